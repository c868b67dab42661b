#!/bin/bash
#SBATCH --job-name=aa-study
#SBATCH --gres=gpu:a100:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64GB
#SBATCH --time=12:00:00
# One command of a study that has no launch script of its own, as a job: bash scripts/study/job.sh python -m MODULE ...
# A command that begins with torchrun runs on all GPUs: torchrun -m MODULE ...
set -euo pipefail
for start in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
  root=$(cd "$start" 2>/dev/null && pwd) || continue
  while [[ $root != / && ! -f $root/scripts/cluster.sh ]]; do root=$(dirname "$root"); done
  [[ -f $root/scripts/cluster.sh ]] && cd "$root" && break
done
[[ -f scripts/cluster.sh ]] || { echo "repository not found: submit from inside it" >&2; exit 2; }
source scripts/cluster.sh
[[ $1 != torchrun ]] || set -- "${ANSWER[@]}" "${@:2}"
exec "$@"
