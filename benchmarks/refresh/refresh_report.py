"""The tables and the plot of `benchmarks.refresh`, from its JSON file."""

import pathlib
from collections.abc import Iterable
from typing import Any

import matplotlib.figure
import numpy as np

from benchmarks.common.tables import markdown

FITS = ('exact', 'eigh', 'power', 'dct', 'random')
WARM = 'power warm'
WAYS = ('exact', 'eigh', WARM, 'power first', 'stale', 'dct', 'random')
SYNTHETIC = 'synthetic'
SHARES = (16, 4)  # Ranks of the table: these shares of the short axis.
COLORS = {
  **{'exact': 'C0', 'eigh': 'C1', 'power': 'C2', 'power warm': 'C2'},
  **{'power first': 'C6', 'stale': 'C8', 'dct': 'C3', 'random': 'C4'},
}

Row = dict[str, Any]


def tables(results: dict[str, Any]) -> str:
  """All parts that there are, as Markdown."""
  shown = {'energy': energy_table, 'time': time_table, 'loss': loss_table}
  return '\n'.join(
    shown[name](results[name]['rows']) for name in shown if name in results
  )


def _seconds(value: float) -> str:
  if value >= 1:
    return f'{value:.1f} s'
  if value >= 1e-3:
    return f'{1e3 * value:.3g} ms'
  return f'{1e6 * value:.3g} us'


def _places(row: Row) -> str:
  """What a row is of, for the list of those that are absent."""
  names = ('size', 'layer', 'kind', 'step', 'shape', 'rank', 'way', 'seed')
  return ', '.join(f'{name} {row[name]}' for name in names if name in row)


def _absent(rows: Iterable[Row]) -> str:
  """The rows that could not be measured, with the reason, as a list."""
  return ''.join(
    f'* {_places(row)}: absent, {row["absent"]}\n'
    for row in rows
    if 'absent' in row
  )


def time_table(rows: list[Row]) -> str:
  """A line per matrix and rank: times, ratios with quartiles, compilation."""
  lines, failed = [], []
  for row in rows:
    if 'absent' in row:
      failed.append(row)
      continue
    cells = []
    for name in FITS:
      fit = row[name]
      if 'absent' in fit:
        cells.append('-')
        place = f'{name}, {row["shape"]}'
        failed.append({'way': place, 'rank': row['rank'], **fit})
        continue
      low, middle, high = fit['ratio'] or (None, None, None)
      text = _seconds(fit['seconds'][1])
      if middle is not None and name != 'exact':
        text += f': {middle:.2g} [{low:.2g}, {high:.2g}]'
      cells.append(text)
    compiled = [
      f'{row[n]["compile_seconds"]:.1f}' if 'absent' not in row[n] else '-'
      for n in FITS
    ]
    m, n = row['shape']
    lines.append(
      [f'{m} x {n}', str(row['rank']), row['matrix'], *cells]
      + [' / '.join(compiled)]
    )
  heads = ['shape', 'rank', 'matrix', *FITS, 'compilation, s']
  return markdown(heads, lines) + '\n' + _absent(failed)


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
  """The rows by size and shape, those that all ways can be compared on.

  The first step is left out: no gradient before it makes a warm start. A
  synthetic matrix has that step alone, and stays.
  """
  found: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    if 'absent' in row or not (row['size'] == SYNTHETIC or row['energy'][WARM]):
      continue
    m, n = row['shape']
    found.setdefault((row['size'], f'{m} x {n}'), []).append(row)
  return found


