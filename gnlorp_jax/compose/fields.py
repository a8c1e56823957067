"""What every field of the settings says and is checked for.

What becomes of a run that is resumed with another value of a field stands in
the field's metadata, under `ON_RESUME`:

  fixed   it cannot change: it decides shapes, or the order of the data
  result  it may change in a run by itself, not among runs that are compared
  free    it may change; results do not depend on it

A field without it is fixed.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.training.compatibility import Since

ON_RESUME = 'on_resume'


def result(default: Any) -> Any:
  """A field that may change in a run by itself, not among compared runs."""
  return dataclasses.field(default=default, metadata={ON_RESUME: 'result'})


def free(default: Any) -> Any:
  """A field that may change whenever a run is resumed."""
  return dataclasses.field(default=default, metadata={ON_RESUME: 'free'})


def fixed_settings(config: Any, *, compared: bool = False) -> dict[str, Any]:
  """The settings that a resumed run must share with the run it resumes.

  Args:
    config: A dataclass whose fields may be dataclasses.
    compared: Whether the run is one of several that are compared, which must
      also agree in what changes results.

  Returns:
    Values by dotted names, such as ``optim.rank``.
  """
  kinds = ('fixed', 'result') if compared else ('fixed',)
  return {
    name: value
    for name, field, value in _fields(config)
    if field.metadata.get(ON_RESUME, 'fixed') in kinds
  }


def since_before(config: Any, *, compared: bool = False) -> Since:
  """How records are read that were written before some of the settings came.

  A record that lacks a setting was made as its default has it. That is the
  default of the field itself: what a recipe or a preset has in its place is
  no word about what was before.

  Args:
    config: As of `fixed_settings`.
    compared: As of `fixed_settings`.
  """
  fixed = fixed_settings(config, compared=compared)
  fields = {name: field for name, field, _ in _fields(config)}
  return Since(
    defaults={
      name: fields[name].default
      for name in fixed
      if fields[name].default is not dataclasses.MISSING
    },
    may_change=frozenset(fields.keys() - fixed.keys()),
  )


def _fields(
  config: Any, prefix: str = ''
) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
  """Dotted name, field and value of every setting."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _fields(value, f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}', field, value


def check_at_least_one(config: Any, *names: str) -> None:
  """Raises ValueError unless the named fields are None or at least 1."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not value >= 1:
      raise ValueError(
        f'{type(config).__name__}.{name} must be at least 1, got {value}.'
      )


def check_within(
  config: Any, interval: str, *names: str, fix: str = ''
) -> None:
  """Raises ValueError unless the named fields are None or in an interval.

  Args:
    config: A dataclass.
    interval: As of `check_interval`, such as ``[0, 1)``: no interval has NaN or
      an infinity in it.
    *names: Its fields.
    fix: What to give instead, a sentence.
  """
  for name in names:
    value = getattr(config, name)
    check_interval(f'{type(config).__name__}.{name}', value, interval, fix)


def check_seeds(name: str, seeds: Iterable[int]) -> None:
  """Raises ValueError unless each seed gives random numbers of its own.

  JAX takes the last 32 bits: 2**32 would be 0 again.
  """
  for seed in seeds:
    if not 0 <= seed < 2**32:
      raise ValueError(
        f'{name}={seed} must be a whole number from 0 to {2**32 - 1}.'
      )


def words(text: str) -> tuple[str, ...]:
  """The words between commas, each once."""
  found = (word.strip() for word in text.split(','))
  return tuple(dict.fromkeys(word for word in found if word))


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
  """The numbers between commas, each once.

  Args:
    name: Of the field, for the error.
    text: Its value.
    kind: int or float.

  Raises:
    ValueError: If something between the commas is no such number.
  """
  try:
    return tuple(dict.fromkeys(kind(word) for word in words(text)))
  except ValueError as error:
    raise ValueError(
      f'{name}={text!r} must be numbers joined by commas: {error}.'
    ) from None
