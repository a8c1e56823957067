"""SinkGD against its algorithm in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import inspect, sinkgd
from gnlorp_jax.optim.methods.sinkgd import sinkhorn


def sr_sinkhorn(grad, rounds):
  """The paper's algorithm 3, for a gradient as PyTorch has it, [out, in]."""
  x = np.float64(grad)
  m, n = x.shape
  for _ in range(rounds):
    x = np.sqrt(n) * x / np.linalg.norm(x, axis=1, keepdims=True)
    x = np.sqrt(m) * x / np.linalg.norm(x, axis=0, keepdims=True)
  return x


def test_update_is_that_of_the_algorithm():
  rng = np.random.default_rng(0)
  grads = {
    'up': {'kernel': rng.standard_normal((2, 5, 7)).astype(np.float32)},
    'norm': {'scale': rng.standard_normal(5).astype(np.float32)},
  }
  tx = sinkgd(0.1, scale=0.5, iterations=3)
  state = tx.init(grads)
  updates, _ = jax.jit(tx.update)(grads, state, grads)
  for matrix in range(2):
    wanted = sr_sinkhorn(grads['up']['kernel'][matrix].T, 3).T
    found = updates['up']['kernel'][matrix]
    np.testing.assert_allclose(found, -0.1 * 0.5 * wanted, atol=1e-6)
  # Adam's first step.
  np.testing.assert_allclose(
    updates['norm']['scale'], -0.1 * np.sign(grads['norm']['scale']), rtol=1e-5
  )
  rows = {row.name: row for row in inspect.report(grads, tx)}
  kernel = rows['up/kernel']
  assert (kernel.label, kernel.state_bytes) == ('low_rank', 0)


def test_rows_and_columns_come_to_be_of_one_size():
  rng = np.random.default_rng(1)
  # Of very different sizes, and of rank one: outer products are solved at once.
  grad = rng.standard_normal((6, 4)) * 10.0 ** rng.integers(-3, 3, (6, 1))
  found = np.float64(sinkhorn(jnp.float32(grad), 20))
  for axis in (0, 1):
    rms = np.sqrt(np.mean(found**2, axis))
    np.testing.assert_allclose(rms, 1, rtol=1e-3)
  outer = jnp.outer(jnp.array([1.0, -2.0]), jnp.array([3.0, 1e-3, 1.0]))
  np.testing.assert_allclose(sinkhorn(outer, 1), jnp.sign(outer), rtol=1e-6)
  zero = jnp.zeros((3, 2)).at[0, 0].set(2)
  np.testing.assert_array_equal(sinkhorn(zero, 5)[1:], 0)


@pytest.mark.parametrize('iterations', [0, 2.5])
def test_rounds_are_a_number_of_one_or_more(iterations):
  with pytest.raises(ValueError, match='iterations must be a'):
    sinkgd(1e-2, iterations=iterations)
