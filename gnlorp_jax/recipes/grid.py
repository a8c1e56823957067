"""Many runs: a search over learning rates, then the other seeds.

A finished run leaves a ``result.json`` and is not repeated; one that was
interrupted goes on at its batch.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import pathlib
import shutil
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import rich.console
import rich.table

from gnlorp_jax.compose.settings import RunConfig
from gnlorp_jax.disk import writing
from gnlorp_jax.training import distributed, loop, records
from gnlorp_jax.training.compatibility import check_compatible
from gnlorp_jax.training.interrupt import Interrupted, StopRequest
from gnlorp_jax.training.monitor import DivergedError

_logger = logging.getLogger(__name__)

RESULT_FILE = 'result.json'
_NEEDED = (
  *('best', 'last', 'learning_rate', 'main_metric', 'seed'),
  *('seconds_per_step', 'settings'),
)
# What a finished run writes: see `run_once`.
Result = dict[str, Any]
Kept = Literal['best', 'all', 'none']
Settings = TypeVar('Settings', bound=RunConfig)


class Member(NamedTuple):
  """One run of a grid.

  Attributes:
    run: The run; its evaluations hold `metric`.
    finish: Writes what a run leaves behind, from its outcome.
    describe: What its result says besides what came out of it: at least
      ``learning_rate``, ``seed``, and ``group``, which tells runs that are
      compared from others; it may be empty.
    metric: The number that runs are compared by.
    higher_is_better: Which way.
    opened: Has the run's folder for this process alone while it trains.
  """

  run: loop.Run
  finish: Callable[[loop.Outcome], None]
  describe: Callable[[], Result]
  metric: str
  higher_is_better: bool
  opened: Callable[[], contextlib.AbstractContextManager[None]] = (
    contextlib.nullcontext
  )


def quality(value: float | None, *, higher_is_better: bool = True) -> float:
  """A metric as something to compare: no number is worse than any number."""
  if value is None or math.isnan(value):
    return -math.inf
  return value if higher_is_better else -value


def read_results(
  run_dir: str | pathlib.Path, pattern: str, fields: Sequence[str] = ()
) -> list[Result]:
  """All finished runs below a folder, in the order of their folders.

  Args:
    run_dir: The folder.
    pattern: Where the folders of runs are, such as ``*/*/*``.
    fields: What results of these runs have beside what all have.

  Raises:
    ValueError: If a result is damaged.
  """
  paths = sorted(pathlib.Path(run_dir).glob(f'{pattern}/{RESULT_FILE}'))
  return [_read_result(path, fields) for path in paths]


def _read_result(path: pathlib.Path, fields: Sequence[str] = ()) -> Result:
  """The result of a finished run.

  Raises:
    ValueError: If the file is damaged, or not one that `run_once` wrote.
  """
  fix = 'Remove it, and the run goes on from its last checkpoint or anew.'
  result = records.read_object(
    path, 'result of a run', (*_NEEDED, *fields), fix
  )
  best, metric = result['best'], result['main_metric']
  is_whole = isinstance(best, dict) and {'step', metric} <= best.keys()
  if not is_whole or not isinstance(result['settings'], dict):
    raise ValueError(
      f'{path} is no result of a run: its best={best!r} and settings must be '
      f'objects, the former with a step and {metric!r}. {fix}'
    )
  return result


def search(
  rates: Sequence[float] | None,
  seeds: Sequence[int],
  run: Callable[[float | None, int], Result],
) -> list[Result]:
  """Runs the first seed with every learning rate, the others with the best.

  Args:
    rates: Learning rates to search; None is the one that is configured.
    seeds: The seeds.
    run: The result of a run of a learning rate and a seed.

  Returns:
    The results.
  """
  first = {rate: run(rate, seeds[0]) for rate in rates or (None,)}
  best = None
  if rates:
    best = best_learning_rate(list(first.values()))
    _say_best(first, best)
  others = [run(best, seed) for seed in seeds[1:]]
  return [*first.values(), *others]


def _say_best(first: dict[float, Result], best: float) -> None:
  chosen = first[best]
  tried = ', '.join(
    f'{rate:g}: {_text(result["best"][result["main_metric"]])}'
    for rate, result in first.items()
  )
  _logger.info(
    '%slearning rate %g has the best %s with seed %d (%s).',
    f'{chosen["group"]}: ' if chosen.get('group') else '',
    *(best, chosen['main_metric'], chosen['seed'], tried),
  )


def _text(value: float | None) -> str:
  return 'no number' if value is None else f'{value:.4f}'


def best_learning_rate(results: Sequence[Result]) -> float:
  """The learning rate with the best main metric.

  Args:
    results: Runs that differ in learning rate and seed. Rates are compared by
      the mean over those seeds that ran with all of them, so that no rate is
      judged by other seeds than the rest.

  Returns:
    The rate; of equally good ones the lowest.

  Raises:
    ValueError: If there are no results.
  """
  if not results:
    raise ValueError('There are no results to choose a learning rate from.')
  by_rate: dict[float, dict[int, Result]] = {}
  for result in results:
    by_rate.setdefault(result['learning_rate'], {})[result['seed']] = result
  common = set.intersection(*(set(runs) for runs in by_rate.values()))

  def mean(rate: float) -> float:
    runs = by_rate[rate]
    return statistics.fmean(
      quality(
        runs[seed]['best'][runs[seed]['main_metric']],
        higher_is_better=runs[seed].get('higher_is_better', True),
      )
      for seed in (common or runs)
    )

  return max(sorted(by_rate), key=mean)


def run_once(
  member: Member, stop: StopRequest, *, keep: Kept, is_single: bool
) -> Result:
  """The result of a run: read if it is finished, or else worked out.

  Args:
    member: The run.
    stop: Tells of signals.
    keep: Which checkpoints of a finished run stay.
    is_single: Whether it is the only run: then divergence is an error.

  Returns:
    The result, as it is in the run's folder: what `Member.describe` says, the
    record of the loop, and the settings.

  Raises:
    SystemExit: After a signal.
    DivergedError: If the only run diverged.
    ValueError: If the folder holds a run with other settings.
  """
  run = member.run
  path = run.folder / RESULT_FILE
  result = distributed.from_first(lambda: _finished(path))
  if result is not None:
    check_compatible(
      *(result['settings'], run.metadata, run.folder, run.accepted, run.since)
    )
    # A kill may have come between.
    distributed.from_first(lambda: _remove_what_is_not_kept(run, result, keep))
    _logger.info('%s is finished already.', run.name)
    return result
  with member.opened():
    result = _train(member, stop, is_single=is_single) | {
      'main_metric': member.metric,
      'higher_is_better': member.higher_is_better,
      'settings': run.metadata,
    }
    distributed.from_first(lambda: _write(path, result, run, keep))
  received = distributed.agree_now(stop.received)
  if received:  # Came while the run was finished.
    raise distributed.SharedExit(128 + received)
  return result


def _write(
  path: pathlib.Path, result: Result, run: loop.Run, keep: Kept
) -> None:
  """Writes a result, and removes what is not kept."""
  text = json.dumps(result, indent=2, allow_nan=False)
  writing.write_text(path, text + '\n')
  _remove_what_is_not_kept(run, result, keep)


def _train(member: Member, stop: StopRequest, *, is_single: bool) -> Result:
  """Trains a run; what its result says of it."""
  try:
    outcome = loop.train(member.run, stop)
    member.finish(outcome)
    result = member.describe() | outcome.record
    # A run that keeps no best parameters ends with its last ones.
    result['best'] = result['best'] or result['last']
    return result
  except Interrupted as interrupted:
    if distributed.is_first():
      _logger.warning(
        '%s: %s is trained, and its results are not written yet. The same '
        'command does it.',
        *(interrupted.received.name, member.run.name),
      )
    raise
  except DivergedError as error:
    if is_single:
      raise
    _logger.warning('%s diverged and is given up: %s', member.run.name, error)
    nothing = {'step': None, member.metric: None}
    return member.describe() | {
      'best': nothing,
      'last': nothing,
      'seconds_per_step': None,
      'diverged': str(error),
    }


def _finished(path: pathlib.Path) -> Result | None:
  """The result in a file, if it is there."""
  return _read_result(path) if path.is_file() else None


def _remove_what_is_not_kept(run: loop.Run, result: Result, keep: Kept) -> None:
  """Removes checkpoints of a finished run that were asked not to be kept."""
  if keep == 'all':
    return
  shutil.rmtree(run.folder / 'checkpoints', ignore_errors=True)
  for path in (run.folder / 'best').glob('*'):
    if keep == 'none' or path.name != str(result['best']['step']):
      shutil.rmtree(path)


def run_all(
  config: Settings,
  make_run: Callable[[Settings], loop.Run],
  finish: Callable[[Settings, loop.Outcome], Any],
  opened: Callable[[Settings], contextlib.AbstractContextManager[None]],
  stop: StopRequest,
) -> list[Result]:
  """Runs the first seed with every learning rate, the others with the best.

  Args:
    config: The settings of all runs, whose folders are directly in that of
      these. Runs are compared by the ``loss`` of their evaluations.
    make_run: Makes a run of its settings, which name one rate and one seed.
    finish: Writes what a run leaves behind, from its settings and outcome.
    opened: Has the folder of the run of some settings for this process alone.
    stop: Tells of signals.

  Returns:
    The results, which are in ``results.json`` in the folder as well.
  """
  folder = pathlib.Path(config.run_dir)

  def run(rate: float | None, seed: int) -> Result:
    chosen = rate or config.optim.learning_rate
    one = dataclasses.replace(
      config,
      run_dir=str(folder / f'lr{chosen:g}_seed{seed}'),
      seed=seed,
      seeds=None,
      learning_rates=None,
      optim=dataclasses.replace(config.optim, learning_rate=chosen),
    )
    member = Member(
      run=make_run(one),
      finish=functools.partial(finish, one),
      describe=lambda: {'group': '', 'learning_rate': chosen, 'seed': seed},
      metric='loss',
      higher_is_better=False,
      opened=functools.partial(opened, one),
    )
    result = run_once(member, stop, keep='all', is_single=False)
    distributed.from_first(write)
    return result

  def write() -> None:
    text = json.dumps(read_results(folder, '*'), indent=2, allow_nan=False)
    writing.write_text(folder / 'results.json', text + '\n')

  return search(config.searched_rates, config.seed_numbers, run)


def show(run_dir: str, results: Sequence[Result]) -> None:
  """Prints what a search over learning rates and seeds found.

  Args:
    run_dir: The folder of the runs.
    results: Their results, with the ``loss`` of the validation.
  """
  console = rich.console.Console()
  table = rich.table.Table(title='Runs', title_justify='left')
  for name in (
    'learning rate',
    'seed',
    'validation loss',
    'perplexity',
    'step',
  ):
    table.add_column(name, justify='right')
  for result in results:
    best = result['best']
    values = (best.get('loss'), best.get('perplexity'))
    table.add_row(
      f'{result["learning_rate"]:g}',
      str(result['seed']),
      *('no number' if v is None else f'{v:.4f}' for v in values),
      str(best['step']),
    )
  console.print(table)
  console.print(f'results.json and the runs are in {run_dir}.', highlight=False)
