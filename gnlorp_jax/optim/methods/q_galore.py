"""Q-GaLore: GaLore with few bits and with refreshes only where needed."""

import optax

from gnlorp_jax.optim.methods.galore import galore
from gnlorp_jax.optim.parts.adam import (
  DecayOrder,
  EpsMode,
)
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
)
from gnlorp_jax.optim.subspace.moments import (
  MomentsOnRefresh,
)
from gnlorp_jax.optim.subspace.sides import Side


def q_galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
  basis_bits: int = 4,
  lazy_refresh: LazyRefresh | None = LazyRefresh(),  # noqa: B008 (immutable)
  moments_on_refresh: MomentsOnRefresh = 'keep',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_mode: EpsMode = 'standard',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'after',
  weight_norm: bool = False,
  moment_bits: int = 8,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Q-GaLore's optimizer: 8-bit moments, 4-bit bases, lazy refreshes.

  It is `galore` with other defaults. `inspect.saved_refreshes` tells how many
  refreshes each layer was spared.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: As in `gradnormlorp`.
    update_proj_gap: Steps between two refreshes of a basis at first, >= 1.
    scale: Multiplies the expanded update of projected kernels.
    projection: As in `gradnormlorp`.
    side: As in `gradnormlorp`.
    spread_refreshes: As in `gradnormlorp`.
    basis_bits: As in `gradnormlorp`.
    lazy_refresh: As in `gradnormlorp`.
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
    >>> tx = q_galore(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296.

  Note:
    Its 8-bit weights are no part of an optimizer. The similarity that lets an
    interval grow is the overlap of the two subspaces; the public code compares
    the first singular vectors with their signs:
    ``LazyRefresh(similarity='cosine')``.
  """
  return galore(
    learning_rate,
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
    weight_decay=weight_decay,
    decay_order=decay_order,
    weight_norm=weight_norm,
    moment_bits=moment_bits,
    param_labels=param_labels,
    kernel_axes=kernel_axes,
    skip_nonfinite=skip_nonfinite,
  )
