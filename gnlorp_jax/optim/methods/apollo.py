"""APOLLO: the raw gradient, scaled as Adam scales a random projection of it.

Shape suffixes in this file:
  MN    a gradient's last two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes `[*]` stack matrices; each has norms of its own.
"""

from collections.abc import Callable
from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.methods.recovered_adam import (
  RecoveryOptions,
  RecoverySubspace,
  channel_ratios,
  length_ratio,
  scale_by_recovered_adam,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import check_choice, check_interval
from gnlorp_jax.optim.parts.norm_growth import limiter
from gnlorp_jax.optim.subspace.low_rank import Recovery

Granularity = Literal['channel', 'tensor']


def apollo_recovery(
  scale: float = 1.0,
  granularity: Granularity = 'channel',
  scale_front: bool = False,
  norm_growth_limit: float | None = 1.01,
) -> Recovery:
  r"""The gradient times the ratio of the lengths of direction and coordinates.

  With coordinates R of the gradient G, Adam's direction N of them, and rows i
  of the axis M that is not compressed,

  .. math:: U_i = \sqrt{\alpha} \, \frac{|N_i|}{|R_i| + 1e-8} \, G_i

  or, per ``tensor``, with the norms of the whole matrices. Only lengths leave
  the subspace, so any basis that keeps them serves, and nothing is expanded.

  Args:
    scale: ``alpha``, at least 0. A random projection to rank r leaves
      ratios smaller by about the root of n / r, which it can make up for.
    granularity: ``channel`` for a ratio per row, ``tensor`` for one per matrix.
    scale_front: Whether the factor stands before `limit_norm_growth`, or
      behind.
    norm_growth_limit: Most that the norm of U may grow by in a step, at least
      1; None lets it grow.

  Returns:
    The recovery; its state is the last norm of U, float32 ``[*]``.

  Raises:
    ValueError: If `granularity` is unknown, or a number out of its interval.
  """
  check_interval('scale', scale, '[0, inf)')
  check_choice('granularity', granularity, get_args(Granularity))
  limit = limiter(norm_growth_limit)
  factor = scale**0.5

  def apply(
    grad_MN: jax.Array,
    low_MR: jax.Array,
    direction_MR: jax.Array,
    back: Callable[[jax.Array], jax.Array],
    state: Any,
  ) -> tuple[jax.Array, Any]:
    del back
    if granularity == 'channel':
      ratio = channel_ratios(grad_MN, direction_MR, low_MR)
    else:
      ratio = length_ratio(direction_MR, low_MR, (-2, -1))
    update_MN = ratio * grad_MN.astype(jnp.float32)
    if scale_front:
      return limit.apply(factor * update_MN, state)
    update_MN, state = limit.apply(update_MN, state)
    return factor * update_MN, state

  return Recovery(limit.init, apply)


@with_options(scale_by_recovered_adam, eps=1e-6, projection='random')
def scale_by_apollo(
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  *,
  granularity: Granularity = 'channel',
  scale_front: bool = False,
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RecoverySubspace],
) -> optax.GradientTransformationExtraArgs:
  """APOLLO's direction for kernels, of full rank with moments of low rank.

  Learning rate and decay follow in `descend`.

  Args:
    update_proj_gap: Steps between two refreshes of a projection, at least 1; a
      refresh draws a new one.
    scale: Its square root multiplies the update of projected kernels, >= 0.
    granularity: ``channel`` scales each channel of the longer axis by itself,
      ``tensor`` each matrix.
    scale_front: Whether the root of `scale` stands before the limiter, or
      behind.
    norm_growth_limit: Factor by which the norm of a matrix's update may grow in
      a step, at least 1; None lets it grow.
    projection: Name of a module of `projections` (``random``, ``svd``,
      ``dct``), or a `Projection`; ``svd`` takes GaLore's subspace.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `scale_by_recovered_adam` and `apollo_recovery`.
  """
  return scale_by_recovered_adam(
    rank,
    update_proj_gap,
    apollo_recovery(scale, granularity, scale_front, norm_growth_limit),
    **options,
  )


@with_options(
  scale_by_apollo, eps=1e-6, projection='random', decay_order='after'
)
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  *,
  granularity: Granularity = 'channel',
  scale_front: bool = False,
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RecoveryOptions],
) -> optax.GradientTransformationExtraArgs:
  """APOLLO: gradients scaled channel by channel, without any SVD.

  Adam runs on a random projection of the gradient and only tells how long each
  channel of the update should be; its direction is the raw gradient's.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`; also if `granularity` is unknown, if `scale`
      is below 0, `norm_growth_limit` below 1, or `side` is ``both``.

  Examples:
    >>> tx = apollo(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhu et al., `APOLLO`, 2024, arXiv:2412.05270, algorithm 1.

  Note:
    The limiter looks at a ratio of norms, from which a constant factor cancels:
    `scale_front` moves nothing but the 1e-8 added to the last norm, so it shows
    only where norms are that small. The public code draws all projections anew
    in one step (``spread_refreshes=False``), from seeds that count the
    parameters; the numbers drawn here are other ones.
  """
  return assemble(
    scale_by_apollo(
      rank,
      update_proj_gap,
      scale,
      granularity=granularity,
      scale_front=scale_front,
      norm_growth_limit=norm_growth_limit,
      **pick(options, RecoverySubspace),
    ),
    scale_by_adam(**pick(options, AdamOptions), eps_mode='hf'),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
