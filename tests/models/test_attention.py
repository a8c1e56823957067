import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import attention


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


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
  found = attention.implementation_for(device, dtype, head_dim)
  assert found == expected


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

  got = gradients(
    lambda *a: attention.causal(*a, 'xla', attention.ScoreRule(8**-0.5)),
    q,
    k,
    v,
  )
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


def by_hand(q, k, v, rule, segments, window):
  """Attention in plain sums over a mask, to be differentiated by JAX."""
  repeats = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
  products = jnp.einsum('btnh,bsnh->bnts', q, k)
  number = np.arange(q.shape[1])
  visible = number[:, None] >= number
  visible &= number[:, None] - number < window
  visible = visible[None] & (segments[:, :, None] == segments[:, None, :])
  x = rule.of(products)
  weights = jax.nn.softmax(jnp.where(visible[:, None], x, -jnp.inf), axis=-1)
  return jnp.einsum('bnts,bsnh->btnh', weights, v)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3], [4, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize('cap', [None, 1.5])
def test_documents_windows_and_caps_equal_sums_by_hand(cap):
  shapes = [(2, 8, heads, 6) for heads in (4, 2, 2, 4)]
  q, k, v, slopes = (normal(s, seed) for seed, s in enumerate(shapes))
  rule = attention.ScoreRule(0.7, cap)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(attend, q, k, v, window):
    y, pull_back = jax.vjp(lambda *qkv: attend(*qkv, window), q, k, v)
    return y, *pull_back(slopes)

  def ours(q, k, v, window):
    return attention.causal(q, k, v, 'xla', rule, SEGMENTS, window)

  def plain(q, k, v, window):
    return by_hand(q, k, v, rule, SEGMENTS, window)

  # The window is an array: a scan over layers brings it.
  window = np.int32(3)
  for got, expected in zip(
    gradients(ours, q, k, v, window),
    gradients(plain, q, k, v, window),
    strict=True,
  ):
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize('window', [None, jnp.int32(3)])
def test_masks_of_odd_lengths_are_none_of_cudnn(window):
  # Its gradient refuses them; without it, no GPU is needed here.
  q = normal((2, 7, 2, 8)).astype(jnp.bfloat16)
  segments = SEGMENTS[:, :7] if window is None else None
  got, expected = (
    attention.causal(q, q, q, k, attention.ScoreRule(0.3), segments, window)
    for k in ('cudnn', 'xla')
  )
  np.testing.assert_array_equal(got, expected)


def test_a_cache_gives_what_all_at_once_gives():
  q, k, v = (normal((2, 8, heads, 6), heads) for heads in (4, 2, 1))
  v = np.repeat(v, 2, axis=2)
  rule = attention.ScoreRule(0.4, 3.0)
  whole = attention.causal(q, k, v, 'xla', rule, None, 4)
  slots = [np.pad(x, ((0, 0), (2, 1), (0, 0), (0, 0))) for x in (k, v)]
  positions = np.broadcast_to([-1, -1, *range(8), -1], (2, 11))
  last = np.broadcast_to([6, 7], (2, 2))
  got = attention.cached(q[:, 6:], *slots, rule, last, positions, 4)
  np.testing.assert_allclose(got, whole[:, 6:], atol=1e-6)


def test_padding_is_a_number_whatever_it_sees():
  q, k = normal((1, 2, 2, 4)), normal((1, 3, 2, 4), 1)
  rule = attention.ScoreRule(0.5)
  empty = np.full((1, 3), -1)
  y = attention.cached(q, k, k, rule, np.full((1, 2), -1), empty)
  assert np.isfinite(y).all()
