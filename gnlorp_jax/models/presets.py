"""Configurations by name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Config = TypeVar('Config')


def find(name: str, presets: Mapping[str, Config]) -> Config:
  """The configuration of that name.

  Args:
    name: Key of `presets`.
    presets: A model's configurations by name.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such name.
  """
  if name not in presets:
    near = difflib.get_close_matches(name.lower(), presets, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'Unknown model {name!r}; expected one of {tuple(presets)}.{hint}'
    )
  return presets[name]
