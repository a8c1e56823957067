"""Ways to choose a subspace: one file each, whose name is its config name."""

import importlib
import pkgutil
from typing import Any

from gnlorp_jax.optim.projections.base import Projection

__all__ = ['Projection', 'as_projection', 'get', 'names']


def names() -> tuple[str, ...]:
  """Names of the projections: the modules of this package."""
  modules = (m.name for m in pkgutil.iter_modules(__path__))
  return tuple(sorted(name for name in modules if name != 'base'))


def get(name: str, **options: Any) -> Projection:
  """The projection called `name`, built with `options`.

  Args:
    name: Name of a module of this package, such as ``svd``; it holds a
      function of the same name that returns a `Projection`.
    **options: Arguments of that function.

  Returns:
    The projection.

  Raises:
    ValueError: If no module has that name.

  Examples:
    >>> get('svd', solver='eigh').init((6, 4), 2).shape
    (4, 2)
  """
  if name not in names():
    raise ValueError(f'Unknown projection {name!r}; expected one of {names()}.')
  module = importlib.import_module(f'{__name__}.{name}')
  projection: Projection = getattr(module, name)(**options)
  return projection


def as_projection(projection: str | Projection) -> Projection:
  """`projection`, looked up if it is a name.

  Raises:
    ValueError: If it is neither a `Projection` nor the name of one.
  """
  if isinstance(projection, str):
    return get(projection)
  if not isinstance(projection, Projection):
    raise ValueError(
      f'projection must be a Projection or one of {names()}, got '
      f'{projection!r}.'
    )
  return projection
