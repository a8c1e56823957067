"""Times the optimizer step alone, of this package and of its peers.

  python -m benchmarks.step --shapes 60m --methods floor 'gradnormlorp*'
  python -m benchmarks.step --device gpu --shapes 4096x4096 1b --ranks 128 512

A case is a dtype, a rank, and one matrix, such as 4096x4096, or the attention
and MLP kernels of a LLaMA, at the rank of the GaLore protocol. Methods take
turns of a few steps until each has made as many counted steps as lie between
two refreshes. Cases come in the order of their worth, and each may take a sixth
of the time that is left; what does not fit the time or the memory (20 GB on a
CPU) is named with the reason. The machine should have nothing else to do: a
core lost costs PyTorch's threads, which wait for each other, many times its
share.

  median      of a turn's median steps; in brackets the quartiles
  / NAME      median over the rounds of the ratio to NAME's median in the same
  worst       the worst step, in medians of its turn; of the visits of a place
              in the refresh interval the fastest counts
  refresh     what refreshes add to the mean step, at --gap: from counted steps
              that refresh, or (first) from the first step less the median
  first       the first step, which fits all bases
  compile     tracing and compiling the step
  state       bytes of the optimizer's state, bases included (MB are 10^6 bytes)
  peak        of weights, gradients, state and what a step needs beside them, as
              the compiler assigns it; for PyTorch what it allocates on a GPU
  floor       bare products that project gradients and expand the result, and a
              pass over gradients and weights: what projecting costs at least.
              floor-layers has a matrix per layer, as the peers

With bfloat16 this package's moments and bases are float32, the peers' bfloat16.
On a GPU PyTorch may multiply float32 in TF32, as JAX does by default.
"""

import os

# JAX and PyTorch share a GPU: neither may take all of it in advance.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import argparse
import functools
import gc
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.common import harness, methods, peers, record, turns
from benchmarks.common.plots import Bars, bars
from benchmarks.common.tables import MB, median_in_quartiles, number, of_columns
from benchmarks.common.turns import Row
from benchmarks.step.step_methods import (
  METHODS,
  Case,
  Data,
  kernels_of,
  make_cases,
  memory_limit,
)

RESULTS = pathlib.Path('benchmarks/results/step.json')
MORE = RESULTS.with_name('optimizer_step_more.json')
PAGE = pathlib.Path('docs/results/step.md')
PLOT = PAGE.with_name('step.png')
SHAPES = ('60m', '4096x4096', '130m', '4096x11008', '350m', '1b')
DTYPES = ('float32', 'bfloat16')
# Of most worth first.
DEFAULT = (
  *('floor', 'gradnormlorp', 'galore-torch', 'optax-galore'),
  *('gradnormlorp-8bit', 'galore', 'adamw', 'torch-adamw'),
  *('torch-adamw-fused', 'apollo', 'apollo-torch', 'fira'),
  *('bitsandbytes-adamw8bit', 'optax-adamw', 'optax-adafactor'),
  *('floor-layers', 'galore-torch-8bit'),
)
REFERENCES = ('floor', 'galore-torch', 'optax-galore', 'torch-adamw')
SHARES = 6  # A case may take this part of the time that is left.


def expected_s(name: str, case: Case, entries: list[Row]) -> float:
  """Seconds until a method's first step is done, 0 if they are not known.

  It grows as exact SVDs do from the one of the latest case before.
  """
  for entry in reversed(entries):
    for row in entry['rows']:
      if row['method'] == name and 'first_step_s' in row:
        growth = case.factoring / case_of(entry).factoring
        return (row['compile_s'] or 0) + growth * row['first_step_s']
  return 0.0


def _row(racer: turns.Racer, racers: list[turns.Racer], gap: int) -> Row:
  """What is known of a method by now, with ratios to the others."""
  known = turns.known(racer)
  known['steps'] = sum(len(turn.seconds) for turn in racer.turns)
  if not racer.turns:
    return known
  medians = turns.medians(racer.turns)
  worst, largest, visits = turns.worst_step(racer, gap)
  cost, source = turns.refresh_cost(racer, gap)
  refreshed = np.concatenate([turn.refreshed for turn in racer.turns])
  return known | {
    'median_s': float(np.median(medians)),
    'quartiles_s': np.percentile(medians, [25, 75]).tolist(),
    **{'worst_per_median': worst, 'max_per_median': largest, 'visits': visits},
    **{'refresh_s_per_step': cost, 'refresh_from': source},
    'refreshing_steps': float(refreshed.mean()),
    'per': {
      other.name: turns.ratio_quartiles(racer.turns, other.turns)
      for other in racers
      if other.name in REFERENCES and other.turns
    },
  }


def run_case(
  args: argparse.Namespace, clock: harness.Clock, written: Row, limit: float
) -> None:
  """Fills the last case of the record, written after each step forward."""
  *before, entry = written['cases']
  case = case_of(entry)
  data = Data(case, harness.PLATFORMS[args.device], limit)

  def build(name: str) -> Any:
    need, left = expected_s(name, case, before), clock.seconds_left
    if need > left:
      raise methods.AbsentError(
        f'left out, needs about {need:.0f} s, the case has {left:.0f} s'
      )
    return METHODS[name](data)

  def save(rows: list[Row]) -> None:
    entry['rows'] = rows
    record.write(args.output, written)

  turns.race(
    *(args.methods, build, lambda *known: _row(*known, case.gap)),
    *(save, clock),
    **{'steps': case.gap, 'turn': args.turn, 'inputs': data.inputs},
  )


