# Sourced by the launch scripts, which have set $root: which python, how many processes, on how many nodes.
# Sets NPROC (processes per node: the GPUs that torch can use, else CPU_NPROC, else 1), and the arrays LAUNCH (the torchrun
# command) and ANSWER (the same for stages that only answer, but plain python for one process: torchrun would bury a
# one-line error). On several nodes MASTER_ADDR (default: the job's first node), MASTER_PORT (from the job's id) and
# NODE_TIMEOUT, how many seconds nodes wait for each other. Ends the job where torch cannot use the GPUs that are here.

if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
  if [[ ! -x ${root:-.}/.venv/bin/python ]]; then
    echo "python has no torch: activate the environment it is installed in, or make .venv with bash scripts/setup.sh" >&2
    exit 2
  fi
  echo "python has no torch: taking the repository's .venv" >&2
  PATH=$(cd "${root:-.}" && pwd)/.venv/bin:$PATH
fi

gpus=0
if [[ ! ${CUDA_VISIBLE_DEVICES-all} =~ ^(-1|NoDevFiles)?$ ]]; then # those hide all of them
  found=$(python -m llava.machine) || exit 2
  read -r gpus allocator <<<"$found"
fi
if ((gpus > 0)); then
  # Rows of ever new lengths leave holes that no later row fits into.
  [[ -n ${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export "$allocator=expandable_segments:True"
else
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export NPROC=${NPROC:-$((gpus > 0 ? gpus : ${CPU_NPROC:-1}))}
cores=$((${SLURM_CPUS_PER_TASK:-$(nproc)} / NPROC))
[[ "${ZERO:-} $*" == *offload* && $cores -gt 1 ]] || cores=1 # the optimiser of offloaded weights works on the CPU
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}

LAUNCH=(torchrun --nproc_per_node="$NPROC")
if ((${SLURM_NNODES:-1} > 1)); then
  if [[ -z ${SLURM_PROCID:-} || ${SLURM_NTASKS:-1} -lt $SLURM_NNODES ]]; then
    echo "a job of $SLURM_NNODES nodes needs one launcher per node: srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash $0" >&2
    exit 2
  fi
  # The first name of a list as "node[01-03,07],x1": of every bracket its first number, then up to the first comma.
  MASTER_ADDR=${MASTER_ADDR:-$(sed -E 's/\[([^],-]+)[^]]*\]/\1/g; s/,.*//' <<<"$SLURM_JOB_NODELIST")}
  # A port of its own for every job and step, below those that the system hands out.
  MASTER_PORT=${MASTER_PORT:-$((10000 + 2 * ((${SLURM_JOB_ID:-0} + 97 * ${SLURM_STEP_ID:-0}) % 10000)))}
  LAUNCH+=(--nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR"
    --master_port="$MASTER_PORT" --rdzv_conf="timeout=${NODE_TIMEOUT:-900}")
else
  LAUNCH+=(--standalone)
fi
ANSWER=("${LAUNCH[@]}")
if ((NPROC == 1 && ${SLURM_NNODES:-1} == 1)); then ANSWER=(python); fi
