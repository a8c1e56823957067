"""Times the optimizer step alone, of this package and of its peers.

A case is a shape, a dtype of weights and gradients, and a rank. A shape is one
matrix, such as 4096x4096, or the attention and MLP kernels of a LLaMA: 60m,
130m, 350m, 1b, at the rank of the GaLore protocol. Gradients have a decaying
spectrum plus noise. A step is `update` and `apply_updates` in one jitted
function with weights and state donated; for PyTorch, `optimizer.step()`. See
benchmarks/step_methods.py for the layouts.

  python -m benchmarks.step --minutes 12
  python -m benchmarks.step --shapes 4096x4096 --ranks 32 128 512
  python -m benchmarks.step --shapes 60m --methods floor 'gradnormlorp*'
  python -m benchmarks.step --device gpu --shapes 4096x4096 4096x11008 \
    60m 130m 350m 1b --ranks 128 32 64 256 512 1024

The machine should have nothing else to do: the threads of PyTorch wait for each
other at every operation, so that one core lost costs them many times its share.

Cases come in the order of their worth: all shapes with the first rank and
dtype, then the others. Each may take a sixth of the time that is left, the last
ones more. Within a case the methods run in turns of a few steps, so that a
machine that slows down slows them all, until each has made as many counted
steps as lie between two refreshes. What earlier cases tell of a method's first
step says whether it fits; if not, the method, or the whole case, is left out
and named. A method that is not known yet runs anyway: begin with a small shape.
Methods of one framework share one set of weights, which they update in turn.
Where all states do not fit the memory (20 GB on a CPU) together, methods run in
groups, with the floor in each if it fits, and the table says so.

The first step fits all bases and is timed by itself, compilation apart, as is
the second, which warms up. Where counted steps refresh, as this package's do
for stacks, of which one matrix at a time is refreshed, the cost of refreshes is
from those. Where none does, as with exact SVDs of all matrices at once every
--gap steps, the first step less the median is the cost of a refresh.

With bfloat16 this package's moments and bases are float32, the peers' bfloat16.
On a GPU PyTorch may multiply float32 in TF32, as JAX does by default.

What the columns mean:
  median      median over the turns of a turn's median step; in brackets the
              quartiles over the turns
  / NAME      median over the rounds of turns of the ratio to NAME's median in
              the same round; the file has the quartiles too
  worst       the worst step, in medians of its turn. A step's place in the
              refresh interval decides what work it has; of the visits of a
              place the fastest counts, so that what the machine does beside is
              left out after two visits. For methods that refresh, but in no
              counted step, it is the first step
  refresh     what refreshes add to the mean step, at --gap; `first` marks those
              from the first step. Not for methods whose every step refreshes
  first       the first step, which fits all bases
  compile     tracing and compiling the step
  state       bytes of the optimizer's state, bases included (MB are 10^6 bytes)
  peak        weights, gradients, state and what a step needs beside them: what
              the compiler assigns (without LAPACK's own workspace); on a GPU
              what the allocator held at most, where this method set the
              record. Not known of PyTorch on CPUs
  steps       counted steps
  floor       bare products, in float32, that project the gradients and expand
              the result, plus one elementwise pass over gradients and weights:
              what a projecting optimizer cannot save. It has the stacks of this
              package's optimizers; floor-layers has one matrix per layer, as
              the peers

Published: pull request 95 of pytorch/ao has the GaLore-Adam step of PyTorch for
one 4096x4096 float32 matrix on an H100, without SVD, at ranks 32 to 512. It
compares with the medians of `--device gpu --shapes 4096x4096` on an H100 alone.
"""

import os

# JAX and PyTorch share a GPU: neither may take all of it in advance.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import harness, methods, record, turns
from benchmarks.common.tables import markdown
from benchmarks.step.step_methods import (
  DEFAULT,
  METHODS,
  Case,
  Data,
  FullError,
  is_ours,
  kernels_of,
  make_cases,
  memory_limit,
  release,
)
from gnlorp_jax.models import llama

