"""APOLLO-Mini: one ratio per matrix from a projection of rank one."""

from typing import Unpack

import optax

from gnlorp_jax.optim.methods.apollo import apollo, scale_by_apollo
from gnlorp_jax.optim.methods.options import with_options
from gnlorp_jax.optim.methods.recovered_adam import RecoveryOptions


@with_options(
  scale_by_apollo, eps=1e-6, projection='random', decay_order='after'
)
def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  update_proj_gap: int = 200,
  scale: float = 128.0,
  *,
  scale_front: bool = True,
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RecoveryOptions],
) -> optax.GradientTransformationExtraArgs:
  """APOLLO-Mini: one ratio per matrix from a projection of rank one.

  Its moments are two vectors as long as the longer axis. For another rank use
  `apollo` with ``granularity='tensor'``.

  Args:
    scale: Its square root multiplies the update of projected kernels, >= 0;
      published runs took 128 for widths of 512, 192 for 768, 384 for 1024.

  Returns:
    A complete optimizer.

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
    **options,
  )
