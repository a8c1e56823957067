"""Hyper-parameters as numbers in the state of an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.parts.hyperparams import (
  HyperparamsState,
  inject_hyperparams,
)
from gnlorp_jax.optim.parts.split import SplitTransformation, as_split

RULES = (('kernel', 'low_rank'), ('.*', 'full'))


def params():
  normal = np.random.default_rng(0).normal
  return {
    'kernel': jnp.float32(normal(size=(2, 8, 12))),
    'bias': jnp.float32(normal(size=6)),
  }


def gradients(number):
  normal = np.random.default_rng(number + 1).normal
  return jax.tree.map(lambda x: jnp.float32(normal(size=x.shape)), params())


def galore(rate, scale):
  return optim.galore(
    lambda count: rate * 0.9**count,
    2,
    2,
    scale,
    param_labels=RULES,
    skip_nonfinite=False,
  )


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope='module')
def injected():
  """A transformation and its compiled update and halves."""
  tx = inject_hyperparams(lambda rate: galore(rate, 0.5), rate=0.1)

  @jax.jit
  def halves(grads, state, params):
    projected, state = tx.project(grads, state, params)
    return tx.apply(projected, state, params)

  return tx, jax.jit(tx.update), halves


@jax.jit
def plain_update(grads, state, params, rate):
  """The optimizer of that rate, which is a number here as well."""
  return galore(rate, 0.5).update(grads, state, params)


@pytest.mark.parametrize('rate', [0.1, 0.037])
def test_updates_are_those_without_numbers_in_the_state(injected, rate):
  tx, update, halves = injected
  weights = params()
  state = tx.init(weights)
  assert isinstance(state, HyperparamsState)
  state = state._replace(hyperparams={'rate': jnp.float32(rate)})
  other, expected_state = state, galore(rate, 0.5).init(weights)
  assert_same(state.inner_state, expected_state)
  for number in range(3):
    grads = gradients(number)
    found, state = update(grads, state, weights)
    expected, expected_state = plain_update(
      grads, expected_state, weights, jnp.float32(rate)
    )
    assert_same(found, expected)
    assert_same(state.inner_state, expected_state)
    assert state.hyperparams == {'rate': jnp.float32(rate)}
    # The two halves in a row are the whole.
    in_halves, other = halves(grads, other, weights)
    assert_same(in_halves, found)
    assert_same(other, state)
  assert update._cache_size() == 1


def test_it_is_split_where_the_optimizer_is(injected):
  tx, *_ = injected
  assert isinstance(galore(0.1, 0.5), SplitTransformation)
  assert isinstance(tx, SplitTransformation)
  # Half of a gradient is projected to half of what all of it is.
  weights = params()
  state = tx.init(weights)
  project = jax.jit(lambda g, s: tx.project(g, s, weights, due=False))
  grads = gradients(0)
  _, state = tx.project(grads, state, weights)
  whole, kept = project(grads, state)
  half, _ = project(jax.tree.map(lambda g: g / 2, grads), state)
  assert jax.tree.leaves(whole)
  assert_same(jax.tree.map(lambda x: x * 2, half), whole)
  assert kept.hyperparams == state.hyperparams
  plain = inject_hyperparams(lambda rate: optax.sgd(rate), rate=1.0)
  assert not isinstance(plain, SplitTransformation)
  assert isinstance(plain, optax.GradientTransformationExtraArgs)
  assert isinstance(as_split(plain), SplitTransformation)


def test_numbers_of_init_are_float32_whatever_they_were():
  tx = inject_hyperparams(
    lambda rate, decay: optax.chain(
      optax.add_decayed_weights(decay), optax.sgd(rate)
    ),
    rate=1,
    decay=0.5,
  )
  state = tx.init(params())
  assert set(state.hyperparams) == {'rate', 'decay'}
  for number in state.hyperparams.values():
    assert number.dtype == jnp.float32 and number.shape == ()
  updates, after = tx.update({'w': jnp.ones(2)}, state, {'w': jnp.ones(2)})
  np.testing.assert_allclose(updates['w'], -1.5)
  assert after.hyperparams == state.hyperparams


def test_further_arguments_reach_the_optimizer():
  def make(rate):
    def update(updates, state, params=None, *, factor=1.0, **extra):
      assert not extra
      return jax.tree.map(lambda g: g * rate * factor, updates), state

    return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
    )

  tx = inject_hyperparams(make, rate=2.0)
  state = tx.init(jnp.zeros(2))
  assert tx.update(jnp.ones(2), state)[0].tolist() == [2, 2]
  assert tx.update(jnp.ones(2), state, factor=3.0)[0].tolist() == [6, 6]
  # One that takes none is not given any.
  plain = inject_hyperparams(lambda rate: optax.sgd(rate), rate=1.0)
  state = plain.init(jnp.zeros(2))
  assert plain.update(jnp.ones(2), state, factor=3.0)[0].tolist() == [-1, -1]


def test_state_is_seen_through():
  """What is asked of an optimizer's state is found inside of it."""
  weights = params()
  tx = inject_hyperparams(lambda rate: galore(rate, 0.5), rate=0.1)
  state, plain = tx.init(weights), galore(0.1, 0.5).init(weights)
  found = optim.inspect.subspace_stats(state)
  assert list(found) == list(optim.inspect.subspace_stats(plain)) == ['kernel']
  sizes, expected = (optim.inspect.state_bytes(s) for s in (state, plain))
  # One float32 more.
  assert sum(sizes.values()) == sum(expected.values()) + 4
  assert {k: sizes[k] for k in ('moments', 'bases')} == {
    k: expected[k] for k in ('moments', 'bases')
  }
