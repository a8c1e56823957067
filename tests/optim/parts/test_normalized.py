"""Gradients that are normalised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim.parts import normalized


def test_columns_have_a_root_mean_square_of_one_whatever_their_size():
  x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
  x *= np.float32([1e-6, 1, 1e6])
  x[0, :, 1] = 0
  found = normalized.unit_rms(x, axis=-2)
  rms = np.sqrt(np.mean(np.float64(found) ** 2, axis=-2))
  np.testing.assert_allclose(rms, [[1, 0, 1], [1, 1, 1]], rtol=1e-6)
  assert (np.sign(found) == np.sign(x)).all()


def test_what_is_no_larger_than_roundings_is_not_blown_up():
  found = normalized.unit_rms(jnp.full((4, 2), 1e-10), axis=-2)
  np.testing.assert_allclose(found, 0.01, rtol=1e-6)
  slope = jax.grad(lambda x: jnp.sum(normalized.unit_rms(x, -2)))
  assert np.isfinite(slope(jnp.zeros((4, 2)))).all()


def test_momentum_is_kept_of_those_that_are_named():
  tx = normalized.scale_by_normalized(
    lambda x: jnp.sign(x), 0.5, lambda name: name == 'a'
  )
  params = {'a': jnp.ones((3, 2)), 'b': jnp.ones((3, 2))}
  state = tx.init(params)
  assert state.mu['a'].shape == (3, 2) and state.mu['b'] is None
  for sign in (1, 1, -1):
    updates, state = tx.update({k: sign * p for k, p in params.items()}, state)
  # 0.5 * 0.75 - 0.5: a's average has turned too, by a little.
  np.testing.assert_allclose(state.mu['a'], -0.125)
  assert float(updates['a'][0, 0]) == float(updates['b'][0, 0]) == -1


def test_errors_name_the_value_and_the_rule():
  with pytest.raises(ValueError, match=r'b1 must be in \[0, 1\), got 1.0'):
    normalized.scale_by_normalized(jnp.sign, 1.0)
  with pytest.raises(ValueError) as error:
    normalized.scale_by_normalized(jnp.sign).init({'bias': jnp.ones(3)})
  assert str(error.value) == (
    "Parameter 'bias' of shape [3] is no kernel: a kernel has at least two "
    "axes, [*, in, out]. Label it 'full'."
  )
