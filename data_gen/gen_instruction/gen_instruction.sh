#!/bin/bash
#SBATCH --job-name=aa-instructions
#SBATCH --cpus-per-task=16
#SBATCH --mem=32GB
#SBATCH --time=12:00:00
#SBATCH --requeue
# Account and partition: export SBATCH_ACCOUNT and SBATCH_PARTITION. Without Slurm: bash this file. --help lists all flags.
set -euo pipefail

# ---- what to make: edit here, override from the environment, or pass flags (the last one wins) ------
FORMAT=${FORMAT:-mix} # sequence, collage, pip, or mix
SOURCE=${SOURCE:-data/llava_v1_5_mix665k.json} # LLaVA-style JSON or JSONL, .parquet, save_to_disk folder, .csv
IMAGES=${IMAGES:-data/images} # a folder, a .zip or a .tar; empty if the source embeds its pictures
OUTPUT=${OUTPUT:-output/instructions}
LEVEL=${LEVEL:-named} # of what is asked: named, compare, search, or mix
SEED=${SEED:-0}

# ---- the repository: sbatch runs a copy of this file from a spool folder; paths are the caller's ----
for start in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
  root=$(cd "$start" 2>/dev/null && pwd) || continue
  while [[ $root != / && ! -f $root/scripts/cluster.sh ]]; do root=$(dirname "$root"); done
  [[ -f $root/scripts/cluster.sh ]] && break
done
[[ -f $root/scripts/cluster.sh ]] || { echo "repository not found: submit from inside it" >&2; exit 2; }
source "$root/scripts/paths.sh"

exec python -m data_gen.gen_instruction --format "$FORMAT" --source "$SOURCE" --image_folder "$IMAGES" \
  --output "$OUTPUT" --level "$LEVEL" --seed "$SEED" "$@" # killed or requeued, it goes on where it was
