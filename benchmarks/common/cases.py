"""Parts of a record, measured case by case as far as the time goes.

A record is a dict of parts: what each was measured with, and its rows. A case
that fails, or that there is no time for, is a row with the reason: ``absent``.
"""

import argparse
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

from benchmarks.common import harness, record, turns

LATE = 'left out: out of time'

Row = dict[str, Any]
Record = dict[str, Any]


class Case(NamedTuple):
  """What is measured together."""

  key: Row  # What its rows are called; they need not repeat it.
  measure: Callable[..., Row | list[Row]]  # Makes its row or rows.
  # What `measure` is given: a clock with all of the time that is left, one with
  # an equal share of it, or nothing.
  clock: Literal['all', 'share'] | None = None


def add_parts(
  parser: argparse.ArgumentParser, names: Collection[str], what: str = 'part'
) -> None:
  """Adds the argument `names`: the parts to measure, or none for all."""
  known = ', '.join(names)

  def checked(name: str) -> str:
    if name not in names:
      error = f'no {what} {name!r}; there are {known}.'
      raise argparse.ArgumentTypeError(error)
    return name

  shown = {'metavar': what.upper(), 'help': f'of {known} (default: all)'}
  parser.add_argument('names', nargs='*', type=checked, **shown)


def load(path: pathlib.Path) -> Record:
  """The parts that a file has; none if there is no file."""
  return record.read(path) if path.exists() else {}


def rows(found: Record, part: str) -> list[Row]:
  """The rows of a part that have figures; none if it was not measured."""
  known = found.get(part, {}).get('rows', [])
  return [row for row in known if 'absent' not in row]


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
    resume: Whether rows with figures that the file has are kept, each with its
      commit.
    **header: What the part is measured with, beside the environment.

  Returns:
    The record.
  """
  found, cases = load(output), list(cases)
  known = [
    {**row, 'commit': row.get('commit') or found[part]['commit']}
    for row in rows(found, part)
    if resume
  ]
  made = [
    [row for row in known if case.key.items() <= row.items()] for case in cases
  ]
  header = {**harness.environment(), **header}
  for number, case in enumerate(cases):
    if not made[number]:
      new = _take(part, case, clock, len(cases) - number)
      made[number] = [{**case.key, **row} for row in new]
    found[part] = {**header, 'rows': list(itertools.chain(*made))}
    record.write(output, found)
  return found


def _take(part: str, case: Case, clock: harness.Clock, left: int) -> list[Row]:
  """The rows of a case, or one that says why there are none."""
  if not clock.seconds_left:
    return [{'absent': LATE}]
  harness.progress(f'{part}: {", ".join(map(str, case.key.values()))}')
  try:
    share = clock if case.clock == 'all' else clock.share(left)
    found = _rounded(case.measure(share) if case.clock else case.measure())
  except Exception as error:  # Whatever it is, the other cases go on.
    return [{'absent': turns.reason(error)}]
  return found if isinstance(found, list) else [found]


def _rounded(node: Any) -> Any:
  """All fractions in it with six significant digits."""
  if isinstance(node, dict):
    return {key: _rounded(value) for key, value in node.items()}
  if isinstance(node, list):
    return [_rounded(value) for value in node]
  return float(f'{node:.6g}') if isinstance(node, float) else node


def absent(rows: Iterable[Row]) -> str:
  """The rows without figures, and why, as a Markdown list."""
  lines = []
  for row in rows:
    if 'absent' in row:
      key = ', '.join(f'{k} {v}' for k, v in row.items() if k != 'absent')
      lines.append(f'* {key}: {row["absent"]}\n')
  return ''.join(lines)
