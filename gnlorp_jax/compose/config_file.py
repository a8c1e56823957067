"""Configurations that are Python files, which ``--config FILE`` names."""

import difflib
import importlib.util
import pathlib
from typing import TypeVar

Config = TypeVar('Config')


def load(path: str | pathlib.Path, kind: type[Config]) -> Config:
  """Reads a configuration file.

  Args:
    path: A Python file that defines a `kind` under the name ``config``.
    kind: The class of the configuration.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such file or it defines no such configuration.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    beside = sorted(str(p) for p in path.parent.glob('*.py'))
    near = difflib.get_close_matches(str(path), beside, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else f' Files there: {beside}.'
    raise ValueError(f'No configuration file {str(path)!r}.{hint}')
  spec = importlib.util.spec_from_file_location('run_config', path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = getattr(module, 'config', None)
  if not isinstance(config, kind):
    found = '' if config is None else f', which is of {type(config).__name__}'
    raise ValueError(
      f'{str(path)!r} defines no configuration: it must assign a '
      f"{kind.__name__} to the name 'config'{found}."
    )
  return config


def take(args: list[str]) -> tuple[str | None, list[str]]:
  """Takes ``--config FILE`` or ``--config=FILE`` off a command line.

  Args:
    args: Its words.

  Returns:
    The file, or None, and the other words.

  Raises:
    ValueError: If no file follows.
  """
  for i, word in enumerate(args):
    if word == '--config':
      if i + 1 == len(args):
        raise ValueError('--config needs the path of a configuration file.')
      return args[i + 1], args[:i] + args[i + 2 :]
    if word.startswith('--config='):
      return word.split('=', 1)[1], args[:i] + args[i + 1 :]
  return None, args
