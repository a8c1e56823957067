"""GaLore with Adafactor in the subspace."""

import functools

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.parts.adafactor import scale_by_adafactor
from gnlorp_jax.optim.parts.adam import DecayOrder
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
)
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.sides import Side


def galore_adafactor(
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
  b1: float | None = None,
  decay_rate: float = 0.8,
  eps: float = 1e-30,
  clip_threshold: float = 1.0,
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'before',
  weight_norm: bool = False,
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Adafactor: second moments of one number per row and column.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: As in `gradnormlorp`.
    update_proj_gap: As in `gradnormlorp`.
    scale: Multiplies the expanded update of projected kernels.
    projection: As in `gradnormlorp`.
    side: As in `gradnormlorp`.
    spread_refreshes: As in `gradnormlorp`.
    basis_bits: As in `gradnormlorp`.
    lazy_refresh: As in `gradnormlorp`.
    b1: Decay of a first moment, in [0, 1); None keeps none.
    decay_rate: As in `scale_by_adafactor`.
    eps: As in `scale_by_adafactor`.
    clip_threshold: As in `scale_by_adafactor`.
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
    ValueError: As `gradnormlorp` and `scale_by_adafactor`.

  Examples:
    >>> tx = galore_adafactor(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507; Shazeer & Stern,
    `Adafactor`, 2018, arXiv:1804.04235.

  Note:
    As in published runs, the learning rate is the one given: neither relative
    to the step nor to the parameter. Unlike there, refreshes are spread over
    the interval and find the subspace by power iteration; see `galore`.
  """
  adafactor = functools.partial(
    scale_by_adafactor, decay_rate, b1, eps, clip_threshold
  )
  return assemble(
    with_low_rank_projection(
      adafactor(matrix_names=''),  # All that is projected is a matrix.
      rank,
      update_proj_gap,
      scale,
      projection=projection,
      side=side,
      spread_refreshes=spread_refreshes,
      basis_bits=basis_bits,
      lazy_refresh=lazy_refresh,
    ),
    adafactor(),
    learning_rate,
    weight_decay=weight_decay,
    decay_order=decay_order,
    weight_norm=weight_norm,
    moment_bits=moment_bits,
    param_labels=param_labels,
    kernel_axes=kernel_axes,
    skip_nonfinite=skip_nonfinite,
  )
