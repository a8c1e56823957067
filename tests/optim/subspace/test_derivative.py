"""Derivatives through steps, against differences of their outcomes.

To a derivative bases are constants. So what is compared here leaves them as
they are.
"""

import functools

import jax
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.moments import moment_rule

STEPS, RATE = 3, 0.1
# A large eps keeps Adam's directions, and so the differences, smooth.
OPTIONS = {'rank': 3, 'eps': 1.0, 'weight_decay': 0.1}
METHODS = {
  'apollo': functools.partial(optim.apollo, **OPTIONS),
  'dct_adamw': functools.partial(optim.dct_adamw, error_bits=32, **OPTIONS),
  'fira': functools.partial(optim.fira, **OPTIONS),
  'galore': functools.partial(optim.galore, **OPTIONS),
  'galore, both': functools.partial(optim.galore, side='both', **OPTIONS),
  'gradnormlorp': functools.partial(optim.gradnormlorp, **OPTIONS),
  # Of full rank, so that its basis does not turn while gradients are multiples
  # of one.
  'ldadam': functools.partial(optim.ldadam, **{**OPTIONS, 'rank': 6}),
}


def normal_like(like, seed):
  """Standard normal numbers in the shapes of a tree."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), like
  )


def random_tree(seed, *steps):
  """A matrix and a stack of two, for each step if there are any."""
  shapes = {'one': (*steps, 9, 6), 'two': (*steps, 2, 6, 8)}
  return normal_like(
    {name: {'kernel': np.zeros(shape)} for name, shape in shapes.items()}, seed
  )


def along(tree, direction, size):
  return jax.tree.map(lambda x, d: x + np.float32(size) * d, tree, direction)


def dot(a, b):
  """The sum over all elements, in float64."""
  products = jax.tree.map(lambda x, y: np.vdot(np.float64(x), y), a, b)
  return sum(jax.tree.leaves(products))


def assert_derivatives(outcome, target, at, *directions):
  """``jax.grad`` of <outcome, target> agrees with central differences."""

  @jax.jit
  def gradient(at):
    _, pull_back = jax.vjp(outcome, at)
    return pull_back(target)[0]

  outcome, found = jax.jit(outcome), gradient(at)
  size = 3e-3
  for direction in directions:
    above, below = (
      dot(outcome(along(at, direction, sign * size)), target)
      for sign in (1, -1)
    )
    # Rounded outcomes, and what is of third order in the size: up to 1e-3 each.
    np.testing.assert_allclose(
      dot(found, direction), (above - below) / (2 * size), rtol=5e-3
    )


@pytest.mark.parametrize('name', METHODS)
def test_derivatives_in_rate_and_gradients(name):
  # The DCT's columns are chosen at every step, but none is near a choice.
  grads = random_tree(10, STEPS)
  # The first gradients fit the other bases, which then rest.
  direction = random_tree(1, STEPS)
  for change in jax.tree.leaves(direction):
    change[0] = 0
  if name == 'ldadam':
    grads = jax.tree.map(lambda g: np.stack([g[0]] * STEPS), grads)
    direction = jax.tree.map(lambda g: np.stack([0 * g[0], g[0], -g[0]]), grads)
  # Small, as parameters round what is added to them.
  start = jax.tree.map(lambda p: 0.1 * p, random_tree(2))

  def outcome(at):
    rate, grads = at
    tx = METHODS[name](rate)

    def step(carry, grads):
      params, state = carry
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), grads)
    return params

  at = np.float32(RATE), grads
  none = jax.tree.map(np.zeros_like, at)
  assert_derivatives(
    outcome,
    random_tree(3),
    at,
    (np.float32(1), none[1]),
    (none[0], direction),
  )


@pytest.mark.parametrize('mode', ['keep', 'reset', 'rotate'])
def test_moments_keep_their_derivative_at_a_refresh(mode):
  # Every basis is new at every step, and does not depend on moments.
  tx = with_low_rank_projection(
    scale_by_adam(eps=1.0, count_per_matrix=True),
    rank=3,
    update_proj_gap=1,
    on_refresh=moment_rule(mode, 0.9, 0.999),
  )
  params = random_tree(2)
  update = jax.jit(tx.update)
  state = jax.jit(tx.init)(params)
  for seed in (4, 5):
    _, state = update(random_tree(seed), state)
  grads = random_tree(6)

  def outcome(moments):
    mu, nu = moments
    inner_state = state.inner_state._replace(mu=mu, nu=nu)
    updates, after = tx.update(grads, state._replace(inner_state=inner_state))
    return updates, after.inner_state.mu

  moments = state.inner_state.mu, state.inner_state.nu
  target = normal_like(jax.eval_shape(outcome, moments), 7)
  if mode == 'reset':
    slopes = jax.jit(lambda at: jax.vjp(outcome, at)[1](target))(moments)
    assert not any(map(np.any, jax.tree.leaves(slopes)))
    return
  # Second moments stay positive.
  direction = normal_like(moments[0], 8), jax.tree.map(np.asarray, moments[1])
  assert_derivatives(outcome, target, moments, direction)
