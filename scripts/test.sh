#!/bin/bash
# Runs the tests in .venv, which it makes if need be. Arguments go to pytest:  bash scripts/test.sh -k attention
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
ruff check .
exec python -m pytest "$@"