def case_of(entry: Row) -> Case:
  """The case of an entry of the record."""
  return Case(*(entry[field] for field in Case._fields))


def ratios(record: Row) -> dict[str, tuple[float, float, float]]:
  """What a regression check compares: larger is better for this package.

  These are quartiles of a reference's time divided by ours, by a name such as
  ``step 60m float32 rank 128: floor / gradnormlorp``.
  """
  found = {}
  for entry in record['cases']:
    for row in entry['rows']:
      if row['method'] in methods.OURS:
        for other, (low, median, high) in row.get('per', {}).items():
          name = f'step {case_of(entry)}: {other} / {row["method"]}'
          found[name] = (1 / high, 1 / median, 1 / low)
  return found


def _form(seconds: float | None) -> str:
  return '.1f' if seconds is None or abs(seconds) >= 0.01 else '.3f'


def _median(row: Row) -> str:
  (low, high), middle = row['quartiles_s'], row['median_s']
  return median_in_quartiles((low, middle, high), _form(middle), 1e3)


def _refresh(row: Row) -> str:
  cost, is_first = row['refresh_s_per_step'], row['refresh_from'] == turns.FIRST
  return number(cost, _form(cost), 1e3) + is_first * ' (first)'


def _per(name: str, row: Row) -> str:
  _, middle, _ = row['per'].get(name, (None, None, None))
  return number(middle, '.2f')


COLUMNS: dict[str, Callable[[Row], str]] = {
  'method': lambda row: row['method'],
  'median, ms': _median,
  **{f'/ {name}': functools.partial(_per, name) for name in REFERENCES},
  'worst': lambda row: number(row['worst_per_median'], '.2f'),
  'refresh, ms per step': _refresh,
  'first, s': lambda row: number(row['first_step_s'], '.2f'),
  'compile, s': lambda row: number(row['compile_s'], '.1f'),
  'state, MB': lambda row: number(row['state_bytes'], '.1f', MB),
  'peak, MB': lambda row: number(row['peak_bytes'], '.1f', MB),
  'steps': lambda row: str(row['steps']),
}


def table(entry: Row) -> str:
  """A case as a Markdown table, and what could not be measured."""
  measured = [row for row in entry['rows'] if 'median_s' in row]
  return of_columns(measured, COLUMNS) + turns.not_timed(entry['rows'])


def tables() -> dict[str, str]:
  """The tables of `PAGE`, from the recorded files."""
  (more,), recorded = (record.read(path)['cases'] for path in (MORE, RESULTS))
  named = {str(case_of(entry)): table(entry) for entry in recorded}
  return named | {'other methods': table(more)}


def plot(cases: list[Row], path: pathlib.Path) -> None:
  """Draws each method's time in that of the floor."""
  panels = []
  for entry in cases:
    timed = [row for row in entry['rows'] if 'floor' in row.get('per', {})]
    quartiles = {row['method']: row['per']['floor'] for row in timed}
    colors = {n: 'C0' if n in methods.OURS else 'C7' for n in quartiles}
    title, label = str(case_of(entry)), 'time per step, floor = 1 (quartiles)'
    if timed:
      panels.append(Bars(title, label, quartiles, colors))
  bars(panels, path)


def plots() -> None:
  """Draws the picture of `PAGE` again."""
  plot(record.read(RESULTS)['cases'], PLOT)


def parse() -> argparse.Namespace:
  """The command line; `methods` are names, `shapes` are known."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, minutes=12, plot=PLOT)
  harness.add_methods(parser, METHODS, DEFAULT, turn=20)
  add, count = parser.add_argument, harness.positive
  add('--shapes', nargs='+', default=SHAPES, help='matrices INxOUT and models')
  add('--dtypes', nargs='+', choices=DTYPES, default=DTYPES, help='of weights')
  ranks = 'of the matrices; models have that of the protocol'
  add('--ranks', type=count, nargs='+', default=[128, 512, 32], help=ranks)
  args = parser.parse_args()
  try:
    args.methods = harness.select(args.methods, METHODS)
    for shape in args.shapes:
      kernels_of(shape)
  except ValueError as error:
    parser.error(str(error))
  return args


def main() -> None:
  """Measures, and writes the JSON file, the tables and the picture."""
  args = parse()
  if args.report:
    report.report('step.measure')
    return
  clock, limit = harness.start(args), memory_limit()
  environment = harness.environment()
  written: Row = {'environment': environment, 'turn': args.turn, 'cases': []}
  cases = make_cases(args.shapes, args.dtypes, args.ranks, args.gap)
  for index, case in enumerate(cases):
    entry = {**case._asdict(), 'rows': []}
    written['cases'].append(entry)
    share = clock.share(min(len(cases) - index, SHARES))
    shorter = min(min(shape[-2:]) for shape in case.kernels.values())
    harness.progress(f'{case}: {share.seconds_left:.0f} s')
    if case.rank > shorter:
      entry['left_out'] = f'the shorter side of a matrix is {shorter}'
    elif not share.seconds_left:
      entry['left_out'] = 'the time is up'
    else:
      run_case(args, share, written, limit)
      gc.collect()  # PyTorch would keep the memory of what is gone.
      if args.device == 'gpu':
        peers.release()
    record.write(args.output, written)
  for entry in written['cases']:
    text = f'left out, {entry["left_out"]}\n' if 'left_out' in entry else None
    sys.stdout.write(f'{case_of(entry)}, T = {entry["gap"]}\n\n')
    sys.stdout.write(f'{text or table(entry)}\n')
  plot(written['cases'], args.plot)


if __name__ == '__main__':
  main()
