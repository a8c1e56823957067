"""ProjFactor: a projected first moment, a factored full-size second one.

Shape suffixes in this file:
  M, N  the two axes of a gradient, turned so that the basis lives on N
"""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  OneSide,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.methods.vlorp import vlorp
from gnlorp_jax.optim.parts.adam import scale_by_adam, scale_by_bias_correction
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.projections.random import Distribution
from gnlorp_jax.optim.subspace.low_rank import (
  Recovery,
  with_low_rank_projection,
)


class Factors(NamedTuple):
  """A second moment of one number per row and column of each matrix."""

  row: jax.Array  # float32 [*, m], sums over the columns
  col: jax.Array  # float32 [*, n], sums over the rows


def factored_root(factors: Factors) -> jax.Array:
  """``sqrt(r c^T / sum r)``, ``[*, m, n]``; 0 where all is zero."""
  total = jnp.sum(factors.row, axis=-1, keepdims=True)
  share_M = factors.row / jnp.where(total > 0, total, 1)
  # Roots before the product: r c^T overflows where the moment itself does not.
  return jnp.sqrt(share_M)[..., :, None] * jnp.sqrt(factors.col)[..., None, :]


def factored_recovery(b2: float, eps: float) -> Recovery:
  r"""Divides the expanded direction by a factored second moment.

  The moment is that of the expanded coordinates ``G'`` of each
  gradient, with row sums r and column sums c:

  .. math::
    r &\leftarrow \beta_2 r + (1 - \beta_2) \, \mathrm{rowsum}(\hat G^{\circ 2})
    \\
    c &\leftarrow \beta_2 c + (1 - \beta_2) \, \mathrm{colsum}(\hat G^{\circ 2})
    \\
    U &= \mathrm{back}(D) / (\sqrt{r c^T / \textstyle\sum r} + \epsilon)

  Args:
    b2: Decay of the second moment, in [0, 1).
    eps: Added to its root, at least 0.

  Returns:
    The `recovery` of `with_low_rank_projection`; its state are `Factors`.

  Raises:
    ValueError: If a number is out of its interval.
  """
  check_interval('b2', b2, '[0, 1)')
  check_interval('eps', eps, '[0, inf)')

  def init(shape: tuple[int, ...]) -> Factors:
    *stack, m, n = shape
    return Factors(
      row=jnp.zeros((*stack, m), jnp.float32),
      col=jnp.zeros((*stack, n), jnp.float32),
    )

  def apply(
    grad_MN: jax.Array,
    low: jax.Array,
    direction: jax.Array,
    back: Callable[[jax.Array], jax.Array],
    factors: Factors,
  ) -> tuple[jax.Array, Factors]:
    del grad_MN
    square_MN = jnp.square(back(low))
    factors = Factors(
      row=b2 * factors.row + (1 - b2) * jnp.sum(square_MN, axis=-1),
      col=b2 * factors.col + (1 - b2) * jnp.sum(square_MN, axis=-2),
    )
    return back(direction) / (factored_root(factors) + eps), factors

  return Recovery(init, apply)


class FirstMomentState(NamedTuple):
  """State of `scale_by_first_moment`."""

  mu: optax.Params  # float32, like the updates


def scale_by_first_moment(b1: float) -> optax.GradientTransformation:
  """The moving average ``m <- beta_1 m + (1 - beta_1) G``.

  Args:
    b1: Its decay, in [0, 1).

  Returns:
    A transformation without bias correction; its updates are float32.

  Raises:
    ValueError: If `b1` is out of its interval.
  """
  check_interval('b1', b1, '[0, 1)')

  def init_fn(params: optax.Params) -> FirstMomentState:
    return FirstMomentState(optax.tree.zeros_like(params, dtype=jnp.float32))

  def update_fn(
    updates: optax.Updates,
    state: FirstMomentState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, FirstMomentState]:
    del params
    updates = optax.tree.cast(updates, jnp.float32)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    return mu, FirstMomentState(mu)

  return optax.GradientTransformation(init_fn, update_fn)


class ProjfactorOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `projfactor`."""


@with_options(vlorp, eps=1e-6, decay_order='after')
def projfactor(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 1,
  update_proj_gap: int = 30,
  scale: float = 1.0,
  *,
  granularity: float | None = None,
  distribution: Distribution = 'normal',
  side: OneSide = 'short',
  spread_refreshes: bool = True,
  **options: Unpack[ProjfactorOptions],
) -> optax.GradientTransformationExtraArgs:
  """ProjFactor: a projected first moment, a factored full-size second one.

  The gradient estimate is that of `vlorp`. Adam runs on it at full size, with
  the first moment kept in the subspace, where it expands exactly while the
  random matrix lasts, and the second one kept as row and column sums.

  Args:
    scale: Multiplies the update of projected kernels.
    eps: Added to the root of the second moment, before the bias correction for
      kernels (``hf``) and after it for other parameters, as published.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `vlorp`, and if `side` is ``both``.

  Examples:
    >>> tx = projfactor(1e-3, granularity=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Wang et al., `VLoRP`, 2025, arXiv:2505.01744.

  Note:
    In the published code `scale` multiplies the expansion, in the numerator
    and in the second moment, where it cancels but for eps; here it acts. A
    gradient that is zero from the first step on gives zero updates instead of
    0/0. The first moment is float32, there of the gradient's dtype. Parameters
    that are not projected decay in the order of the kernels; there as in
    ``torch.optim.AdamW``, before the step.
  """
  b1, b2, eps = options['b1'], options['b2'], options['eps']
  direction = with_low_rank_projection(
    scale_by_first_moment(b1),
    rank,
    update_proj_gap,
    scale,
    projection=projections.get(
      'random', granularity=granularity, distribution=distribution
    ),
    side=side,
    spread_refreshes=spread_refreshes,
    recovery=factored_recovery(b2, eps),
  )
  return assemble(
    optax.chain(direction, scale_by_bias_correction(b1, b2)),
    scale_by_adam(b1, b2, eps),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
