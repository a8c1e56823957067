import types

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import layers


def test_normal_init_in_bfloat16_has_tails():
  draw = jax.jit(layers.normal_init(0.02), static_argnums=(1, 2))(
    jax.random.key(0), (400, 500), jnp.bfloat16
  )
  assert draw.dtype == jnp.bfloat16
  draw = np.asarray(draw, np.float64) / 0.02
  # 200,000 draws: the mean and the deviation are known to 0.3 %, and values
  # beyond 4 deviations are expected 13 times.
  assert abs(draw.mean()) < 0.01
  assert abs(draw.std() - 1) < 0.01
  assert np.abs(draw).max() > 4


@pytest.mark.parametrize('shape', [(6,), (5, 6), (2, 5, 6)])
@pytest.mark.parametrize('width', [4, 9])
def test_products_and_both_gradients_equal_float64(shape, width):
  random = np.random.default_rng(0)
  x, kernel = random.normal(size=shape), random.normal(size=(6, width))
  slopes = random.normal(size=(*shape[:-1], width))
  dims = (((x.ndim - 1,), (0,)), ((), ()))

  @jax.jit
  def gradients(x, kernel, slopes):
    y, pull_back = jax.vjp(
      lambda x, kernel: layers.dot_general(x, kernel, dims), x, kernel
    )
    return y, *pull_back(slopes)

  results = gradients(*map(np.float32, (x, kernel, slopes)))
  flat = x.reshape(-1, 6).T @ slopes.reshape(-1, width)
  for got, expected in zip(
    results, (x @ kernel, slopes @ kernel.T, flat), strict=True
  ):
    # Sums of at most ten float32 products of order 1.
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_dot_general_refuses_what_it_cannot_do():
  x, kernel = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
  dims = (((1,), (0,)), ((), ()))
  with pytest.raises(ValueError, match='^dimension_numbers=.*: only the last'):
    layers.dot_general(x, kernel.T, (((1,), (1,)), ((), ())))
  with pytest.raises(ValueError) as error:
    layers.dot_general(x, kernel.astype(jnp.bfloat16), dims)
  assert str(error.value) == (
    'x is float32, the kernel bfloat16: both must have one dtype. Cast one of '
    'them, or set the dtype of the layer.'
  )
  with pytest.raises(ValueError) as error:
    layers.dot_general(
      x, kernel, dims, preferred_element_type=jnp.dtype('bfloat16')
    )
  assert str(error.value) == (
    'preferred_element_type=bfloat16 must be None or the dtype of x, float32. '
    'Use jax.lax.dot_general.'
  )


def test_what_is_marked_is_kept_and_nothing_else(capsys):
  kernel = jnp.ones((3, 4))

  def block(x):
    y = layers.dot_general(jnp.sin(x), kernel, (((1,), (0,)), ((), ())))
    return jnp.sum(jnp.sin(jnp.cos(y) @ jnp.ones((4, 5))))

  jax.ad_checkpoint.print_saved_residuals(
    jax.checkpoint(block, policy=layers.keep_marked), jnp.ones((2, 3))
  )
  kept = capsys.readouterr().out.splitlines()
  assert sum(line.startswith('f32[2,4]') for line in kept) == 1
  assert not any(line.startswith('f32[2,5]') for line in kept)
  primitive = types.SimpleNamespace(name='dot_product_attention_fwd_wrapper')
  assert layers.keep_marked(primitive)


def test_norm_from_one_equals_float64_and_starts_as_a_plain_norm():
  norm = layers.RMSNorm(1e-6, jnp.float32, jnp.float32)
  x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  params = norm.init(jax.random.key(0), x)
  np.testing.assert_array_equal(params['params']['scale'], 0)
  scale = np.linspace(-1, 1, 8, dtype=np.float32)
  got = norm.apply({'params': {'scale': scale}}, x)
  size = np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(got, x / size * (1 + np.float64(scale)), rtol=1e-5)
