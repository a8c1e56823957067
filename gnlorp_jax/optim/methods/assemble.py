"""From the directions of a method to a complete optimizer.

What all aliases have in common stands here: labels, weight normalisation,
learning rate and decay, quantised moments, the guard against gradients that are
not finite, and whatever trees and meshes users have.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from gnlorp_jax.optim.parts import nonfinite
from gnlorp_jax.optim.parts.adam import DecayOrder, descend
from gnlorp_jax.optim.parts.boundary import (
  AxesFn,
  as_they_are,
  axes_by_rules,
  for_any_tree,
)
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.parts.decay_mask import with_decay_mask
from gnlorp_jax.optim.parts.kernel_axes import (
  DimensionNumbers,
  KernelAxes,
  with_kernel_axes,
)
from gnlorp_jax.optim.parts.labels import (
  EMBEDDINGS,
  ParamLabels,
  check_rules_match,
  labels,
)
from gnlorp_jax.optim.parts.split import chain, partition
from gnlorp_jax.optim.parts.update_dtype import with_update_dtype
from gnlorp_jax.optim.parts.weight_norm import NormState, with_weight_norm
from gnlorp_jax.optim.quantized.moments import (
  MomentBits,
  check_moment_bits,
  with_moment_bits,
)

_logger = logging.getLogger(__name__)


def assemble(
  low_rank: optax.GradientTransformation | None,
  full: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: float = 0.0,
  weight_decay_mask: Any = None,
  decay_order: DecayOrder = 'before',
  weight_norm: bool = False,
  norm_state: NormState = 'synced',
  moment_bits: MomentBits = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  weight_dimension_numbers: DimensionNumbers | None = None,
  skip_nonfinite: bool = True,
  update_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimizer of two directions, that of kernels and that of the rest.

  Args:
    low_rank: Direction of what is labelled ``low_rank``, the kernels, projected
      or not, before learning rate and decay; None where they are treated as
      ``full``.
    full: Direction of the parameters labelled ``full`` and, under weight
      normalisation, of the magnitudes.
    learning_rate: A number or an Optax schedule.
    weight_decay: Decoupled decay of the weights, at least 0.
    weight_decay_mask: Which parameters decay, see `options.CommonOptions`.
    decay_order: ``before`` or ``after`` the step, see `descend`.
    weight_norm: Whether kernels move as magnitude times direction, see
      `with_weight_norm`; their decay then acts on the magnitude.
    norm_state: ``synced`` or ``tracked``, see `with_weight_norm`.
    moment_bits: Bits of the moments, see `options.CommonOptions`.
    param_labels: Which parameter is ``low_rank``, ``full`` or ``frozen``, see
      `labels.assign`.
    kernel_axes: Rules about the axes of kernels, see `with_kernel_axes`.
    weight_dimension_numbers: The same as dimension numbers.
    skip_nonfinite: Whether to guard against gradients that are not finite.
    update_dtype: Dtype of the updates, see `with_update_dtype`.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.
  """
  check_moment_bits(moment_bits)
  check_interval('weight_decay', weight_decay, '[0, inf)')
  step = descend(learning_rate, weight_decay, decay_order=decay_order)
  find_labels = functools.partial(
    labels, param_labels, weight_dimension_numbers=weight_dimension_numbers
  )
  is_full = low_rank is None
  init_labels = _checked(find_labels(), kernel_axes, moment_bits, not is_full)
  if low_rank is None:
    low_rank = optax.chain(full, step)
  else:
    low_rank = with_kernel_axes(
      _of_kernels(low_rank, full, step, learning_rate, weight_norm, norm_state),
      kernel_axes,
      weight_dimension_numbers,
    )
  transforms = {
    'low_rank': low_rank,
    'full': optax.chain(full, step),
    'frozen': optax.set_to_zero(),
  }
  tx = partition(transforms, init_labels, find_labels(is_part=True))
  tx = with_moment_bits(tx, _bits_by_name(moment_bits))
  tx = with_update_dtype(tx, update_dtype)
  if skip_nonfinite:
    tx = nonfinite.skip_nonfinite(tx)
  axes_fn: AxesFn = as_they_are
  if not is_full:
    axes_fn = axes_by_rules(
      kernel_axes, weight_dimension_numbers, find_labels(is_part=True)
    )
  tx = for_any_tree(tx, axes_fn)
  if weight_decay_mask is None:
    return tx
  return with_decay_mask(tx, weight_decay_mask)


def _of_kernels(
  direction: optax.GradientTransformation,
  full: optax.GradientTransformation,
  step: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_norm: bool,
  norm_state: NormState,
) -> optax.GradientTransformation:
  """The optimizer of kernels: whole, or of their magnitudes and directions."""
  if not weight_norm:
    return chain(direction, step)
  # W = g v / |v| does not depend on the length of v: only g decays.
  return with_weight_norm(
    chain(direction, descend(learning_rate)),
    optax.chain(full, step),
    norm_state=norm_state,
  )


def _bits_by_name(bits: MomentBits) -> MomentBits:
  """Bits of all moments as rules, by which those of embeddings stay float32."""
  if isinstance(bits, Sequence) or bits == 32:
    return bits
  return [(EMBEDDINGS, 32), ('.*', bits)]


def _checked(
  label_fn: Callable[[optax.Params], Any],
  kernel_axes: KernelAxes,
  moment_bits: MomentBits,
  has_low_rank: bool,
) -> Callable[[optax.Params], Any]:
  """`label_fn` of all parameters, with complaints about what has no effect."""

  def checking_label_fn(params: optax.Params) -> Any:
    check_rules_match('kernel_axes', [rule[0] for rule in kernel_axes], params)
    if isinstance(moment_bits, Sequence):
      check_rules_match(
        'moment_bits', [rule[0] for rule in moment_bits], params
      )
    tree = label_fn(params)
    found = jax.tree.leaves(tree)
    if has_low_rank and found and 'low_rank' not in found:
      _logger.warning(
        'No parameter is labelled low_rank: none is treated as a kernel, and '
        'what is said of kernels (such as rank) has no effect. See '
        'param_labels, and report() for the reasons.'
      )
    return tree

  return checking_label_fn
