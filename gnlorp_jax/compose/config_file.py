"""Configurations that are Python files, which ``--config FILE`` names.

The file is executed, with all rights of the program.
"""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from gnlorp_jax.models.field_types import WrongTypeError, check_types

Config = TypeVar('Config')

_UNKNOWN_FIELD = re.compile(
  r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
)


# In a checkout a link to configs/.
_SUPPLIED = pathlib.Path(__file__).parents[1] / 'configs'


def names() -> list[str]:
  """The configurations that come with the package, such as ``llama_60m``."""
  return sorted(file.stem for file in _SUPPLIED.glob('[!_]*.py'))


def load(path: str | pathlib.Path, kind: type[Config]) -> Config:
  """Reads a configuration file, by executing it.

  Args:
    path: A Python file that defines a `kind` under the name ``config``, or one
      of `names`.
    kind: The class of the configuration.

  Returns:
    The configuration, all of whose values are of the types of their fields.

  Raises:
    ValueError: If there is no such file, it defines no such configuration, or
      an error is in it, which is then named with its line.
  """
  if str(path) in names():
    path = _SUPPLIED / f'{path}.py'
  path = pathlib.Path(path)
  if path.exists() and path.suffix != '.py':
    raise ValueError(
      f'{str(path)!r} is no Python file, and a configuration is one, named '
      f'*.py: it assigns a {kind.__name__} to the name config.'
    )
  if not path.is_file():
    beside = sorted(str(p) for p in path.parent.glob('*.py'))
    near = difflib.get_close_matches(str(path), [*beside, *names()], n=1)
    hint = f' Did you mean {near[0]!r}?' if near else f' Files there: {beside}.'
    raise ValueError(
      f'No configuration file {str(path)!r}.{hint} Those of the package: '
      f'{", ".join(names())}.'
    )
  module = _executed(path)
  config = getattr(module, 'config', None)
  if not isinstance(config, kind):
    found = '' if config is None else f', which is of {type(config).__name__}'
    raise ValueError(
      f'{str(path)!r} defines no configuration: it must assign a '
      f"{kind.__name__} to the name 'config'{found}."
    )
  try:
    check_types(config)
  except WrongTypeError as error:
    line = _line_of(path, error.field)
    raise ValueError(f'{path}{line}: {error}') from error
  return config


def _executed(path: pathlib.Path) -> ModuleType:
  """The module of a file; what it raises is told with its line."""
  spec = importlib.util.spec_from_file_location('run_config', path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Dataclasses in it look for their module.
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    # It may be in a file that this one imports.
    is_here = error.filename in (None, spec.origin)
    where = str(path) if is_here else error.filename
    line = '' if error.lineno is None else f':{error.lineno}'
    raise ValueError(f'{where}{line}: no Python: {error.msg}.') from error
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: no Python: {error}.') from error
  except (Exception, SystemExit) as error:
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == spec.origin  # In full, however it was asked for.
    ]
    where = f'{path}:{lines[-1]}' if lines else str(path)
    raise ValueError(f'{where}: {_what(error, module)}') from error
  return module


def _what(error: Exception | SystemExit, module: ModuleType) -> str:
  """What went wrong in a file, in words about settings where it is about one.

  Args:
    error: What it raised.
    module: The file's names as far as it came.
  """
  if isinstance(error, NameError) and error.name:
    near = difflib.get_close_matches(error.name, vars(module), n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    return f'the name {error.name!r} is not defined.{hint}'
  if isinstance(error, TypeError):
    unknown = _UNKNOWN_FIELD.search(str(error))
    if unknown:
      return _unknown_field(*unknown.groups(), module)
    # A value of another type, at which a check of its size came to grief.
    for settings in _being_made(error.__traceback__):
      try:
        check_types(settings)
      except WrongTypeError as wrong:
        return str(wrong)
  if isinstance(error, ValueError):
    return str(error)
  if isinstance(error, SystemExit):
    return 'the file ends the program. Let it assign to config alone.'
  return f'{type(error).__name__}: {error}'


def _unknown_field(kind: str, field: str, module: ModuleType) -> str:
  names = list(vars(module).values())
  for inner in [name for name in names if isinstance(name, ModuleType)]:
    names += vars(inner).values()
  text = f'{kind} has no field {field!r}.'
  for found in names:
    if dataclasses.is_dataclass(found) and found.__name__ == kind:
      fields = [f.name for f in dataclasses.fields(found)]
      near = difflib.get_close_matches(field, fields, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      return f'{text}{hint} Fields: {fields}.'
  return text


def _being_made(trace: TracebackType | None) -> Iterator[Any]:
  """The settings whose own checks an error came from."""
  while trace is not None:
    made = trace.tb_frame.f_locals.get('self')
    if trace.tb_frame.f_code.co_name == '__post_init__':
      yield made
    trace = trace.tb_next


def _line_of(path: pathlib.Path, field: str) -> str:
  """Where a file gives a field a value, as ``:LINE``; empty if nowhere."""
  lines = [
    node.value.lineno
    for node in ast.walk(ast.parse(path.read_bytes()))
    if isinstance(node, ast.keyword) and node.arg == field.split('.')[-1]
  ]
  return f':{lines[-1]}' if lines else ''


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
