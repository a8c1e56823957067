"""DCT-AdamW: Adam on dynamically chosen columns of a cosine transform."""

import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.parts.adam import (
  DecayOrder,
  EpsMode,
  scale_by_adam,
)
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.projections.dct import Transform
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.moments import (
  MomentsOnRefresh,
  moment_rule,
)
from gnlorp_jax.optim.subspace.sides import Side


def scale_by_dct_adam(
  rank: int = 128,
  update_proj_gap: int = 1,
  scale: float = 1.0,
  *,
  transform: Transform = 'dct2',
  norm: int = 1,
  side: Side = 'short',
  error_bits: int | None = None,
  moments_on_refresh: MomentsOnRefresh = 'rotate',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_mode: EpsMode = 'standard',
) -> optax.GradientTransformationExtraArgs:
  """DCT-AdamW's direction for kernels; the arguments are `dct_adamw`'s.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection` and `projections.dct`.
  """
  rule = moment_rule(moments_on_refresh, b1, b2)
  return with_low_rank_projection(
    scale_by_adam(
      b1, b2, eps, eps_mode=eps_mode, count_per_matrix=rule is not None
    ),
    rank,
    update_proj_gap,
    scale,
    projection=projections.get('dct', transform=transform, norm=norm),
    side=side,
    on_refresh=rule,
    error_bits=error_bits,
  )


def dct_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 1,
  scale: float = 1.0,
  *,
  transform: Transform = 'dct2',
  norm: int = 1,
  side: Side = 'short',
  error_bits: int | None = None,
  moments_on_refresh: MomentsOnRefresh = 'rotate',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_mode: EpsMode = 'standard',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'before',
  weight_norm: bool = False,
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """DCT-AdamW: Adam on dynamically chosen columns of a cosine transform.

  Each matrix stores only the numbers of its columns; they are chosen again at
  every step, and the moments of the columns that stay move along.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: As in `gradnormlorp`.
    update_proj_gap: Steps between two choices of columns, at least 1.
    scale: Multiplies the expanded update of projected kernels.
    transform: ``dct2`` or ``dct3``, see `projections.dct`.
    norm: 1 or 2, the norm that scores a column.
    side: As in `gradnormlorp`.
    error_bits: 32, 8 or 4 bits for every element of a buffer that feeds back
      what projecting lost; None forgets it.
    moments_on_refresh: As in `gradnormlorp`.
    b1: As in `gradnormlorp`.
    b2: As in `gradnormlorp`.
    eps: As in `gradnormlorp`.
    eps_mode: As in `gradnormlorp`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``before`` or ``after``, see `descend`.
    weight_norm: As in `galore`.
    moment_bits: As in `gradnormlorp`.
    param_labels: As in `gradnormlorp`.
    kernel_axes: As in `gradnormlorp`.
    skip_nonfinite: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = dct_adamw(1e-3, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Modoranu et al., `FFT-based Dynamic Subspace Selection`, 2025,
    arXiv:2505.17967, algorithm 2.

  Note:
    The public class rotates moments and feeds errors back only on request; the
    published method rotates, and so does this by default. With an interval T
    above 1 it chooses at steps 1, T, 2T, ...; here at 1, T + 1, 2T + 1, ... of
    each matrix, spread over the interval.
  """
  return assemble(
    scale_by_dct_adam(
      rank,
      update_proj_gap,
      scale,
      transform=transform,
      norm=norm,
      side=side,
      error_bits=error_bits,
      moments_on_refresh=moments_on_refresh,
      b1=b1,
      b2=b2,
      eps=eps,
      eps_mode=eps_mode,
    ),
    scale_by_adam(b1, b2, eps, eps_mode=eps_mode),
    learning_rate,
    weight_decay=weight_decay,
    decay_order=decay_order,
    weight_norm=weight_norm,
    moment_bits=moment_bits,
    param_labels=param_labels,
    kernel_axes=kernel_axes,
    skip_nonfinite=skip_nonfinite,
  )
