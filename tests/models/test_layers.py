import functools
import types

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import layers

# Compiled, a call is one program and not one per operation.
apply_rope = jax.jit(layers.apply_rope, static_argnums=1)


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def test_rope_equals_complex_rotation():
  theta, head_dim = 1000.0, 8
  x = np.random.default_rng(0).normal(size=(2, 5, 3, head_dim))
  turn = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
    1j * np.arange(5)[None, :, None, None] * turn
  )
  expected = np.concatenate([turned.real, turned.imag], axis=-1)
  got = apply_rope(np.float32(x), theta)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rope_scores_depend_on_distance_only():
  q, k = (
    np.asarray(apply_rope(np.broadcast_to(x, (1, 12, 1, 8)), 100.0))[0, :, 0]
    for x in normal((2, 8))
  )
  scores = q @ k.T
  # Float32 angles up to 12 radians; the scores are of order 1.
  np.testing.assert_allclose(scores[3:, 3:], scores[:-3, :-3], atol=1e-5)
  assert abs(scores[3, 0] - scores[0, 0]) > 0.1


def test_rope_keeps_dtype_and_rounds_once():
  x = normal((1, 64, 2, 8)).astype(jnp.bfloat16)
  got = apply_rope(x, 10.0)
  exact = np.asarray(apply_rope(x.astype(np.float32), 10.0))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


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


@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_attention_and_its_gradients_equal_those_of_jax(num_kv_heads, dtype):
  shapes = [(2, 7, heads, 8) for heads in (4, num_kv_heads, num_kv_heads, 4)]
  q, k, v, slopes = (
    normal(shape, seed).astype(dtype) for seed, shape in enumerate(shapes)
  )

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(attend, *qkv):
    y, pull_back = jax.vjp(attend, *qkv)
    return y, *pull_back(jnp.astype(slopes, y.dtype))

  got = gradients(lambda *a: layers.causal_attention(*a, 'xla'), q, k, v)
  exact = gradients(
    lambda *a: jax.nn.dot_product_attention(*a, is_causal=True),
    *map(np.float32, (q, k, v)),
  )
  for x, expected in zip(got, exact, strict=True):
    assert x.dtype == dtype
    error = np.max(np.abs(np.float32(x) - expected))
    # bfloat16 has 8 bits: weights, slopes and results are each rounded.
    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    assert error < tolerance * np.max(np.abs(expected))


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
