"""Weight normalisation against jax.grad of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim.parts.weight_norm import (
  column_norm,
  pull_back,
  recompose,
  with_weight_norm,
)


def kernel(shape=(3, 6, 4), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def sgd_step(w, grad, lr, norm_state='synced', steps=1):
  tx = with_weight_norm(optax.sgd(lr), optax.sgd(lr), norm_state=norm_state)
  state = tx.init(w)
  for _ in range(steps):
    updates, state = tx.update(grad, state, w)
    w = optax.apply_updates(w, updates)
  return w, state


def test_recompose_inverts_the_decomposition():
  w = kernel()
  g, v, _, _ = pull_back(w, w)
  np.testing.assert_array_equal(v, w)
  np.testing.assert_allclose(recompose(g, 3 * v), w, rtol=1e-6)
  np.testing.assert_allclose(g[:, 0], np.linalg.norm(w, axis=1), rtol=1e-6)


def test_pulled_back_gradients_equal_automatic_ones():
  v, target = kernel(), kernel(seed=1)
  g = jnp.abs(kernel((3, 1, 4), 2)) + 0.5

  def loss(g, v):
    w = g * v / jnp.linalg.norm(v, axis=-2, keepdims=True)
    return jnp.sum((w - target) ** 2)

  expected = jax.grad(loss, argnums=(0, 1))(g, v)
  norm = column_norm(v)
  w = g * v / norm
  parts = pull_back(2 * (w - target), w, norm)
  np.testing.assert_allclose(parts.g_1O, g, rtol=1e-5)
  np.testing.assert_allclose(parts.v_IO, v, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(parts.dg_1O, expected[0], rtol=2e-4, atol=1e-5)
  np.testing.assert_allclose(parts.dv_IO, expected[1], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize('norm_state', ['synced', 'tracked'])
def test_steps_equal_explicit_parameters_g_and_v(norm_state):
  # The oracle keeps g and v as parameters and differentiates through W.
  w, target = kernel((5, 3)), kernel((5, 3), 1)
  lr = 0.1

  def loss(w):
    return jnp.sum((w - target) ** 2)

  def of_parts(parts):
    g, v = parts
    return loss(g * v / jnp.linalg.norm(v, axis=0, keepdims=True))

  parts = (jnp.linalg.norm(w, axis=0, keepdims=True), w)
  tx = with_weight_norm(optax.sgd(lr), optax.sgd(lr), norm_state=norm_state)
  state = tx.init(w)
  for _ in range(5):
    updates, state = tx.update(jax.grad(loss)(w), state, w)
    w = optax.apply_updates(w, updates)
    grads = jax.grad(of_parts)(parts)
    parts = jax.tree.map(lambda p, d: p - lr * d, parts, grads)
    g, v = parts
    if norm_state == 'synced':
      v = g * v / jnp.linalg.norm(v, axis=0, keepdims=True)
      parts = (g, v)
    expected = g * v / jnp.linalg.norm(v, axis=0, keepdims=True)
    np.testing.assert_allclose(w, expected, rtol=1e-4, atol=1e-5)


def test_tracked_norm_grows_and_synced_has_no_state():
  w, grad = kernel(), kernel(seed=1)
  _, tracked = sgd_step(w, grad, 0.1, 'tracked', steps=3)
  assert (np.asarray(tracked.v_norm) > column_norm(w)).all()
  assert sgd_step(w, grad, 0.1)[1].v_norm is None


def test_direction_gradient_is_tangent():
  w, grad = kernel(), kernel(seed=1)
  dv = pull_back(grad, w).dv_IO
  np.testing.assert_allclose(jnp.sum(dv * w, axis=-2), 0, atol=1e-5)


@pytest.mark.parametrize('norm_state', ['synced', 'tracked'])
def test_zero_column_is_safe_and_learns(norm_state):
  w = kernel((6, 4)).at[:, 1].set(0)
  grad = kernel((6, 4), 1)
  new, _ = sgd_step(w, grad, 0.1, norm_state)
  np.testing.assert_allclose(new[:, 1], -0.1 * grad[:, 1], rtol=1e-6)
  later, state = sgd_step(w, grad, 0.1, norm_state, steps=4)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((later, state)))
  assert np.abs(later[:, 1]).min() > 0


def test_tracked_norm_survives_a_kernel_changed_by_others():
  tx = with_weight_norm(optax.sgd(0.1), optax.sgd(0.1), norm_state='tracked')
  state = tx.init(jnp.zeros((4, 2)))
  updates, _ = tx.update(kernel((4, 2)), state, kernel((4, 2), 1))
  assert np.isfinite(updates).all()


def test_zero_gradient_changes_nothing():
  w = kernel()
  new, _ = sgd_step(w, jnp.zeros_like(w), 0.1)
  np.testing.assert_allclose(new, w, rtol=1e-6)


def test_updates_are_float32_for_bfloat16_kernels():
  w = kernel().astype(jnp.bfloat16)
  tx = with_weight_norm(optax.sgd(1e-4), optax.sgd(1e-4))
  updates, _ = tx.update(w, tx.init(w), w)
  assert updates.dtype == jnp.float32
  # The update itself is far below bfloat16's resolution of the weight.
  assert 0 < np.abs(updates).max() < 1e-3


def test_missing_params_and_unknown_norm_state_are_errors():
  tx = with_weight_norm(optax.sgd(0.1), optax.sgd(0.1))
  with pytest.raises(ValueError, match='params is None: .* Call update'):
    tx.update(kernel(), tx.init(kernel()))
  with pytest.raises(ValueError) as error:
    with_weight_norm(optax.sgd(0.1), optax.sgd(0.1), norm_state='free')
  assert str(error.value) == (
    "Unknown norm_state 'free'; expected one of ('synced', 'tracked')."
  )
