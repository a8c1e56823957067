"""Argument checks of the library: the value, the rule, the fix."""

import math
import numbers
import re
from collections.abc import Sequence
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


def check_interval(name: str, value: Any, interval: str, fix: str = '') -> None:
  """Raises a `ValueError` unless a number lies in an interval.

  Args:
    name: What to call the number in the error.
    value: The number. What is none, such as a schedule or a traced array, is
      not checked.
    interval: As one writes it, such as ``[0, 1)`` or ``(0, inf)``. NaN and the
      infinities are in none, whatever its brackets say.
    fix: What to give instead, a sentence.

  Examples:
    >>> check_interval('b1', 0.9, '[0, 1)')
    >>> check_interval('learning_rate', float('nan'), '(-inf, inf)')
    Traceback (most recent call last):
      ...
    ValueError: learning_rate must be a finite number in (-inf, inf), got nan.
  """
  if not isinstance(value, numbers.Real):
    return
  low, high = map(float, interval[1:-1].split(','))
  number = float(value)
  above = number >= low if interval[0] == '[' else number > low
  below = number <= high if interval[-1] == ']' else number < high
  finite = math.isfinite(number)
  if not (finite and above and below):
    raise ValueError(
      f'{name} must be {"" if finite else "a finite number "}in {interval}, '
      f'got {value}.{" " * bool(fix)}{fix}'
    )


def check_regex(option: str, rule: Sequence[Any]) -> None:
  """Raises a `ValueError` unless a rule begins with a regular expression.

  Args:
    option: What the rule belongs to.
    rule: A tuple ``(regex, ...)``.
  """
  try:
    re.compile(rule[0])
  except (re.error, TypeError) as error:
    raise ValueError(
      f'{option} rule {rule!r}: not a regular expression: {error}. It is '
      "searched for anywhere in a path such as 'layers/up/kernel': 'up' finds "
      "this one and '.*' all of them."
    ) from error


def check_matrix(name: str, shape: tuple[int, ...]) -> None:
  """Raises a `ValueError` if a parameter has fewer than two axes."""
  if len(shape) < 2:
    raise ValueError(
      f'Parameter {name!r} of shape {list(shape)} is no kernel: a '
      "kernel has at least two axes, [*, in, out]. Label it 'full'."
    )


def check_params(params: optax.Params | None) -> None:
  """Raises a `ValueError` if `update` was called without the parameters."""
  if params is None:
    raise ValueError(
      'params is None: this transformation reads the parameters. Call '
      'update(grads, state, params).'
    )
