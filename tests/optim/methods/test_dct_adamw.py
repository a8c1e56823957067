"""DCT-AdamW against a float64 transcription of the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import dct_adamw


def transform(n, name):
  i, j = np.meshgrid(np.arange(n), np.arange(n), indexing='ij')
  c = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
  c[0] *= np.sqrt(0.5)
  return c if name == 'dct3' else c.T


def published(w, grads, *, rank, gap, name, rotate, feedback, lr=0.01, wd=0.1):
  """Section 5.3 of the method in PyTorch's layout, (out, in).

  Refreshes at 1, T + 1, ... (the public code: 1, T, 2T, ...; equal at T = 1).
  """
  m, n = w.shape
  right = m >= n
  q = transform(min(m, n), name)
  error = m_low = v_low = 0.0
  previous = indices = None
  for t, grad in enumerate(grads, 1):
    w = w * (1 - lr * wd)
    a = grad + error
    if (t - 1) % gap == 0:
      scores = np.abs(a @ q).sum(0) if right else np.abs(q.T @ a).sum(1)
      previous, indices = indices, np.sort(np.argsort(scores)[-rank:])
    basis = q[:, indices]
    low = a @ basis if right else basis.T @ a
    back = low @ basis.T if right else basis @ low
    if feedback:
      error = a - back
    if t > 1 and rotate and (t - 1) % gap == 0:
      x = q[:, previous].T @ basis
      m_low = m_low @ x if right else x.T @ m_low
      v_low = np.abs(v_low @ x if right else x.T @ v_low)
    m_low = 0.9 * m_low + 0.1 * low
    v_low = 0.999 * v_low + 0.001 * low**2
    c1, c2 = 1 - 0.9**t, 1 - 0.999**t
    direction = m_low / (np.sqrt(v_low) + 1e-8 * np.sqrt(c2))
    full = direction @ basis.T if right else basis @ direction
    w = w - lr * np.sqrt(c2) / c1 * full
  return w


@pytest.mark.parametrize(
  ('shape', 'name', 'gap', 'rotate', 'feedback'),
  [
    # The public code's case, and each departure from it.
    ((6, 9), 'dct2', 1, True, True),
    ((9, 6), 'dct3', 1, True, True),
    ((6, 6), 'dct2', 1, True, False),
    ((6, 6), 'dct3', 3, True, True),
    ((9, 6), 'dct2', 3, True, True),
    ((6, 9), 'dct3', 2, False, False),
  ],
)
def test_follows_the_published_formulas(shape, name, gap, rotate, feedback):
  rng = np.random.default_rng(3)
  w = rng.standard_normal(shape)
  grads = rng.standard_normal((8, *shape))
  expected = published(
    w, grads, rank=3, gap=gap, name=name, rotate=rotate, feedback=feedback
  )
  tx = dct_adamw(
    0.01,
    rank=3,
    update_proj_gap=gap,
    transform=name,
    moments_on_refresh='rotate' if rotate else 'keep',
    error_bits=32 if feedback else None,
    weight_decay=0.1,
  )

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update({'kernel': grad}, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(params, grads):
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    return params['kernel']

  kernel = train({'kernel': np.float32(w.T)}, np.float32(grads.mT))
  np.testing.assert_allclose(kernel.T, expected, atol=3e-6)


def test_only_column_numbers_are_stored():
  params = {'kernel': jnp.zeros((4, 64, 96))}
  state = jax.eval_shape(dct_adamw(1e-3, rank=32).init, params)
  (low_rank, _) = state.inner_state.inner_states['low_rank'].inner_state
  (indices,) = jax.tree.leaves(low_rank.subspace['kernel'].basis)
  assert (indices.shape, indices.dtype) == ((4, 32), jnp.int32)


@pytest.mark.parametrize('bits', [8, 4])
def test_quantised_error_feedback_stays_near_that_in_float32(bits):
  # SGD with error feedback: what is lost once arrives later, so the sum of
  # the updates follows the sum of the gradients.
  rng = np.random.default_rng(0)
  grad = np.float32(rng.standard_normal((24, 40)))
  tx = optax.chain(_feedback(bits), optax.scale(1.0))

  def step(state, _):
    updates, state = tx.update(grad, state)
    return state, updates

  _, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(grad), length=60))()
  means = np.cumsum(np.float64(updates), 0) / np.arange(1, 61)[:, None, None]
  distances = np.linalg.norm(means - grad, axis=(1, 2)) / np.linalg.norm(grad)
  # The buffer stays bounded, so the mean update converges like 1 / steps.
  assert distances[-1] < 0.15 < distances[0]


def _feedback(bits):
  from gnlorp_jax.optim import with_low_rank_projection

  return with_low_rank_projection(
    optax.identity(), 8, 1, projection='dct', error_bits=bits
  )
