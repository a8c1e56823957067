"""How errors are stored: bytes, accuracy, and odd shapes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import projections, with_low_rank_projection
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.optim.projections.svd import track
from gnlorp_jax.optim.subspace.error_feedback import decode_error, encode_error
from gnlorp_jax.optim.subspace.quantized_basis import quantize_basis


def error(shape=(3, 24, 10)):
  rng = np.random.default_rng(0)
  return rng.standard_normal(shape) * rng.uniform(0.1, 10, shape[-1])


@pytest.mark.parametrize(('bits', 'levels'), [(8, 255), (4, 15)])
def test_codes_are_evenly_spaced_over_each_output_unit(bits, levels):
  x = error()
  found = decode_error(encode_error(jnp.asarray(x, jnp.float32), bits))
  span = x.max(axis=-2, keepdims=True) - x.min(axis=-2, keepdims=True)
  # Half a level for the element; the zero point is rounded as well, which
  # moves the extremes by half a level at most.
  assert (np.abs(found - x) <= span / levels * 1.001).all()
  assert np.abs(found - x).mean() < 0.3 * (span / levels).mean()


def test_float32_is_kept_as_it_is():
  x = jnp.asarray(error(), jnp.float32)
  np.testing.assert_array_equal(decode_error(encode_error(x, 32)), x)


@pytest.mark.parametrize(('bits', 'size'), [(8, 1), (4, 0.5)])
def test_storage_is_one_or_half_a_byte_per_element(bits, size):
  stored = encode_error(jnp.zeros((2, 64, 16)), bits)
  # Scale and zero in float32 for each output unit.
  assert tree_bytes(stored) == 2 * 16 * (64 * size + 8)


def test_constant_and_zero_units_are_exact():
  x = jnp.array([[0.0, 2.5], [0.0, 2.5]])
  np.testing.assert_array_equal(decode_error(encode_error(x, 8)), x)


def test_unknown_bits_are_an_error():
  with pytest.raises(ValueError) as caught:
    with_low_rank_projection(optax.identity(), 4, error_bits=16)
  assert str(caught.value) == (
    'error_bits must be None (no error feedback), 32, 8 or 4, got 16.'
  )


@pytest.mark.parametrize('projection', ['random', projections.get('random')])
def test_errors_of_bases_that_are_not_orthonormal_are_not_fed_back(projection):
  with pytest.raises(ValueError) as caught:
    with_low_rank_projection(
      optax.identity(), 4, error_bits=8, projection=projection
    )
  assert str(caught.value) == (
    'error_bits=8 would feed back what this projection leaves out, which may '
    'be longer than the gradient and then grows without end: its bases are not '
    'orthonormal. Use error_bits=None, or a projection whose bases are, such '
    "as 'svd' or 'dct'."
  )


def test_a_projection_of_few_bits_or_with_memory_says_what_it_is_made_of():
  random, svd = projections.get('random'), projections.get('svd')
  assert not quantize_basis(random, 8).is_orthonormal
  assert not track(random, 0.5).is_orthonormal
  assert quantize_basis(track(svd, 0.5), 8).is_orthonormal
