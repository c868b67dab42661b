#!/bin/bash
# The whole method in miniature, offline, on two CPU cores: makes data, trains and answers with the real launch scripts.
# Extra flags go to the training, e.g.  bash scripts/demo.sh --dpo_alpha 0 --gamma 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
start=$SECONDS

OUT=${OUT:-output/demo}
BASE=scripts/miniature/base
rm -rf "$OUT"

echo "== 1/4  data: multi-image preference pairs of the miniature world"
python -m scripts.miniature.make_data --output "$OUT/data" --num_train 1920 --num_test 1200 --seed 0

echo "== 2/4  training: train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh, DeepSpeed ZeRO-2 on 2 CPU processes"
NPROC=${NPROC:-2} MODEL=$BASE DATA=$OUT/data/train.json IMAGES=$OUT/data/images OUTPUT=$OUT/trained REPORT_TO=none \
  bash train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh --num_train_epochs 3 --bf16 False --gradient_checkpointing False \
  --lora_r 32 --lora_alpha 64 --learning_rate 5e-4 --gradient_accumulation_steps 1 --per_device_train_batch_size 16 \
  --logging_steps 10 --save_steps 60 --dataloader_num_workers 0 "$@"

echo "== 3/4  answers to held-out questions, before and after: inference/llava_hound_dpo/my_inference_hpc.sh"
asked=(--max_new_tokens 8 --attention_maps 24)
export NPROC=1 DATA=$OUT/data/test.json IMAGES=$OUT/data/images BATCH=32
for model in "base=$BASE" "trained=$OUT/trained"; do
  MODEL=${model#*=} OUTPUT=$OUT/answers/${model%%=*}.jsonl \
    bash inference/llava_hound_dpo/my_inference_hpc.sh "${asked[@]}"
done

echo "== 4/4  the same with AdaptViz: inference_optimization/llava_hound_dpo/my_inference_adaptive.sh"
for model in "base=$BASE" "trained=$OUT/trained"; do
  MODEL=${model#*=} OUTPUT=$OUT/answers/${model%%=*}_adaptviz.jsonl \
    bash inference_optimization/llava_hound_dpo/my_inference_adaptive.sh "${asked[@]}"
done
answers=("$OUT"/answers/{base,trained,base_adaptviz,trained_adaptviz}.jsonl)
python -m inference.llava_hound_dpo.evaluate --answers "${answers[@]}" --questions "$OUT/data/test.json" \
  --image_folder "$OUT/data/images" --output "$OUT/scores" >"$OUT/evaluate.log"
python -m scripts.miniature.compare --answers "${answers[@]}" --output "$OUT/scores"
echo
sed -n '/^| second - first/,$p' "$OUT/scores/scores.md"

cat <<EOT

adapter (loads with plain peft and transformers)  $OUT/trained/adapter_model.safetensors
what was run, with versions and counts            $OUT/trained/run.json
losses and attention ratio by step                $OUT/trained/trainer_state.json
data                                              $OUT/data/train.json, test.json, images/
answers with attention ratio and confidence       $OUT/answers/trained.jsonl
scores with intervals, by image and position      $OUT/scores/scores.md, scores.json, scores.png
the same as a page, with sample prompts           $OUT/scores/report.html
demo finished in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s after installation
EOT
