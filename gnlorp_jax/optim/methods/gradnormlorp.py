"""GradNormLoRP: weight normalisation with projected directions."""

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.galore import scale_by_galore
from gnlorp_jax.optim.parts.adam import (
  DecayOrder,
  EpsMode,
  scale_by_adam,
)
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.parts.weight_norm import NormState
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
)
from gnlorp_jax.optim.subspace.moments import (
  MomentsOnRefresh,
)
from gnlorp_jax.optim.subspace.sides import Side


def gradnormlorp(
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
  norm_state: NormState = 'synced',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'before',
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""GradNormLoRP: weight normalisation with projected directions.

  A kernel is magnitude times direction, :math:`W = g v / |v|`. The gradient of
  v is projected to `rank` and Adam runs there; g, one scalar per output unit,
  has an Adam of its own. Embeddings, heads, norms and biases take plain Adam.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: Rank of the subspaces, at least 1, a Python int.
    update_proj_gap: Steps between two refreshes of a basis, >= 1, a Python int.
    scale: Multiplies the expanded update of the directions; the magnitudes and
      the other parameters move with the plain learning rate.
    projection: Name of a module of `projections`, or a `Projection` such as
      ``projections.get('svd', solver='exact')``.
    side: Axis that is compressed: ``short``, ``long``, ``in``, ``out`` or
      ``both`` (the two-sided form of the paper).
    spread_refreshes: Refresh one matrix at a time instead of all in one step.
    basis_bits: 32, 16, 8 or 4 bits for every element of the bases, see
      `quantize_basis`.
    lazy_refresh: Lets a matrix whose subspace rests wait longer for its next
      refresh, see `LazyRefresh`; None refreshes all equally often.
    moments_on_refresh: ``keep``, ``reset`` or ``rotate`` the moments when their
      basis changes, see `adam.moment_rule`.
    norm_state: ``synced`` or ``tracked``, see `with_weight_norm`.
    b1: Decay of the first moments, in [0, 1).
    b2: Decay of the second moments, in [0, 1).
    eps: Added to the root of the second moments.
    eps_mode: ``hf`` or ``standard``, see `scale_by_adam`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``before`` or ``after`` the step, see `descend`.
    moment_bits: 32, 8 or 4 bits for every element of the moments, see
      `quantize_moments`.
    param_labels: Rules ``(regex, label)`` or what `optax.partition` takes, with
      the labels ``low_rank``, ``full``, ``frozen``; None for the defaults. See
      `labels.assign` and, for a dry run, `inspect.report`.
    kernel_axes: Rules ``(regex, num_in, num_out)`` for kernels with more than
      one input or output axis, such as those of Flax's attention modules; see
      `with_kernel_axes`. Any other kernel is ``[*, in, out]``.
    skip_nonfinite: Leave out and count the steps whose gradients are not
      finite. False where the training step does so around the whole update,
      which needs less memory; see `skip_nonfinite`.

  Returns:
    A complete optimizer; its `update` needs `params`, its updates are float32.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.

  Examples:
    >>> tx = gradnormlorp(1e-2, rank=4)
    >>> params = {'dense': {'kernel': jnp.ones((16, 8)), 'bias': jnp.ones(8)}}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> updates['dense']['kernel'].shape
    (16, 8)

  References:
    Huang et al., `GradNormLoRP`, 2024, arXiv:2412.19616.

  Note:
    The paper projects both sides; its public code, one (``std``), which is the
    default here too. Weight decay shrinks the magnitude: W = g v / |v| does not
    depend on the length of v, so decaying v would do nothing. The public
    code decays after the step.
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
    weight_norm=True,
    norm_state=norm_state,
    moment_bits=moment_bits,
    param_labels=param_labels,
    kernel_axes=kernel_axes,
    skip_nonfinite=skip_nonfinite,
  )
