r"""Pre-trains for a given number of minutes and records how it went.

A short run measures the time of a step; a second one takes as many steps as fit
into the time. The record holds tokens per second, model FLOP utilisation and
peak device memory (both on GPUs), and the loss curve.

  python -m benchmarks.timed_run --minutes 8 --name llama_60m -- \
    --config configs/llama_60m.py --data.source 'wikipedia_en/*train*' \
    --data.validation-source 'wikipedia_en/*validation*' \
    --data.tokenizer t5/ --eval-batches 20 --eval-every 250

All options after -- are those of train_lm.py.
"""

import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import harness, record
from gnlorp_jax import config
from gnlorp_jax.compose import parameters
from gnlorp_jax.recipes.pretrain import data
from gnlorp_jax.training import metrics

MEASURED_STEPS = 30
RESULTS = pathlib.Path('benchmarks/results')
RUNS = pathlib.Path('runs/timed_run')


def _train(folder: pathlib.Path, steps: int, options: list[str]) -> float:
  """One run of train_lm.py; returns its seconds, start-up included."""
  shutil.rmtree(folder, ignore_errors=True)
  command = [
    *(sys.executable, 'train_lm.py', *options, '--run-dir', str(folder)),
    *('--log-every', str(max(steps // record.POINTS, 1))),
    *('--steps', str(steps), '--checkpoint-every', str(steps)),
  ]
  start = time.time()
  subprocess.run(command, check=True)
  return time.time() - start


def _outcome(folder: pathlib.Path) -> dict[str, Any]:
  """The summary of a run with its loss curves, and the tokens of a step."""
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  curves = {
    part: [[r['step'], r[f'{part}/loss']] for r in rows if f'{part}/loss' in r]
    for part in ('train', 'eval')
  }
  first = next(row for row in rows if 'train/tokens' in row)
  tokens = first['train/tokens'] / first['step']
  summary = record.read(folder / 'summary.json')
  return {**summary, **curves, 'tokens_per_step': tokens}


def main() -> None:
  """Measures, trains, and writes the record and the plot."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--minutes', type=float, default=8, help='time for both runs together')
  add('--name', required=True, help='name of the record')
  add('options', nargs='*', help='options of train_lm.py, after --')
  args = parser.parse_args()
  probe, folder = RUNS / f'{args.name}-probe', RUNS / args.name
  # Tokenising is done once and for all, and not part of the time.
  settings = config.parse(args.options, '')
  model = parameters.architecture(settings.init_from, settings.model)
  data.load(settings, model)
  used = _train(probe, MEASURED_STEPS, args.options)
  known = _outcome(probe)
  step = known['tokens_per_step'] / known['median_tokens_per_second']
  # What the probe took beyond its steps (start, compilation, evaluations,
  # export), the second run takes again; a tenth is kept in reserve.
  overhead = max(used - MEASURED_STEPS * step, 0)
  left = 0.9 * (args.minutes * 60 - used) - overhead
  steps = max(int(left / step), MEASURED_STEPS)
  harness.progress(f'{step:.3f} s per step: {steps} steps.')
  seconds = used + _train(folder, steps, args.options)
  path = RESULTS / f'{args.name}.json'
  found = {'name': args.name, 'seconds': round(seconds), **_outcome(folder)}
  record.write(path, found)
  shutil.copy(folder / 'loss.png', path.with_suffix('.png'))
  harness.progress(f'Wrote {path}.')


if __name__ == '__main__':
  main()
