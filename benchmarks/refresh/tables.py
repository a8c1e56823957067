"""The tables of `benchmarks.refresh`, from its JSON file."""

import functools

import numpy as np

from benchmarks.common import cases
from benchmarks.common.cases import Row
from benchmarks.common.tables import (
  markdown,
  median_in_quartiles,
  number,
  of_columns,
)

FITS = ('exact', 'eigh', 'power', 'dct', 'random')
WARM = 'power warm'
WAYS = ('exact', 'eigh', WARM, 'power first', 'stale', 'dct', 'random')
SYNTHETIC = 'synthetic'
SHARES = (16, 4)  # Ranks of the table: these shares of the short axis.
CURVE = (32, 16, 8, 4, 2)  # Those of real gradients' energies.


def tables(found: cases.Record) -> dict[str, str]:
  """The parts that there are, as Markdown; gradients are in no table."""
  shown = {'energy': energy_table, 'time': time_table, 'loss': loss_table}
  return {
    part: table(cases.rows(found, part))
    for part, table in shown.items()
    if part in found
  }


def ranks_of(n: int, shares: tuple[int, ...]) -> list[int]:
  """Ranks in ascending order: these shares of the short axis."""
  return sorted({max(n // share, 1) for share in shares})


def energy_ranks(row: Row) -> list[int]:
  """The ranks that a row has energies of."""
  shares = SHARES if row['size'] == SYNTHETIC else CURVE
  return ranks_of(row['shape'][1], shares)


def absent(rows: list[Row]) -> str:
  """What has no figures, fits of a row among them, as a list."""
  fits = [
    {'fit': fit, 'shape': row['shape'], 'rank': row['rank'], **row[fit]}
    for row in rows
    for fit in FITS
    if 'absent' in row.get(fit, {})
  ]
  return cases.absent([*rows, *fits])


def time_table(rows: list[Row]) -> str:
  """A line per matrix and rank: times, ratios with quartiles, compilation."""

  def cell(name: str, row: Row) -> str:
    fit = row[name]
    if 'absent' in fit:
      return '-'
    value = fit['seconds'][1]
    shown = f'{1e6 * value:.3g} us'
    if value >= 1e-3:
      shown = f'{1e3 * value:.3g} ms' if value < 1 else f'{value:.1f} s'
    if name != 'exact' and fit['ratio']:
      shown += f': {median_in_quartiles(fit["ratio"], ".2g")}'
    return shown

  columns = {
    'shape': lambda row: '{} x {}'.format(*row['shape']),
    'rank': lambda row: str(row['rank']),
    'matrix': lambda row: row['matrix'],
    **{name: functools.partial(cell, name) for name in FITS},
    'compilation, s': lambda row: ' / '.join(
      number(row[name].get('compile_seconds'), '.1f') for name in FITS
    ),
  }
  return of_columns(rows, columns)


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
  """The rows by size and shape, those that all ways can be compared on.

  The first step is left out: no gradient before it makes a warm start. A
  synthetic matrix has that step alone, and stays.
  """
  found: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    if row['size'] == SYNTHETIC or row['energy'][WAYS.index(WARM)]:
      shape = '{} x {}'.format(*row['shape'])
      found.setdefault((row['size'], shape), []).append(row)
  return found


def energy_table(rows: list[Row]) -> str:
  """A line per size, shape and rank: medians over layers, kinds and steps.

  In a cell: energy relative to the best (the lowest of all matrices in
  brackets), then the overlap with the exact subspace.
  """

  def cell(group: list[Row], way: int, at: int, place: int) -> str:
    if not group[0]['energy'][way]:
      return '-'
    energies = [row['energy'][way][at] for row in group]
    shared = np.median([row['overlap'][way][place] for row in group])
    return f'{np.median(energies):.3f} [{min(energies):.3f}], {shared:.2f}'

  lines = []
  for (size, shape), group in groups(rows).items():
    for place, rank in enumerate(ranks_of(group[0]['shape'][1], SHARES)):
      at = energy_ranks(group[0]).index(rank)
      best = np.median([row['best'][at] for row in group])
      cells = [cell(group, way, at, place) for way in range(len(WAYS))]
      names = [size, shape, str(len(group)), str(rank), f'{best:.3f}']
      lines.append([*names, *cells])
  heads = ['size', 'shape', 'gradients', 'rank', 'best energy', *WAYS]
  return markdown(heads, lines)


def loss_table(rows: list[Row]) -> str:
  """A line per way: the loss of each seed, and each less that of exact."""
  losses = {(row['way'], row['seed']): row['eval_loss'] for row in rows}
  ways = dict.fromkeys(way for way, _ in losses)
  seeds = sorted({seed for _, seed in losses})
  lines = []
  for way in ways:
    apart = [
      f'{losses[way, seed] - losses["exact", seed]:+.4f}'
      for seed in seeds
      if way != 'exact' and {(way, seed), ('exact', seed)} <= set(losses)
    ]
    cells = [number(losses.get((way, seed)), '.4f') for seed in seeds]
    lines.append([way, *cells, ', '.join(apart) or '-'])
  heads = ['basis', *(f'seed {seed}' for seed in seeds), 'less exact']
  return markdown(heads, lines)
