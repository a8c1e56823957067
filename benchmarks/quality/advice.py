"""The rows that the package advises by, as the file that it ships.

  python -m benchmarks.report quality.advice

takes those of `benchmarks.quality.frontier` once they are recorded, else those
of `benchmarks.quality`: rows of one protocol alone compare. An optimizer has a
row if at least two seeds of it count. `gnlorp_jax.recommend` and `python -m
gnlorp_jax.plan --budget` read the file; the page shows it.
"""

import pathlib
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.common import record
from benchmarks.common.tables import markdown
from benchmarks.quality import frontier, measure, runs
from gnlorp_jax.compose import optimizer
from gnlorp_jax.config import OptimConfig
from gnlorp_jax.models import llama
from gnlorp_jax.optim import advice

PAGE = pathlib.Path('docs/plan.md')
PACKAGED = pathlib.Path('gnlorp_jax/optim/measured.json')
DIGITS = 6  # Behind the point of a loss.


def chosen() -> ModuleType:
  """The benchmark whose record is taken: the larger, if there is one."""
  larger = frontier.COMPARISON.results.exists()
  return frontier if larger else measure


def build(benchmark: ModuleType) -> dict[str, Any]:
  """What the package's file holds, from a benchmark's record."""
  path = benchmark.COMPARISON.results
  header, found = runs.read(path)
  settings = header['settings']
  model = llama.preset(settings['size'])
  tokens = settings['steps'] * settings['batch_size'] * settings['seq_len']
  return {
    'source': path.as_posix(),
    'model': settings['size'],
    'parameters': settings['parameters'],
    'width': model.hidden_size,
    'dtype': model.param_dtype,
    'compute_dtype': settings['compute_dtype'],
    'steps': settings['steps'],
    'tokens': tokens,
    'rows': [
      _row(
        name,
        best,
        runs.tried(found, name),
        benchmark.METHODS[name].options,
        settings,
        model,
      )
      for name, best in runs.chosen(found).items()
      if len(best) > 1
    ],
  }


def _row(
  name: str,
  best: list[runs.Row],
  rates: list[float],
  options: dict[str, Any],
  settings: dict[str, Any],
  model: llama.LlamaConfig,
) -> dict[str, Any]:
  """A row of the package's file."""
  others = {key: value for key, value in options.items() if key != 'name'}
  of_width = {}
  if optimizer.accepts(OptimConfig(name=options['name']), 'rank'):
    of_width['rank'] = others.pop('rank', settings['rank']) / model.hidden_size
  if options['name'] == 'apollo_mini' and 'scale' in others:
    # Its publication scales with the width; see its docstring.
    of_width['scale'] = others.pop('scale') / model.hidden_size
  losses = [runs.final(row) for row in best]
  return {
    'name': name,
    'optimizer': options['name'],
    'options': others,
    'of_width': of_width,
    'rates': rates,
    'learning_rate': best[0]['learning_rate'],
    'loss': round(float(np.mean(losses)), DIGITS),
    'deviation': round(float(np.std(losses, ddof=1)), DIGITS),
    'seeds': len(losses),
  }


def package() -> None:
  """Writes the package's file."""
  record.write(PACKAGED, build(chosen()))


def tables() -> dict[str, str]:
  """What is advised by, as a table of the page."""
  found = advice.from_json(build(chosen()))
  heads = ['place', 'optimizer', 'options', 'peak rate', 'eval loss', 'seeds']
  lines = []
  for row, place in zip(found.rows, found.places, strict=True):
    options = [
      f'{n} {share:g} of the width' for n, share in row.of_width.items()
    ]
    options += [f'{name} {value}' for name, value in row.options.items()]
    loss = f'{row.loss:.4f} ± {row.deviation:.4f}'
    lines.append(
      [
        str(place),
        row.optimizer,
        ', '.join(options),
        f'{row.learning_rate:g}',
        loss,
        str(row.seeds),
      ]
    )
  return {'advice': markdown(heads, lines)}
