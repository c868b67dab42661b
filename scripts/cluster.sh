# Sourced by the launch scripts, which have set $root: which python, how many processes, on how many nodes.
# Sets NPROC (processes per node), and the arrays LAUNCH (the torchrun command) and ANSWER (the same for stages that only
# answer, but plain python for one process: torchrun would bury a one-line error). On several nodes MASTER_ADDR (default:
# the job's first node), MASTER_PORT (from the job's id) and NODE_TIMEOUT, how many seconds nodes wait for each other.

if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
  if [[ ! -x ${root:-.}/.venv/bin/python ]]; then
    echo "python has no torch: activate the environment it is installed in, or make .venv with bash scripts/setup.sh" >&2
    exit 2
  fi
  echo "python has no torch: taking the repository's .venv" >&2
  PATH=$(cd "${root:-.}" && pwd)/.venv/bin:$PATH
fi

if [[ -z ${NPROC:-} ]]; then
  case ${CUDA_VISIBLE_DEVICES-all} in
    all) NPROC=$(python -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || NPROC=0 ;; # MIG parts, too
    '' | -1) NPROC=0 ;; # all are hidden
    *) NPROC=$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES") ;;
  esac
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
