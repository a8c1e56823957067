"""Fira: GaLore, and the rest of the gradient scaled as Adam scales its part.

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
  scale_by_recovered_adam,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import check_choice
from gnlorp_jax.optim.parts.norm_growth import limiter
from gnlorp_jax.optim.subspace.low_rank import Recovery

ScalePlacement = Literal['unscaled', 'scaled']


def fira_recovery(
  scale: float = 0.25,
  scale_placement: ScalePlacement = 'unscaled',
  norm_growth_limit: float | None = 1.01,
) -> Recovery:
  """Adam's direction in the subspace, and the scaled rest of the gradient.

  With coordinates ``R = G Q``, Adam's direction N of them, and
  ``k_i = |N_i| / (|R_i| + 1e-8)`` for the rows i of the axis M that is
  not compressed,

  * ``unscaled``: ``U = alpha N Q^T + S``,
    ``S_i = k_i (G - alpha R Q^T)_i``
  * ``scaled``: ``U = alpha (N Q^T + S)``,
    ``S_i = k_i (G - R Q^T)_i``

  where S goes through `limit_norm_growth` before it is added.

  Args:
    scale: ``alpha``.
    scale_placement: Whether the rest S is ``scaled`` too, or ``unscaled``.
    norm_growth_limit: Most that the norm of S may grow by in a step, at least
      1; None lets it grow.

  Returns:
    The recovery; its state is the last norm of S, float32 ``[*]``.

  Raises:
    ValueError: If `scale_placement` is unknown or the limit below 1.
  """
  check_choice('scale_placement', scale_placement, get_args(ScalePlacement))
  limit = limiter(norm_growth_limit)
  is_scaled = scale_placement == 'scaled'

  def apply(
    grad_MN: jax.Array,
    low_MR: jax.Array,
    direction_MR: jax.Array,
    back: Callable[[jax.Array], jax.Array],
    state: Any,
  ) -> tuple[jax.Array, Any]:
    ratio_M1 = channel_ratios(grad_MN, direction_MR, low_MR)
    inside_MN = back(low_MR if is_scaled else scale * low_MR)
    rest_MN = ratio_M1 * (grad_MN.astype(jnp.float32) - inside_MN)
    rest_MN, state = limit.apply(rest_MN, state)
    if is_scaled:
      return scale * (back(direction_MR) + rest_MN), state
    return scale * back(direction_MR) + rest_MN, state

  return Recovery(limit.init, apply)


@with_options(scale_by_recovered_adam, eps=1e-6)
def scale_by_fira(
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  scale_placement: ScalePlacement = 'unscaled',
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RecoverySubspace],
) -> optax.GradientTransformationExtraArgs:
  """Fira's direction for kernels, of full rank with moments of low rank.

  Learning rate and decay follow in `descend`.

  Args:
    scale_placement: ``scaled`` multiplies the rest of the gradient by `scale`
      too; ``unscaled`` does not, see `fira_recovery`.
    norm_growth_limit: Factor by which the norm of that rest may grow in a step,
      at least 1; None lets it grow.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `scale_by_recovered_adam` and `fira_recovery`.
  """
  return scale_by_recovered_adam(
    rank,
    update_proj_gap,
    fira_recovery(scale, scale_placement, norm_growth_limit),
    **options,
  )


@with_options(scale_by_fira, eps=1e-6, decay_order='after')
def fira(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  scale_placement: ScalePlacement = 'unscaled',
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RecoveryOptions],
) -> optax.GradientTransformationExtraArgs:
  """Fira: full-rank updates with the moments of GaLore.

  What GaLore's subspace leaves of a gradient is not dropped but scaled, channel
  by channel, as Adam scales the part inside; a limiter on the growth of its
  norm keeps it from spiking.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`; also if `scale_placement` is unknown, if
      `norm_growth_limit` is below 1, or if `side` is ``both``.

  Examples:
    >>> tx = fira(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Chen et al., `Fira`, 2024, arXiv:2410.01623.

  Note:
    ``unscaled`` is what the public code runs: it subtracts only a share `scale`
    of the part inside the subspace and multiplies the rest by nothing. The
    paper's formula is ``scaled``. The public code finds its bases by a full
    SVD, all at once: ``projection=projections.get('svd', solver='exact')`` and
    ``spread_refreshes=False``.
  """
  return assemble(
    scale_by_fira(
      rank,
      update_proj_gap,
      scale,
      scale_placement=scale_placement,
      norm_growth_limit=norm_growth_limit,
      **pick(options, RecoverySubspace),
    ),
    scale_by_adam(**pick(options, AdamOptions), eps_mode='hf'),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
