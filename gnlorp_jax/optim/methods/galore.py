"""GaLore: Adam on projected gradients."""

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.parts.adam import (
  DecayOrder,
  EpsMode,
  scale_by_adam,
)
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
)
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.moments import (
  MomentsOnRefresh,
  moment_rule,
)
from gnlorp_jax.optim.subspace.sides import Side


def scale_by_galore(
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
  basis_bits: int = 32,
  lazy_refresh: LazyRefresh | None = None,
  moments_on_refresh: MomentsOnRefresh = 'keep',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
) -> optax.GradientTransformationExtraArgs:
  """GaLore's direction for kernels: Adam in the subspace of their gradients.

  The arguments are those of `galore`; learning rate and decay follow in
  `descend`, or all around it weight normalisation, as in `gradnormlorp`.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection` and `scale_by_adam`.
  """
  rule = moment_rule(moments_on_refresh, b1, b2)
  return with_low_rank_projection(
    scale_by_adam(
      b1, b2, eps, eps_mode=eps_mode, count_per_matrix=rule is not None
    ),
    rank,
    update_proj_gap,
    scale,
    projection=projection,
    side=side,
    spread_refreshes=spread_refreshes,
    basis_bits=basis_bits,
    lazy_refresh=lazy_refresh,
    on_refresh=rule,
  )


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
  basis_bits: int = 32,
  lazy_refresh: LazyRefresh | None = None,
  moments_on_refresh: MomentsOnRefresh = 'keep',
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
  """GaLore: Adam on projected gradients.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: As in `gradnormlorp`.
    update_proj_gap: As in `gradnormlorp`.
    scale: Multiplies the expanded update of projected kernels.
    projection: As in `gradnormlorp`.
    side: As in `gradnormlorp`; ``short`` is the reference's ``std``, ``long``
      its ``reverse_std``, ``both`` its ``full``.
    spread_refreshes: As in `gradnormlorp`.
    basis_bits: As in `gradnormlorp`.
    lazy_refresh: As in `gradnormlorp`.
    moments_on_refresh: As in `gradnormlorp`.
    b1: As in `gradnormlorp`.
    b2: As in `gradnormlorp`.
    eps: As in `gradnormlorp`.
    eps_mode: As in `gradnormlorp`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``after`` or ``before``, see `descend`.
    weight_norm: Whether kernels move as magnitude times direction, which is
      what `gradnormlorp` does; see `with_weight_norm`.
    moment_bits: As in `gradnormlorp`.
    param_labels: As in `gradnormlorp`.
    kernel_axes: As in `gradnormlorp`.
    skip_nonfinite: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = galore(1e-2, rank=4, projection='svd')
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507, algorithm 2.

  Note:
    With ``projection=projections.get('svd', solver='exact')`` and
    ``spread_refreshes=False`` it follows the public PyTorch code; the defaults
    find the subspace by power iteration and spread the refreshes.
  """
  return assemble(
    scale_by_galore(
      rank,
      update_proj_gap,
      scale,
      projection=projection,
      side=side,
      spread_refreshes=spread_refreshes,
      basis_bits=basis_bits,
      lazy_refresh=lazy_refresh,
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
