"""From the directions of a method to a complete optimizer.

What all aliases have in common stands here: labels, weight normalisation,
learning rate and decay, quantised moments, and the guard against gradients that
are not finite.
"""

import logging
from collections.abc import Callable
from typing import Any

import jax
import optax

from gnlorp_jax.optim.parts import nonfinite
from gnlorp_jax.optim.parts.adam import DecayOrder, descend
from gnlorp_jax.optim.parts.checks import check_interval, check_static
from gnlorp_jax.optim.parts.kernel_axes import KernelAxes, with_kernel_axes
from gnlorp_jax.optim.parts.labels import ParamLabels, labels
from gnlorp_jax.optim.parts.split import chain, partition
from gnlorp_jax.optim.parts.weight_norm import NormState, with_weight_norm
from gnlorp_jax.optim.quantized.moments import quantize_moments

_logger = logging.getLogger(__name__)


def assemble(
  low_rank: optax.GradientTransformation | None,
  full: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'before',
  weight_norm: bool = False,
  norm_state: NormState = 'synced',
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimizer of two directions, that of kernels and that of the rest.

  Args:
    low_rank: Direction of the kernels labelled ``low_rank``, before learning
      rate and decay; None where they are treated as ``full``.
    full: Direction of the parameters labelled ``full`` and, under weight
      normalisation, of the magnitudes.
    learning_rate: A number or an Optax schedule.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``before`` or ``after`` the step, see `descend`.
    weight_norm: Whether kernels move as magnitude times direction, see
      `with_weight_norm`; their decay then acts on the magnitude.
    norm_state: ``synced`` or ``tracked``, see `with_weight_norm`.
    moment_bits: 32, 8 or 4 bits for every element of the moments, see
      `quantize_moments`.
    param_labels: As in `gradnormlorp`.
    kernel_axes: As in `gradnormlorp`.
    skip_nonfinite: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.
  """
  check_static('moment_bits', moment_bits)
  if moment_bits not in (32, 8, 4):
    raise ValueError(f'moment_bits must be 32, 8 or 4, got {moment_bits!r}.')
  check_interval('weight_decay', weight_decay, 0, float('inf'))
  step = descend(learning_rate, weight_decay, decay_order=decay_order)
  init_labels = labels(param_labels)
  if low_rank is None:
    low_rank = full
  else:
    init_labels = _warn_without_kernels(init_labels)
  full = optax.chain(full, step)
  if weight_norm:
    # W = g v / |v| does not depend on the length of v: only g decays.
    direction = chain(low_rank, descend(learning_rate))
    low_rank = with_weight_norm(direction, full, norm_state=norm_state)
  else:
    low_rank = chain(low_rank, step)
  transforms = {
    'low_rank': with_kernel_axes(low_rank, kernel_axes),
    'full': full,
    'frozen': optax.set_to_zero(),
  }
  tx = quantize_moments(
    partition(transforms, init_labels, labels(param_labels, is_part=True)),
    moment_bits,
  )
  return nonfinite.skip_nonfinite(tx) if skip_nonfinite else tx


def _warn_without_kernels(
  label_fn: Callable[[optax.Params], Any],
) -> Callable[[optax.Params], Any]:
  """`label_fn`, with a warning where it leaves nothing to be projected."""

  def warning_label_fn(params: optax.Params) -> Any:
    tree = label_fn(params)
    found = jax.tree.leaves(tree)
    if found and 'low_rank' not in found:
      _logger.warning(
        'No parameter is labelled low_rank: rank has no effect, and this is '
        'plain Adam. See param_labels, and report() for the reasons.'
      )
    return tree

  return warning_label_fn
