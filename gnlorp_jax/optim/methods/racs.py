"""RACS: gradients scaled by a number for each row and each column.

Shape suffixes in this file:
  I, O  the input and output axes of a kernel, the last two of its array
Leading axes `[*]` stack matrices; each is treated by itself.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import check_interval, check_matrix
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.norm_growth import limiter
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.parts.trees import record_of_trees

_ROUNDS = 5  # Of the fixed-point iteration, as in the paper.


class RacsState(NamedTuple):
  """State of `scale_by_racs`."""

  row: optax.Params  # float32 [*, in], the paper's s
  col: optax.Params  # float32 [*, out], the paper's q
  norm: optax.Params  # float32 [*], last norm; () without a limit


class _Leaf(NamedTuple):
  """What a step makes of one parameter."""

  update: Any  # float32 [*, in, out]; () before the first
  row: jax.Array
  col: jax.Array
  norm: Any


def two_sided_scales(grad_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
  r"""Scales s of rows and q of columns with ``s q^T ~ G * G``.

  Five rounds of

  .. math:: s = G^{\circ 2} q / |q|^2, \qquad q = (G^{\circ 2})^T s / |s|^2

  from q = 1: a power iteration for the leading singular vectors of the squared
  gradient.

  Args:
    grad_IO: ``G``, float32 ``[*, in, out]``.

  Returns:
    s, float32 ``[*, in]``, and q, float32 ``[*, out]``; zero where G is.

  References:
    Gong et al., 2025, arXiv:2502.07752, equation 16.
  """
  # Of entries of 1 at most, so that no square of a square underflows.
  largest = jnp.max(jnp.abs(grad_IO), axis=(-2, -1), keepdims=True)
  largest = jnp.where(largest > 0, largest, 1)
  square_IO = jnp.square(grad_IO / largest)
  col = jnp.ones_like(grad_IO[..., 0, :])
  for _ in range(_ROUNDS):
    row = _combined(square_IO, col)
    col = _combined(square_IO.mT, row)
  return row * jnp.square(largest[..., 0]), col


def _combined(square_MN: jax.Array, weight_N: jax.Array) -> jax.Array:
  """The rows' sums over N with weights w, divided by |w|^2, ``[*, m]``."""
  length = jnp.sum(jnp.square(weight_N), axis=-1, keepdims=True)
  sums = jnp.sum(square_MN * weight_N[..., None, :], axis=-1)
  return sums / jnp.where(length > 0, length, 1)


def _inverse_root(x: jax.Array) -> jax.Array:
  """One over the root; zero for zero, which scales rows that are zero too."""
  return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)


def scale_by_racs(
  beta: float = 0.9, norm_growth_limit: float | None = 1.01
) -> optax.GradientTransformationExtraArgs:
  r"""RACS' direction for kernels, with float32 state.

  With the moving averages of the scales of `two_sided_scales`,

  .. math:: U_{ij} = G_{ij} / \sqrt{s_i q_j},

  whose norm grows by a factor of `norm_growth_limit` a step at most.

  Args:
    beta: Decay of the averages, in [0, 1).
    norm_growth_limit: At least 1; None lets the norm grow.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: If a number is out of its interval; at `init`, if a leaf has
      fewer than two axes.

  Examples:
    >>> state = scale_by_racs().init({'kernel': jnp.ones((12, 8, 4))})
    >>> state.row['kernel'].shape, state.col['kernel'].shape
    ((12, 8), (12, 4))

  References:
    Gong et al., `Structured Fisher Approximation`, 2025, arXiv:2502.07752,
    algorithm 1.

  Note:
    The paper does not say which axis of a square matrix begins with q = 1;
    here output units do, the rows of PyTorch's ``[out, in]``. A gradient of
    zeros leaves the averages as they are: its scales are 0 / 0. So does one
    whose largest entry is below about 1e-19: its square is zero in float32.
  """
  check_interval('beta', beta, '[0, 1)')
  limit = limiter(norm_growth_limit)

  def init_fn(params: optax.Params) -> RacsState:
    def zeros(path: Any, param: jax.Array) -> _Leaf:
      check_matrix(path_name(path), param.shape)
      *stack, n_in, n_out = param.shape
      return _Leaf(
        update=(),
        row=jnp.zeros((*stack, n_in), jnp.float32),
        col=jnp.zeros((*stack, n_out), jnp.float32),
        norm=limit.init(param.shape),
      )

    tree = jax.tree_util.tree_map_with_path(zeros, params)
    leaf = record_of_trees(tree, _Leaf)
    return RacsState(leaf.row, leaf.col, leaf.norm)

  def direction(
    grad_IO: jax.Array, row: jax.Array, col: jax.Array, norm: Any
  ) -> _Leaf:
    grad_IO = grad_IO.astype(jnp.float32)
    new_row, new_col = two_sided_scales(grad_IO)
    zero = jnp.all(new_row == 0, axis=-1, keepdims=True)
    row = jnp.where(zero, row, beta * row + (1 - beta) * new_row)
    col = jnp.where(zero, col, beta * col + (1 - beta) * new_col)
    update_IO = (
      grad_IO
      * _inverse_root(row)[..., :, None]
      * _inverse_root(col)[..., None, :]
    )
    update_IO, norm = limit.apply(update_IO, norm)
    return _Leaf(update_IO, row, col, norm)

  def update_fn(
    updates: optax.Updates,
    state: RacsState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, RacsState]:
    del params
    leaf = record_of_trees(
      jax.tree.map(direction, updates, state.row, state.col, state.norm), _Leaf
    )
    return leaf.update, RacsState(leaf.row, leaf.col, leaf.norm)

  return skip_empty(optax.GradientTransformation(init_fn, update_fn))


class RacsOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `racs`."""


@with_options()
def racs(
  learning_rate: optax.ScalarOrSchedule,
  scale: float = 0.05,
  *,
  beta: float = 0.9,
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RacsOptions],
) -> optax.GradientTransformationExtraArgs:
  """RACS: stochastic gradients, scaled row by row and column by column.

  A kernel labelled ``low_rank`` has a number for each row, one for each column
  and its last norm as state. All that is labelled ``full`` (embeddings, heads,
  norms, biases) takes Adam.

  Args:
    scale: Multiplies the update of kernels.
    beta: Decay of the averages of the scales of rows and columns, in [0, 1).
    norm_growth_limit: Factor by which the norm of a matrix's update may grow in
      a step, at least 1; None lets it grow.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.

  Examples:
    >>> tx = racs(2e-2)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Gong et al., `Structured Fisher Approximation`, 2025, arXiv:2502.07752,
    algorithm 1.

  Note:
    As in the paper the averages begin at zero and are not corrected: the first
    steps are longer by up to ``1 / (1 - beta)``, so let the learning rate warm
    up. See `scale_by_racs` for what the paper leaves open.
  """
  return assemble(
    optax.chain(scale_by_racs(beta, norm_growth_limit), optax.scale(scale)),
    scale_by_adam(**pick(options, AdamOptions)),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
