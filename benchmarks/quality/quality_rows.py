"""Rows of `quality`: which runs come next, their files, table and plot."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from benchmarks.common.tables import markdown

MIB = 2**20
MARKERS = 'os^vDP'

Row = dict[str, Any]
Run = tuple[str, float, int]  # Method, peak learning rate, seed.


class Plan(NamedTuple):
  """Which runs are wanted."""

  rates: dict[str, tuple[float, ...]]  # By method, the likeliest first.
  seeds: int
  extend: int  # Most rates tried beyond the given ones, per method.


def names_of(rows: Sequence[Row]) -> list[str]:
  """The methods of the rows, by their names."""
  return sorted({row['method'] for row in rows})


def final(row: Row) -> float:
  """The evaluation loss after the last step."""
  return row['eval'][-1][1]


def trained(rows: Sequence[Row]) -> list[Row]:
  """The runs that neither failed nor diverged."""
  return [row for row in rows if row.get('outcome') == 'trained']


def best_rate(rows: Sequence[Row], name: str) -> float | None:
  """The rate at which seed 0 ended lowest; None if it trained at none."""
  first = [
    row for row in trained(rows) if (row['method'], row['seed']) == (name, 0)
  ]
  return min(first, key=final)['learning_rate'] if first else None


def pending(name: str, rows: Sequence[Row], plan: Plan) -> list[Run]:
  """The runs of a method that come next, given those that are known.

  First the planned rates, then rates beyond the edge, then seeds: what follows
  depends on how these end.
  """
  done = {
    (row['learning_rate'], row['seed']) for row in rows if row['method'] == name
  }
  planned = plan.rates[name]
  untried = [rate for rate in planned if (rate, 0) not in done]
  if untried:
    return [(name, rate, 0) for rate in untried]
  tried = [rate for rate, seed in done if seed == 0]
  best = best_rate(rows, name)
  if best is None and any('absent' in r for r in rows if r['method'] == name):
    return []  # It cannot run at all: lower rates would not help.
  if len(set(tried) - set(planned)) < plan.extend:
    # Where nothing trained, the rates were too high.
    if best is None or best == min(tried):
      return [(name, min(tried) / 2, 0)]
    if best == max(tried):
      return [(name, max(tried) * 2, 0)]
  if best is None:
    return []
  seeds = range(1, plan.seeds)
  return [(name, best, seed) for seed in seeds if (best, seed) not in done]


def part_path(output: pathlib.Path, number: int, count: int) -> pathlib.Path:
  """The file of one of several processes."""
  return output.with_name(f'{output.stem}.{number}of{count}.json')


def read(
  output: pathlib.Path, settings: dict[str, Any] | None = None
) -> tuple[dict[str, Any] | None, list[Row]]:
  """The runs of a file and of its parts, each run once.

  Args:
    output: The file of the whole comparison.
    settings: What the runs must have been made with; None takes those of the
      first file.

  Returns:
    What the first file holds beside its rows (None if there is no file), and
    the rows.

  Raises:
    ValueError: If a file has other settings.
  """
  header, rows = None, {}
  parts = sorted(output.parent.glob(f'{output.stem}.*of*.json'))
  for path in (output, *parts):
    if not path.exists():
      continue
    found = json.loads(path.read_text())
    settings = settings or found['settings']
    check_settings(path, found['settings'], settings)
    rows |= {
      (row['method'], row['learning_rate'], row['seed']): row
      for row in found.pop('rows')
    }
    header = header or found
  return header, [rows[key] for key in sorted(rows)]


def check_settings(
  path: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
  """Raises ValueError if a file's settings are not those wanted."""
  other = [
    f'{name} is {found.get(name)!r} there and {wanted.get(name)!r} here'
    for name in sorted({*found, *wanted})
    if found.get(name) != wanted.get(name)
  ]
  if other:
    raise ValueError(
      f'{path} holds runs with other settings: {"; ".join(other)}. Runs of '
      'different settings do not compare: name another --output, or remove '
      'the file.'
    )


def without_failed(rows: Sequence[Row]) -> list[Row]:
  """The rows but for those that may end otherwise when they are tried again."""
  return [row for row in rows if 'absent' not in row]


def spread(values: Sequence[float], digits: int) -> str:
  """Mean and, of two values or more, their standard deviation, as text."""
  mean = f'{np.mean(values):.{digits}f}'
  if len(values) < 2:
    return mean
  return f'{mean} ± {np.std(values, ddof=1):.{digits}f}'


