"""Rows of a file of results, each found again by what it is of."""

import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.common import harness, record

Row = dict[str, Any]


class Rows:
  """Rows in a JSON file, beside what they were measured with.

  The file is read again before it is written, since another process may have
  added what it measured in the meantime.
  """

  def __init__(
    self, path: pathlib.Path, keys: Sequence[str], name: str = 'rows'
  ):
    """Reads what is there.

    Args:
      path: The file, which need not be there.
      keys: Fields by which a row is found; one that a row lacks is None.
      name: Of the list of rows in the file, which may hold others.
    """
    self._path, self._keys, self._name = path, keys, name
    self._settings: Row = {}
    self._read()

  def _read(self) -> None:
    self._found: Row = {'environment': None, 'settings': {}}
    if self._path.exists():
      self._found |= record.read(self._path)
    self._found.setdefault(self._name, [])

  def agree(self, settings: Row) -> None:
    """Notes what the rows share.

    Raises:
      ValueError: If there are rows of other settings.
    """
    there = self._found['settings']
    for name, value in settings.items():
      if there.get(name, value) != value:
        raise ValueError(
          f'{self._path} holds rows with {name}={there[name]}, and asked for '
          f'is {value}. Give another --output.'
        )
    self._settings |= settings

  def find(self, of: Row) -> Row | None:
    """The row with these keys, if it is there."""
    for row in self._found[self._name]:
      if all(row.get(key) == of.get(key) for key in self._keys):
        return row
    return None

  def keep(self, row: Row) -> None:
    """Writes a row, instead of what there was with its keys."""
    self._read()
    before = self.find(row)
    others = [r for r in self._found[self._name] if r is not before]
    self._found[self._name] = [*others, row]
    self._found['settings'] |= self._settings
    self._found['environment'] = harness.environment()
    record.write(self._path, self._found)
