"""APOLLO-Mini: one ratio per matrix from a projection of rank one."""

import optax

from gnlorp_jax.optim.methods.apollo import apollo
from gnlorp_jax.optim.parts.adam import (
  DecayOrder,
)
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace.sides import Side


def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  update_proj_gap: int = 200,
  scale: float = 128.0,
  *,
  scale_front: bool = True,
  norm_growth_limit: float | None = 1.01,
  projection: str | Projection = 'random',
  side: Side = 'short',
  spread_refreshes: bool = True,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'after',
  weight_norm: bool = False,
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """APOLLO-Mini: one ratio per matrix from a projection of rank one.

  Its moments are two vectors as long as the longer axis. For another rank use
  `apollo` with ``granularity='tensor'``.

  Args:
    learning_rate: As in `apollo`.
    update_proj_gap: As in `apollo`.
    scale: As in `apollo`; published runs took 128 for widths of 512, 192 for
      768, 384 for 1024.
    scale_front: As in `apollo`.
    norm_growth_limit: As in `apollo`.
    projection: As in `apollo`.
    side: As in `apollo`.
    spread_refreshes: As in `apollo`.
    b1: As in `apollo`.
    b2: As in `apollo`.
    eps: As in `apollo`.
    weight_decay: As in `apollo`.
    decay_order: As in `apollo`.
    weight_norm: As in `apollo`.
    moment_bits: As in `apollo`.
    param_labels: As in `apollo`.
    kernel_axes: As in `apollo`.
    skip_nonfinite: As in `apollo`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: As `apollo`.

  Examples:
    >>> tx = apollo_mini(1e-2)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhu et al., `APOLLO`, 2024, arXiv:2412.05270.
  """
  return apollo(
    learning_rate,
    1,
    update_proj_gap,
    scale,
    granularity='tensor',
    scale_front=scale_front,
    norm_growth_limit=norm_growth_limit,
    projection=projection,
    side=side,
    spread_refreshes=spread_refreshes,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    decay_order=decay_order,
    weight_norm=weight_norm,
    moment_bits=moment_bits,
    param_labels=param_labels,
    kernel_axes=kernel_axes,
    skip_nonfinite=skip_nonfinite,
  )
