"""Whether the values of a configuration are of the types of its fields.

Who writes a configuration in Python, or as JSON, may give any value.
"""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class WrongTypeError(ValueError):
  """A field has a value of another type than its own.

  Attributes:
    field: Its dotted name.
  """

  def __init__(self, field: str, text: str):
    super().__init__(text)
    self.field = field


def check_types(config: Any, prefix: str = '') -> None:
  """Raises `WrongTypeError` unless all values are of their fields' types.

  Values from the command line are, whatever is given; those from Python are
  what somebody wrote.

  Args:
    config: A dataclass whose fields may be dataclasses.
    prefix: What its name among those of other settings ends in, such as
      ``optim.``.
  """
  hints = get_type_hints(type(config))
  for field in dataclasses.fields(config):
    name, hint, value = (
      field.name,
      hints[field.name],
      getattr(config, field.name),
    )
    if not is_of(value, hint):
      raise WrongTypeError(
        prefix + name,
        f'{type(config).__name__}.{name}={value!r} must be {described(hint)}.',
      )
    if dataclasses.is_dataclass(value):
      check_types(value, f'{prefix}{name}.')


def is_of(value: Any, hint: Any) -> bool:
  """Whether a value is of a type, as fields of dataclasses have it."""
  origin, inner = get_origin(hint), get_args(hint)
  if origin is Literal:
    return any(value == x and type(value) is type(x) for x in inner)
  if origin in (Union, UnionType):
    return any(is_of(value, x) for x in inner)
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    each = inner[:1] * len(value) if inner[-1:] == (...,) else inner
    return len(value) == len(each) and all(map(is_of, value, each))
  if hint in (int, float):  # True is an int too, and an int a float.
    kinds = int if hint is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)
  return hint is Any or isinstance(value, hint)


_NAMES = {
  int: 'a whole number',
  float: 'a number',
  bool: 'True or False',
  str: 'a text',
  NoneType: 'None',
}


def described(hint: Any) -> str:
  """A type in words."""
  origin, inner = get_origin(hint), get_args(hint)
  if origin is Literal:
    return f'one of {inner}'
  if origin in (Union, UnionType):
    return ' or '.join(described(x) for x in inner)
  if origin is tuple:
    each = inner[:1] if inner[-1:] == (...,) else inner
    return f'a tuple, of each {", ".join(described(x) for x in each)},'.rstrip(
      ','
    )
  return _NAMES.get(hint, f'a {hint.__name__}')
