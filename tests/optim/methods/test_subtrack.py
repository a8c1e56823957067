"""SubTrack++ against its algorithm in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import inspect, subtrack

RATE, SCALE, B1, B2, EPS, LIMIT = 0.1, 0.25, 0.8, 0.9, 1e-6, 1.05
RANK, GAP, ETA = 2, 2, 0.7


def leading(grad):
  """Left singular vectors with the signs that are agreed on here."""
  basis = np.linalg.svd(grad)[0][:, :RANK]
  largest = basis[np.abs(basis).argmax(0), np.arange(RANK)]
  return basis * np.sign(largest)


def turned(s, grad):
  """A rank-one step on the Grassmannian."""
  low = s.T @ grad
  u, sigma, vt = np.linalg.svd(2 * (grad - s @ low) @ low.T)
  u, v = u[:, :1], vt[:1].T
  angle = ETA * sigma[0] / np.sum(grad**2)  # Ours: relative to the gradient.
  step = (s @ v * np.cos(angle) + u * np.sin(angle)) @ v.T
  return step + s @ (np.eye(RANK) - v @ v.T)


def algorithm_1(w, grads):
  """For gradients [m, n] with m <= n."""
  w, last, shrunk, s = np.float64(w), None, 0, None
  m = v = 0.0
  for t, grad in enumerate(map(np.float64, grads), 1):
    if s is None:
      s = leading(grad)
    elif (t - 1) % GAP == 0:
      new = turned(s, grad)
      x, c1, c2 = new.T @ s, 1 - B1 ** (t - 1), 1 - B2 ** (t - 1)
      # Equations 8 and 9, with corrected moments inside.
      variance = x**2 @ (v / c2 - (m / c1) ** 2)
      m = x @ m
      v = c2 * np.abs(variance + (m / c1) ** 2)
      s = new
    low = s.T @ grad
    m = B1 * m + (1 - B1) * low
    v = B2 * v + (1 - B2) * low**2
    out = m / (np.sqrt(v) + EPS)
    phi = np.linalg.norm(out, axis=0) / np.linalg.norm(low, axis=0)
    rest = (grad - s @ low) * phi
    norm = np.linalg.norm(rest)
    if last is not None and norm > LIMIT * last:
      rest, shrunk = rest * LIMIT * last / norm, shrunk + 1
    last = np.linalg.norm(rest)
    size = np.sqrt(1 - B2**t) / (1 - B1**t)
    w = w - RATE * SCALE * size * (s @ out + rest)
  return w, shrunk


@pytest.mark.parametrize('is_tall', [False, True])
def test_steps_are_those_of_the_algorithm(is_tall):
  rng = np.random.default_rng(0)
  w, *grads = rng.standard_normal((7, 5, 8)).astype(np.float32)
  expected, shrunk = algorithm_1(w, grads)
  assert 0 < shrunk < len(grads)
  turn = (lambda x: x.T) if is_tall else (lambda x: x)
  tx = subtrack(
    RATE,
    RANK,
    GAP,
    SCALE,
    step_size=ETA,
    norm_growth_limit=LIMIT,
    b1=B1,
    b2=B2,
    eps=EPS,
    spread_refreshes=False,
  )
  params = {'kernel': jnp.asarray(turn(w))}
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  for grad in grads:
    updates, state = update({'kernel': turn(grad)}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(
    turn(params['kernel']), expected, rtol=0, atol=1e-5
  )


def test_a_basis_begins_with_its_first_gradient_whenever_that_comes(descended):
  tx = subtrack(0.02, 3, 5, 1.0, step_size=0.5)
  (subspace,) = inspect.subspaces(descended(tx)).values()
  assert (np.asarray(subspace.refresh_count) > 25).all()
  grad = {'kernel': jnp.ones((6, 5)).at[0].set(0)}
  state, update = tx.init(grad), jax.jit(tx.update)
  for size in (0.0, 0.0, 1.0):
    _, state = update(jax.tree.map(lambda g, s=size: s * g, grad), state, grad)
  (late,) = inspect.subspaces(state).values()
  np.testing.assert_allclose(late.energy, 1, rtol=1e-5)
  np.testing.assert_array_equal(late.refresh_count, 1)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'step_size': 0.0}, 'step_size must be in (0, inf), got 0.0.'),
    (
      {'norm_growth_limit': 0.5},
      'norm_growth_limit must be in [1, inf), got 0.5.',
    ),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    subtrack(RATE, **options)
  assert str(error.value) == text
