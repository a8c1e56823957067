"""Fits and tables of `benchmarks.scaling`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import cases
from benchmarks.common.cases import Row
from benchmarks.common.tables import (
  MB,
  markdown,
  median_in_quartiles,
  number,
  of_columns,
)


class Fit(NamedTuple):
  """A power law through some costs, by least squares of the logarithms."""

  exponent: float  # b of ``cost = a * size^b``.
  deviation: float  # Largest distance of a cost from it, as a share of the fit.
  last: float  # The same exponent through the two largest sizes alone.


def fit(sizes: list[float], costs: list[float]) -> Fit | None:
  """Fits a power law to positive costs; None with fewer than two sizes."""
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
  known = chosen(rows, method=method)
  return fit([row['parameters'] for row in known], [row[cost] for row in known])


def unique(rows: list[Row], key: str) -> list[Any]:
  """Values of a key, in the order in which they come."""
  return list(dict.fromkeys(row[key] for row in rows if key in row))


def chosen(rows: list[Row], **values: Any) -> list[Row]:
  """The rows with these values."""
  return [
    row for row in rows if all(row.get(k) == v for k, v in values.items())
  ]


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
  rows = cases.rows(found, part)
  if part in ('devices', 'plan'):
    return {part: _device_table(rows)}
  cost, cell, unit = {
    'state': ('bytes', lambda row: number(row['bytes'], '.1f', MB), 'MB'),
    'time': ('median_s', _time, 'ms; of AdamW'),
  }[part]
  shown = {}
  # There is one state, but there are several steps.
  for step in unique(rows, 'step') or [None]:
    what = f'{step} step' if step else 'optimizer state'
    by_size = chosen(rows, step=step, against='parameters')
    if by_size:
      shown[f'{what}, {unit}'] = _grid(by_size, 'size', cost, cell)
    by_rank = chosen(rows, step=step, against='rank')
    if by_rank:
      name = f'{what} of {by_rank[0]["size"]} by rank, {unit}'
      shown[name] = _grid(by_rank, 'rank', cost, cell)
  return shown


def _grid(
  rows: list[Row], down: str, cost: str, cell: Callable[[Row], str]
) -> str:
  """Methods side by side, one line for each size or rank."""
  across = unique(rows, 'method')
  heads, lines = [down, *across], []
  for value in unique(rows, down):
    cells = {row['method']: cell(row) for row in chosen(rows, **{down: value})}
    lines.append([str(value), *(cells.get(method, '-') for method in across)])
  if down == 'size':
    heads[0] = 'model, 10^6 parameters'
    parameters = {row['size']: row['parameters'] for row in rows}
    for line in lines:
      line[0] += f', {parameters[line[0]] / 1e6:.1f}'
    fits = [fit_method(rows, method, cost) for method in across]
    exponents = [
      f'{f.exponent:.2f} (to {f.deviation:.0%}); {f.last:.2f}' if f else '-'
      for f in fits
    ]
    lines.append(['exponent', *exponents])
  return markdown(heads, lines)


def _time(row: Row) -> str:
  shown = f'{1e3 * row["median_s"]:.1f}'
  if row['of_adamw'] and row['method'] != 'adamw':
    shown += f'; {median_in_quartiles(row["of_adamw"])}'
  return shown


def _device_table(rows: list[Row]) -> str:
  def megabytes(key: str) -> Callable[[Row], str]:
    return lambda row: number(row[key], '.1f', MB)

  columns: dict[str, Callable[[Row], str]] = {
    'model': lambda row: row['size'],
    'method': lambda row: row['method'],
    'step': lambda row: row['step'],
    'data': lambda row: str(row['data']),
    'fsdp': lambda row: str(row['fsdp']),
    'on a device, MB': megabytes('device_bytes'),
    'temporaries, MB': megabytes('temporary_bytes'),
    'sent, MB': megabytes('bytes_per_step'),
    'of the parameters': lambda row: (
      f'{row["bytes_per_step"] / row["parameter_bytes"]:.2f}'
    ),
    'refreshes, MB': megabytes('refresh_bytes'),
  }
  if not any('size' in row for row in rows):
    del columns['model']
  return of_columns(rows, columns)
