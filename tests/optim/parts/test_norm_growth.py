"""The norm-growth limiter against a transcription in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim.parts.norm_growth import initial_norm, limit_norm_growth

# Norms up to factors: growth, a fall, slow growth, zeros, growth after them.
SIZES = [1.0, 5.0, 1.015, 0.2, 0.201, 0.0, 0.0, 3.0, 1e-9, 1e-6, 40.0, 1e-3]


def updates(seed, shape=(4, 6)):
  rng = np.random.default_rng(seed)
  x_TMN = rng.standard_normal((len(SIZES), *shape)).astype(np.float32)
  return x_TMN * np.array(SIZES, np.float32)[:, None, None]


def reference(x_TMN, limit):
  """The published rule; None marks the first step."""
  last, was_limited = None, []
  limited_TMN, norms = [], []
  for x in x_TMN.astype(np.float64):
    norm = np.sqrt((x**2).sum())
    is_over = last is not None and norm / (last + 1e-8) > limit
    if is_over:
      x = x * limit * (last + 1e-8) / norm
    last = np.sqrt((x**2).sum())
    limited_TMN.append(x)
    norms.append(last)
    was_limited.append(is_over)
  return np.stack(limited_TMN), np.array(norms), was_limited


def run(x_T, limit=1.01):
  step = jax.jit(limit_norm_growth)
  norm = initial_norm(jnp.asarray(x_T[0]))
  limited, norms = [], []
  for x in x_T:
    x, norm = step(jnp.asarray(x), norm, limit)
    limited.append(np.asarray(x))
    norms.append(np.asarray(norm))
  return np.stack(limited), np.stack(norms)


@pytest.mark.parametrize('limit', [1.01, 1.5])
def test_follows_the_published_rule(limit):
  x_TMN = updates(0)
  expected, expected_norms, was_limited = reference(x_TMN, limit)
  assert 3 < sum(was_limited) < len(SIZES) - 3
  found, norms = run(x_TMN, limit)
  # Each step adds a few roundings of float32 to the norm it starts from.
  np.testing.assert_allclose(found, expected, rtol=3e-6)
  np.testing.assert_allclose(norms, expected_norms, rtol=3e-6)


def test_stacked_matrices_equal_single_ones():
  parts = [updates(seed)[seed:] for seed in range(3)]
  steps = min(map(len, parts))
  parts = [part[:steps] for part in parts]
  found, norms = run(np.stack(parts, axis=1)[:, :, None])
  assert norms.shape == (steps, 3, 1)
  for i, part in enumerate(parts):
    single, single_norms = run(part)
    np.testing.assert_allclose(found[:, i, 0], single, rtol=1e-6)
    np.testing.assert_allclose(norms[:, i, 0], single_norms, rtol=1e-6)


def test_the_first_update_is_free_and_a_zero_one_is_not_the_first():
  x = jnp.full((2, 2), 50.0)
  free, norm = limit_norm_growth(x, initial_norm(x))
  np.testing.assert_array_equal(free, x)
  np.testing.assert_allclose(norm, 100)
  held, norm = limit_norm_growth(x, jnp.zeros([]))
  np.testing.assert_allclose(norm, 1.01e-8, rtol=1e-6)
  np.testing.assert_allclose(held, 1.01e-8 / 2, rtol=1e-6)


@pytest.mark.parametrize('last', [0.0, 1.0, np.inf])
def test_zero_stays_zero(last):
  x, norm = limit_norm_growth(jnp.zeros((3, 2)), jnp.float32(last))
  np.testing.assert_array_equal(x, 0)
  assert norm == 0


def test_bfloat16_updates_are_limited_in_float32():
  x = jnp.asarray(updates(0)[0]).astype(jnp.bfloat16)
  last = jnp.float32(0.5)
  found, norm = limit_norm_growth(x, last)
  assert found.dtype == norm.dtype == initial_norm(x).dtype == jnp.float32
  expected, _ = limit_norm_growth(x.astype(jnp.float32), last)
  np.testing.assert_array_equal(found, expected)


def test_sharding_does_not_change_what_is_limited():
  mesh = jax.make_mesh((4,), ('fsdp',))
  x_TMN = updates(1, (8, 16))
  split = jax.sharding.NamedSharding(mesh, jax.P(None, 'fsdp'))
  norm = other_norm = initial_norm(x_TMN[0])
  step = jax.jit(limit_norm_growth)
  for x in x_TMN:
    a, norm = step(jnp.asarray(x), norm)
    b, other_norm = step(jax.device_put(x, split), other_norm)
    # Sums in another order.
    np.testing.assert_allclose(a, b, rtol=2e-6)
    np.testing.assert_allclose(norm, other_norm, rtol=2e-6)
