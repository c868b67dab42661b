#!/bin/bash
# The whole way from single pictures with questions to a trained model, in miniature, offline, on two CPU cores.
# Started again, it goes on where it was. Extra flags go to the training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh

OUT=${OUT:-output/miniature}
PICTURES=${PICTURES:-1200} # single pictures, and as many instructions
TESTS=${TESTS:-100}        # test questions of each format
BASE=scripts/miniature/base
root=$PWD CPU_NPROC=2
source scripts/cluster.sh
((gpus > 0)) || export CUDA_VISIBLE_DEVICES= # so that the scripts below need not look again
batch=$((NPROC > 1 ? 16 / NPROC : 8)) # 16 pairs a step on up to 16 processes

echo "== 1/6  sources: single pictures with questions, for training and (other combinations) for the test"
[[ -f $OUT/source/source.json ]] || python -m scripts.miniature.make_source --output "$OUT/source" --num_pictures "$PICTURES"
[[ -f $OUT/test_source/source.json ]] || python -m scripts.miniature.make_source --output "$OUT/test_source" \
  --split test --num_pictures $((5 * TESTS)) --group_size $((5 * TESTS))

echo "== 2/6  instructions and test questions in three formats"
NPROC=1 SOURCE=$OUT/source/source.json IMAGES=$OUT/source/images OUTPUT=$OUT/instructions \
  bash data_gen/gen_instruction/gen_instruction.sh --num_cells_weights 4:1 # the base knows collages of four
[[ -f $OUT/test/run.json ]] || python -m data_gen.gen_instruction.test_set --source "$OUT/test_source/source.json" \
  --image_folder "$OUT/test_source/images" --output "$OUT/test" --num_per_format "$TESTS"

echo "== 3/6  pairs: the base's own wrong answers"
MODEL=$BASE INSTRUCTIONS=$OUT/instructions/instructions.jsonl IMAGES=$OUT/instructions/images \
  OUTPUT=$OUT/pairs BATCH=32 bash data_gen/gen_chosen_rejected/gen_chosen_rejected.sh --max_new_tokens 8 \
  --source "$OUT/source/source.json"

echo "== 4/6  one data set, ready to publish"
python -m data_gen.mix --pairs "$OUT/pairs/pairs.json" --image_folder "$OUT/instructions/images" --output "$OUT/set" --zip \
  --source_images "$OUT/source/images" --validation 0.1 --title "Pairs of the miniature world"
python -m data_gen.mix read --published "$OUT/set"

echo "== 5/6  training"
[[ -f $OUT/trained/adapter_model.safetensors ]] ||
  MODEL=$BASE DATA=$OUT/set/train.json IMAGES=$OUT/set/images.zip OUTPUT=$OUT/trained REPORT_TO=none \
    bash train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh --num_train_epochs 3 --bf16 False --gradient_checkpointing False \
    --lora_r 32 --lora_alpha 64 --learning_rate 5e-4 --per_device_train_batch_size $batch \
    --gradient_accumulation_steps $((NPROC > 1 ? 1 : 2)) --logging_steps 10 --save_steps 60 --dataloader_num_workers 0 "$@"

echo "== 6/6  answers to the test questions, before and after"
for format in sequence collage pip; do
  for model in "before=$BASE" "after=$OUT/trained"; do
    NPROC=1 MODEL=${model#*=} DATA=$OUT/test/${format}_test_images.json IMAGES=$OUT/test/test_images_$format.tar BATCH=32 \
      OUTPUT=$OUT/answers/$format/${model%%=*}.jsonl bash inference/llava_hound_dpo/my_inference_hpc.sh --max_new_tokens 8
  done
  python -m inference.llava_hound_dpo.evaluate --answers "$OUT/answers/$format"/{before,after}.jsonl \
    --questions "$OUT/test/${format}_test_images.json" --output "$OUT/scores/$format"
done