def chosen(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """The trained runs at the best rate of every method, the lowest first."""
  found = {}
  for name in names_of(rows):
    best = best_rate(rows, name)
    mine = [
      row
      for row in trained(rows)
      if (row['method'], row['learning_rate']) == (name, best)
    ]
    if mine:
      found[name] = mine
  return dict(
    sorted(found.items(), key=lambda item: np.mean([*map(final, item[1])]))
  )


def table(rows: Sequence[Row]) -> str:
  """A Markdown row per method, the lowest loss first."""
  heads = ['optimizer', 'peak rate', 'eval loss', 'perplexity']
  heads += ['seeds', 'state, MiB', 'tuning']
  lines = []
  winners = chosen(rows)
  failed = [name for name in names_of(rows) if name not in winners]
  for name in (*winners, *failed):
    mine = [row for row in rows if row['method'] == name]
    tuning = ', '.join(
      f'{row["learning_rate"]:g}: {ended(row)}'
      for row in mine
      if row['seed'] == 0
    )
    best = winners.get(name, [])
    if not best:
      lines.append([name, *['-'] * 5, tuning])
      continue
    losses = [final(row) for row in best]
    rate = best[0]['learning_rate']
    seeds = sum(row['learning_rate'] == rate for row in mine)
    lines.append(
      [
        name,
        f'{rate:g}',
        spread(losses, 4),
        spread([math.exp(loss) for loss in losses], 1),
        f'{seeds}' if seeds == len(best) else f'{len(best)} of {seeds} trained',
        f'{sum(best[0]["state_bytes"].values()) / MIB:.1f}',
        tuning,
      ]
    )
  return markdown(heads, lines)


def ended(row: Row) -> str:
  """The last evaluation loss, or what went wrong."""
  if row.get('outcome') == 'trained':
    return f'{final(row):.4f}'
  return row.get('absent') or row['outcome']


def missing(names: list[str], rows: Sequence[Row], plan: Plan) -> str:
  """Names the runs that are left, for below the table."""
  left = [
    f'{name} at {rate:g} with seed {seed}'
    for method in names
    for name, rate, seed in pending(method, rows, plan)
  ]
  if not left:
    return ''
  return f'Not run, and what would follow: {", ".join(left)}.\n'


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Loss curves with their deviation, and memory against loss."""
  figure = matplotlib.figure.Figure(figsize=(12, 4.8), layout='constrained')
  curves, memory = figure.subplots(1, 2)
  tops = []
  order = names_of(rows)
  for name, runs in chosen(rows).items():
    color = f'C{order.index(name)}'
    steps = [number for number, _ in runs[0]['train']]
    losses = np.array([[loss for _, loss in row['train']] for row in runs])
    evals = np.array([[loss for _, loss in row['eval'][1:]] for row in runs])
    mean, deviation = losses.mean(axis=0), _deviation(losses)
    tops.append(mean[len(mean) // 5])
    curves.fill_between(
      *(steps, mean - deviation, mean + deviation),
      color=color,
      alpha=0.15,
      lw=0,
    )
    curves.plot(steps, mean, color=color, lw=0.8)
    rate = runs[0]['learning_rate']
    curves.errorbar(
      [number for number, _ in runs[0]['eval'][1:]],
      evals.mean(axis=0),
      _deviation(evals),
      fmt='o',
      ms=4,
      capsize=3,
      color=color,
      label=f'{spread(evals[:, -1], 3)}  {name}, {rate:g}',
    )
    state = sum(runs[0]['state_bytes'].values()) / MIB
    memory.errorbar(
      *(state, evals[:, -1].mean(), _deviation(evals[:, -1])),
      fmt=MARKERS[order.index(name) % len(MARKERS)],
      capsize=4,
      color=color,
      label=f'{state:.1f} MiB  {name}',
    )
  curves.set(
    xlabel='step', ylabel='loss, nats per token', ylim=(None, max(tops))
  )
  curves.legend(
    title='evaluation (points), training (lines)', fontsize=8, frameon=False
  )
  memory.set(
    xlabel='optimizer state, MiB',
    ylabel='eval loss after the last step',
    xlim=(0, None),
  )
  memory.legend(fontsize=8)
  for axes in (curves, memory):
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)


def _deviation(values: np.ndarray) -> np.ndarray:
  """Over the first axis; 0 where it is of one run."""
  if len(values) < 2:
    return np.zeros(values.shape[1:])
  return values.std(axis=0, ddof=1)
