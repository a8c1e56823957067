"""The optimizers a user calls, each a short composition of the other files.

Every alias labels the parameters (`labels`), treats each group with its own
chain, and steps over gradients that are not finite.
"""

import logging
from collections.abc import Callable
from typing import Any

import jax
import optax

from gnlorp_jax.optim import nonfinite
from gnlorp_jax.optim.adam import (
  DecayOrder,
  EpsMode,
  descend,
  scale_by_adam,
)
from gnlorp_jax.optim.checks import check_interval
from gnlorp_jax.optim.kernel_axes import KernelAxes, with_kernel_axes
from gnlorp_jax.optim.labels import ParamLabels, labels
from gnlorp_jax.optim.low_rank import with_low_rank_projection
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace import Side
from gnlorp_jax.optim.weight_norm import NormState, with_weight_norm

_logger = logging.getLogger(__name__)


def gradnormlorp(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
  norm_state: NormState = 'synced',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
  weight_decay: float = 0.0,
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
    norm_state: ``synced`` or ``tracked``, see `with_weight_norm`.
    b1: Decay of the first moments, in [0, 1).
    b2: Decay of the second moments, in [0, 1).
    eps: Added to the root of the second moments.
    eps_mode: ``hf`` or ``standard``, see `scale_by_adam`.
    weight_decay: Decoupled decay of all weights, at least 0.
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
    depend on the length of v, so decaying v would do nothing.
  """
  direction = optax.chain(
    with_low_rank_projection(
      scale_by_adam(b1, b2, eps, eps_mode=eps_mode),
      rank,
      update_proj_gap,
      scale,
      projection=projection,
      side=side,
      spread_refreshes=spread_refreshes,
    ),
    descend(learning_rate),
  )
  full = _adam_step(learning_rate, b1, b2, eps, eps_mode, weight_decay)
  low_rank = with_weight_norm(direction, full, norm_state=norm_state)
  tx = _by_label(
    with_kernel_axes(low_rank, kernel_axes),
    full,
    _low_rank_labels(param_labels),
  )
  return nonfinite.skip_nonfinite(tx) if skip_nonfinite else tx


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'after',
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
    b1: As in `gradnormlorp`.
    b2: As in `gradnormlorp`.
    eps: As in `gradnormlorp`.
    eps_mode: As in `gradnormlorp`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``after`` or ``before``, see `descend`.
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
  low_rank = optax.chain(
    with_low_rank_projection(
      scale_by_adam(b1, b2, eps, eps_mode=eps_mode),
      rank,
      update_proj_gap,
      scale,
      projection=projection,
      side=side,
      spread_refreshes=spread_refreshes,
    ),
    descend(learning_rate, weight_decay, decay_order=decay_order),
  )
  full = _adam_step(
    learning_rate, b1, b2, eps, eps_mode, weight_decay, decay_order
  )
  tx = _by_label(
    with_kernel_axes(low_rank, kernel_axes),
    full,
    _low_rank_labels(param_labels),
  )
  return nonfinite.skip_nonfinite(tx) if skip_nonfinite else tx


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_mode: EpsMode = 'standard',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'before',
  param_labels: ParamLabels | None = None,
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """AdamW on every parameter, with float32 moments: the full-rank baseline.

  Args:
    learning_rate: A number or an Optax schedule.
    b1: Decay of the first moments, in [0, 1).
    b2: Decay of the second moments, in [0, 1).
    eps: Added to the root of the second moments.
    eps_mode: ``standard`` or ``hf``, see `scale_by_adam`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``before`` or ``after``, see `descend`.
    param_labels: As in `gradnormlorp`; ``low_rank`` is treated as ``full``.
    skip_nonfinite: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = adamw(1e-3)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Loshchilov & Hutter, `Decoupled Weight Decay`, 2017, arXiv:1711.05101.
  """
  full = _adam_step(
    learning_rate, b1, b2, eps, eps_mode, weight_decay, decay_order
  )
  tx = _by_label(full, full, labels(param_labels))
  return nonfinite.skip_nonfinite(tx) if skip_nonfinite else tx


def _adam_step(
  learning_rate: optax.ScalarOrSchedule,
  b1: float,
  b2: float,
  eps: float,
  eps_mode: EpsMode,
  weight_decay: float,
  decay_order: DecayOrder = 'before',
) -> optax.GradientTransformation:
  """AdamW for one group of parameters, or for magnitudes."""
  check_interval('b1', b1, 0, 1)
  check_interval('b2', b2, 0, 1)
  check_interval('eps', eps, 0, float('inf'))
  check_interval('weight_decay', weight_decay, 0, float('inf'))
  return optax.chain(
    scale_by_adam(b1, b2, eps, eps_mode=eps_mode),
    descend(learning_rate, weight_decay, decay_order=decay_order),
  )


def _by_label(
  low_rank: optax.GradientTransformation,
  full: optax.GradientTransformation,
  label_fn: Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of all parameters from that of each label."""
  transforms = {
    'low_rank': low_rank,
    'full': full,
    'frozen': optax.set_to_zero(),
  }
  return optax.partition(transforms, label_fn)


def _low_rank_labels(
  param_labels: ParamLabels | None,
) -> Callable[[optax.Params], Any]:
  """`labels`, with a warning where it leaves nothing to be projected."""
  plain = labels(param_labels)

  def label_fn(params: optax.Params) -> Any:
    tree = plain(params)
    found = jax.tree.leaves(tree)
    if found and 'low_rank' not in found:
      _logger.warning(
        'No parameter is labelled low_rank: rank has no effect, and this is '
        'plain Adam. See param_labels, and report() for the reasons.'
      )
    return tree

  return label_fn
