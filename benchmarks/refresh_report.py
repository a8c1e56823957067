"""The tables and the plot of `benchmarks.refresh`, from its JSON file."""

import pathlib
from collections.abc import Iterable
from typing import Any

import matplotlib.figure
import numpy as np

from benchmarks import harness

FITS = ('exact', 'eigh', 'power', 'dct', 'random')
WAYS = ('exact', 'eigh', 'power warm', 'power first', 'stale', 'dct', 'random')
SHARES = (16, 4)  # Ranks of the table: these shares of the short axis.
COLORS = {
  **{'exact': 'C0', 'eigh': 'C1', 'power': 'C2', 'power warm': 'C2'},
  **{'power first': 'C6', 'stale': 'C7', 'dct': 'C3', 'random': 'C4'},
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
  return f'{1e6 * value:.2g} us'


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
  return harness.markdown(heads, lines) + '\n' + _absent(failed)


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
  """The rows by size and shape."""
  found: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    if 'absent' not in row:
      m, n = row['shape']
      found.setdefault((row['size'], f'{m} x {n}'), []).append(row)
  return found


def _values(rows: list[Row], field: str, way: str, rank: str) -> list[float]:
  """A field of all rows that have it; the first step has no way `warm`."""
  return [r[field][way][rank] for r in rows if rank in r[field][way]]


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
        energies = _values(group, 'energy', way, rank)
        overlaps = _values(group, 'overlap', way, rank)
        cells.append(
          f'{np.median(energies):.3f} [{min(energies):.3f}], '
          f'{np.median(overlaps):.2f}'
          if energies
          else '-'
        )
      lines.append([size, shape, str(len(group)), rank, *cells])
  heads = ['size', 'shape', 'gradients', 'rank', 'best energy', *WAYS]
  return harness.markdown(heads, lines) + '\n' + _absent(rows)


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
  return harness.markdown(heads, lines) + '\n' + _absent(rows)


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Time against size, and captured energy against rank on real gradients."""
  groups = _groups(results.get('energy', {}).get('rows', []))
  sizes = list(dict.fromkeys(s for s, _ in groups if s != 'synthetic'))
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
    found = sorted(
      (np.prod(row['shape']) / 1e6, *row[name]['seconds'])
      for row in quarter
      if 'absent' not in row[name]
    )
    if not found:
      continue
    x, low, middle, high = np.transpose(found)
    errors = 1e3 * (middle - low), 1e3 * (high - middle)
    axes.errorbar(
      x, 1e3 * middle, errors, fmt='o-', ms=3, color=COLORS[name], label=name
    )
  axes.set(
    xscale='log',
    yscale='log',
    xlabel='millions of numbers in the matrix',
    ylabel='ms for one refresh',
    title='rank: a quarter of the short axis',
  )


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
    medians = []
    for rank in ranks:
      found = [
        row['best'][rank] * row['energy'][way][rank]
        for row in rows
        if rank in row['energy'][way]
      ]
      medians.append(np.median(found) if found else np.nan)
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
  axes.minorticks_off()
