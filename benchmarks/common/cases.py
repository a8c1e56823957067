"""Parts of a record, measured case by case as far as the time goes.

A record is a dict of parts, each made by one call: what it was measured with,
and its rows. A case that fails, or that there is no time for, is a row with the
key ``absent``, which says why.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

import jax

from benchmarks.common import harness, record, turns

LATE = 'left out: out of time'

Row = dict[str, Any]
Record = dict[str, Any]


class Case(NamedTuple):
  """What is measured together.

  Attributes:
    key: What its rows are called; they need not repeat it.
    measure: Makes its row or rows.
    clock: What `measure` is given to keep to: a clock with ``all`` of the time
      that is left, one with its ``share`` of it, or nothing.
  """

  key: Row
  measure: Callable[..., Row | list[Row]]
  clock: Literal['all', 'share'] | None = None


def add_parts(
  parser: argparse.ArgumentParser, names: Collection[str], what: str = 'part'
) -> None:
  """Adds the argument `names`: the parts to measure, or none for all."""
  known = ', '.join(names)

  def checked(name: str) -> str:
    if name not in names:
      raise argparse.ArgumentTypeError(
        f'no {what} {name!r}; there are {known}.'
      )
    return name

  shown = {'metavar': what.upper(), 'help': f'of {known} (default: all)'}
  parser.add_argument('names', nargs='*', type=checked, **shown)


def load(path: pathlib.Path) -> Record:
  """The parts that a file has; none if there is no file."""
  return record.read(path) if path.exists() else {}


def rows(found: Record, part: str) -> list[Row]:
  """The rows of a part; none if it was not measured."""
  return found.get(part, {}).get('rows', [])


def measure(
  part: str,
  cases: Iterable[Case],
  output: pathlib.Path,
  clock: harness.Clock,
  *,
  resume: bool = False,
  **header: Any,
) -> Record:
  """Measures a part of a record, and leaves the other parts.

  Args:
    part: Its name.
    cases: By their worth: the last ones are left out first.
    output: File of the record, written after every case.
    clock: The time; a case that has begun is finished.
    resume: Whether rows that the file has are kept. They name their commit.
    **header: What the part is measured with, beside the environment.

  Returns:
    The record.
  """
  found, cases = load(output), list(cases)
  known = [
    {**row, 'commit': row.get('commit') or found[part]['commit']}
    for row in rows(found, part)
    if resume and 'absent' not in row
  ]
  header = {**harness.environment(), **header}
  done = [
    [row for row in known if case.key.items() <= row.items()] for case in cases
  ]
  for number, case in enumerate(cases):
    if not done[number]:
      if clock.seconds_left:
        harness.progress(f'{part}: {", ".join(map(str, case.key.values()))}')
      new = _take(case, clock, len(cases) - number)
      done[number] = [{**case.key, **row} for row in new]
    found[part] = {**header, 'rows': list(itertools.chain(*done))}
    record.write(output, found)
  return found


def _take(case: Case, clock: harness.Clock, left: int) -> list[Row]:
  """The rows of a case, or one that says why there are none."""
  if not clock.seconds_left:
    return [{'absent': LATE}]
  try:
    share = clock if case.clock == 'all' else clock.share(left)
    found = rounded(case.measure(share) if case.clock else case.measure())
  except Exception as error:  # Whatever it is, the other cases go on.
    return [{'absent': turns.reason(error)}]
  return found if isinstance(found, list) else [found]


def rounded(node: Any) -> Any:
  """All fractions in it with six significant digits."""
  if isinstance(node, dict):
    return {key: rounded(value) for key, value in node.items()}
  if isinstance(node, list):
    return [rounded(value) for value in node]
  return float(f'{node:.6g}') if isinstance(node, float) else node


def absent(rows: Iterable[Row]) -> str:
  """The rows without figures, and why, as a Markdown list."""
  lines = []
  for row in rows:
    if 'absent' in row:
      key = ', '.join(f'{k} {v}' for k, v in row.items() if k != 'absent')
      lines.append(f'* {key}: {row["absent"]}\n')
  return ''.join(lines)


class Compiled(turns.Method):
  """A program that takes part in a race, compiled here.

  Attributes:
    key: What it is.
    compile_s: What compiling it took, seconds.
    repeats: How often it runs in a step, so that this can be timed.

  Args:
    key: What it is.
    lowered: The program.
    take: Calls it once and returns what is to be waited for.
  """

  def __init__(
    self,
    key: Row,
    lowered: jax.stages.Lowered,
    take: Callable[[jax.stages.Compiled], Any],
  ):
    start = time.perf_counter()
    self._compiled = lowered.compile()
    self.compile_s = time.perf_counter() - start
    self.key, self.repeats, self._take = key, 1, take

  def step(self, index: int) -> None:
    """Runs it; all steps have the same input."""
    del index
    for _ in range(self.repeats):
      found = self._take(self._compiled)
    jax.block_until_ready(found)


def race(
  racers: list[turns.Racer],
  rounds: tuple[int, int],
  steps: int,
  clock: harness.Clock,
) -> None:
  """Lets all take their turns, in an order that alternates.

  Args:
    racers: Who takes part.
    rounds: The least number of turns of each, where time is short, and the
      largest.
    steps: Steps of a turn.
    clock: The time; a round that has begun is finished.
  """
  least, most = rounds
  for number in range(most):
    if number >= least and not clock.seconds_left:
      break
    for racer in turns.order(racers, number):
      racer.turn(steps)
