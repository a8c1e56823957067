#!/usr/bin/env bash
# Pre-trains LLaMA-60m in bfloat16 for about eight minutes on one GPU.
#
#   benchmarks/gpu_60m.sh TEXT_FOLDER TOKENIZER
#
# TEXT_FOLDER holds *train*.json.gz and *validation*.json.gz in the C4 layout.
# Writes benchmarks/results/gpu_llama_60m.json (tokens/s, model FLOP
# utilisation, peak memory, loss curve) and .png.
set -euo pipefail
text=$(realpath "${1:?folder with *train*.json.gz and *validation*.json.gz}")
tokenizer=$(realpath "${2:?tokenizer.json or a folder with one}")
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.timed_run --minutes 8 \
  --name gpu_llama_60m -- \
  --config configs/llama_60m.py \
  --data.source "$text/*train*.json.gz" \
  --data.validation-source "$text/*validation*.json.gz" \
  --data.tokenizer "$tokenizer" --data.mode packed \
  --optim.clip-global-norm 1.0 --eval-every 250 --eval-batches 5
