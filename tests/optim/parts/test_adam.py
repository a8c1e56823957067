"""Adam's conventions against torch.optim and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim.parts.adam import descend, scale_by_adam


def grads(steps, shape=(5, 3), scale=1.0):
  rng = np.random.default_rng(0)
  return rng.standard_normal((steps, *shape)).astype(np.float32) * scale


def reference(g_TMN, b1, b2, eps, eps_mode):
  """The published formulas in float64 NumPy."""
  m = v = 0.0
  for t, g in enumerate(g_TMN.astype(np.float64), start=1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    c1, c2 = 1 - b1**t, 1 - b2**t
    if eps_mode == 'standard':
      yield (m / c1) / (np.sqrt(v / c2) + eps)
    else:
      yield np.sqrt(c2) / c1 * m / (np.sqrt(v) + eps)


@pytest.mark.parametrize('eps_mode', ['standard', 'hf'])
def test_direction_follows_the_formula_for_tiny_gradients(eps_mode):
  # Gradients of the size of eps tell the two modes apart.
  g_TMN = grads(6, scale=1e-6)
  tx = scale_by_adam(0.9, 0.99, 1e-6, eps_mode=eps_mode)
  state = tx.init(jnp.zeros(g_TMN.shape[1:]))
  for g, expected in zip(
    g_TMN, reference(g_TMN, 0.9, 0.99, 1e-6, eps_mode), strict=True
  ):
    direction, state = tx.update(jnp.asarray(g), state)
    np.testing.assert_allclose(direction, expected, rtol=2e-5)


def test_modes_differ_at_the_first_step():
  g = jnp.full((2,), 1e-6)
  first = {}
  for mode in ('standard', 'hf'):
    tx = scale_by_adam(eps=1e-6, eps_mode=mode)
    first[mode], _ = tx.update(g, tx.init(g))
  # 1 / (1 + 1) against 1 / (1 + 1 / sqrt(0.001)).
  np.testing.assert_allclose(first['standard'], 0.5, rtol=1e-4)
  np.testing.assert_allclose(first['hf'], 1 / (1 + 1000**0.5), rtol=1e-3)


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_adamw_follows_torch(weight_decay):
  torch = pytest.importorskip('torch')
  g_TMN, w = grads(8), grads(1)[0]
  theirs = torch.nn.Parameter(torch.tensor(w))
  torch_opt = torch.optim.AdamW([theirs], lr=0.01, weight_decay=weight_decay)
  tx = optax.chain(scale_by_adam(), descend(0.01, weight_decay))
  ours = jnp.asarray(w)
  state = tx.init(ours)
  for g in g_TMN:
    theirs.grad = torch.tensor(g)
    torch_opt.step()
    updates, state = tx.update(jnp.asarray(g), state, ours)
    ours = optax.apply_updates(ours, updates)
  np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
  ('order', 'expected'),
  [('before', 2.0 * (1 - 0.1 * 0.5) - 0.1), ('after', (2.0 - 0.1) * 0.95)],
)
def test_decay_order_decides_what_decays(order, expected):
  tx = descend(0.1, 0.5, decay_order=order)
  w = jnp.array(2.0)
  updates, _ = tx.update(jnp.array(1.0), tx.init(w), w)
  np.testing.assert_allclose(w + updates, expected, rtol=1e-6)


def test_decay_after_follows_a_schedule():
  tx = descend(lambda count: 0.1 * (count + 1), 0.5, decay_order='after')
  w = jnp.array(1.0)
  state = tx.init(w)
  for lr in (0.1, 0.2):
    expected = w * (1 - lr * 0.5)
    updates, state = tx.update(jnp.array(0.0), state, w)
    w = w + updates
    np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_moments_are_float32_for_bfloat16_gradients():
  g = jnp.ones((4, 4), jnp.bfloat16)
  tx = scale_by_adam()
  _, state = tx.update(g, tx.init(g))
  assert state.mu.dtype == state.nu.dtype == jnp.float32


def test_state_buffers_are_distinct_so_that_they_can_be_donated():
  g = jnp.ones((4, 4))
  state = scale_by_adam().init(g)
  update = jax.jit(scale_by_adam().update, donate_argnums=1)
  update(g, state)
  assert state.mu.is_deleted() and state.nu.is_deleted()


@pytest.mark.parametrize(
  ('build', 'text'),
  [
    (
      lambda: scale_by_adam(eps_mode='torch'),
      "Unknown eps_mode 'torch'; expected one of ('standard', 'hf').",
    ),
    (
      lambda: descend(0.1, decay_order='never'),
      "Unknown decay_order 'never'; expected one of ('before', 'after').",
    ),
  ],
)
def test_unknown_choice_is_an_error(build, text):
  with pytest.raises(ValueError) as error:
    build()
  assert str(error.value) == text
