#!/bin/bash
#SBATCH --job-name=aa-inference
#SBATCH --gres=gpu:a100:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64GB
#SBATCH --time=12:00:00
#SBATCH --requeue
# Account and partition: export SBATCH_ACCOUNT and SBATCH_PARTITION. Without Slurm: bash this file. --help lists all flags.
set -euo pipefail

# ---- what to answer: edit here, override from the environment, or pass flags (the last one wins) ----
MODEL=${MODEL:-output/aa-dpo} # a checkpoint or an adapter; --only_base_model answers with the base below an adapter
DATA=${DATA:-data/sequence_test_images.json}
IMAGES=${IMAGES:-data/test_images_sequence.tar} # a folder, a .zip or a .tar
OUTPUT=${OUTPUT:-output/answers/answers.jsonl}
BATCH=${BATCH:-8}

# ---- the repository: sbatch runs a copy of this file from a spool folder; paths are the caller's ----
for start in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
  root=$(cd "$start" 2>/dev/null && pwd) || continue
  while [[ $root != / && ! -f $root/scripts/cluster.sh ]]; do root=$(dirname "$root"); done
  [[ -f $root/scripts/cluster.sh ]] && break
done
[[ -f $root/scripts/cluster.sh ]] || { echo "repository not found: submit from inside it" >&2; exit 2; }
source "$root/scripts/paths.sh" && source "$root/scripts/cluster.sh"

exec "${ANSWER[@]}" -m inference.llava_hound_dpo.run_inference --model_name_or_path "$MODEL" --data_path "$DATA" \
  --image_folder "$IMAGES" --output "$OUTPUT" --batch_size "$BATCH" "$@"
