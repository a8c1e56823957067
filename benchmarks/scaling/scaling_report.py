"""Fits, tables and the plot of `benchmarks.scaling`."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.tables import markdown

Row = dict[str, Any]


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

  Returns:
    The fit.
  """
  if len(set(sizes)) < 2:
    return None
  order = np.argsort(sizes)
  x, y = np.log(sizes)[order], np.log(costs)[order]
  slope, offset = np.polyfit(x, y, 1)
  off = np.abs(np.expm1(y - (slope * x + offset)))
  last = (y[-1] - y[-2]) / (x[-1] - x[-2])
  return Fit(float(slope), float(off.max()), float(last))


def fits(rows: list[Row], cost: str) -> dict[str, Fit | None]:
  """A fit of a cost against the parameters for each method."""
  known = [row for row in rows if cost in row]
  return {
    method: fit(
      [row['parameters'] for row in known if row['method'] == method],
      [row[cost] for row in known if row['method'] == method],
    )
    for method in unique(rows, 'method')
  }


def unique(rows: list[Row], key: str) -> list[Any]:
  """Values of a key, in the order in which they come."""
  return list(dict.fromkeys(row[key] for row in rows if key in row))


def chosen(rows: list[Row], **values: Any) -> list[Row]:
  """The rows with these values."""
  return [
    row for row in rows if all(row.get(k) == v for k, v in values.items())
  ]


def timed_rows(racers: list[Any], parameters: int) -> list[Row]:
  """What steps that took turns came to, each beside AdamW where it raced."""
  medians = {i: np.median(r.turns, axis=1) for i, r in enumerate(racers)}
  adamw = next(
    (medians[i] for i, r in enumerate(racers) if r.key['method'] == 'adamw'),
    None,
  )
  rows = []
  for i, racer in enumerate(racers):
    low, median, high = np.quantile(medians[i], (0.25, 0.5, 0.75)).tolist()
    ratios = None
    if adamw is not None:
      ratios = np.quantile(medians[i] / adamw, (0.25, 0.5, 0.75)).tolist()
    rows.append(
      {
        **racer.key,
        'parameters': parameters,
        'median_s': median,
        'quartiles_s': [low, high],
        'of_adamw': ratios,
        'first_s': racer.first_s,
        'compile_s': racer.compile_s,
        'steps': sum(map(len, racer.turns)),
      }
    )
  return rows


def sizes(found: dict[str, Any]) -> dict[str, int]:
  """Bytes that do not depend on the machine, by name; see benchmarks.check."""
  counted = {}
  for part, content in found['parts'].items():
    for row in content['rows']:
      names = [
        f'{key}={row[key]}'
        for key in ('size', 'method', 'step', 'rank', 'data', 'fsdp')
        if key in row
      ]
      for name in ('bytes', 'device_bytes', 'bytes_per_step'):
        if name in row:
          counted[f'{part}: {", ".join(names)}: {name}'] = row[name]
  return counted


# Tables.


def tables(found: dict[str, Any], part: str) -> str:
  """A part's tables as Markdown, and what was left out."""
  content = found['parts'][part]
  rows = content['rows']
  text = TABLES[part](rows)
  for row in rows:
    if why := row.get('absent') or row.get('error'):
      text += f'* {_name(row)}: {why}\n'
  for key in content['left_out']:
    text += f'* {_name(key)}: left out, no time\n'
  return text


def _name(row: Row) -> str:
  keys = ('step', 'against', 'size', 'method', 'rank', 'data', 'fsdp')
  return ', '.join(f'{key} {row[key]}' for key in keys if key in row)


def _grid(
  rows: list[Row], down: str, cost: str, cell: Any, exponents: bool
) -> str:
  """Methods side by side, one line for each size or rank."""
  across = unique(rows, 'method')
  lines = []
  for value in unique(rows, down):
    line = chosen(rows, **{down: value})
    counts = unique(line, 'parameters')
    name = f'{value}, {counts[0] / 1e6:.1f}' if counts else str(value)
    cells = {row['method']: cell(row) for row in line if cost in row}
    lines.append(
      [name if down == 'size' else str(value)]
      + [cells.get(method, '-') for method in across]
    )
  if exponents:
    found = fits(rows, cost)
    cells = [
      '-'
      if f is None
      else f'{f.exponent:.2f} (to {f.deviation:.0%}); {f.last:.2f}'
      for f in found.values()
    ]
    lines.append(['exponent', *cells])
  head = 'model, 10^6 parameters' if down == 'size' else down
  return markdown([head, *across], lines)


def _state_table(rows: list[Row]) -> str:
  by_size = chosen(rows, against='parameters')
  by_rank = chosen(rows, against='rank')

  def cell(row: Row) -> str:
    return f'{row["bytes"] / 1e6:.1f}'

  text = 'Optimizer state, MB:\n\n'
  text += _grid(by_size, 'size', 'bytes', cell, exponents=True)
  if by_rank:
    text += f'\nOf {by_rank[0]["size"]} by rank, MB:\n\n'
    text += _grid(by_rank, 'rank', 'bytes', cell, exponents=False)
  return text


def _time_table(rows: list[Row]) -> str:
  def cell(row: Row) -> str:
    shown = f'{1e3 * row["median_s"]:.1f}'
    if row['of_adamw'] and row['method'] != 'adamw':
      low, median, high = row['of_adamw']
      shown += f'; {median:.2f} [{low:.2f}, {high:.2f}]'
    return shown

  text = ''
  for step in unique(rows, 'step'):
    for against, down in (('parameters', 'size'), ('rank', 'rank')):
      part = chosen(rows, step=step, against=against)
      if not part:
        continue
      of = f', {part[0]["size"]} by rank' if down == 'rank' else ''
      text += f'\nThe {step} step{of}, ms; of AdamW:\n\n'
      text += _grid(part, down, 'median_s', cell, exponents=down == 'size')
  return text.lstrip('\n')


