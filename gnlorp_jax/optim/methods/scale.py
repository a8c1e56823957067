"""SCALE: gradients with normalised columns, and momentum for the head alone."""

import functools
from typing import Any, Unpack

import jax
import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  KernelOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.kernel_axes import with_kernel_axes
from gnlorp_jax.optim.parts.labels import is_head
from gnlorp_jax.optim.parts.normalized import scale_by_normalized, unit_rms
from gnlorp_jax.optim.parts.plain import path_name


class ScaleOptions(AdamOptions, KernelOptions, total=False):
  """The shared keywords of `scale`."""


def scale_by_columns(b1: float = 0.9) -> optax.GradientTransformationExtraArgs:
  r"""SCALE's direction for kernels, with momentum for heads.

  For a kernel ``[*, in, out]`` with gradient G, whose columns are those of the
  output units j,

  .. math:: U_{:j} = \sqrt{n_{in}} \, G_{:j} / |G_{:j}|

  and for a head (`labels.is_head`) the same of the moving average
  ``m <- beta_1 m + (1 - beta_1) G``.

  Args:
    b1: Decay of the average, in [0, 1).

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: If `b1` is out of its interval.
  """
  columns = functools.partial(unit_rms, axis=-2)
  return scale_by_normalized(columns, b1, is_head)


@with_options()
def scale(
  learning_rate: optax.ScalarOrSchedule,
  **options: Unpack[ScaleOptions],
) -> optax.GradientTransformationExtraArgs:
  """SCALE: almost no state, for columns of a length and a head with momentum.

  A kernel labelled ``low_rank`` moves along its gradient, each column (output
  unit) divided by its root mean square, and has no state. A head has a first
  moment, whatever its label is: a kernel is a head if its path names it
  ``lm_head``, ``head``, ``logits``, ``classifier`` or ``score``. What else is
  labelled ``full`` (embeddings, norms, biases) takes Adam.

  Args:
    b1: Decay of the head's moment and of Adam's first ones, in [0, 1).

  Returns:
    A complete optimizer.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.

  Examples:
    >>> tx = scale(1e-3)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})
    >>> jax.tree.reduce(lambda total, x: total + x.size, state, 0) < 16
    True

  References:
    Glentis et al., `A Minimalist Optimizer Design for LLM Pretraining`, 2025,
    arXiv:2506.16659, algorithm 1.

  Note:
    The paper's columns have length one; those of its public code, and these, a
    root mean square of one, so that one learning rate serves them and Adam.
    There embeddings are normalised too; here they are with
    ``param_labels=[('kernel|embed', 'low_rank'), ('.*', 'full')]``, and have
    Adam's moments by default: most of their rows have no gradient in a step. A
    head that is tied to the embedding counts as an embedding. Columns whose
    root mean square is below 1e-8 are divided by that, so that they become
    shorter than others; the paper has no such bound.
  """
  adam = pick(options, AdamOptions)
  columns = scale_by_columns(adam['b1'])
  head = with_kernel_axes(
    columns, options['kernel_axes'], options['weight_dimension_numbers']
  )
  full = optax.chain(
    optax.masked(head, functools.partial(_are_heads, expected=True)),
    optax.masked(
      scale_by_adam(**adam), functools.partial(_are_heads, expected=False)
    ),
  )
  return assemble(columns, full, learning_rate, **pick(options, KernelOptions))


def _are_heads(params: Any, expected: bool) -> Any:
  """Which parameters are heads, or which are not."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (x.ndim > 1 and is_head(path_name(path))) == expected,
    params,
  )
