"""The picture of `benchmarks.refresh`."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import cases, plots
from benchmarks.common.cases import Row
from benchmarks.refresh.tables import (
  FITS,
  SYNTHETIC,
  WAYS,
  energy_ranks,
  groups,
)

COLORS = {
  **{'exact': 'C0', 'eigh': 'C1', 'power': 'C2', 'power warm': 'C2'},
  **{'power first': 'C6', 'stale': 'C8', 'dct': 'C3', 'random': 'C4'},
}


def draw(found: cases.Record) -> Figure:
  """Time against size, and captured energy against rank on real gradients."""
  by_size: dict[str, list[Row]] = {}
  for (size, _), rows in groups(cases.rows(found, 'energy')).items():
    if size != SYNTHETIC:
      by_size.setdefault(size, []).extend(rows)
  number = 1 + len(by_size)
  figure, all_axes = plots.panels(number, (5 * number, 4.5))
  _times(all_axes[0], cases.rows(found, 'time'))
  for axes, (size, rows) in zip(all_axes[1:], by_size.items(), strict=True):
    _energies(axes, size, rows)
  for axes in all_axes:
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
    axes.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
    plots.legend(axes, frameon=False, fontsize=8)
  return figure


def _times(axes: Axes, rows: list[Row]) -> None:
  """Medians with quartiles at a quarter of the short axis."""
  rows = [row for row in rows if row['rank'] == row['shape'][1] // 4]
  for name in FITS:
    for is_square, line in ((False, 'o-'), (True, 's:')):
      found = sorted(
        (row['shape'][1], *row[name]['seconds'])
        for row in rows
        if 'absent' not in row[name]
        and (row['shape'][0] == row['shape'][1]) == is_square
      )
      if not found:
        continue
      n, low, middle, high = np.transpose(found)
      axes.errorbar(
        *(n, 1e3 * middle, (1e3 * (middle - low), 1e3 * (high - middle))),
        **{'fmt': line, 'ms': 3, 'lw': 1.2, 'color': COLORS[name]},
        label=None if is_square else name,
      )
  ticks = sorted({row['shape'][1] for row in rows})
  axes.set(xscale='log', yscale='log', xticks=ticks, xticklabels=ticks)
  axes.set(
    title='rank: a quarter of the short axis',
    xlabel='short axis (full lines: MLP kernels, dotted: square ones)',
    ylabel='ms for one refresh',
  )


def _energies(axes: Axes, size: str, rows: list[Row]) -> None:
  """Median shares of the energy by rank; quartiles of the best."""
  ranks = energy_ranks(rows[0])
  best = np.array([row['best'] for row in rows])
  low, middle, high = np.quantile(best, (0.25, 0.5, 0.75), axis=0)
  axes.fill_between(ranks, low, high, color='0.9')
  thick = {'color': 'k', 'lw': 2.5, 'alpha': 0.4}
  axes.plot(ranks, middle, **thick, label='best (quartiles)')
  for number, way in enumerate(WAYS):
    energy = np.array([row['energy'][number] for row in rows])
    medians = np.median(best * energy, axis=0)
    axes.plot(ranks, medians, 'o-', ms=3, lw=1, color=COLORS[way], label=way)
  axes.set(xscale='log', xticks=ranks, xticklabels=ranks, xlabel='rank')
  axes.set(ylabel='share of the energy captured', ylim=(0, 1.02))
  axes.set(title=f'gradients of LLaMA-{size}')
