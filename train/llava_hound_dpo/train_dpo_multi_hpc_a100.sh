#!/bin/bash
#SBATCH --job-name=aa-dpo
#SBATCH --gres=gpu:a100:2
#SBATCH --cpus-per-task=16
#SBATCH --mem=64GB
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Account and partition: export SBATCH_ACCOUNT and SBATCH_PARTITION. Without Slurm: bash this file. --help lists all flags.
set -euo pipefail

# ---- the experiment: edit here, override from the environment, or pass flags (the last one wins) ----
dpo_alpha=${dpo_alpha:-1.0} # weight of attention-aware DPO: 1.0 with gamma 0.0 is DPO + attention
gamma=${gamma:-0.0}         # weight of attention-aware SFT: 1.0 with dpo_alpha 0.0 is SFT + attention
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf}
ZERO=${ZERO:-2} # stage of DeepSpeed: 2, 3, or 3_offload, with all of 7B on the host: ask Slurm for 192GB there, as the plan says
DATA=${DATA:-data/train.json} IMAGES=${IMAGES:-data/images.zip} # a folder, a .zip or a .tar
OUTPUT=${OUTPUT:-output/aa-dpo}
REPORT_TO=${REPORT_TO:-wandb} # logs offline without a login; "none" for no tracking
export WANDB_PROJECT=${WANDB_PROJECT:-aa-dpo} WANDB_NAME=${WANDB_NAME:-$(basename "$OUTPUT")} # and WANDB_ENTITY

# ---- the repository: sbatch runs a copy of this file from a spool folder; paths are the caller's ----
for start in "$(dirname "${BASH_SOURCE[0]}")" "${SLURM_SUBMIT_DIR:-}" "$PWD"; do
  root=$(cd "$start" 2>/dev/null && pwd) || continue
  while [[ $root != / && ! -f $root/scripts/cluster.sh ]]; do root=$(dirname "$root"); done
  [[ -f $root/scripts/cluster.sh ]] && break
done
[[ -f $root/scripts/cluster.sh ]] || { echo "repository not found: submit from inside it" >&2; exit 2; }
source "$root/scripts/paths.sh" && source "$root/scripts/cluster.sh" && source "$root/scripts/stoppable.sh"

flags=(--model_name_or_path "$MODEL" --data_path "$DATA" --image_folder "$IMAGES" --output_dir "$OUTPUT"
  --dpo_alpha "$dpo_alpha" --gamma "$gamma" --beta 0.1 --lora_enable True --lora_r 128 --lora_alpha 256
  --learning_rate 5e-5 --lr_scheduler_type linear --warmup_steps 0.1 --weight_decay 0 --num_train_epochs 3
  --per_device_train_batch_size 1 --gradient_accumulation_steps 32 --bf16 True --gradient_checkpointing auto
  --deepspeed "$root/scripts/zero$ZERO.json" --model_max_length 4096 --save_steps 50 --save_total_limit 3
  --dataloader_num_workers 4 --report_to "$REPORT_TO")

python -m train.llava_hound_dpo.run_dpo "${flags[@]}" "$@" --dry_run True # a bad flag or record ends the job here
[[ " $* " =~ \ (--help|-h|--dry_run(=|\ +)?(True|true|1)?)\  ]] && exit
run_stoppable "${LAUNCH[@]}" -m train.llava_hound_dpo.run_dpo "${flags[@]}" --check_images exists "$@"
