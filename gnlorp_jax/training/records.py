"""JSON files that runs write and read again: objects, and rows by step.

A person may have changed them since, or a disk. What is wrong is told with the
file, the line and what to do.
"""

import json
import pathlib
from collections.abc import Collection
from typing import Any


def read_object(
  path: pathlib.Path, what: str, fields: Collection[str], fix: str
) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    path: The file.
    what: What it should hold, for the error.
    fields: Fields that it must have.
    fix: What to do about a damaged file, a sentence.

  Returns:
    The object.

  Raises:
    ValueError: If the file is absent or damaged, or holds something else.
  """
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    _check_fields(found, fields)
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no {what}: {error}. {fix}') from error
  return found


def read_rows(path: pathlib.Path, fix: str) -> list[dict[str, Any]]:
  """Reads a file of JSON lines, each an object with a whole number ``step``.

  Args:
    path: The file. A last line that was cut off is left out.
    fix: What to do about a damaged file, a sentence.

  Returns:
    The objects.

  Raises:
    ValueError: If the file is absent or not UTF-8, or a line is damaged.
  """
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, ValueError) as error:
    raise ValueError(f'Cannot read {path}: {error}. {fix}') from error
  complete, _, _ = text.rpartition('\n')
  rows = []
  # Not `splitlines`: JSON allows other line ends inside a string.
  for number, line in enumerate(complete.split('\n') if complete else (), 1):
    try:
      row = json.loads(line)
      _check_fields(row, ('step',))
      if type(row['step']) is not int:
        raise ValueError(f'its step is {row["step"]!r}, no whole number')
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}:{number}: {error}. {fix}') from error
    rows.append(row)
  return rows


def _check_fields(found: Any, fields: Collection[str]) -> None:
  if not isinstance(found, dict):
    raise ValueError(f'expected a JSON object, got {str(found)[:40]!r}')
  missing = [name for name in fields if name not in found]
  if missing:
    raise ValueError(f'it lacks the fields {missing}')
