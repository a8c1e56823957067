"""SinkGD: gradients whose rows and columns are all of one size."""

from typing import Unpack

import jax
import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import check_int
from gnlorp_jax.optim.parts.normalized import scale_by_normalized, unit_rms


def sinkhorn(grad: jax.Array, iterations: int) -> jax.Array:
  """Divides columns and rows by their root mean squares, again and again.

  Args:
    grad: Kernels ``[*, in, out]``, float32.
    iterations: Rounds, ``L``, at least 1, of first the columns (output
      units), then the rows.

  Returns:
    Matrices whose rows have a root mean square of 1 and whose columns nearly
    have, float32; zero ones stay zero.

  References:
    Scetbon et al., `Gradient Multi-Normalization`, 2025, arXiv:2502.06742,
    algorithm 3.

  Note:
    The paper's rows are those of PyTorch's ``[out, in]``, the columns here.
  """
  for _ in range(iterations):
    grad = unit_rms(unit_rms(grad, axis=-2), axis=-1)
  return grad


class SinkGDOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `sinkgd`."""


@with_options()
def sinkgd(
  learning_rate: optax.ScalarOrSchedule,
  scale: float = 0.05,
  *,
  iterations: int = 5,
  **options: Unpack[SinkGDOptions],
) -> optax.GradientTransformationExtraArgs:
  """SinkGD: no state, for rows and columns of one size.

  A kernel labelled ``low_rank`` moves along its gradient, whose columns and
  rows are divided by their root mean squares in turn, and has no state. All
  that is labelled ``full`` (embeddings, heads, norms, biases) takes Adam.

  Args:
    scale: Multiplies the update of kernels; 1 makes it as large as Adam's.
    iterations: Rounds of normalising columns and rows, at least 1.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.

  Examples:
    >>> tx = sinkgd(2e-2)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})
    >>> jax.tree.reduce(lambda total, x: total + x.size, state, 0) < 16
    True

  References:
    Scetbon et al., `Gradient Multi-Normalization`, 2025, arXiv:2502.06742,
    algorithms 3 and 4.

  Note:
    Rows and columns of a root mean square below 1e-8 are divided by that, as
    in public code; the paper has no such bound.
  """
  check_int('iterations', iterations)
  return assemble(
    optax.chain(
      scale_by_normalized(lambda grad: sinkhorn(grad, iterations)),
      optax.scale(scale),
    ),
    scale_by_adam(**pick(options, AdamOptions)),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
