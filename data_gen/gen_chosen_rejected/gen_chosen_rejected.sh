#!/bin/bash
#SBATCH --job-name=aa-pairs
#SBATCH --gres=gpu:a100:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64GB
#SBATCH --time=24:00:00
#SBATCH --requeue
# Account and partition: export SBATCH_ACCOUNT and SBATCH_PARTITION. Without Slurm: bash this file. --help lists all flags.
set -euo pipefail

# ---- what to ask: edit here, override from the environment, or pass flags (the last one wins) -------
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf} # the model whose mistakes become rejected answers
INSTRUCTIONS=${INSTRUCTIONS:-output/instructions/instructions.jsonl}
IMAGES=${IMAGES:-output/instructions/images} # a folder, a .zip or a .tar
OUTPUT=${OUTPUT:-output/pairs}
BATCH=${BATCH:-8}

# ---- the repository: sbatch runs a copy of this file from a spool folder; paths are the caller's ----
for start in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
  root=$(cd "$start" 2>/dev/null && pwd) || continue
  while [[ $root != / && ! -f $root/scripts/cluster.sh ]]; do root=$(dirname "$root"); done
  [[ -f $root/scripts/cluster.sh ]] && break
done
[[ -f $root/scripts/cluster.sh ]] || { echo "repository not found: submit from inside it" >&2; exit 2; }
source "$root/scripts/paths.sh" && source "$root/scripts/cluster.sh"

exec "${ANSWER[@]}" -m data_gen.gen_chosen_rejected --model_name_or_path "$MODEL" --instructions "$INSTRUCTIONS" \
  --image_folder "$IMAGES" --output "$OUTPUT" --batch_size "$BATCH" "$@" # killed or requeued, it goes on where it was
