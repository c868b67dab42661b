#!/bin/bash
# The whole method in miniature, offline, on two CPU cores: makes data, trains and answers with the real launch scripts.
# Extra flags go to the training, e.g.  bash scripts/demo.sh --dpo_alpha 0 --gamma 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
start=$SECONDS

OUT=${OUT:-output/demo}
BASE=${BASE:-scripts/miniature/base} # or another that scripts.miniature.train_base made
root=$PWD CPU_NPROC=2
source scripts/cluster.sh
((gpus > 0)) || export CUDA_VISIBLE_DEVICES= # so that the scripts below need not look again
batch=$((NPROC > 1 ? 32 / NPROC : 16)) # 32 pairs a step on up to 32 processes
rm -rf "$OUT"

echo "== 1/4  data: multi-image preference pairs of the miniature world"
python -m scripts.miniature.make_data --output "$OUT/data" --num_train 1920 --num_test 1200 --seed 0

echo "== 2/4  training: train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh, DeepSpeed ZeRO-2 on $NPROC processes"
MODEL=$BASE DATA=$OUT/data/train.json IMAGES=$OUT/data/images OUTPUT=$OUT/trained REPORT_TO=none \
  bash train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh --num_train_epochs 3 --bf16 False --gradient_checkpointing False \
  --lora_r 32 --lora_alpha 64 --learning_rate 5e-4 --per_device_train_batch_size $batch \
  --gradient_accumulation_steps $((NPROC > 1 ? 1 : 2)) --logging_steps 10 --save_steps 60 --dataloader_num_workers 0 "$@"

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
python - "$OUT/scores/scores.json" <<'PY'
import json, pathlib, sys

scores = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
models, formats = scores["answers"], ("sequence", "collage", "pip", "single")
for title, key, scale, form, shown in (("accuracy %", "accuracy", 100, ">18.1f", formats),
                                       ("attention ratio", "attention_ratio", 1, ">18.3f", formats[:3])):
    print(f"\n{title:<24}{'prompts':>8}" + "".join(f"{name:>18}" for name in models))
    for name in shown:
        groups = [model["by_format"][name] for model in models.values()]
        print(f"  {name:<22}{groups[0]['questions']:>8}" + "".join(format(scale * g[key], form) for g in groups))
print("\naccuracy, points [95 % interval], paired by question")
for c in scores["comparisons"]:
    print(f"  {c['second'] + ' - ' + c['first']:<36}{100 * c['difference']:>+7.1f} [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]")
PY

cat <<EOT

adapter (loads with plain peft and transformers)  $OUT/trained/adapter_model.safetensors
what was run, with versions and counts            $OUT/trained/run.json
losses and attention ratio by step                $OUT/trained/trainer_state.json
data                                              $OUT/data/train.json, test.json, images/
answers with attention ratio and confidence       $OUT/answers/trained.jsonl
scores with intervals, by image and position      $OUT/scores/scores.md, scores.json
the same as a page, with sample prompts           $OUT/scores/report.html
demo finished in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s after installation
EOT
