import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import layers


def test_rope_equals_complex_rotation():
  theta, head_dim = 1000.0, 8
  x = np.random.default_rng(0).normal(size=(2, 5, 3, head_dim))
  turn = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
    1j * np.arange(5)[None, :, None, None] * turn
  )
  expected = np.concatenate([turned.real, turned.imag], axis=-1)
  got = layers.apply_rope(jnp.asarray(x, jnp.float32), theta)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rope_scores_depend_on_distance_only():
  key = jax.random.key(0)
  q, k = jax.random.normal(key, (2, 8))
  q, k = (
    layers.apply_rope(jnp.broadcast_to(x, (1, 12, 1, 8)), 100.0)[0, :, 0]
    for x in (q, k)
  )
  scores = q @ k.T
  # Float32 angles up to 12 radians; the scores are of order 1.
  np.testing.assert_allclose(scores[3:, 3:], scores[:-3, :-3], atol=1e-5)
  assert abs(scores[3, 0] - scores[0, 0]) > 0.1


def test_rope_keeps_dtype_and_rounds_once():
  x = jax.random.normal(jax.random.key(0), (1, 64, 2, 8)).astype(jnp.bfloat16)
  got = layers.apply_rope(x, 10.0)
  exact = layers.apply_rope(x.astype(jnp.float32), 10.0)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_normal_init_in_bfloat16_has_tails():
  draw = layers.normal_init(0.02)(jax.random.key(0), (400, 500), jnp.bfloat16)
  assert draw.dtype == jnp.bfloat16
  draw = np.asarray(draw, np.float64) / 0.02
  # 200,000 draws: the mean and the deviation are known to 0.3 %, and values
  # beyond 4 deviations are expected 13 times.
  assert abs(draw.mean()) < 0.01
  assert abs(draw.std() - 1) < 0.01
  assert np.abs(draw).max() > 4


@pytest.mark.parametrize(
  'capability, dtype, head_dim, expected',
  [
    ('9.0', jnp.bfloat16, 64, 'cudnn'),
    ('8.0', jnp.float16, 128, 'cudnn'),
    ('9.0', jnp.float32, 64, 'xla'),
    ('9.0', jnp.bfloat16, 52, 'xla'),
    ('9.0', jnp.bfloat16, 256, 'xla'),
    ('7.5', jnp.bfloat16, 64, 'xla'),
    ('gfx942', jnp.bfloat16, 64, 'xla'),
    (None, jnp.bfloat16, 64, 'xla'),
  ],
)
def test_attention_implementation_follows_device_and_dtype(
  capability, dtype, head_dim, expected
):
  attributes = {} if capability is None else {'compute_capability': capability}
  device = types.SimpleNamespace(**attributes)
  found = layers.attention_implementation(device, dtype, head_dim)
  assert found == expected
