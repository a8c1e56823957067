import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import rope


@functools.partial(jax.jit, static_argnums=1)
def apply_rope(x, theta):
  """Rotates as a model without scaling does, at positions from 0."""
  positions = jnp.arange(x.shape[1])[None]
  return rope.rotate(
    x, positions, *rope.Rope(theta).frequencies(x.shape[-1], 1)
  )


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


def test_rotation_takes_positions_and_a_factor():
  x = normal((2, 5, 3, 8))
  frequency, _ = rope.Rope(100.0).frequencies(8, 1)
  turn = jax.jit(rope.rotate, static_argnums=3)
  whole = turn(x, np.arange(5)[None], frequency, 1.0)
  positions = np.array([[3, 0, 4, 1, 2], [2, 2, 2, 0, 1]])
  got = turn(
    np.take_along_axis(x, positions[..., None, None], 1),
    positions,
    frequency,
    2.0,
  )
  expected = np.take_along_axis(
    np.asarray(whole), positions[..., None, None], 1
  )
  np.testing.assert_allclose(got, 2 * expected, atol=2e-6)


def test_zero_frequencies_leave_features_as_they_are():
  x = normal((1, 4, 2, 6))
  got = rope.rotate(x, np.arange(4)[None], np.zeros(3))
  np.testing.assert_array_equal(got, x)


def test_features_beyond_the_frequencies_stay_as_they_are():
  x = normal((1, 4, 2, 10))
  frequency, _ = rope.Rope(100.0).frequencies(6, 4)
  got = rope.rotate(x, np.arange(4)[None], frequency)
  np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
  np.testing.assert_allclose(
    got[..., :6], apply_rope(x[..., :6], 100.0), atol=1e-6
  )


def test_long_factors_are_as_many_as_pairs():
  scaling = rope.LongRope(
    short_factor=(1.0, 2.0),
    long_factor=(3.0,),
    factor=2.0,
    original_max_position_embeddings=8,
  )
  with pytest.raises(ValueError) as error:
    scaling.check(2)
  assert str(error.value) == (
    'long_factor of rope_scaling has 1 factors, and 2 pairs of features turn: '
    'give one for each pair.'
  )


SCALED = {
  'linear': {'factor': 4.0},
  'llama3': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  },
  'yarn': {'factor': 4.0, 'original_max_position_embeddings': 32768},
  'yarn ': {
    'factor': 40.0,
    'original_max_position_embeddings': 4096,
    'beta_fast': 16.0,
    'beta_slow': 2.0,
    'mscale': 1.0,
    'mscale_all_dim': 0.8,
    'truncate': False,
  },
  'longrope': {'factor': 8.0, 'original_max_position_embeddings': 4096},
  'longrope ': {'factor': 8.0, 'attention_factor': 1.3},
}


@pytest.mark.parametrize('kind', SCALED)
@pytest.mark.parametrize('head_dim, theta', [(128, 5e5), (16, 1e4)])
def test_scaled_frequencies_equal_those_of_transformers(kind, head_dim, theta):
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  fields = {'rope_type': kind.strip(), 'rope_theta': theta, **SCALED[kind]}
  if 'longrope' in kind:
    factors = 1 + np.random.default_rng(0).random((2, head_dim // 2))
    fields['short_factor'], fields['long_factor'] = factors.tolist()
  config = transformers.LlamaConfig(
    hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=fields
  )
  scaling, reasons = rope.from_hf(fields, config.max_position_embeddings)
  assert not reasons
  for length in (4096, 4097):
    expected, factor = ROPE_INIT_FUNCTIONS[kind.strip()](config, 'cpu', length)
    found, by = rope.Rope(theta, scaling).frequencies(head_dim, length)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert by == pytest.approx(factor, rel=1e-12)
  assert rope.from_hf(rope.to_hf(theta, scaling), None) == (scaling, [])


@pytest.mark.parametrize(
  'fields, text',
  [
    (
      {'type': 'dynamic', 'factor': 2.0},
      "rope_type='dynamic' (supported: ['default', 'linear', 'llama3', 'yarn', "
      "'longrope']; its frequencies change with the length of a sequence)",
    ),
    (
      {'rope_type': 'spiral'},
      "rope_type='spiral' (supported: ['default', 'linear', 'llama3', 'yarn', "
      "'longrope']; it is not known)",
    ),
    (
      {'rope_type': 'llama3', 'factor': 8.0},
      "rope_type='llama3' lacks ['low_freq_factor', 'high_freq_factor']",
    ),
    (
      {'rope_type': 'linear', 'factor': -1.0},
      "rope_type='linear' with factor=-1.0 (it must be a number > 0)",
    ),
    (
      {
        'rope_type': 'longrope',
        'factor': 2.0,
        'short_factor': 1.0,
        'long_factor': [1.0, 2.0],
      },
      "rope_type='longrope' with short_factor=1.0 (it must be several numbers, "
      'each > 0)',
    ),
    (
      {'rope_type': 'linear', 'factor': 2.0, 'bend': 3},
      "rope_type='linear' with unknown {'bend': 3}",
    ),
  ],
)
def test_what_is_not_supported_is_told_with_its_reason(fields, text):
  assert rope.from_hf(fields, 64) == (None, [text])


def test_no_scaling_in_any_spelling():
  for fields in ({}, {'rope_type': 'default'}, {'type': 'default'}):
    assert rope.from_hf(fields, 64) == (None, [])
