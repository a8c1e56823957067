"""RACS against its algorithm in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import inspect, racs, scale_by_racs
from gnlorp_jax.optim.methods.racs import two_sided_scales

RATE, SCALE, BETA, LIMIT, STEPS = 0.1, 0.5, 0.8, 1.05, 6


def scales(grad):
  """Equation 16 for a gradient [out, in], with diagonal matrices S and Q."""
  big_q = np.eye(len(grad))
  for _ in range(5):
    s = np.diag(grad.T @ big_q @ grad) / np.linalg.norm(big_q) ** 2
    big_s = np.diag(s)
    q = np.diag(grad @ big_s @ grad.T) / np.linalg.norm(big_s) ** 2
    big_q = np.diag(q)
  return s, q


def expected(w, grads):
  """Algorithm 1 for a weight [out, in]."""
  w, s, q, last = np.float64(w), 0.0, 0.0, None
  shrunk = 0
  for grad in map(np.float64, grads):
    new_s, new_q = scales(grad)
    s = BETA * s + (1 - BETA) * new_s
    q = BETA * q + (1 - BETA) * new_q
    scaled = np.diag(q**-0.5) @ grad @ np.diag(s**-0.5)
    norm = np.linalg.norm(scaled)
    eta = 1.0 if last is None else LIMIT / max(norm / last, LIMIT)
    shrunk += eta < 1
    last = eta * norm
    w = w - RATE * SCALE * eta * scaled
  return w, shrunk


def test_steps_are_those_of_the_algorithm(stepped):
  rng = np.random.default_rng(0)
  w = rng.standard_normal((2, 5, 7)).astype(np.float32)
  grads = rng.standard_normal((STEPS, 2, 5, 7)).astype(np.float32)
  grads[3] *= 100  # The limiter acts.
  tx = racs(RATE, SCALE, beta=BETA, norm_growth_limit=LIMIT)
  params, _ = stepped(tx, {'kernel': w}, [{'kernel': g} for g in grads])
  for matrix in range(2):
    wanted, shrunk = expected(w[matrix].T, grads[:, matrix].mT)
    assert shrunk
    np.testing.assert_allclose(params['kernel'][matrix].T, wanted, rtol=2e-5)


def test_scales_are_of_rank_one_gradients_exact_whatever_their_size():
  rng = np.random.default_rng(1)
  for size in (1e-15, 1.0, 1e15):
    rows, columns = rng.uniform(1, 2, 4), rng.uniform(1, 2, 3)
    grad = np.float32(size * np.outer(rows, columns))
    s, q = map(np.float64, two_sided_scales(jnp.asarray(grad)))
    np.testing.assert_allclose(
      np.outer(s, q) / size**2, np.outer(rows, columns) ** 2, rtol=1e-5
    )


def test_zeros_move_nothing_and_are_not_remembered():
  tx = scale_by_racs(BETA, None)
  grad = {'kernel': jnp.ones((3, 2)).at[1].set(0)}
  state = tx.init(grad)
  updates, state = tx.update(grad, state)
  assert (updates['kernel'][1] == 0).all() and state.norm['kernel'] == ()
  updates, after = tx.update(jax.tree.map(jnp.zeros_like, grad), state)
  np.testing.assert_array_equal(updates['kernel'], 0)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_state_is_a_number_for_each_row_and_column():
  params = {'kernel': jax.ShapeDtypeStruct((3, 16, 24), jnp.float32)}
  (row,) = inspect.report(params, racs(RATE))
  assert (row.label, row.state_bytes) == ('low_rank', 4 * 3 * (16 + 24 + 1))


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'beta': 1.0}, 'beta must be in [0, 1), got 1.0.'),
    (
      {'norm_growth_limit': 0.5},
      'norm_growth_limit must be in [1, inf), got 0.5.',
    ),
  ],
)
def test_bad_numbers_are_told(options, text):
  with pytest.raises(ValueError) as error:
    racs(RATE, **options)
  assert str(error.value) == text
