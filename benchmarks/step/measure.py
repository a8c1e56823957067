"""Times the optimizer step alone, of this package and of its peers.

A case is a shape, a dtype of weights and gradients, and a rank. A shape is one
matrix, such as 4096x4096, or the attention and MLP kernels of a LLaMA: 60m,
130m, 350m, 1b, at the rank of the GaLore protocol. Gradients have a decaying
spectrum plus noise. A step is `update` and `apply_updates` in one jitted
function with weights and state donated; for PyTorch, `optimizer.step()`. See
benchmarks/step/step_methods.py for the layouts.

  python -m benchmarks.step --minutes 12
  python -m benchmarks.step --shapes 60m --methods floor 'gradnormlorp*'
  python -m benchmarks.step --device gpu --shapes 4096x4096 4096x11008 \
    60m 130m 350m 1b --ranks 128 32 64 256 512 1024

The machine should have nothing else to do: the threads of PyTorch wait for each
other at every operation, so that one core lost costs them many times its share.

Cases come in the order of their worth; each may take a sixth of the time that
is left, the last ones more. Within a case the methods take turns of a few steps
until each has made as many counted steps as lie between two refreshes. What the
cases before tell of a method's first step says whether it fits the time; a
method that is not known yet runs anyway: begin with a small shape. What does
not fit the time or the memory (20 GB on a CPU) is named with the reason.

  median      over the turns of a turn's median step; in brackets the quartiles
  / NAME      median over the rounds of turns of the ratio to NAME's median in
              the same round; the file has the quartiles too
  worst       the worst step, in medians of its turn: of the visits of a place
              in the refresh interval the fastest counts. For methods that
              refresh, but in no counted step, it is the first step
  refresh     what refreshes add to the mean step, at --gap: from counted steps
              that refresh, or else (first) from the first step less the median.
              Not for methods whose every step refreshes
  first       the first step, which fits all bases
  compile     tracing and compiling the step
  state       bytes of the optimizer's state, bases included (MB are 10^6 bytes)
  peak        weights, gradients, state and what a step needs beside them, as
              the compiler assigns it (without LAPACK's own workspace). PyTorch:
              what it allocates in two steps on a GPU
  floor       bare products, in float32, that project the gradients and expand
              the result, and one pass over gradients and weights: what a
              projecting optimizer cannot save. It has the stacks of this
              package's optimizers; floor-layers has a matrix per layer, as the
              peers

With bfloat16 this package's moments and bases are float32, the peers' bfloat16.
On a GPU PyTorch may multiply float32 in TF32, as JAX does by default.

Published: pull request 95 of pytorch/ao has the GaLore-Adam step of PyTorch for
one 4096x4096 float32 matrix on an H100, without SVD, at ranks 32 to 512. It
compares with the medians of `--device gpu --shapes 4096x4096` on an H100 alone.
"""

import os

# JAX and PyTorch share a GPU: neither may take all of it in advance.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import argparse
import gc
import pathlib
import sys
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.common import harness, methods, peers, record, turns
from benchmarks.common.plots import Bars, bars
from benchmarks.common.tables import MB, markdown, median_in_quartiles, number
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
OURS = (*methods.OURS, 'gradnormlorp-guard')
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


