#!/usr/bin/env bash
# The most valuable measurements on one GPU, within nine minutes, best first:
#
#   benchmarks/gpu_suite.sh
#
#   1. train      whole training steps beside PyTorch's, 60m to 1b
#   2. layerwise  LLaMA-7B layer by layer: the device's peak memory against what
#                 the compiled step claims
#   3. step       the optimizer step beside its peers'
#   4. refresh    what refreshing a basis costs
#
# It needs an H100 or a card like it, no network, and nothing but the source tree
# and the packages that are there: jax with CUDA, optax and flax; torch and the
# packages it is compared with as far as they are installed. Each script writes
# its file row by row, is stopped when its share of the time is over, and does
# not keep the next from running if it fails. Time that one leaves goes to the
# others. The list at the end says what was written, and what failed and why.
#
# In the environment:
#   SUITE_MINUTES  time for everything                                 (9)
#   RESULTS        folder for gpu_*.json, plots and logs (benchmarks/results)
#   PYTHON         the interpreter                                     (python3)
#   DEVICE=cpu TINY=1   small sizes, to try it without a GPU; the files are then
#                  called cpu_tiny_*.json                              (gpu, off)
set -uo pipefail

device=${DEVICE:-gpu}
tiny=${TINY:-}
minutes=${SUITE_MINUTES:-9}
if [[ $device != gpu && $device != cpu ]]; then
  echo "DEVICE is '$device'; use gpu, or cpu with TINY=1." >&2
  exit 2
fi
if [[ $device == cpu && -z $tiny ]]; then
  echo 'DEVICE=cpu would take hours at full size; add TINY=1.' >&2
  exit 2
fi
if [[ ! $minutes =~ ^[1-9][0-9]*$ ]]; then
  echo "SUITE_MINUTES is '$minutes'; use a whole number, at least 1." >&2
  exit 2
fi
if [[ $# -gt 0 ]]; then
  echo "No argument is known, got '$1'. Settings come from the environment:" >&2
  echo 'see the top of this file.' >&2
  exit 2
fi

mkdir -p "${RESULTS:-$(dirname "$0")/results}"
results=$(realpath "${RESULTS:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
prefix=$device${tiny:+_tiny}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
# PyTorch lives in the same processes: JAX takes only what it needs.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
[[ $device == cpu ]] && export JAX_PLATFORMS=cpu

# Name, share of the time, and options at full size and tiny. Every method of
# `train` has to compile before the first turn: only those that matter most.
names=(train layerwise step refresh)
shares=(44 22 23 11)
declare -A module=(
  [train]=train.measure [layerwise]=train.gpu_layerwise [step]=step.measure
  [refresh]=refresh.measure
)
methods='--methods gradnormlorp galore-torch adamw torch-adamw galore'
declare -A full=(
  [train]="--sizes 60m 130m 350m 1b --dtype bfloat16 --loss-chunk 4096 $methods"
  [layerwise]='--part memory_7b_24gb'
  [step]='--shapes 60m 350m 1b 4096x4096 --ranks 512 --dtypes bfloat16 float32'
  [refresh]='time'
)
declare -A small=(
  [train]="--sizes 9m --batch-size 2 --seq-len 64 --gap 4 $methods"
  [layerwise]='--part memory_130m --tiny'
  [step]='--shapes 64x96 --ranks 8 --dtypes float32 --methods floor gradnormlorp'
  [refresh]='time'
)
report=()

# What the figures will depend on.
"$python" --version || exit 1
"$python" - <<'PYTHON'
import importlib.metadata

names = ['jax', 'jaxlib', 'jax-cuda12-plugin', 'jax-cuda13-plugin', 'optax']
names += ['flax', 'torch', 'transformers', 'galore-torch', 'apollo-torch']
names += ['bitsandbytes', 'peft']
for name in names:
  try:
    print(f'{name} {importlib.metadata.version(name)}')
  except importlib.metadata.PackageNotFoundError:
    print(f'{name}: not installed')
PYTHON
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader \
  2>/dev/null || echo 'no GPU: nvidia-smi finds none'
git rev-parse --short=12 HEAD 2>/dev/null || echo 'no git: no commit is recorded'

# Runs script number $1 with what the later ones leave it of the time.
run() {
  local name=${names[$1]} total=0 left seconds options log status reason
  local output=$results/${prefix}_$name.json
  local file=benchmarks/${module[$name]//.//}.py
  local -i i
  for ((i = $1; i < ${#names[@]}; i++)); do ((total += shares[i])); done
  left=$((60 * minutes - SECONDS))
  seconds=$((left * shares[$1] / total))
  if [[ ! -f $file ]]; then
    report+=("$name: skipped, there is no $file")
    return
  fi
  if ((seconds < 5)); then
    report+=("$name: skipped, no time is left")
    return
  fi
  options=${full[$name]}
  [[ -n $tiny ]] && options=${small[$name]}
  # It has no clock of its own; the others finish what they began at the end.
  if [[ $name != layerwise ]]; then
    options+=" --device $device --minutes $(awk "BEGIN { print $seconds / 75 }")"
  fi
  # A plot of another device must not replace those of the documents.
  if grep -q '^PLOT = ' "$file"; then
    options+=" --plot $results/${prefix}_$name.png"
  fi
  log=$results/${prefix}_$name.log
  echo
  echo "== $name, $seconds s: python -m benchmarks.${module[$name]} $options"
  # shellcheck disable=SC2086  # The options are words.
  timeout --kill-after=5 "$seconds" "$python" -m "benchmarks.${module[$name]}" \
    $options --output "$output" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  reason=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-200)
  case $status in
    0) reason='' ;;
    124 | 137) reason="not done after $seconds s" ;;
    *) reason="failed with status $status: $reason" ;;
  esac
  if [[ -f $output && $output -nt $start ]]; then
    report+=("$name: ${output##*/}${reason:+, $reason; what was done is in it}")
  else
    report+=("$name: nothing written, ${reason:-and no error}")
  fi
}

start=$(mktemp)
trap 'rm -f "$start"' EXIT
touch -d '1 second ago' "$start"
for number in "${!names[@]}"; do run "$number"; done

echo
echo "== $SECONDS s, in $results:"
printf '%s\n' "${report[@]}"
