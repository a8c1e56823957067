import functools
import types

import chex
import flax.linen as nn
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


def _products_and_gradients(x, kernel, slopes):
  y, pull_back = jax.vjp(
    lambda x, kernel: layers.dot_general(
      x, kernel, (((x.ndim - 1,), (0,)), ((), ()))
    ),
    x,
    kernel,
  )
  return y, *pull_back(slopes)


@pytest.mark.parametrize('shape', [(6,), (5, 6), (2, 5, 6)])
@pytest.mark.parametrize('width', [4, 9])
def test_products_and_both_gradients_equal_float64(shape, width):
  random = np.random.default_rng(0)
  x, kernel = random.normal(size=shape), random.normal(size=(6, width))
  slopes = random.normal(size=(*shape[:-1], width))
  results = jax.jit(_products_and_gradients)(
    *map(np.float32, (x, kernel, slopes))
  )
  flat = x.reshape(-1, 6).T @ slopes.reshape(-1, width)
  for got, expected in zip(
    results, (x @ kernel, slopes @ kernel.T, flat), strict=True
  ):
    # Sums of at most ten float32 products of order 1.
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_bfloat16_products_are_rounded_once():
  random = np.random.default_rng(0)
  sizes = ((4, 300), (300, 5), (4, 5))
  x, kernel, slopes = (
    random.normal(size=size).astype(jnp.bfloat16) for size in sizes
  )
  results = jax.jit(_products_and_gradients)(x, kernel, slopes)
  x, kernel, slopes = (a.astype(np.float64) for a in (x, kernel, slopes))
  for got, expected in zip(
    results, (x @ kernel, slopes @ kernel.T, x.T @ slopes), strict=True
  ):
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last of eight binary digits, and the float32 sums.
    np.testing.assert_allclose(np.float64(got), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
  ('platform', 'result'), [('cpu', 'f32'), ('cuda', 'bf16')]
)
def test_bfloat16_products_are_float32_ones_on_cpus_alone(platform, result):
  arrays = [jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)] * 3
  traced = jax.jit(_products_and_gradients).trace(*arrays)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(products) == 3
  operands = '(tensor<8x8xbf16>, tensor<8x8xbf16>)'
  for line in products:
    assert f'{operands} -> tensor<8x8x{result}>' in line


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_attending_is_the_product_with_the_embeddings(dtype):
  embed = layers.Embed(7, 5, dtype=dtype, embedding_init=layers.normal_init(1))
  params = embed.init(jax.random.key(0), jnp.zeros((1,), jnp.int32))
  x = jax.random.normal(jax.random.key(1), (2, 3, 5)).astype(dtype)
  slopes = jax.random.normal(jax.random.key(2), (2, 3, 7)).astype(dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(attend, params, x):
    y, pull_back = jax.vjp(
      lambda params, x: embed.apply(params, x, method=attend), params, x
    )
    return y, *pull_back(slopes)

  got = gradients(layers.Embed.attend, params, x)
  expected = gradients(nn.Embed.attend, params, x)
  # Flax's own may round its sums in between.
  rtol = 1e-6 if dtype == 'float32' else 2**-7
  chex.assert_trees_all_close(got, expected, rtol=rtol, atol=rtol)


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
  norm = layers.ZeroCenteredRMSNorm(1e-6, jnp.float32, jnp.float32)
  x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  params = norm.init(jax.random.key(0), x)
  np.testing.assert_array_equal(params['params']['scale'], 0)
  scale = np.linspace(-1, 1, 8, dtype=np.float32)
  got = norm.apply({'params': {'scale': scale}}, x)
  size = np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(got, x / size * (1 + np.float64(scale)), rtol=1e-5)
