"""The picture of `benchmarks.scaling`."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import cases
from benchmarks.common.cases import Row
from benchmarks.scaling.tables import chosen, fit_method, unique

MARKERS = '*PXDvh^<>dp8'


def draw(found: cases.Record) -> Figure:
  """State, time and communication, of the parts that there are."""
  rows = {
    part: [row for row in cases.rows(found, part) if 'absent' not in row]
    for part in ('state', 'time', 'devices', 'plan')
  }
  figure = Figure(figsize=(17, 4.5), layout='constrained')
  state, seconds, sent = figure.subplots(1, 3)
  by_size = chosen(rows['state'], against='parameters')
  _curves(state, by_size, 'bytes', 1e9, 'optimizer state, GB')
  timed = chosen(rows['time'], against='parameters')
  label = 'seconds (o optimizer step, s whole step)'
  for step, style in (('optimizer', 'o-'), ('training', 's--')):
    part = chosen(timed, step=step)
    _curves(seconds, part, 'median_s', 1, label, style, step == 'optimizer')
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
    part = sorted(chosen(rows, method=method), key=lambda r: r['parameters'])
    power = fit_method(rows, method, cost)
    shown = f'{method}: {power.exponent:.2f}' if power else method
    axes.loglog(
      [row['parameters'] for row in part],
      [row[cost] / scale for row in part],
      style,
      color=f'C{i}',
      # Where curves coincide, the ones below can be seen.
      linewidth=4 - i,
      label=shown if names else None,
    )
  axes.set(xlabel='parameters', ylabel=label)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(title='exponent', fontsize='small')
  elif names:
    axes.set_title('not measured yet')


def _sent(rows: list[Row]) -> tuple[list[int], list[float]]:
  """Devices, and what is sent in bytes of the parameters."""
  return (
    [row['data'] * row['fsdp'] for row in rows],
    [row['bytes_per_step'] / row['parameter_bytes'] for row in rows],
  )


def _communication(axes: Axes, small: list[Row], planned: list[Row]) -> None:
  """Bytes sent, in bytes of the parameters, against the devices."""
  # galore sends what gradnormlorp does, but for norms.
  small = [r for r in small if r['method'] != 'galore']
  kinds = dict.fromkeys((row['method'], row['step']) for row in small)
  for i, (method, step) in enumerate(kinds):
    for axis, other, style in (('data', 'fsdp', 'o-'), ('fsdp', 'data', 's--')):
      rows = chosen(small, method=method, step=step, **{other: 1})
      rows = [row for row in rows if row[axis] > 1]
      if rows:
        label = f'{method}, {step}, {axis}'
        axes.plot(*_sent(rows), style, color=f'C{i}', label=label)
  planned = [row for row in planned if row['bytes_per_step']]
  kinds = dict.fromkeys((r['size'], r['method'], r['step']) for r in planned)
  for marker, (size, method, step) in zip(MARKERS, kinds, strict=False):
    rows = chosen(planned, size=size, method=method, step=step)
    label = f'{size}, {method}, {step} (GPUs)'
    axes.plot(*_sent(rows), marker, color='k', alpha=0.6, label=label)
    for row, *place in zip(rows, *_sent(rows), strict=True):
      axes.annotate(
        f'data {row["data"]}, fsdp {row["fsdp"]}',
        *(place, (-6, 0)),
        textcoords='offset points',
        **{'ha': 'right', 'va': 'center', 'fontsize': 'xx-small'},
      )
  axes.set_xscale('log', base=2)
  axes.set(
    xlabel='devices',
    ylabel='sent per device and step, in bytes of the parameters',
  )
  if axes.get_legend_handles_labels()[0]:
    # Beside the plot: there is no corner without a point.
    axes.legend(fontsize='x-small', loc='upper left', bbox_to_anchor=(1, 1))
