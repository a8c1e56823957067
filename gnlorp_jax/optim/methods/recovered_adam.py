"""Adam in a subspace, whose directions become updates of full rank.

What `fira`, `apollo`, `subtrack` and `alice` have in common: lengths of
directions and coordinates, and the keywords around them.

Shape suffixes in this file:
  MN    a gradient's last two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes `[*]` stack matrices; each has norms of its own.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  OneSideOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam, scale_by_bias_correction
from gnlorp_jax.optim.subspace.low_rank import (
  Recovery,
  with_low_rank_projection,
)
from gnlorp_jax.optim.subspace.moments import rotate_moments

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