RESULTS = pathlib.Path('benchmarks/results/step.json')
PLOT = pathlib.Path('docs/results/step.png')
SHAPES = ('60m', '4096x4096', '130m', '4096x11008', '350m', '1b')
DTYPES = ('float32', 'bfloat16')
REFERENCES = ('floor', 'galore-torch', 'optax-galore', 'torch-adamw')
ROUNDS = 5  # Wanted at least: turns are shortened for them.
SHARES = 6  # A case may take this part of the time that is left.
Row = dict[str, Any]


class Pace:
  """What the cases so far tell of the time that a method needs."""

  def __init__(self):
    self._seen: dict[str, dict[str, tuple[Case, Row]]] = {}

  def note(self, case: Case, row: Row) -> None:
    """Remembers a measured row; the latest of a shape counts."""
    seen = self._seen.setdefault(row['method'], {})
    seen.pop(case.shape, None)
    seen[case.shape] = case, row

  def seconds(self, name: str, case: Case) -> float:
    """To compile, to take the first step, and `ROUNDS` others; 0: not known.

    From the same shape, or else from the latest: the first step grows as exact
    SVDs do, the others with the number of weights.
    """
    seen = self._seen.get(name)
    if not seen:
      return 0.0
    other, row = seen.get(case.shape, list(seen.values())[-1])
    first = row['first_step_s'] * case.factoring / other.factoring
    steps = ROUNDS * row['median_s'] * case.weights / other.weights
    return (row['compile_s'] or 0.0) + first + steps


class Runner(NamedTuple):
  """What all cases have in common."""

  names: list[str]
  turn: int
  platform: str
  limit: float
  pace: Pace


def first_line(error: Exception) -> str:
  """The kind of an error and the first line of its text."""
  lines = str(error).splitlines() or ['']
  return f'{type(error).__name__}: {lines[0]}'


def row_of(racer: turns.Racer, group: list[turns.Racer], gap: int) -> Row:
  """What is known of a method by now, with ratios to others of its group."""
  method = racer.method
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
  return known | {
    'median_s': float(np.median(medians)),
    'quartiles_s': np.percentile(medians, [25, 75]).tolist(),
    'worst_per_median': worst,
    'max_per_median': largest,
    'visits': visits,
    'refresh_s_per_step': cost,
    'refresh_from': source,
    'refreshing_steps': float(
      np.mean(np.concatenate([turn.refreshed for turn in racer.turns]))
    ),
    'per': {
      other.name: turns.ratio_quartiles(racer.turns, other.turns)
      for other in group
      if other.name in REFERENCES and other.turns
    },
  }


def build(
  names: list[str],
  data: Data,
  clock: harness.Clock,
  pace: Pace,
  note: Callable[[Row], None],
) -> tuple[list[turns.Racer], dict[str, str]]:
  """Builds methods and takes their first steps.

  Args:
    names: Keys of `METHODS`.
    data: Weights and gradients.
    clock: The time of the case.
    pace: What is known of the methods' need of it.
    note: Gets the row of each method, also of one that cannot run.

  Returns:
    The methods, and those that did not fit the memory, with the reason.
  """
  racers, full = list[turns.Racer](), dict[str, str]()
  for name in names:
    need, left = pace.seconds(name, data.case), clock.seconds_left
    if need > left:
      why = f'left out: needs about {need:.0f} s, the case has {left:.0f} s'
      note({'method': name, 'absent': why})
      continue
    try:
      method = METHODS[name](data)
      racers.append(turns.Racer(name, method, data.inputs))
      method.note_peak()
      note(row_of(racers[-1], racers, data.case.gap))
      harness.progress(f'  {name}: first step {racers[-1].first_s:.2f} s')
    except FullError as error:
      full[name] = str(error)
    except methods.AbsentError as error:
      note({'method': name, 'absent': str(error)})
    except Exception as error:  # Whatever a peer raises is its row.
      note({'method': name, 'error': first_line(error)})
      data.repair()
  return racers, full


