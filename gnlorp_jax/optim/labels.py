"""Labels of parameters, as documented and used; see `parts.labels`."""

from gnlorp_jax.optim.parts.labels import (
  Assignment,
  ParamLabels,
  assign,
  labels,
)

__all__ = ['Assignment', 'ParamLabels', 'assign', 'labels']