def row_of(racer: turns.Racer, racers: list[turns.Racer], gap: int) -> Row:
  """What is known of a method by now, with ratios to the others."""
  method: Any = racer.method
  known = {
    'method': racer.name,
    'state_bytes': method.state_bytes,
    'peak_bytes': method.peak_bytes,
    'compile_s': method.compile_s,
    'first_step_s': racer.first_s,
    'steps': sum(len(turn.seconds) for turn in racer.turns),
  }
  if not racer.turns:
    return known
  medians = turns.medians(racer.turns)
  worst, largest, visits = turns.worst_step(racer, gap)
  cost, source = turns.refresh_cost(racer, gap)
  refreshed = np.concatenate([turn.refreshed for turn in racer.turns])
  return known | {
    'median_s': float(np.median(medians)),
    'quartiles_s': np.percentile(medians, [25, 75]).tolist(),
    'worst_per_median': worst,
    'max_per_median': largest,
    'visits': visits,
    'refresh_s_per_step': cost,
    'refresh_from': source,
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
  """Measures all methods; `args.output` is written after each step forward.

  Args:
    args: The command line.
    clock: The time of the case.
    written: The record by now. Its last case is measured, and gets its rows.
    limit: Bytes that the case may take.
  """
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
    *(args.methods, build, lambda *known: row_of(*known, case.gap)),
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
      if row['method'] in OURS:
        for other, (low, median, high) in row.get('per', {}).items():
          name = f'step {case_of(entry)}: {other} / {row["method"]}'
          found[name] = (1 / high, 1 / median, 1 / low)
  return found


def _form(seconds: float | None) -> str:
  return '.1f' if seconds is None or abs(seconds) >= 0.01 else '.3f'


def table(entry: Row) -> str:
  """A case as a Markdown table, and what could not be measured."""
  measured = [row for row in entry['rows'] if 'median_s' in row]
  heads = [
    *('method', 'median, ms', *(f'/ {name}' for name in REFERENCES)),
    *('worst', 'refresh, ms per step', 'first, s', 'compile, s'),
    *('state, MB', 'peak, MB', 'steps'),
  ]
  lines = []
  for row in measured:
    median, cost = row['median_s'], row['refresh_s_per_step']
    low, high = row['quartiles_s']
    per = [row['per'].get(name, (None, None, None)) for name in REFERENCES]
    is_first = row['refresh_from'] == turns.FIRST
    lines.append(
      [
        row['method'],
        median_in_quartiles((low, median, high), _form(median), 1e3),
        *(number(middle, '.2f') for _, middle, _ in per),
        number(row['worst_per_median'], '.2f'),
        number(cost, _form(cost), 1e3) + is_first * ' (first)',
        number(row['first_step_s'], '.2f'),
        number(row['compile_s'], '.1f'),
        number(row['state_bytes'], '.1f', MB),
        number(row['peak_bytes'], '.1f', MB),
        str(row['steps']),
      ]
    )
  return markdown(heads, lines) + turns.not_timed(entry['rows'])


def tables() -> dict[str, str]:
  """The tables of `PAGE`, from the recorded files."""
  named = {
    str(case_of(entry)): table(entry) for entry in record.read(RESULTS)['cases']
  }
  (more,) = record.read(MORE)['cases']
  return named | {'other methods': table(more)}


def plot(cases: list[Row], path: pathlib.Path) -> None:
  """Draws each method's time in that of the floor."""
  panels = []
  for entry in cases:
    rows = [row for row in entry['rows'] if 'floor' in row.get('per', {})]
    if rows:
      panels.append(
        Bars(
          str(case_of(entry)),
          'time per step, floor = 1 (quartiles)',
          {row['method']: row['per']['floor'] for row in rows},
          {r['method']: 'C0' if r['method'] in OURS else 'C7' for r in rows},
        )
      )
  bars(panels, path)


def plots() -> None:
  """Draws the picture of `PAGE` again."""
  plot(record.read(RESULTS)['cases'], PLOT)


def parse() -> argparse.Namespace:
  """The command line; `methods` are names, `shapes` are known."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, minutes=12, plot=PLOT)
  add = parser.add_argument
  add('--shapes', nargs='+', default=SHAPES, help='matrices INxOUT and models')
  add('--dtypes', nargs='+', choices=DTYPES, default=DTYPES, help='of weights')
  ranks = 'of the matrices; models have that of the protocol'
  add('--ranks', type=int, nargs='+', default=[128, 512, 32], help=ranks)
  names = 'names or patterns as of a shell, quoted, of: ' + ', '.join(METHODS)
  add('--methods', nargs='+', default=DEFAULT, metavar='NAME', help=names)
  add('--gap', type=int, default=200, help='steps between two refreshes')
  add('--turn', type=int, default=20, help='most steps in a row of a method')
  args = parser.parse_args()
  try:
    args.methods = harness.select(args.methods, METHODS)
    for shape in args.shapes:
      kernels_of(shape)
  except ValueError as error:
    parser.error(str(error))
  for name in ('gap', 'turn', 'ranks'):
    value = getattr(args, name)
    if np.min(value) < 1:
      parser.error(f'--{name} must be at least 1, got {value}.')
  return args


def main() -> None:
  """Measures, and writes the JSON file, the tables and the picture."""
  args = parse()
  if args.report:
    report.report('step.measure')
    return
  clock, limit = harness.start(args), memory_limit()
  written: Row = {
    **{'environment': harness.environment(), 'turn': args.turn, 'cases': []}
  }
  cases = make_cases(args.shapes, args.dtypes, args.ranks, args.gap)
  for number_of, case in enumerate(cases):
    entry = {**case._asdict(), 'rows': []}
    written['cases'].append(entry)
    share = clock.share(min(len(cases) - number_of, SHARES))
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
    title = f'{case_of(entry)}, T = {entry["gap"]}'
    sys.stdout.write(f'{title}\n\n{text or table(entry)}\n')
  plot(written['cases'], args.plot)


if __name__ == '__main__':
  main()
