#!/usr/bin/env bash
# Measures the layer-wise step on one GPU: peak memory against what the compiled
# program claims, for 130M, 1B and 7B; then 7B on text within 24 and 16 GB.
#
#   benchmarks/gpu_layerwise.sh [TEXT [OPTIONS]]
#
# TEXT is what --data.source of train_lm.py accepts, by default the standard
# library's sources. Writes benchmarks/results/gpu_layerwise.json, part by part;
# a part that fails leaves its error. OPTIONS are those of
# benchmarks/train/gpu_layerwise.py, such as --part run_7b_24gb or --tiny.
set -euo pipefail
text=stdlib
if [[ $# -gt 0 && $1 != -* ]]; then
  text=$1
  shift
fi
[ -e "$text" ] && text=$(realpath "$text")
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_layerwise --text "$text" "$@"
