# Sourced by demo.sh and test.sh, from the repository root: a virtual environment in .venv with all requirements.
# Installs again only when a requirements file has changed. PYTHON chooses the interpreter.

wanted=$(cat requirements-dev.txt requirements.txt | cksum)
if [[ ! -x .venv/bin/python || "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]]; then
  echo "installing into .venv (some minutes on the first run) ..."
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 2; }
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt 2> >(grep -v '^WARNING: Location' >&2)
  echo "$wanted" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
