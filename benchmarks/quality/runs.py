"""Comparisons of training runs: what runs next, files, the table, the picture.

A row is a run. It has a `method`, a `learning_rate` and a `seed`; how it ended
in words, the `outcome`; its curves `eval` and `train`, lists of [step, loss];
and what else its benchmark says of it. A run that failed says why in `absent`.
"""

import argparse
import datetime
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np

from benchmarks.common import harness, pages, plots, record
from benchmarks.common.tables import NOTHING, markdown

PAGE = pathlib.Path('docs/results/quality.md')
MIB = 2**20
MARKERS = 'os^vDP'

Row = dict[str, Any]
Run = tuple[str, float, int]  # Method, peak learning rate, seed.
Trainer = Callable[[float, int], Row]  # Maps peak learning rate and seed.


class Plan(NamedTuple):
  """Which runs are wanted."""

  rates: dict[str, tuple[float, ...]]  # By method, the likeliest first.
  seeds: int = 1
  extend: int = 0  # Most rates tried beyond the given ones, per method.


def key(row: Row) -> Run:
  """What tells a run from others."""
  return row['method'], row['learning_rate'], row['seed']


def ending(
  evals: list[list[float]], losses: Sequence[float], skipped: jax.Array | int
) -> Row:
  """What a row says of how a run went.

  Args:
    evals: The evaluations, [step, loss]; the first is before the first step.
    losses: The training loss of every step.
    skipped: How many steps were left out.
  """
  finite = np.isfinite(losses)
  number, last = evals[-1]
  if not finite.all():
    outcome = f'loss not finite from step {int(np.argmin(finite)) + 1}'
  elif not math.isfinite(last):
    outcome = f'eval loss not finite after step {number}'
  elif skipped:
    outcome = f'{skipped} steps had no finite gradient'
  elif last > evals[0][1]:
    outcome = f'eval loss {last:.2f}, above the untrained'
  else:
    outcome = 'trained'
  return {
    'outcome': outcome,
    'skipped_steps': int(skipped),
    'eval': [[number, record.finite(loss)] for number, loss in evals],
    # Losses are float32, which has no more digits.
    'train': [
      [number, loss if loss is None else round(loss, 6)]
      for number, loss in record.curve(losses)
    ],
  }


def final(row: Row) -> float:
  """The evaluation loss after the last step."""
  return row['eval'][-1][1]


def ended(row: Row) -> str:
  """The last evaluation loss, or what went wrong."""
  if row.get('outcome') == 'trained':
    return f'{final(row):.4f}'
  return row.get('absent') or row['outcome']


def trained(rows: Iterable[Row]) -> list[Row]:
  """The runs that neither failed nor diverged."""
  return [row for row in rows if row.get('outcome') == 'trained']


def best_rate(rows: Iterable[Row], name: str) -> float | None:
  """The rate at which seed 0 ended lowest; None if it trained at none."""
  first = [
    row for row in trained(rows) if (row['method'], row['seed']) == (name, 0)
  ]
  return min(first, key=final)['learning_rate'] if first else None


def tried(rows: Iterable[Row], name: str) -> list[float]:
  """The rates that a method was tried at, ascending; seed 0 tries them."""
  return sorted(
    row['learning_rate']
    for row in rows
    if (row['method'], row['seed']) == (name, 0)
  )


def counted(rows: Sequence[Row]) -> list[Row]:
  """The runs of a method at its best rate that say how it ends.

  Seed 0 chose the rate: where two others ran, it does not count.
  """
  others = [row for row in rows if row['seed'] != 0]
  return others if len(others) > 1 else list(rows)


