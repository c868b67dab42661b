# Sourced by the training's launch script: runs torchrun such that SIGUSR1, SIGTERM or Ctrl-C to the script ends the training
# after its current step, with a checkpoint. Then, under Slurm, the job is queued again; else, and after Ctrl-C, the exit code
# is 75: start it again. A second Ctrl-C ends it at once.
#
# The signal goes through a file that the trainer looks for after every step, and not to torchrun: that dies of SIGUSR1, and
# kills its workers 30 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT, in newer versions) after a SIGTERM, whatever they are writing.

STOPPED=75
export STOP_FILE TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

run_stoppable() {
  local code=0 job by_hand=
  STOP_FILE=$(mktemp -u)
  trap 'touch "$STOP_FILE"' USR1 TERM HUP
  # Slurm may signal all processes of a step. A session of its own keeps the terminal's Ctrl-C from torchrun, which would
  # end its workers; of a job in the background bash takes it away, which the second needs.
  (trap '' USR1; trap - TERM HUP INT; exec $(command -v setsid) "$@") &
  job=$!
  trap 'if [[ -n $by_hand ]]; then kill -INT "$job" 2>/dev/null; else
    by_hand=1; touch "$STOP_FILE"; echo "stopping after the current step, with a checkpoint; Ctrl-C again ends at once" >&2; fi' INT
  wait "$job" || code=$?
  while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, not the job
    code=0
    wait "$job" || code=$?
  done
  trap - USR1 TERM HUP INT
  if [[ -s $STOP_FILE ]]; then # the trainer has written into it that it stopped early
    code=$STOPPED
    if [[ -z $by_hand && -n ${SLURM_JOB_ID:-} && ${SLURM_PROCID:-0} == 0 ]]; then
      scontrol requeue "$SLURM_JOB_ID" || echo "scontrol requeue failed: submit the job again" >&2
    fi
  elif ((code != 0)); then
    echo "the training ended with exit code $code; its own message is above, and the same command goes on from the newest checkpoint" >&2
  fi
  rm -f "$STOP_FILE"
  return "$code"
}
