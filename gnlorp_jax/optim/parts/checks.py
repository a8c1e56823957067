"""Argument checks of the library: the value, the rule, the fix."""

import numbers
from typing import Any

import optax


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises a `ValueError` that names the choices unless `value` is one."""
  if value not in choices:
    raise ValueError(f'Unknown {name} {value!r}; expected one of {choices}.')


def check_static(name: str, value: int) -> None:
  """Raises a `ValueError` unless `value` is an integer that is not traced."""
  if not isinstance(value, numbers.Integral) or isinstance(value, bool):
    raise ValueError(
      f'{name} must be an integer known at build time, got {value!r}: it fixes '
      'shapes or the program. With optax.inject_hyperparams, list it in '
      f'static_args=({name!r}, ...).'
    )


def check_int(name: str, value: int) -> None:
  """Raises a `ValueError` unless `value` is an integer of at least 1."""
  check_static(name, value)
  if value < 1:
    raise ValueError(f'{name} must be at least 1, got {value}.')


def check_interval(name: str, value: Any, low: float, high: float) -> None:
  """Raises unless low <= value < high; traced values cannot be checked."""
  if isinstance(value, int | float) and not low <= value < high:
    raise ValueError(f'{name} must be in [{low}, {high}), got {value}.')


def check_params(params: optax.Params | None) -> None:
  """Raises a `ValueError` if `update` was called without the parameters."""
  if params is None:
    raise ValueError(
      'params is None: this transformation reads the parameters. Call '
      'update(grads, state, params).'
    )
