# Sourced by the launch scripts, from the repository root: how many processes, on how many nodes.
# Sets NPROC (processes per node), and the arrays LAUNCH (the torchrun command, on several nodes by scripts/launch.py) and
# ANSWER (the same for stages that only answer, but plain python for one process: torchrun would bury a one-line error).
# On several nodes: MASTER_PORT (from the job's id), and NODE_TIMEOUT, how many seconds nodes wait for each other at first.

if [[ -z ${NPROC:-} ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    NPROC=$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES")
  else
    NPROC=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
  fi
  ((NPROC > 0)) || NPROC=1 # no GPU: one process on the CPU
fi
[[ -e /dev/nvidia0 ]] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
export NPROC OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

LAUNCH=(torchrun --nproc_per_node="$NPROC")
if ((${SLURM_NNODES:-1} > 1)); then
  if [[ -z ${SLURM_PROCID:-} || ${SLURM_NTASKS:-1} -lt $SLURM_NNODES ]]; then
    echo "a job of $SLURM_NNODES nodes needs one launcher per node: srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash $0" >&2
    exit 2
  fi
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  # A port of its own for every job and step, and the next one for the launchers; below those that the system hands out.
  port=${MASTER_PORT:-$((10000 + 2 * ((${SLURM_JOB_ID:-0} + 97 * ${SLURM_STEP_ID:-0}) % 10000)))}
  LAUNCH=(python -m scripts.launch --nproc_per_node="$NPROC" --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID"
    --master_addr="$first" --master_port="$port" --rdzv_conf="timeout=${NODE_TIMEOUT:-900}")
else
  LAUNCH+=(--standalone)
fi
ANSWER=("${LAUNCH[@]}")
if ((NPROC == 1 && ${SLURM_NNODES:-1} == 1)); then ANSWER=(python); fi
