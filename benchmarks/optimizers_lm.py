"""Trains the same small LLaMA with several optimizers and learning rates.

Every run is `train_lm.py` on equal data, steps and seed; the learning rate of
each optimizer is tuned over the values below. Results go to a JSON file after
every run, and at the end to a plot and, as a Markdown table, to the standard
output. Runs that the file holds already are not repeated: remove it when the
data or the options change.

  python -m benchmarks.optimizers_lm --data 'wikipedia_en/*train*' \
    --validation 'wikipedia_en/*validation*' --tokenizer t5

takes about 40 minutes on two CPU cores.
"""

import argparse
import itertools
import json
import math
import pathlib
import subprocess
import sys
import time
from typing import Any

import matplotlib.figure

from gnlorp_jax.training import metrics

LEARNING_RATES = {
  'adamw': (2e-3, 4e-3, 1e-3, 8e-3),
  'galore': (1e-2, 2e-2, 5e-3),
  'gradnormlorp': (1e-2, 2e-2, 5e-3),
}
RESULTS = pathlib.Path('benchmarks/results/optimizers_lm.json')
PLOT = pathlib.Path('docs/optimizers_lm.png')


def run(name: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
  """One training run in a process of its own."""
  folder = args.runs / f'{name}-{rate:g}'
  command = [
    *(sys.executable, 'train_lm.py', '--config', args.config),
    *('--data.source', args.data, '--data.tokenizer', args.tokenizer),
    *('--data.validation-source', args.validation),
    *('--optim.name', name, '--optim.learning-rate', f'{rate:g}'),
    *('--run-dir', str(folder), *args.options),
  ]
  start = time.time()
  subprocess.run(command, check=True)
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  summary = json.loads((folder / 'summary.json').read_text())
  return {
    'optimizer': name,
    'learning_rate': rate,
    'eval': [[r['step'], r['eval/loss']] for r in rows if 'eval/loss' in r],
    'train': [[r['step'], r['train/loss']] for r in rows if 'train/loss' in r],
    'state_bytes': sum(
      summary['memory_bytes'][part]['this run']
      for part in ('moments', 'bases', 'other')
    ),
    'tokens_per_second': summary['median_tokens_per_second'],
    'seconds': round(time.time() - start),
  }


def best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """The run with the lowest last evaluation loss, per optimizer."""
  found: dict[str, dict[str, Any]] = {}
  for row in sorted(rows, key=lambda row: row['eval'][-1][1]):
    found.setdefault(row['optimizer'], row)
  return found


def table(rows: list[dict[str, Any]]) -> str:
  """The runs as a Markdown table; the best of each optimizer in bold."""
  winners = [id(row) for row in best(rows).values()]
  lines = [
    '| optimizer | peak learning rate | eval loss | perplexity | state MiB |',
    '|---|---|---|---|---|',
  ]
  for row in sorted(rows, key=lambda r: (r['optimizer'], r['learning_rate'])):
    loss = row['eval'][-1][1]
    mark = '**' if id(row) in winners else ''
    lines.append(
      f'| {row["optimizer"]} | {row["learning_rate"]:g} '
      f'| {mark}{loss:.4f}{mark} | {math.exp(loss):.1f} '
      f'| {row["state_bytes"] / 2**20:.1f} |'
    )
  return '\n'.join(lines) + '\n'


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Training loss (mean of 5 logged steps) and evaluations of the best runs."""
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout='constrained')
  axes = figure.add_subplot()
  for color, name in zip(('C0', 'C1', 'C3'), LEARNING_RATES, strict=True):
    row = best(rows)[name]
    steps, losses = zip(*row['train'], strict=True)
    smooth = [
      sum(losses[max(i - 4, 0) : i + 1]) / len(losses[max(i - 4, 0) : i + 1])
      for i in range(len(losses))
    ]
    axes.plot(steps, smooth, color=color, lw=1, alpha=0.6)
    label = f'{name}, lr {row["learning_rate"]:g}: {row["eval"][-1][1]:.3f}'
    axes.plot(*zip(*row['eval'], strict=True), 'o-', color=color, label=label)
  axes.set(xlabel='step', ylabel='loss (nats per token)', ylim=(None, 8))
  axes.grid(color='0.9')
  axes.legend(title='evaluation (points), training (thin)', frameon=False)
  figure.savefig(path, dpi=150)


def main() -> None:
  """Runs what is missing, then writes table and plot."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--data', required=True, help='training text, as data.source')
  add('--validation', required=True, help='validation text')
  add('--tokenizer', required=True, help='as data.tokenizer')
  add('--config', default='configs/llama_9m.py', help='configuration file')
  add('--runs', type=pathlib.Path, default=pathlib.Path('runs/optimizers_lm'))
  add('--output', type=pathlib.Path, default=RESULTS)
  add('options', nargs='*', help='more options of train_lm.py, after --')
  args = parser.parse_args()
  rows = json.loads(args.output.read_text()) if args.output.exists() else []
  done = {(row['optimizer'], row['learning_rate']) for row in rows}
  # The likeliest value of each optimizer first: a partial result is of use.
  for rates in itertools.zip_longest(*LEARNING_RATES.values()):
    for name, rate in zip(LEARNING_RATES, rates, strict=True):
      if rate is None or (name, rate) in done:
        continue
      rows.append(run(name, rate, args))
      args.output.parent.mkdir(parents=True, exist_ok=True)
      args.output.write_text(json.dumps(rows, indent=1) + '\n')
  plot(rows, PLOT)
  sys.stdout.write(table(rows))


if __name__ == '__main__':
  main()
