"""Pre-trains for a given number of minutes and records how it went.

A short run measures the time of a step; a second one takes as many steps as fit
into the time, with the learning-rate schedule fitted to them. The record holds
tokens per second, model FLOP utilisation and peak device memory (both on GPUs),
and the loss curve.

  python -m benchmarks.timed_run --minutes 8 --name llama_60m -- \
    --config configs/llama_60m.py --data.source 'wikipedia_en/*train*' \
    --data.validation-source 'wikipedia_en/*validation*' \
    --data.tokenizer t5 --eval-batches 20 --eval-every 250

All options after -- are those of train_lm.py.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from gnlorp_jax import config
from gnlorp_jax.compose import parameters
from gnlorp_jax.recipes.pretrain import data
from gnlorp_jax.training import metrics

MEASURED_STEPS = 30
RUNS = pathlib.Path('runs/timed_run')


def train(folder: pathlib.Path, steps: int, options: list[str]) -> float:
  """One run of train_lm.py; returns its seconds, start-up included."""
  shutil.rmtree(folder, ignore_errors=True)
  log_every = max(steps // 100, 1)
  command = [
    *(sys.executable, 'train_lm.py', *options, '--run-dir', str(folder)),
    *('--steps', str(steps), '--log-every', str(log_every)),
    *('--checkpoint-every', str(steps)),
  ]
  start = time.time()
  subprocess.run(command, check=True)
  return time.time() - start


def seconds_per_step(folder: pathlib.Path, tokens_per_second: float) -> float:
  """Time of one step, from its tokens and the measured speed."""
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  first = next(row for row in rows if 'train/tokens' in row)
  return first['train/tokens'] / first['step'] / tokens_per_second


def record(name: str, folder: pathlib.Path, seconds: float) -> dict[str, Any]:
  """The summary of a run with its loss curves."""
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  summary = json.loads((folder / 'summary.json').read_text())
  return {
    'name': name,
    'seconds': round(seconds),
    **summary,
    'train': [[r['step'], r['train/loss']] for r in rows if 'train/loss' in r],
    'eval': [[r['step'], r['eval/loss']] for r in rows if 'eval/loss' in r],
  }


def main() -> None:
  """Measures, trains, and writes the record and the plot."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--minutes', type=float, default=8, help='time for both runs together')
  add('--name', required=True, help='name of the record')
  add('--output', type=pathlib.Path, default=pathlib.Path('benchmarks/results'))
  add('options', nargs='*', help='options of train_lm.py, after --')
  args = parser.parse_args()
  probe, folder = RUNS / f'{args.name}-probe', RUNS / args.name
  # Tokenising is done once and for all, and not part of the time.
  settings = config.parse(args.options, '')
  model = parameters.architecture(settings.init_from, settings.model)
  data.load(settings, model)
  used = train(probe, MEASURED_STEPS, args.options)
  summary = json.loads((probe / 'summary.json').read_text())
  step = seconds_per_step(probe, summary['median_tokens_per_second'])
  # What the probe took beyond its steps (start, compilation, evaluations,
  # export), the second run takes again; a tenth is kept in reserve.
  overhead = max(used - MEASURED_STEPS * step, 0)
  left = 0.9 * (args.minutes * 60 - used) - overhead
  steps = max(int(left / step), MEASURED_STEPS)
  sys.stdout.write(f'{step:.3f} s per step: {steps} steps.\n')
  seconds = used + train(folder, steps, args.options)
  args.output.mkdir(parents=True, exist_ok=True)
  result = record(args.name, folder, seconds)
  path = args.output / f'{args.name}.json'
  path.write_text(json.dumps(result, indent=1) + '\n')
  shutil.copy(folder / 'loss.png', args.output / f'{args.name}.png')
  sys.stdout.write(f'Wrote {path}.\n')


if __name__ == '__main__':
  main()