def energy_table(rows: list[Row]) -> str:
  """A line per size, shape and rank: medians over layers, kinds and steps.

  In a cell: energy relative to the best (the lowest of all matrices in
  brackets), then the overlap with the exact subspace.
  """
  lines = []
  for (size, shape), group in _groups(rows).items():
    n = int(shape.split(' x ')[1])
    for rank in (str(n // share) for share in SHARES):
      best = np.median([row['best'][rank] for row in group])
      cells = [f'{best:.3f}']
      for way in WAYS:
        if rank not in group[0]['energy'][way]:
          cells.append('-')
          continue
        energies = [row['energy'][way][rank] for row in group]
        shared = np.median([row['overlap'][way][rank] for row in group])
        middle, lowest = np.median(energies), min(energies)
        cells.append(f'{middle:.3f} [{lowest:.3f}], {shared:.2f}')
      lines.append([size, shape, str(len(group)), rank, *cells])
  heads = ['size', 'shape', 'gradients', 'rank', 'best energy', *WAYS]
  return markdown(heads, lines) + '\n' + _absent(rows)


def loss_table(rows: list[Row]) -> str:
  """A line per way: the loss of each seed, and the mean less that of exact."""
  known = [row for row in rows if 'absent' not in row]
  losses = {(row['way'], row['seed']): row['eval_loss'] for row in known}
  seeds = sorted({seed for _, seed in losses})
  lines = []
  for way in dict.fromkeys(row['way'] for row in rows):
    cells = [
      f'{losses[way, s]:.4f}' if (way, s) in losses else '-' for s in seeds
    ]
    pairs = [
      losses[way, s] - losses['exact', s]
      for s in seeds
      if (way, s) in losses and ('exact', s) in losses
    ]
    apart = '-'
    if pairs and way != 'exact':
      apart = ', '.join(f'{pair:+.4f}' for pair in pairs)
    lines.append([way, *cells, apart])
  heads = ['basis', *(f'seed {seed}' for seed in seeds), 'less exact']
  return markdown(heads, lines) + '\n' + _absent(rows)


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Time against size, and captured energy against rank on real gradients."""
  groups = _groups(results.get('energy', {}).get('rows', []))
  sizes = list(dict.fromkeys(s for s, _ in groups if s != SYNTHETIC))
  figure = matplotlib.figure.Figure(
    figsize=(5 * (1 + len(sizes)), 4.5), layout='constrained'
  )
  panels = figure.subplots(1, 1 + len(sizes), squeeze=False)[0]
  _plot_times(panels[0], results.get('time', {}).get('rows', []))
  for axes, size in zip(panels[1:], sizes, strict=True):
    _plot_energies(
      axes,
      size,
      [row for (s, _), g in groups.items() if s == size for row in g],
    )
  for axes in panels:
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(frameon=False, fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def _plot_times(axes: Any, rows: list[Row]) -> None:
  """Medians with quartiles at a quarter of the short axis."""
  quarter = [
    row
    for row in rows
    if 'absent' not in row and row['rank'] == row['shape'][1] // 4
  ]
  for name in FITS:
    for is_square, line in ((False, 'o-'), (True, 's:')):
      found = sorted(
        (row['shape'][1], *row[name]['seconds'])
        for row in quarter
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
  ticks = sorted({row['shape'][1] for row in quarter})
  axes.set(
    xscale='log', yscale='log', title='rank: a quarter of the short axis'
  )
  axes.set(
    xlabel='short axis (full lines: MLP kernels, dotted: square ones)',
    ylabel='ms for one refresh',
    xticks=ticks,
    xticklabels=ticks,
  )
  axes.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)


def _plot_energies(axes: Any, size: str, rows: list[Row]) -> None:
  """Median shares of the energy by rank; quartiles of the best."""
  ranks = sorted(rows[0]['best'], key=int)
  x = [int(rank) for rank in ranks]
  best = [
    np.quantile([row['best'][rank] for row in rows], (0.25, 0.5, 0.75))
    for rank in ranks
  ]
  low, middle, high = np.transpose(best)
  axes.fill_between(x, low, high, color='0.9')
  axes.plot(x, middle, color='k', lw=2.5, alpha=0.4, label='best (quartiles)')
  for way in WAYS:
    medians = [
      np.median([row['best'][r] * row['energy'][way][r] for row in rows])
      for r in ranks
    ]
    axes.plot(x, medians, 'o-', ms=3, lw=1, color=COLORS[way], label=way)
  axes.set(
    xscale='log',
    xticks=x,
    xticklabels=ranks,
    xlabel='rank',
    ylabel='share of the energy captured',
    ylim=(0, 1.02),
    title=f'gradients of LLaMA-{size}',
  )
  axes.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