def race(
  racers: list[turns.Racer],
  data: Data,
  clock: harness.Clock,
  turn: int,
  note: Callable[[Row], None],
) -> None:
  """Takes turns until an interval of steps is made, or the time is up.

  Args:
    racers: The methods; one whose step fails is taken out.
    data: Their weights and gradients.
    clock: The time that is left to them.
    turn: Most steps in a row of one method.
    note: Gets the rows after each round.
  """
  a_step = sum(racer.second_s for racer in racers)
  steps = int(clock.seconds_left / (ROUNDS * a_step))
  steps = min(max(steps, 1), turn)
  rounds, last = 0, 0.0
  while racers and rounds * steps < data.case.gap:
    if rounds and clock.seconds_left < last:
      break
    start = time.perf_counter()
    for racer in turns.order(racers, rounds):
      # PyTorch's threads keep spinning for a while after their work.
      time.sleep(0.05)
      try:
        racer.turn(steps)
      except Exception as error:
        racers.remove(racer)
        note({'method': racer.name, 'error': first_line(error)})
        data.repair()
    last = time.perf_counter() - start
    rounds += 1
    for racer in racers:
      note(row_of(racer, racers, data.case.gap))
  harness.progress(f'  {rounds} rounds of {steps} steps')


def run_case(
  case: Case,
  runner: Runner,
  clock: harness.Clock,
  save: Callable[[list[Row]], None],
) -> list[Row]:
  """Measures all methods, in as many groups as the memory makes necessary.

  Args:
    case: What is optimized.
    runner: The methods, and how they run.
    clock: The time of the case.
    save: Called with all rows after each first step and each round.

  Returns:
    One row per method, in their order.
  """
  rows: dict[str, Row] = {}
  group = 1

  def note(row: Row) -> None:
    # The floor, which may come again, counts where it came first.
    if rows.get(row['method'], {}).get('group', group) != group:
      return
    rows[row['method']] = {**case._asdict(), **row, 'group': group}
    save([rows[name] for name in runner.names if name in rows])

  # What needs little time comes first: a slow one must not take it from many.
  waiting = sorted(runner.names, key=lambda n: runner.pace.seconds(n, case))
  with_floor = True
  while waiting:
    again = with_floor and 'median_s' in rows.get('floor', {})
    names = ['floor', *waiting] if again else waiting
    data = Data(case, runner.platform, runner.limit)
    racers, full = build(names, data, clock, runner.pace, note)
    waiting = list(full)
    if again and [racer.name for racer in racers] == ['floor']:
      with_floor = False  # It leaves no room for the others.
    elif racers:
      groups = 1 + -(-len(waiting) // len(racers))
      race(racers, data, clock.share(groups), runner.turn, note)
    elif waiting:
      note({'method': waiting[0], 'absent': full[waiting[0]]})
      waiting = waiting[1:]
    del data, racers
    release(runner.platform)
    group += 1
  for row in rows.values():
    if 'median_s' in row:
      runner.pace.note(case, row)
  return [rows[name] for name in runner.names if name in rows]


def left_out(case: Case, runner: Runner, clock: harness.Clock) -> str | None:
  """Why a case cannot be measured; None if it can."""
  shorter = min(min(k.n_in, k.n_out) for k in case.kernels.values())
  if case.rank > shorter:
    return f'the shorter side of a matrix is {shorter}'
  if not clock.seconds_left:
    return 'the time is up'
  # One method alone compares with nothing.
  needs = sorted(runner.pace.seconds(name, case) for name in runner.names)
  need, left = sum(needs[:2]), clock.seconds_left
  if need > left:
    return f'needs {need:.0f} s at least, its share is {left:.0f} s'
  return None


def ratios(record: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
  """How this package's optimizers compare: the larger, the better.

  Args:
    record: What this script has written.

  Returns:
    Lower quartile, median and upper quartile of a reference's time divided by
    ours, by a name such as ``step 60m float32 rank 128: floor / gradnormlorp``.
  """
  found = {}
  for row in record['rows']:
    if not is_ours(row['method']):
      continue
    case = Case(row['shape'], row['dtype'], row['rank'], row['gap'])
    for other, (low, median, high) in row.get('per', {}).items():
      name = f'step {case}: {other} / {row["method"]}'
      found[name] = (1 / high, 1 / median, 1 / low)
  return found


def by_case(rows: list[Row]) -> dict[Case, list[Row]]:
  """The rows of each case, in the order of their making."""
  found: dict[Case, list[Row]] = {}
  for row in rows:
    case = Case(row['shape'], row['dtype'], row['rank'], row['gap'])
    found.setdefault(case, []).append(row)
  return found


def _number(value: float | None, form: str, scale: float = 1) -> str:
  return '-' if value is None else format(value * scale, form)


def _ms(seconds: float | None) -> str:
  small = seconds is not None and abs(seconds) < 0.01
  return _number(seconds, '.3f' if small else '.1f', 1e3)


def _cells(row: Row) -> list[str]:
  low, high = row['quartiles_s']
  refresh = _ms(row['refresh_s_per_step'])
  refresh += ' (first)' if row['refresh_from'] == turns.FIRST else ''
  per = [row['per'].get(name, (None, None, None)) for name in REFERENCES]
  return [
    row['method'],
    f'{_ms(row["median_s"])} ({_ms(low)}-{_ms(high)})',
    *(_number(median, '.2f') for _, median, _ in per),
    _number(row['worst_per_median'], '.2f'),
    refresh,
    _number(row['first_step_s'], '.2f'),
    _number(row['compile_s'], '.1f'),
    _number(row['state_bytes'], '.1f', 1e-6),
    _number(row['peak_bytes'], '.1f', 1e-6),
    str(row['steps']),
  ]


def table(record: dict[str, Any]) -> str:
  """A Markdown table per case, and what could not be measured."""
  heads = [
    *('method', 'median, ms', *(f'/ {name}' for name in REFERENCES)),
    *('worst', 'refresh, ms per step', 'first, s', 'compile, s'),
    *('state, MB', 'peak, MB', 'steps'),
  ]
  text = ''
  for case, rows in by_case(record['rows']).items():
    measured = [row for row in rows if 'median_s' in row]
    text += f'{case}, T = {case.gap}\n\n'
    text += markdown(heads, [_cells(row) for row in measured]) + '\n'
    groups = sorted({row['group'] for row in measured})
    if len(groups) > 1:
      text += 'Not all states fit the memory together. Timed in turns were: '
      text += '; '.join(
        ', '.join(row['method'] for row in measured if row['group'] == group)
        for group in groups
      )
      text += '. The floor ran with each group that it fits.\n\n'
    for row in rows:
      if 'absent' in row:
        text += f'* {row["method"]}: absent, {row["absent"]}\n'
      if 'error' in row:
        text += f'* {row["method"]}: failed, {row["error"]}\n'
    text += '' if len(rows) == len(measured) else '\n'
  for name, why in record['left_out'].items():
    text += f'* Case {name}: left out, {why}\n'
  return text


def plot(rows: list[Row], path: pathlib.Path) -> None:
  """Time against rank of the matrices, and ratios to the floor of the models.

  Args:
    rows: All rows; those without a median are left out.
    path: Where the picture goes. Nothing is written if there is nothing to see.
  """
  lines: dict[tuple[str, str], dict[str, list[Row]]] = {}
  bars: dict[Case, list[Row]] = {}
  for case, of_case in by_case(rows).items():
    for row in of_case:
      if 'median_s' not in row:
        continue
      if case.shape not in llama.PRESETS:
        panel = lines.setdefault((case.shape, case.dtype), {})
        panel.setdefault(row['method'], []).append(row)
      elif 'floor' in row['per']:
        bars.setdefault(case, []).append(row)
  count = len(lines) + len(bars)
  if not count:
    return
  columns = min(count, 2)
  height = -(-count // columns)
  figure = Figure(figsize=(6.4 * columns, 4.6 * height), layout='constrained')
  panels = figure.subplots(height, columns, squeeze=False).flatten()
  names = list(dict.fromkeys(row['method'] for row in rows))
  for panel, ((shape, dtype), methods_of) in zip(
    panels, lines.items(), strict=False
  ):
    for name, points in methods_of.items():
      points = sorted(points, key=lambda row: row['rank'])
      color = f'C{names.index(name) % 10}'
      panel.loglog(
        [row['rank'] for row in points],
        [1e3 * row['median_s'] for row in points],
        marker='ov^sDPX'[names.index(name) % 7],
        linestyle='-' if is_ours(name) else '--',
        color=color,
        label=name,
      )
    panel.set(title=f'{shape} {dtype}', xlabel='rank', ylabel='ms per step')
    ranks = sorted({row['rank'] for of in methods_of.values() for row in of})
    panel.set_xticks(ranks, [str(rank) for rank in ranks])
    panel.set_xticks([], minor=True)
    panel.legend(fontsize='x-small', ncols=2)
  for panel, (case, of_case) in zip(
    panels[len(lines) :], bars.items(), strict=False
  ):
    low, middle, high = np.array([row['per']['floor'] for row in of_case]).T
    panel.barh(
      [row['method'] for row in of_case],
      middle,
      xerr=[middle - low, high - middle],
      color=['C0' if is_ours(row['method']) else 'C7' for row in of_case],
    )
    panel.invert_yaxis()
    panel.set(title=str(case), xlabel='time per step, floor = 1 (quartiles)')
  for panel in panels[count:]:
    panel.remove()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
  """The command line; `methods` are names, `shapes` are known."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  harness.add_arguments(parser, output=RESULTS, minutes=12)
  add = parser.add_argument
  add(
    '--shapes',
    nargs='+',
    default=SHAPES,
    help=f'matrices INxOUT and models (default: {" ".join(SHAPES)})',
  )
  add(
    '--dtypes',
    nargs='+',
    choices=DTYPES,
    default=DTYPES,
    help='of weights and gradients (default: both)',
  )
  add(
    '--ranks',
    type=int,
    nargs='+',
    default=[128, 512, 32],
    help='of the matrices; models have that of the protocol '
    '(default: 128 512 32)',
  )
  add(
    '--methods',
    nargs='+',
    default=list(DEFAULT),
    metavar='NAME',
    help='names or patterns as of a shell, quoted, of: '
    + ', '.join(METHODS)
    + f' (default: {" ".join(DEFAULT)})',
  )
  add(
    '--gap',
    type=int,
    default=200,
    help='steps between two refreshes of a basis (default: %(default)s)',
  )
  add(
    '--turn',
    type=int,
    default=20,
    help='most steps in a row of one method (default: %(default)s)',
  )
  add(
    '--plot',
    type=pathlib.Path,
    default=PLOT,
    help='picture (default: %(default)s)',
  )
  args = parser.parse_args()
  try:
    args.methods = harness.select(args.methods, METHODS)
    for shape in args.shapes:
      kernels_of(shape)
  except ValueError as error:
    parser.error(str(error))
  for name in ('gap', 'turn', *('ranks',) * len(args.ranks)):
    value = getattr(args, name)
    if min(value if isinstance(value, list) else [value]) < 1:
      parser.error(f'--{name} must be at least 1, got {value}.')
  return args


def main() -> None:
  """Measures, and writes the JSON file, the tables and the picture."""
  args = parse()
  clock = harness.start(args)
  platform = harness.PLATFORMS[args.device]
  runner = Runner(args.methods, args.turn, platform, memory_limit(), Pace())
  written: dict[str, Any] = {
    'environment': harness.environment(),
    'turn': args.turn,
    'rows': [],
    'left_out': {},
  }
  cases = make_cases(args.shapes, args.dtypes, args.ranks, args.gap)
  for number, case in enumerate(cases):
    share = clock.share(min(len(cases) - number, SHARES))
    why = left_out(case, runner, share)
    if why is not None:
      harness.progress(f'{case}: left out, {why}')
      written['left_out'][str(case)] = why
      record.write(args.output, written)
      continue
    harness.progress(f'{case}: {share.seconds_left:.0f} s')
    before = written['rows']

    def save(rows: list[Row], before: list[Row] = before) -> None:
      written['rows'] = before + rows
      record.write(args.output, written)

    run_case(case, runner, share, save)
  plot(written['rows'], args.plot)
  sys.stdout.write(table(written))


if __name__ == '__main__':
  main()
