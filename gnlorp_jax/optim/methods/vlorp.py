"""VLoRP and ProjFactor: random projections of finer or coarser granularity.

Shape suffixes in this file:
  M, N  the two axes of a gradient, turned so that the basis lives on N
"""

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
from gnlorp_jax.optim.projections.random import Distribution
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.sides import Side


def scale_by_vlorp(
  rank: int = 1,
  update_proj_gap: int = 30,
  scale: float = 0.25,
  *,
  granularity: float = 64,
  distribution: Distribution = 'normal',
  side: Side = 'short',
  spread_refreshes: bool = True,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
) -> optax.GradientTransformationExtraArgs:
  """VLoRP's direction for kernels, Adam in the subspace; see `vlorp`.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection`, `projections.random` and
      `scale_by_adam`.
  """
  return with_low_rank_projection(
    scale_by_adam(b1, b2, eps, eps_mode=eps_mode),
    rank,
    update_proj_gap,
    scale,
    projection=projections.get(
      'random', granularity=granularity, distribution=distribution
    ),
    side=side,
    spread_refreshes=spread_refreshes,
  )


def vlorp(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 1,
  update_proj_gap: int = 30,
  scale: float = 0.25,
  *,
  granularity: float = 64,
  distribution: Distribution = 'normal',
  side: Side = 'short',
  spread_refreshes: bool = True,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'after',
  weight_norm: bool = False,
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """VLoRP in its subspace scheme: Adam on randomly projected gradients.

  Each matrix stores a seed instead of a basis. `granularity` cuts the gradient
  finer or coarser before it is projected; the moments of a kernel whose other
  axis is m have ``m * granularity * rank`` elements each.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: Columns of the random matrix, at least 1.
    update_proj_gap: Steps between two random matrices, at least 1.
    scale: Multiplies the expanded update of projected kernels.
    granularity: Pieces of every row of a gradient, or one over the rows to
      join, see `projections.random`; it must divide the compressed axis.
    distribution: ``normal`` or ``rademacher``, see `projections.random`.
    side: As in `gradnormlorp`; ``both`` needs ``granularity=1``.
    spread_refreshes: As in `gradnormlorp`.
    b1: As in `gradnormlorp`.
    b2: As in `gradnormlorp`.
    eps: As in `gradnormlorp`.
    eps_mode: As in `gradnormlorp`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``after`` or ``before``, see `descend`.
    weight_norm: As in `galore`.
    moment_bits: As in `gradnormlorp`.
    param_labels: As in `gradnormlorp`.
    kernel_axes: As in `gradnormlorp`.
    skip_nonfinite: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: As `gradnormlorp` and `projections.random`.

  Examples:
    >>> tx = vlorp(1e-3, granularity=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Wang et al., `VLoRP`, 2025, arXiv:2505.01744.

  Note:
    As published, the moments stay as they are when the random matrix changes.
    The published run takes a granularity of 256, which does not divide the
    width of every model; 64 was nearly as good there. For its reshape and its
    seeds see `projections.random`.
  """
  return assemble(
    scale_by_vlorp(
      rank,
      update_proj_gap,
      scale,
      granularity=granularity,
      distribution=distribution,
      side=side,
      spread_refreshes=spread_refreshes,
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
