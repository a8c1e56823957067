"""How far a run is: a live bar on a terminal, elsewhere lines of the log."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import rich.console
import rich.progress

from gnlorp_jax.training import distributed

_logger = logging.getLogger(__name__)


class Progress(NamedTuple):
  """What shows how far training is.

  Attributes:
    step: ``step(number, loss, tokens_per_second)`` is called now and then.
    doing: ``with doing(what)`` says what takes a while beside steps, such as
      ``evaluating``.
  """

  step: Callable[[int, float, float], None]
  doing: Callable[[str], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def shown(
  total: int,
  start: int = 0,
  *,
  name: str = '',
  plain_interval: float = 30.0,
  console: rich.console.Console | None = None,
) -> Iterator[Progress]:
  """Shows how far training is: a live bar, or lines where there is no terminal.

  Args:
    total: Number of steps of the whole run.
    start: Number of steps taken before.
    name: Which run it is, where a program has several.
    plain_interval: Without a terminal, seconds between two lines of the log.
    console: Where to show the bar; None is the standard output.

  Yields:
    What to tell it.
  """
  console = console or rich.console.Console()
  if not distributed.is_first():
    yield Progress(lambda *facts: None, lambda what: contextlib.nullcontext())
    return
  if not console.is_terminal:
    yield _plain(total, plain_interval, name)
    return
  columns = (
    rich.progress.TextColumn(
      '{task.description}step {task.completed:,}/{task.total:,}'
      '{task.fields[doing]}'
    ),
    rich.progress.BarColumn(bar_width=None),
    rich.progress.TextColumn('loss {task.fields[loss]}'),
    rich.progress.TextColumn('{task.fields[rate]} tokens/s'),
    rich.progress.TextColumn('ETA'),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=console, expand=True) as bar:
    task = bar.add_task(
      f'{name} ' if name else '',
      total=total,
      completed=start,
      loss='-',
      rate='-',
      doing='',
    )

    def step(number: int, loss: float, tokens_per_second: float) -> None:
      bar.update(
        task,
        completed=number,
        loss=f'{loss:.4f}',
        rate=f'{tokens_per_second:,.0f}',
      )

    @contextlib.contextmanager
    def doing(what: str) -> Iterator[None]:
      bar.update(task, doing=f', {what}', refresh=True)
      try:
        yield
      finally:
        bar.update(task, doing='')

    yield Progress(step, doing)


def _plain(total: int, interval: float, name: str) -> Progress:
  """Logs a line when the last one is `interval` seconds ago, and at the end.

  What it does beside steps is told the first time. The time left follows from
  the steps since the first call: what came before it was compilation.
  """
  first: tuple[int, float] | None = None
  last = -math.inf
  prefix = f'{name}: ' if name else ''
  told: set[str] = set()

  def step(number: int, loss: float, tokens_per_second: float) -> None:
    nonlocal first, last
    now = time.monotonic()
    first = first or (number, now)
    if now - last < interval and number < total:
      return
    last = now
    steps, seconds = number - first[0], now - first[1]
    left = (
      f', ETA {_duration(seconds / steps * (total - number))}' if steps else ''
    )
    _logger.info(
      '%sstep %s/%s, loss %.4f, %s tokens/s%s',
      prefix,
      f'{number:,}',
      f'{total:,}',
      loss,
      f'{tokens_per_second:,.0f}',
      left,
    )

  @contextlib.contextmanager
  def doing(what: str) -> Iterator[None]:
    if what not in told:
      _logger.info('%s%s ...', prefix, what.capitalize())
      told.add(what)
    yield

  return Progress(step, doing)


def _duration(seconds: float) -> str:
  """Seconds as hours, minutes and seconds: '1:02:03'."""
  minutes, whole = divmod(round(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02}:{whole:02}'