def _device_table(rows: list[Row]) -> str:
  heads = [
    *('method', 'step', 'data', 'fsdp', 'on a device, MB', 'temporaries, MB'),
    *('sent, MB', 'of the parameters', 'refreshes, MB'),
  ]
  has_size = any('size' in row for row in rows)
  lines = []
  for row in rows:
    if 'device_bytes' not in row:
      continue
    names = [row['size']] if has_size else []
    names += [str(row[key]) for key in ('method', 'step', 'data', 'fsdp')]
    figures = ('device_bytes', 'temporary_bytes', 'bytes_per_step')
    cells = [f'{row[key] / 1e6:.1f}' for key in figures]
    cells.append(f'{row["bytes_per_step"] / row["parameter_bytes"]:.2f}')
    lines.append([*names, *cells, f'{row["refresh_bytes"] / 1e6:.1f}'])
  return markdown((['model'] if has_size else []) + heads, lines)


TABLES = {
  'state': _state_table,
  'time': _time_table,
  'devices': _device_table,
  'plan': _device_table,
}


# The plot.


def plot(found: dict[str, Any]) -> Figure:
  """State, time and communication, of the parts that there are."""
  rows = {part: found['parts'].get(part, {}).get('rows', []) for part in TABLES}
  figure = Figure(figsize=(17, 4.5), layout='constrained')
  state, seconds, sent = figure.subplots(1, 3)
  _curves(
    *(state, chosen(rows['state'], against='parameters'), 'bytes'),
    scale=1e9,
    label='optimizer state, GB',
  )
  for step, style in (('optimizer', 'o-'), ('training', 's--')):
    part = chosen(rows['time'], against='parameters', step=step)
    _curves(
      *(seconds, part, 'median_s'),
      scale=1,
      label='seconds (o optimizer step, s whole step)',
      style=style,
      names=step == 'optimizer',
    )
  _communication(sent, rows['devices'], rows['plan'])
  return figure


def _curves(
  axes: Axes,
  rows: list[Row],
  cost: str,
  scale: float,
  label: str,
  style: str = 'o-',
  names: bool = True,
) -> None:
  """A cost against the parameters, one curve for each method."""
  for i, method in enumerate(unique(rows, 'method')):
    part = [row for row in chosen(rows, method=method) if cost in row]
    part.sort(key=lambda row: row['parameters'])
    power = fits(part, cost).get(method)
    shown = method if power is None else f'{method}: {power.exponent:.2f}'
    axes.loglog(
      [row['parameters'] for row in part],
      [row[cost] / scale for row in part],
      style,
      color=f'C{i}',
      # Where curves coincide, the ones below can be seen.
      linewidth=4 - i,
      label=shown if names else None,
    )
  axes.set_xlabel('parameters')
  axes.set_ylabel(label)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(title='exponent', fontsize='small')
  elif names:
    axes.set_title('not measured yet')


def _communication(axes: Axes, small: list[Row], planned: list[Row]) -> None:
  """Bytes sent, in bytes of the parameters, against the devices."""
  curves = [
    (f'{method}, {step}, {axis}', chosen(small, method=method, step=step), axis)
    for method in unique(small, 'method')
    if method != 'galore'  # It sends what gradnormlorp does, but for norms.
    for step in unique(small, 'step')
    for axis in ('data', 'fsdp')
  ]
  for i, (label, rows, axis) in enumerate(curves):
    other = 'fsdp' if axis == 'data' else 'data'
    part = [
      row
      for row in rows
      if 'bytes_per_step' in row and row[other] == 1 and row[axis] > 1
    ]
    if part:
      axes.plot(
        [row[axis] for row in part],
        [row['bytes_per_step'] / row['parameter_bytes'] for row in part],
        'o-' if axis == 'data' else 's--',
        color=f'C{i // 2}',
        label=label,
      )
  for marker, (size, method, step) in zip(
    '*PXDvh^<>dp8',
    dict.fromkeys(
      (row['size'], row['method'], row['step'])
      for row in planned
      if 'bytes_per_step' in row
    ),
    strict=False,
  ):
    part = [
      row
      for row in chosen(planned, size=size, method=method, step=step)
      if row.get('bytes_per_step')
    ]
    axes.plot(
      [row['data'] * row['fsdp'] for row in part],
      [row['bytes_per_step'] / row['parameter_bytes'] for row in part],
      marker,
      color='k',
      alpha=0.6,
      label=f'{size}, {method}, {step} (GPUs)',
    )
    for row in part:
      place = (
        row['data'] * row['fsdp'],
        row['bytes_per_step'] / row['parameter_bytes'],
      )
      axes.annotate(
        f'data {row["data"]}, fsdp {row["fsdp"]}',
        place,
        xytext=(-6, 0),
        textcoords='offset points',
        ha='right',
        va='center',
        fontsize='xx-small',
      )
  axes.set_xscale('log', base=2)
  axes.set_xlabel('devices')
  axes.set_ylabel('sent per device and step, in bytes of the parameters')
  if axes.get_legend_handles_labels()[0]:
    # Beside the plot: there is no corner without a point.
    axes.legend(fontsize='x-small', loc='upper left', bbox_to_anchor=(1, 1))
