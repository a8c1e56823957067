"""Kernels in 8 bits: what rounding at random keeps, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import quantized_weights
from gnlorp_jax.optim.quantized import arrays
from gnlorp_jax.optim.quantized.weights import CODEC

# Compiled, a call is one program and not one per operation.
quantize_weights = jax.jit(quantized_weights.quantize_weights)
requantize_weights = jax.jit(quantized_weights.requantize_weights)
dequantize_weights = jax.jit(
  quantized_weights.dequantize_weights, static_argnums=1
)
quantize = jax.jit(arrays.quantize, static_argnums=1)
quantize_onto = jax.jit(arrays.quantize_onto, static_argnums=1)

STEP = 1 / 128  # Between two values, where a block spans 255 of them.


def block_of(inner):
  """A kernel [1, 16, 16] of one block from 0 to 255 steps, the rest `inner`."""
  x = np.full(256, inner, np.float32)
  x[0], x[-1] = 0, 255
  return x.reshape(1, 16, 16) * np.float32(STEP)


def random_tree(seed=0, layers=3, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {
    'mlp': {
      'up': {'kernel': rng.normal(size=(layers, 20, 30)).astype(dtype)},
      'down': {'kernel': rng.normal(size=(layers, 30, 20)).astype(dtype)},
    },
    'norm': {'scale': rng.normal(size=(layers, 20)).astype(dtype)},
  }


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def draws(value, count):
  """`value` rounded at random with `count` keys, [count, ...], in steps."""
  old = quantize_weights({'kernel': value})
  keys = jax.random.split(jax.random.key(0), count)
  found = jax.jit(
    jax.vmap(
      lambda key: dequantize_weights(
        requantize_weights({'kernel': value}, old, key), jnp.float32
      )['kernel']
    )
  )(keys)
  return np.asarray(found, np.float64) / STEP


@pytest.mark.parametrize('part', [0.1, 0.5, 0.75])
def test_a_value_between_two_becomes_either_by_its_remainder(part):
  count = 400
  inner = draws(block_of(100 + part), count).reshape(count, 256)[:, 1:-1]
  assert set(np.unique(inner)) == {100.0, 101.0}
  # The mean of a binomial, within five standard deviations: of all draws, and
  # of each element.
  sigma = np.sqrt(part * (1 - part) / inner.size)
  assert abs(inner.mean() - 100 - part) < 5 * sigma
  each = np.abs(inner.mean(axis=0) - 100 - part)
  assert each.max() < 5 * np.sqrt(part * (1 - part) / count)
  # Neighbours are rounded independently.
  ups = inner - inner.mean()
  between = (ups[:, 1:] * ups[:, :-1]).mean() / (part * (1 - part))
  assert abs(between) < 5 / np.sqrt(inner.size)


def test_values_of_the_code_stay_whatever_the_key():
  value = block_of(37)
  np.testing.assert_array_equal(
    draws(value, 20), np.broadcast_to(value / STEP, (20, 1, 16, 16))
  )


def test_nearest_loses_a_small_update_that_stochastic_keeps_on_average():
  steps, size = 50, 0.2
  update = np.full((1, 16, 16), size * STEP, np.float32)
  update[0, 0, 0] = update[0, -1, -1] = 0  # The block's extremes stay.

  def travel(stochastic):
    stored = quantize_weights({'kernel': block_of(100)})
    for number in range(steps):
      now = dequantize_weights(stored, jnp.float32)
      key = jax.random.key(number) if stochastic else None
      stored = requantize_weights(
        {'kernel': now['kernel'] + update}, stored, key
      )
    end = dequantize_weights(stored, jnp.float32)['kernel']
    return np.asarray(end).reshape(-1)[1:-1] / STEP - 100

  np.testing.assert_array_equal(travel(False), 0)
  way = travel(True)
  # Every step adds the variance of one draw to an element.
  sigma = np.sqrt(steps * size * (1 - size) / way.size)
  assert abs(way.mean() - steps * size) < 5 * sigma


def test_random_numbers_follow_key_and_path():
  tree = random_tree()
  same = tree['mlp']['up']['kernel']
  tree['mlp']['gate'] = {'kernel': same}
  old = quantize_weights(tree)
  new = jax.tree.map(lambda x: x * 1.01, tree)
  first, again, other = (
    requantize_weights(new, old, jax.random.key(seed)) for seed in (1, 1, 2)
  )
  assert_same(first, again)
  eager = quantized_weights.requantize_weights(new, old, jax.random.key(1))
  assert_same(first, eager)

  def codes(tree, name):
    return np.asarray(tree['mlp'][name]['kernel'].codes)

  assert (codes(first, 'up') != codes(other, 'up')).mean() > 0.1
  assert (codes(first, 'up') != codes(first, 'gate')).mean() > 0.1
  # Nothing but the last digit.
  assert np.abs(codes(first, 'up').astype(int) - codes(other, 'up')).max() == 1


def test_slices_are_quantised_and_decoded_as_the_stack_is():
  tree = random_tree()
  whole = quantize_weights(tree)
  decoded = dequantize_weights(whole, jnp.float32)
  for layer in range(3):
    slice_ = jax.tree.map(lambda x, i=layer: x[i : i + 1], tree)
    stored = jax.tree.map(lambda x, i=layer: np.asarray(x)[i : i + 1], whole)
    assert_same(quantize_weights(slice_), stored)
    assert_same(requantize_weights(slice_, stored, None), stored)
    assert_same(
      dequantize_weights(stored, jnp.float32),
      jax.tree.map(lambda x, i=layer: np.asarray(x)[i : i + 1], decoded),
    )


@pytest.mark.parametrize('shape', [(32, 64), (3, 256, 128), (2, 20, 30)])
def test_a_kernel_takes_a_byte_and_eight_per_block(shape):
  stored = jax.eval_shape(
    quantize_weights, {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
  )
  found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
  matrices = int(np.prod(shape[:-2]))
  blocks = -(-shape[-2] * shape[-1] // 256)
  assert found == np.prod(shape) + matrices * blocks * 8


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_asked_for_and_others_stay(dtype):
  tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_tree())
  stored = quantize_weights(tree)
  kernel = stored['mlp']['up']['kernel']
  assert kernel.codes.dtype == jnp.uint8
  assert kernel.scale.dtype == kernel.zero.dtype == jnp.float32
  assert stored['norm']['scale'].dtype == dtype
  for wanted in (jnp.float32, jnp.bfloat16):
    loaded = dequantize_weights(stored, wanted)
    assert loaded['mlp']['up']['kernel'].dtype == wanted
    assert loaded['norm']['scale'].dtype == dtype
  exact = jax.tree.map(np.float32, tree)
  again = requantize_weights(exact, stored, None)
  assert_same(again, stored)


def test_a_kernel_of_integers_is_an_error():
  with pytest.raises(ValueError) as error:
    quantize_weights({'up': {'kernel': np.zeros((4, 4), np.int32)}})
  assert str(error.value) == (
    "'up/kernel' has dtype int32: only floating kernels are quantised. Cast "
    'it, or give those that are already quantised to requantize_weights.'
  )


# Decoded values, quantised again.


def decoded(stored):
  """By NumPy: codes less zero, times scale."""
  size = stored.shape[0] * stored.shape[1]
  codes = np.asarray(stored.codes, np.float32).reshape(-1, size)
  blocks = np.repeat(np.arange(stored.scale.shape[-1]), 256)[:size]
  scale, zero = (np.asarray(x)[:, blocks] for x in (stored.scale, stored.zero))
  value = (codes - zero) * scale
  return value.reshape(stored.codes.shape)


def test_decoded_values_get_their_codes_again():
  new = random_tree()
  stored = requantize_weights(new, quantize_weights(new), jax.random.key(0))
  kernel = stored['mlp']['up']['kernel']
  found = quantize_onto(decoded(kernel), CODEC, kernel.scale, kernel.zero)
  assert_same(found, kernel)
  # The extremes alone would not have told the scale: rounding moved them.
  alone = quantize(decoded(kernel), CODEC)
  assert np.any(np.asarray(alone.scale) != kernel.scale)


def test_blocks_of_other_values_get_a_grid_of_their_own():
  kernel = quantize_weights(random_tree())['mlp']['up']['kernel']
  x = decoded(kernel)
  x[1, :4] *= 1.5  # 120 elements of the first of three blocks.
  found = quantize_onto(x, CODEC, kernel.scale, kernel.zero)
  own = quantize(x, CODEC)
  expected = np.array(kernel.scale)
  expected[1, 0] = np.asarray(own.scale)[1, 0]
  np.testing.assert_array_equal(found.scale, expected)
  error = np.abs(decoded(found) - x)[1].reshape(-1)[:256]
  assert error.max() <= expected[1, 0] * 0.5001
  np.testing.assert_array_equal(
    np.asarray(found.codes)[0], np.asarray(kernel.codes)[0]
  )
