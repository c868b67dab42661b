#!/bin/bash
# Runs the tests in .venv, which it makes if need be, on all cores up to four. Arguments go to pytest:
#   bash scripts/test.sh -k attention      bash scripts/test.sh -n 0 -x      (-n 0: one process, no others)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
ruff check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # a core each: processes share no more than the cores
exec python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
