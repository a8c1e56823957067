"""Fits and tables of `benchmarks.scaling`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import cases, turns
from benchmarks.common.cases import Row
from benchmarks.common.tables import MB, markdown, median_in_quartiles, number

SENT = ('device_bytes', 'temporary_bytes', 'bytes_per_step', 'refresh_bytes')


class Fit(NamedTuple):
  """A power law through some costs.

  Attributes:
    exponent: b of ``cost = a * size^b``, by least squares of the logarithms.
    deviation: Largest distance of a cost from it, as a share of the fit.
    last: The same exponent through the two largest sizes alone.
  """

  exponent: float
  deviation: float
  last: float


def fit(sizes: list[float], costs: list[float]) -> Fit | None:
  """Fits a power law; None where there are fewer than two sizes.

  Args:
    sizes: In any order.
    costs: Positive, of the same length.
  """
  if len(set(sizes)) < 2:
    return None
  order = np.argsort(sizes)
  x, y = np.log(sizes)[order], np.log(costs)[order]
  slope, offset = np.polyfit(x, y, 1)
  off = np.abs(np.expm1(y - (slope * x + offset)))
  last = (y[-1] - y[-2]) / (x[-1] - x[-2])
  return Fit(float(slope), float(off.max()), float(last))


def fit_method(rows: list[Row], method: str, cost: str) -> Fit | None:
  """A fit of a method's cost against the parameters."""
  known = [row for row in chosen(rows, method=method) if cost in row]
  return fit([row['parameters'] for row in known], [row[cost] for row in known])


def unique(rows: list[Row], key: str) -> list[Any]:
  """Values of a key, in the order in which they come."""
  return list(dict.fromkeys(row[key] for row in rows if key in row))


def chosen(rows: list[Row], **values: Any) -> list[Row]:
  """The rows with these values."""
  return [
    row for row in rows if all(row.get(k) == v for k, v in values.items())
  ]


def timed_rows(racers: list[turns.Racer]) -> list[Row]:
  """What steps that took turns came to, each beside AdamW where it raced."""
  adamw = [racer.turns for racer in racers if racer.name == 'adamw']
  rows = []
  for racer in racers:
    medians = turns.medians(racer.turns)
    low, median, high = np.quantile(medians, (0.25, 0.5, 0.75)).tolist()
    ratios = [turns.ratio_quartiles(racer.turns, other) for other in adamw]
    rows.append(
      {
        **racer.method.key,
        **{'median_s': median, 'quartiles_s': [low, high]},
        'of_adamw': ratios[0] if ratios else None,
        **{'first_s': racer.first_s, 'compile_s': racer.method.compile_s},
        'steps': sum(len(turn.seconds) for turn in racer.turns),
      }
    )
  return rows


def sizes(found: cases.Record) -> dict[str, int]:
  """Bytes that do not depend on the machine, by name; see benchmarks.check."""
  keys = ('size', 'method', 'step', 'rank', 'data', 'fsdp')
  counted = {}
  for part in found:
    for row in cases.rows(found, part):
      names = ', '.join(f'{key}={row[key]}' for key in keys if key in row)
      for name in ('bytes', 'device_bytes', 'bytes_per_step'):
        if name in row:
          counted[f'{part}: {names}: {name}'] = row[name]
  return counted


def tables(part: str, found: cases.Record) -> dict[str, str]:
  """A part's tables as Markdown, by what they are of."""
  rows = [row for row in cases.rows(found, part) if 'absent' not in row]
  if part in ('devices', 'plan'):
    return {part: _device_table(rows)}
  cost, cell = {
    'state': ('bytes', lambda row: number(row['bytes'], '.1f', MB)),
    'time': ('median_s', _time),
  }[part]
  unit = 'MB' if part == 'state' else 'ms; of AdamW'
  shown = {}
  # There is one state, but there are several steps.
  for step in unique(rows, 'step') or [None]:
    what = f'{step} step' if step else 'optimizer state'
    of_step = chosen(rows, step=step)
    by_size = chosen(of_step, against='parameters')
    by_rank = chosen(of_step, against='rank')
    if by_size:
      shown[f'{what}, {unit}'] = _grid(by_size, 'size', cost, cell)
    if by_rank:
      name = f'{what} of {by_rank[0]["size"]} by rank, {unit}'
      shown[name] = _grid(by_rank, 'rank', cost, cell)
  return shown


def _grid(
  rows: list[Row], down: str, cost: str, cell: Callable[[Row], str]
) -> str:
  """Methods side by side, one line for each size or rank."""
  across = unique(rows, 'method')
  lines = []
  for value in unique(rows, down):
    line = chosen(rows, **{down: value})
    name = str(value)
    if down == 'size':
      name += f', {line[0]["parameters"] / 1e6:.1f}'
    cells = {row['method']: cell(row) for row in line}
    lines.append([name, *(cells.get(method, '-') for method in across)])
  if down == 'rank':
    return markdown([down, *across], lines)
  found = [fit_method(rows, method, cost) for method in across]
  exponents = [
    f'{f.exponent:.2f} (to {f.deviation:.0%}); {f.last:.2f}' if f else '-'
    for f in found
  ]
  lines.append(['exponent', *exponents])
  return markdown(['model, 10^6 parameters', *across], lines)


def _time(row: Row) -> str:
  shown = f'{1e3 * row["median_s"]:.1f}'
  if row['of_adamw'] and row['method'] != 'adamw':
    shown += f'; {median_in_quartiles(row["of_adamw"])}'
  return shown


def _device_table(rows: list[Row]) -> str:
  names = ['method', 'step', 'data', 'fsdp']
  if any('size' in row for row in rows):
    names.insert(0, 'size')
  lines = []
  for row in rows:
    figures = [number(row[key], '.1f', MB) for key in SENT]
    of_parameters = f'{row["bytes_per_step"] / row["parameter_bytes"]:.2f}'
    figures.insert(3, of_parameters)
    lines.append([*(str(row[name]) for name in names), *figures])
  heads = ['model' if name == 'size' else name for name in names]
  heads += ['on a device, MB', 'temporaries, MB', 'sent, MB']
  return markdown([*heads, 'of the parameters', 'refreshes, MB'], lines)
