"""Complete optimizers: one file each, whose name is its config name."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import optax

__all__ = ['get', 'names']

Method = Callable[..., optax.GradientTransformationExtraArgs]


def names() -> tuple[str, ...]:
  """Names of the optimizers: modules that hold a function of their own name.

  It takes the learning rate first, which tells it from the parts that
  optimizers are made of, such as `assemble`.
  """
  return tuple(_methods())


def get(name: str) -> Method:
  """The optimizer called `name`: a function of a learning rate and options.

  Args:
    name: Name of a module of this package, such as ``galore``.

  Returns:
    The function of that name in it.

  Raises:
    ValueError: If no optimizer has that name.

  Examples:
    >>> tx = get('galore')(1e-2, rank=4)
  """
  if name not in names():
    raise ValueError(f'Unknown optimizer {name!r}; expected one of {names()}.')
  return _methods()[name]


@functools.cache
def _methods() -> dict[str, Method]:
  # Imported when asked for: they import the parts that lie beside them.
  modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
  found = {
    name: getattr(importlib.import_module(f'{__name__}.{name}'), name, None)
    for name in modules
  }
  return {name: f for name, f in found.items() if f and _takes_rate(f)}


def _takes_rate(function: Callable[..., Any]) -> bool:
  parameters = inspect.signature(function).parameters
  return next(iter(parameters), None) == 'learning_rate'