def chosen(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """The trained runs at the best rate of every method, the lowest first."""
  found = {}
  for name in sorted({row['method'] for row in rows}):
    at_best = name, best_rate(rows, name)
    best = [row for row in rows if key(row)[:2] == at_best]
    if mine := trained(counted(best)):
      found[name] = mine
  by_loss = sorted(found, key=lambda name: np.mean([*map(final, found[name])]))
  return {name: found[name] for name in by_loss}


def pending(name: str, rows: Sequence[Row], plan: Plan) -> list[Run]:
  """The runs of a method that come next, given those that are known.

  First the planned rates, then rates beyond the edge, then seeds: what follows
  depends on how these end.
  """
  done = {key(row)[1:] for row in rows if row['method'] == name}
  planned = plan.rates[name]
  untried = [rate for rate in planned if (rate, 0) not in done]
  if untried:
    return [(name, rate, 0) for rate in untried]
  tried = [rate for rate, seed in done if seed == 0]
  best = best_rate(rows, name)
  if best is None and any('absent' in r for r in rows if r['method'] == name):
    return []  # It cannot run at all: lower rates would not help.
  if len(set(tried) - set(planned)) < plan.extend:
    # Where nothing trained, the rates were too high.
    if best is None or best == min(tried):
      return [(name, min(tried) / 2, 0)]
    if best == max(tried):
      return [(name, max(tried) * 2, 0)]
  seeds = [] if best is None else range(1, plan.seeds)
  return [(name, best, seed) for seed in seeds if (best, seed) not in done]


def read(
  output: pathlib.Path, settings: Row | None = None
) -> tuple[Row, list[Row]]:
  """The runs of a file and of its parts, each run once.

  Args:
    output: The file of the whole comparison.
    settings: What the runs must have been made with; None takes those of the
      first file.

  Returns:
    What the first file holds beside its rows, ``{}`` if there is no file, and
    the rows in the order of their keys.

  Raises:
    ValueError: If a file has other settings.
  """
  header, rows = {}, {}
  parts = sorted(output.parent.glob(f'{output.stem}.*of*.json'))
  for path in filter(pathlib.Path.exists, (output, *parts)):
    found = record.read(path)
    rows |= {key(row): row for row in found.pop('rows')}
    header = header or found
    theirs, ours = found['settings'], settings or header['settings']
    other = [
      f'{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here'
      for name in sorted({*theirs, *ours})
      if theirs.get(name) != ours.get(name)
    ]
    if other:
      raise ValueError(
        f'{path} holds runs with other settings: {"; ".join(other)}. Runs of '
        'different settings do not compare: name another --output, or remove '
        'the file.'
      )
  return header, [rows[key] for key in sorted(rows)]


def _deviation(values: np.ndarray) -> np.ndarray:
  """Standard deviation over the first axis; 0 where it is of one run."""
  return np.std(values, axis=0, ddof=min(len(values) - 1, 1))


def spread(values: Sequence[float], digits: int) -> str:
  """Mean and, of two values or more, their standard deviation, as text."""
  mean, deviation = np.mean(values), _deviation(values)
  text = f'{mean:.{digits}f}'
  return text if len(values) < 2 else f'{text} ± {deviation:.{digits}f}'


def _state_mib(row: Row) -> float:
  return sum(row['state_bytes'].values()) / MIB


def table(rows: Sequence[Row]) -> str:
  """A Markdown row per method, the lowest loss first."""
  heads = ['optimizer', 'peak rate', 'eval loss', 'perplexity']
  heads += ['seeds', 'state, MiB', 'tuning']
  winners = chosen(rows)
  lines = []
  for name in dict.fromkeys([*winners, *sorted(row['method'] for row in rows)]):
    mine = [row for row in rows if row['method'] == name]
    cells = [NOTHING] * 5
    if best := winners.get(name):
      losses, rate = [final(row) for row in best], best[0]['learning_rate']
      seeds = len(counted([r for r in mine if r['learning_rate'] == rate]))
      cells = [
        f'{rate:g}',
        spread(losses, 4),
        spread([math.exp(loss) for loss in losses], 1),
        str(seeds) if seeds == len(best) else f'{len(best)} of {seeds} trained',
        f'{_state_mib(best[0]):.1f}',
      ]
    first = [row for row in mine if row['seed'] == 0]
    tuning = [f'{row["learning_rate"]:g}: {ended(row)}' for row in first]
    lines.append([name, *cells, ', '.join(tuning)])
  return markdown(heads, lines)


def curve(row: Row, name: str = 'train') -> np.ndarray:
  """Steps and losses of a curve, ``[2, points]``."""
  return np.array(row[name], float).T


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Loss curves with their deviations, and memory against loss."""
  winners = chosen(rows)
  figure = matplotlib.figure.Figure(figsize=(13, 8), layout='constrained')
  panels = figure.subplot_mosaic(
    [['loss', 'memory'], ['gap', 'memory']], width_ratios=(3, 2)
  )
  losses = {n: np.array([curve(r)[1] for r in winners[n]]) for n in winners}
  # The noise that methods share, of the same batches, hides how they differ.
  average = np.mean([found.mean(axis=0) for found in losses.values()], axis=0)
  for place, (name, runs) in enumerate(winners.items()):
    first, color = runs[0], f'C{place % 10}'
    line, marker = '-' if place < 10 else '--', MARKERS[place % len(MARKERS)]
    points = {'fmt': marker, 'ms': 5, 'capsize': 3, 'color': color}
    steps, _ = curve(first)
    for panel, shift in (('loss', 0), ('gap', average)):
      mean = losses[name].mean(axis=0) - shift
      band = _deviation(losses[name])
      panels[panel].plot(steps, mean, line, color=color, lw=1)
      panels[panel].fill_between(
        *(steps, mean - band, mean + band), color=color, alpha=0.15, lw=0
      )
    evals = np.array([curve(row, 'eval')[1] for row in runs])
    mean, deviation = evals.mean(axis=0), _deviation(evals)
    steps, _ = curve(first, 'eval')
    panels['loss'].errorbar(steps[1:], mean[1:], deviation[1:], **points)
    state, rate = _state_mib(first), first['learning_rate']
    label = f'{spread(evals[:, -1], 3)}, {state:.1f} MiB  {name}, {rate:g}'
    panels['memory'].errorbar(
      *(state, mean[-1], deviation[-1]), label=label, **points
    )
  top = max(found[:, found.shape[1] // 5].mean() for found in losses.values())
  panels['loss'].set(ylabel='loss, nats per token', ylim=(None, top))
  panels['gap'].set(xlabel='step', ylabel='training loss less the mean of all')
  panels['memory'].set(
    xlabel='optimizer state, MiB',
    ylabel='eval loss after the last step',
    xlim=(0, None),
  )
  figure.legend(
    title='lines: training, points: evaluation',
    loc='outside lower center',
    ncols=3,
    fontsize=8,
    frameon=False,
  )
  save(figure, path)


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
  """Writes a picture with a grid in its panels."""
  for axes in figure.axes:
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
  plots.save(figure, path)


class Comparison(NamedTuple):
  """A benchmark whose rows are runs.

  Attributes:
    name: Of its file of results, of its table and of its picture.
    table: Makes Markdown of rows.
    plot: Draws rows, where there is a picture.
    repeats: Whether it takes runs again that its file holds already.
  """

  name: str
  table: Callable[[Sequence[Row]], str] = table
  plot: Callable[[Sequence[Row], pathlib.Path], None] | None = plot
  repeats: bool = False

  @property
  def results(self) -> pathlib.Path:
    """The recorded file."""
    return pathlib.Path(f'benchmarks/results/{self.name}.json')

  @property
  def picture(self) -> pathlib.Path:
    """The recorded picture."""
    return PAGE.with_name(f'{self.name}.png')

  def tables(self) -> dict[str, str]:
    """The recorded runs as a table of the page."""
    return {self.name: self.table(read(self.results)[1])}

  def plots(self) -> None:
    """Draws the recorded runs."""
    self.plot(read(self.results)[1], self.picture)

  def add_arguments(
    self, parser: argparse.ArgumentParser, methods: Iterable[str]
  ) -> None:
    """Adds what `run` asks for."""
    picture = self.picture if self.plot else None
    harness.add_arguments(parser, self.results, minutes=600, plot=picture)
    names = list(methods)
    text = 'names or patterns, of these (default: all): ' + '; '.join(names)
    parser.add_argument(
      '--methods', nargs='+', default=names, metavar='NAME', help=text
    )
    parser.set_defaults(process='1/1')
    if not self.repeats:
      parser.add_argument('--process', help='I/N: the I-th of N processes')

  def run(
    self,
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    plan: Plan,
    prepare: Callable[[], tuple[Row, Callable[[str], Trainer]]],
  ) -> None:
    """Takes what is missing, then reports; one of several processes only runs.

    Args:
      parser: Says what is wrong.
      args: Its arguments.
      plan: The runs that are wanted, of methods of which --methods chooses.
      prepare: Returns the settings that the runs of one file share, and what
        makes the trainer of a method.
    """
    try:
      names = harness.select(args.methods, plan.rates)
      plan = plan._replace(rates={name: plan.rates[name] for name in names})
      match = re.fullmatch(r'(\d+)/(\d+)', args.process)
      number, count = map(int, match.groups()) if match else (0, 0)
      if not 1 <= number <= count:
        raise ValueError(
          f'--process {args.process} must be I/N with 1 <= I <= N.'
        )
      if not args.report:
        clock = harness.start(args)
        self._take(args.output, (number, count), plan, clock, *prepare())
      if args.report or count == 1:
        self._report(args)
    except (ValueError, OSError) as error:
      parser.error(str(error))

  def _take(
    self,
    path: pathlib.Path,
    share: tuple[int, int],
    plan: Plan,
    clock: harness.Clock,
    settings: Row,
    make: Callable[[str], Trainer],
  ) -> None:
    """Takes runs of the methods in turns, until none or no time is left."""
    number, count = share
    # A process keeps a method to itself: its seeds follow from its rates.
    names = list(plan.rates)[number - 1 :: count]
    again = names if self.repeats else ()
    _, rows = read(path, settings)
    # What failed may end otherwise when it is tried again.
    rows = [r for r in rows if 'absent' not in r and r['method'] not in again]
    if count > 1:
      path = path.with_name(f'{path.stem}.{number}of{count}.json')
    header = {'settings': settings, 'environment': harness.environment()}

    def save() -> None:
      own = [row for row in rows if count == 1 or row['method'] in names]
      record.write(path, {**header, 'rows': own})

    save()
    trainers, seconds = {}, []
    while left := [runs for n in names if (runs := pending(n, rows, plan))]:
      for run in [runs[0] for runs in left]:
        # As slow as the median: a process may have been stopped for a while.
        if clock.seconds_left < np.median(seconds or [1.0]):
          names_left = ', '.join(runs[0][0] for runs in left)
          harness.progress(f'Out of time; runs are left of {names_left}.')
          return
        rows.append(_take_run(run, trainers, make))
        save()
        seconds.append(rows[-1]['seconds'])

  def _report(self, args: argparse.Namespace) -> None:
    """Merges the files of all processes into one, and shows what they hold."""
    header, rows = read(args.output)
    if not header:
      raise ValueError(
        f'{args.output} does not exist, so there is nothing to report. Run '
        'without --report first.'
      )
    record.write(args.output, {**header, 'rows': rows})
    sys.stdout.write(self.table(rows))
    if self.plot and chosen(rows):
      self.plot(rows, args.plot)
    if args.report and args.output == self.results:
      pages.write(PAGE, self.tables())


def _take_run(
  run: Run, trainers: dict[str, Trainer], make: Callable[[str], Trainer]
) -> Row:
  """The row of a run; one that fails says why."""
  name, rate, seed = run
  started, worked = time.monotonic(), time.process_time()
  row: Row = {'method': name, 'learning_rate': rate, 'seed': seed}
  try:
    if name not in trainers:
      trainers[name] = make(name)
    row |= trainers[name](rate, seed)
  except Exception as error:  # Whatever it is, the other runs go on.
    lines = str(error).splitlines() or ['']
    row['absent'] = f'{type(error).__name__}: {lines[0]}'
  seconds = round(time.monotonic() - started, 1)
  harness.progress(
    f'{name}, rate {rate:g}, seed {seed}: {ended(row)}, {seconds:.0f} s'
  )
  return row | {
    'seconds': seconds,
    'cpu_seconds': round(time.process_time() - worked, 1),
    'date': datetime.date.today().isoformat(),
    'commit': record.commit(),
  }
