"""What the tests of several optimizers ask for."""

import jax
import numpy as np
import optax
import pytest


def _descended(tx):
  rng = np.random.default_rng(0)
  # A stack of three matrices, whose refreshes are spread over the steps.
  target, w = rng.standard_normal((2, 3, 12, 10)).astype(np.float32)

  @jax.jit
  def fit(params):
    def step(_, carry):
      params, state = carry
      grads = {'kernel': params['kernel'] - target}
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, 150, step, (params, tx.init(params)))

  params, state = fit({'kernel': w})
  before = np.sum((w - target) ** 2)
  assert np.sum((params['kernel'] - target) ** 2) < 0.1 * before
  return state


def _stepped(tx, params, grads):
  @jax.jit
  def step(params, state, grad):
    updates, state = tx.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for grad in grads:
    params, state = step(params, state, grad)
  return params, state


@pytest.fixture
def stepped():
  """Takes a step for each gradient; returns parameters and state."""
  return _stepped


@pytest.fixture
def descended():
  """Takes 150 steps of a regression on a stack; returns the state.

  The squared error must fall to less than a tenth.
  """
  return _descended
