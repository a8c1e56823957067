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
  OneSideOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam, scale_by_bias_correction
from gnlorp_jax.optim.parts.checks import check_choice
from gnlorp_jax.optim.parts.norm_growth import limiter
from gnlorp_jax.optim.subspace.low_rank import (
  Recovery,
  with_low_rank_projection,
)
from gnlorp_jax.optim.subspace.moments import rotate_moments

ScalePlacement = Literal['unscaled', 'scaled']

_EPS = 1e-8  # Beside the norm of a channel's coordinates.


def length_ratio(
  direction_MR: jax.Array, low_MR: jax.Array, axes: int | tuple[int, int]
) -> jax.Array:
  """How much longer Adam's direction is than the coordinates it was made of.

  Args:
    direction_MR: Adam's direction, ``[*, m, r]``, float32.
    low_MR: Coordinates of the gradient, ``[*, m, r]``, float32.
    axes: Axes of one length: -1 for a ratio per row, (-2, -1) per matrix.

  Returns:
    Ratios, ``[*, m, 1]`` or ``[*, 1, 1]``, float32.
  """
  wanted = jnp.linalg.norm(direction_MR, axis=axes, keepdims=True)
  given = jnp.linalg.norm(low_MR, axis=axes, keepdims=True)
  return wanted / (given + _EPS)


def channel_ratios(
  grad_MN: jax.Array, direction_MR: jax.Array, low_MR: jax.Array
) -> jax.Array:
  """`length_ratio` of every row of a gradient, ``[*, m, 1]``, float32.

  Raises:
    ValueError: If the coordinates have other rows than the gradient.
  """
  if low_MR.shape[-2] != grad_MN.shape[-2]:
    raise ValueError(
      f'The projection makes {low_MR.shape[-2]} rows of coordinates of the '
      f'{grad_MN.shape[-2]} rows of a gradient, but each row is scaled by the '
      'length of its own. Use a projection that keeps the rows, such as '
      "projections.get('random', granularity=1)."
    )
  return length_ratio(direction_MR, low_MR, -1)


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


class RecoverySubspace(AdamOptions, OneSideOptions, total=False):
  """The shared keywords of `scale_by_recovered_adam`."""


class RecoveryOptions(RecoverySubspace, WeightNormOptions, total=False):
  """The shared keywords of optimizers around it."""


@with_options()
def scale_by_recovered_adam(
  rank: int,
  update_proj_gap: int,
  recovery: Recovery,
  *,
  rotates: bool = False,
  **options: Unpack[RecoverySubspace],
) -> optax.GradientTransformationExtraArgs:
  """Adam in a subspace whose directions become updates of full rank.

  Args:
    recovery: Makes the update of a gradient, its coordinates, and Adam's
      direction of these before the bias corrections.
    rotates: Whether the moments move to a new basis, see `rotate_moments`, or
      stay as they are.
    eps: Added to the root of the second moments, at least 0; the bias
      corrections do not touch it (``hf``).

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection` and `scale_by_adam`.
  """
  adam = pick(options, AdamOptions)
  return optax.chain(
    with_low_rank_projection(
      scale_by_adam(**adam, bias_correction=False, count_per_matrix=rotates),
      rank,
      update_proj_gap,
      on_refresh=rotate_moments(adam['b1'], adam['b2']) if rotates else None,
      recovery=recovery,
      **pick(options, OneSideOptions),
    ),
    # Behind the recovery: public code limits the norm before the correction.
    scale_by_bias_correction(adam['b1'], adam['b2']),
  )


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
