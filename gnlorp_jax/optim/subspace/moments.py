"""What becomes of Adam's moments when the basis that they live in changes."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.adam import bias_corrections
from gnlorp_jax.optim.parts.checks import check_choice

MomentsOnRefresh = Literal['keep', 'reset', 'rotate']

# Moves arrays that live in a subspace, the moments, from the old basis to the
# new one: transport(low, power), see `projections.base.transport`.
Transport = Callable[[jax.Array, int], jax.Array]
# What a refresh does to the moments of one leaf: rule(moments, transport).
MomentRule = Callable[[Any, Transport], Any]


def moment_rule(
  mode: MomentsOnRefresh, b1: float, b2: float
) -> MomentRule | None:
  """What a refresh of the basis does to Adam's moments.

  Args:
    mode: ``keep`` leaves them as they are, ``reset`` starts Adam again for
      that matrix, ``rotate`` moves them to the new basis, see `rotate_moments`.
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).

  Returns:
    The `on_refresh` of `with_low_rank_projection`; None for ``keep``.

  Raises:
    ValueError: If `mode` is unknown.
  """
  check_choice('moments_on_refresh', mode, get_args(MomentsOnRefresh))
  if mode == 'keep':
    return None
  if mode == 'reset':
    return lambda moments, transport: jax.tree.map(jnp.zeros_like, moments)
  return rotate_moments(b1, b2)


def rotate_moments(b1: float, b2: float) -> MomentRule:
  r"""Moves Adam's moments from the old basis to the new one.

  With ``X = Q_old^T Q_new`` the first moment becomes ``m X``. The
  second is split into the square of the mean and a variance, and the variance
  of independent coordinates moves with the squares of X:

  .. math:: v' = c_2 \, | (v / c_2 - (m / c_1)^2) X^{\circ 2} + (m X / c_1)^2 |

  For a selection of columns, as the DCT's, this keeps the moments of the
  columns that stay and zeros those of new ones.

  Args:
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).

  Returns:
    A rule for `with_low_rank_projection`.

  References:
    Robert et al., `LDAdam`, 2024, arXiv:2410.16103, algorithm 1.
  """

  def rule(
    moments: optax.ScaleByAdamState, transport: Transport
  ) -> optax.ScaleByAdamState:
    # A matrix without steps has zero moments, whatever they are divided by.
    count = jnp.maximum(moments.count, 1)[..., None, None]
    c1, c2 = bias_corrections(b1, b2, count)
    mu = transport(moments.mu, 1)
    variance = moments.nu / c2 - (moments.mu / c1) ** 2
    nu = c2 * jnp.abs(transport(variance, 2) + (mu / c1) ** 2)
    return optax.ScaleByAdamState(count=moments.count, mu=mu, nu=nu)

  return rule


def moments_of(inner_state: optax.OptState) -> optax.ScaleByAdamState:
  """The moments in the state of an inner optimizer.

  Raises:
    ValueError: Unless there is one state of Adam, with a count per matrix.
  """
  nodes = jax.tree.leaves(inner_state, is_leaf=_is_adam)
  found = [node for node in nodes if _is_adam(node)]
  kinds: list[Any] = [
    jax.tree.structure(tree) for node in found for tree in (node.count, node.mu)
  ]
  if len(found) != 1 or kinds[0] != kinds[1]:
    raise ValueError(
      'on_refresh moves the moments of one scale_by_adam(..., '
      f'count_per_matrix=True), but inner holds {len(found)} states of Adam, '
      'or one with a common count. Use that as inner, or on_refresh=None.'
    )
  return found[0]


def with_moments(
  inner_state: optax.OptState, moments: optax.ScaleByAdamState
) -> optax.OptState:
  """The state of an inner optimizer with other moments."""
  return jax.tree.map(
    lambda node: moments if _is_adam(node) else node,
    inner_state,
    is_leaf=_is_adam,
  )


def _is_adam(node: Any) -> bool:
  return isinstance(node, optax.ScaleByAdamState)
