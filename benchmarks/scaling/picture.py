"""The picture of `benchmarks.scaling`."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import cases, plots
from benchmarks.common.cases import Row
from benchmarks.scaling.tables import chosen, fit_method, unique

MARKERS = '*PXDvh^<>dp8'


def draw(found: cases.Record) -> Figure:
  """State, time and communication, of the parts that there are."""
  figure, (state, seconds, sent) = plots.panels(3, (17, 4.5))
  by_size = chosen(cases.rows(found, 'state'), against='parameters')
  _curves(state, by_size, 'bytes', 'o-', named=True, scale=1e-9)
  state.set(ylabel='optimizer state, GB')
  timed = chosen(cases.rows(found, 'time'), against='parameters')
  for step, style in (('optimizer', 'o-'), ('training', 's--')):
    rows = chosen(timed, step=step)
    _curves(seconds, rows, 'median_s', style, named=step == 'optimizer')
  seconds.set(ylabel='seconds (o optimizer step, s whole step)')
  for axes in (state, seconds):
    axes.set(xlabel='parameters', xscale='log', yscale='log')
    if not plots.legend(axes, title='exponent', fontsize='small'):
      axes.set_title('not measured yet')
  _communication(sent, cases.rows(found, 'devices'), cases.rows(found, 'plan'))
  return figure


def _curves(
  axes: Axes,
  rows: list[Row],
  cost: str,
  style: str,
  *,
  named: bool,
  scale: float = 1,
) -> None:
  """A cost against the parameters, one curve for each method."""
  for i, method in enumerate(unique(rows, 'method')):
    part = sorted(chosen(rows, method=method), key=lambda r: r['parameters'])
    power = fit_method(rows, method, cost)
    shown = f'{method}: {power.exponent:.2f}' if power else method
    axes.plot(
      [row['parameters'] for row in part],
      [row[cost] * scale for row in part],
      style,
      # Where curves coincide, the ones below can be seen.
      **{'color': f'C{i}', 'linewidth': 4 - i},
      label=shown if named else None,
    )


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
  unit = 'in bytes of the parameters'
  axes.set(xlabel='devices', ylabel=f'sent per device and step, {unit}')
  # Beside the plot: there is no corner without a point.
  beside = {'loc': 'upper left', 'bbox_to_anchor': (1, 1)}
  plots.legend(axes, fontsize='x-small', **beside)
