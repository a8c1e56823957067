"""Codes against bitsandbytes, nearest-value search and NumPy in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim.quantized import arrays
from gnlorp_jax.optim.quantized.arrays import QuantizedArray
from gnlorp_jax.optim.quantized.codecs import (
  Codec,
  affine,
  dynamic,
  linear,
  nf4,
)

# Compiled, a call is one program and not one per operation.
quantize = jax.jit(arrays.quantize, static_argnames=('codec', 'matrix_axes'))
dequantize = jax.jit(arrays.dequantize)

CODECS = {
  'signed8': dynamic(8, signed=True),
  'unsigned8': dynamic(8, signed=False),
  'signed4': dynamic(4, signed=True, block=128),
  'linear4': linear(4),
  'nf4': nf4(),
  'affine8': affine(8),
  'affine4': affine(4),
  'rows8': affine(8, block=None),
  'rows4': affine(4, block=None),
}
every_codec = pytest.mark.parametrize('name', CODECS)


def bitsandbytes_functional():
  pytest.importorskip('torch')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # About kernels it would like to download.
    return pytest.importorskip('bitsandbytes.functional')


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def input_for(codec, shape, seed=0):
  """Elements over many decades, of the signs that a codec has."""
  x = normal(shape, seed) ** 5
  return x if codec.signed else np.abs(x)


def unpacked(q):
  codes = np.asarray(q.codes)
  if q.codec.bits == 8:
    return codes
  pairs = np.stack([codes % 16, codes // 16], axis=-1)
  return pairs.reshape(*codes.shape[:-1], -1)[..., : q.shape[-1]]


def all_values(codec):
  """What each code stands for, float32."""
  codes = np.arange(2**codec.bits, dtype=np.uint8)
  if codec.bits == 4:
    codes = codes[::2] + 16 * codes[1::2]
  shape = (2**codec.bits,)
  q = QuantizedArray(jnp.asarray(codes), jnp.ones(1), None, codec, shape)
  return np.asarray(dequantize(q))


def dynamic_map(bits, signed):
  """The values of arXiv:2110.02861, written out in float64."""
  positive = []
  for i in range(bits - 1):
    cells = 2**i if signed else 2 ** (i + 1)
    edges = np.linspace(0.1, 1, cells + 1)
    positive.extend(10.0 ** (i - bits + 2) * (edges[1:] + edges[:-1]) / 2)
  negative = [-x for x in positive] if signed else []
  return np.array(sorted([*negative, 0, *positive, 1]))


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('signed', [True, False])
def test_values_are_those_of_bitsandbytes(bits, signed):
  functional = bitsandbytes_functional()
  expected = functional.create_dynamic_map(
    signed=signed, max_exponent_bits=bits - 1, total_bits=bits
  ).numpy()
  if bits == 4:  # It fills up to 256 with zeros.
    expected = np.unique(expected)
  actual = all_values(dynamic(bits, signed=signed, block=2**bits))
  # Two roundings in float32 here, two others there.
  np.testing.assert_allclose(actual, expected, rtol=2e-7)
  np.testing.assert_allclose(actual, dynamic_map(bits, signed), rtol=2e-7)


def sweep(values):
  """Points of [-1, 1] with all borders between values, and off ties."""
  middles = (values[1:] + values[:-1]) / 2
  x = np.concatenate(
    [
      np.linspace(-1, 1, 300001),
      np.logspace(-9, 0, 100001),
      -np.logspace(-9, 0, 100001),
      values,
      middles * (1 + 1e-6),
      middles * (1 - 1e-6),
      [10.0**-i for i in range(9)],
      [0, 1, -1],
    ]
  ).astype(np.float32)
  if values[0] >= 0:
    x = np.abs(x)
  at = np.clip(np.searchsorted(middles, x.astype(np.float64)), 1, None) - 1
  near = np.stack([middles[at], middles[np.minimum(at + 1, len(middles) - 1)]])
  # Two roundings in float32 decide nearer to the middle than this.
  tie = np.min(np.abs(near - x), axis=0) <= 2.5e-7 * np.abs(x)
  return x[~tie], np.mean(tie)


@pytest.mark.parametrize('name', ['signed8', 'unsigned8', 'signed4', 'linear4'])
def test_codes_are_those_of_the_nearest_value(name):
  codec = CODECS[name]
  values = (
    np.arange(1, 17) / 16
    if codec.kind == 'linear'
    else dynamic_map(codec.bits, codec.signed)
  )
  x, ties = sweep(values)
  assert ties < 1e-3
  middles = (values[1:] + values[:-1]) / 2
  expected = np.searchsorted(middles, x.astype(np.float64))
  assert set(expected) == set(range(2**codec.bits))  # All codes occur.
  # One block, of which 1 is the largest: it leaves the elements as they are.
  whole = Codec(codec.kind, codec.bits, codec.signed, x.size)
  q = quantize(x, whole)
  np.testing.assert_array_equal(q.scale, [1.0])
  np.testing.assert_array_equal(unpacked(q), expected)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('shape', [(64, 256), (67, 100), (5000,)])
def test_codes_equal_those_of_bitsandbytes(signed, shape):
  functional = bitsandbytes_functional()
  import torch

  codec = dynamic(8, signed=signed)
  x = input_for(codec, shape)
  x.reshape(-1)[256:512] = 0
  code = functional.create_dynamic_map(signed=signed)
  q = quantize(x, codec)
  # Its path for float64 rounds to float32 and then to the nearest value.
  theirs, scale = torch.ops.bitsandbytes.quantize_blockwise(
    torch.tensor(x).double(), code, 256
  )
  np.testing.assert_array_equal(q.scale, scale.numpy())
  theirs = theirs.numpy()
  differ = np.asarray(q.codes) != theirs
  differ.reshape(-1)[256:512] = False  # Its 1 / 0 makes no code.
  # Ties: the two may sit on different sides of a middle, within float32.
  assert differ.mean() <= 2e-4
  assert np.abs(np.asarray(q.codes, int) - theirs)[differ].max(initial=0) <= 1
  restored = functional.dequantize_blockwise(
    torch.tensor(np.asarray(q.codes)), absmax=scale, code=code, blocksize=256
  )
  np.testing.assert_allclose(dequantize(q), restored.numpy(), rtol=3e-7)


@pytest.mark.parametrize('signed', [True, False])
def test_compiled_bitsandbytes_is_within_a_cell_of_its_table(signed):
  # Its float32 path looks elements up in a table of 65536 cells over [-1, 1].
  functional = bitsandbytes_functional()
  import torch

  codec = dynamic(8, signed=signed)
  x = input_for(codec, (64, 256))
  code = functional.create_dynamic_map(signed=signed)
  theirs, scale = torch.ops.bitsandbytes.quantize_blockwise(
    torch.tensor(x), code, 256
  )
  np.testing.assert_array_equal(quantize(x, codec).scale, scale.numpy())
  scaled = x.astype(np.float64) / scale.numpy()[:, None]
  middles = (code.numpy()[1:].astype(np.float64) + code.numpy()[:-1]) / 2
  cell = 2 / 65536
  assert (theirs.numpy() >= np.searchsorted(middles, scaled - cell)).all()
  assert (theirs.numpy() <= np.searchsorted(middles, scaled + cell)).all()


@pytest.mark.parametrize('kind', ['normal', 'borders'])
def test_nf4_is_that_of_bitsandbytes(kind):
  """Codes, scales and values, bit by bit; also right between two values."""
  torch = pytest.importorskip('torch')
  functional = bitsandbytes_functional()
  values = functional.get_4bit_type('nf4', device='cpu').numpy()
  np.testing.assert_array_equal(all_values(CODECS['nf4']), values)
  x = normal((96, 64)) * np.exp(normal((96, 1), 1))
  if kind == 'borders':
    borders = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(borders, np.float32(side)) for side in (-2, 2)]
    row = np.concatenate([borders, *near, values, [-1, 1, 0]])
    assert row.shape == (64,)
    x = row[None] * 2.0 ** np.arange(-3, 3)[:, None]
  x = x.astype(np.float32)
  packed, state = functional.quantize_4bit(
    torch.from_numpy(x), quant_type='nf4', blocksize=64
  )
  expected = functional.dequantize_4bit(packed, state).numpy()
  packed = packed.numpy().ravel()
  codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(x.shape)
  q = quantize(x, CODECS['nf4'])
  np.testing.assert_array_equal(unpacked(q), codes)
  np.testing.assert_array_equal(q.scale, state.absmax.numpy())
  np.testing.assert_array_equal(dequantize(q), expected)
  # What is decoded has the same codes again.
  again = quantize(dequantize(q), CODECS['nf4'])
  np.testing.assert_array_equal(again.codes, q.codes)
  np.testing.assert_array_equal(again.scale, q.scale)


@pytest.mark.parametrize('name', ['affine8', 'nf4'])
def test_decoding_in_a_loop_over_layers_keeps_nothing_of_a_kernels_size(name):
  """JAX moves constants out of such a loop; of NF4 they were 16 kernels."""
  size = 256
  kernels = quantize(normal((6, size, size)), CODECS[name])

  @jax.checkpoint
  def block(x, layer):
    kernel, change = layer
    return jnp.tanh(x @ (arrays.dequantize(kernel) + change)), None

  def loss(changes, x):
    return jnp.sum(jax.lax.scan(block, x, (kernels, changes))[0])

  step = jax.jit(jax.grad(loss))
  changes, x = jnp.zeros((6, size, 1)), jnp.ones((2, size))
  stats = step.lower(changes, x).compile().memory_analysis()
  assert stats.temp_size_in_bytes < 3 * 4 * size**2


def test_four_bit_second_moments_have_no_zero():
  x = np.abs(normal((4, 128))) ** 8 + 1e-30
  restored = dequantize(quantize(x, linear(4)))
  largest = x.max(axis=-1, keepdims=True)
  assert (np.asarray(restored) >= largest / 16 * 0.999).all()


def affine_reference(x_KB, bits):
  """The formulas of `affine`, in float64."""
  x_KB = x_KB.astype(np.float64)
  low = x_KB.min(axis=-1, keepdims=True)
  scale = (x_KB.max(axis=-1, keepdims=True) - low) / (2**bits - 1)
  zero = -np.round(low / scale)
  codes = np.clip(np.round(x_KB / scale) + zero, 0, 2**bits - 1)
  return codes, scale, zero, (codes - zero) * scale


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('offset', [0.0, 3.0, -30.0])
@pytest.mark.parametrize('block', [64, None])
def test_affine_follows_the_formulas(bits, offset, block):
  x = normal((2, 6, 32)) + np.float32(offset)
  q = quantize(x, affine(bits, block=block))
  x_KB = x.reshape(2, -1, block or 32)
  codes, scale, zero, restored = affine_reference(x_KB, bits)
  np.testing.assert_allclose(q.scale, scale[..., 0], rtol=1e-5)
  np.testing.assert_array_equal(q.zero, zero[..., 0])
  differ = unpacked(q) != codes.reshape(x.shape)
  assert differ.mean() < 0.01  # Ties, in float32.
  close = np.abs(np.asarray(dequantize(q)) - restored.reshape(x.shape))
  assert close[~differ].max() < 1e-5 * max(1, abs(offset))
  # Nothing is clipped, whichever side of 0 the block is on.
  error = np.abs(np.asarray(dequantize(q)) - x).reshape(x_KB.shape)
  assert (error <= scale * 1.001 + 1e-6).all()


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('value', [0.0, 1e-9, -2.5, 1e20, 1e-42])
def test_affine_constant_block_is_exact(bits, value):
  x = np.full((2, 300), value, np.float32)
  restored = np.asarray(dequantize(quantize(x, affine(bits))))
  # Below the smallest normal number a block becomes 0.
  np.testing.assert_array_equal(restored, 0 if value == 1e-42 else x)


@pytest.mark.parametrize('bits', [8, 4])
def test_stochastic_rounding_is_unbiased(bits):
  x = normal((4, 64))
  codec = affine(bits, block=None)
  draws = jax.jit(
    jax.vmap(lambda key: dequantize(quantize(x, codec, key=key)))
  )(jax.random.split(jax.random.key(0), 4000))
  step = np.asarray(quantize(x, codec).scale)[:, None]
  inside = (x > x.min(axis=-1, keepdims=True) + step) & (
    x < x.max(axis=-1, keepdims=True) - step
  )
  mean = np.mean(np.asarray(draws), axis=0, dtype=np.float64)
  error = np.abs(mean - x) / step
  # A draw is off by at most half a step in standard deviation: 5 sigma.
  assert error[inside].max() < 5 * 0.5 / np.sqrt(4000)
  assert np.abs(np.asarray(draws) - x).max() <= 1.001 * step.max()
  nearest = np.asarray(dequantize(quantize(x, codec)))
  assert (np.abs(nearest - x) / step)[inside].max() > 0.4  # Which is biased.


def test_stochastic_rounding_needs_a_key_of_its_own():
  x = normal((4, 64))
  a, b, again = (
    np.asarray(quantize(x, affine(8), key=jax.random.key(seed)).codes)
    for seed in (0, 1, 0)
  )
  assert (a != b).any() and (a == again).all()


@every_codec
@pytest.mark.parametrize('shape', [(3, 8, 64), (2, 3, 5, 33), (301,)])
def test_stack_equals_each_matrix_by_itself(name, shape):
  codec = CODECS[name]
  x = input_for(codec, shape)
  q = quantize(x, codec)
  restored = dequantize(q)
  assert restored.shape == shape and restored.dtype == jnp.float32
  assert q.shape == shape[-2:]
  for index in np.ndindex(shape[:-2]):
    part = jax.tree.map(lambda leaf, i=index: np.asarray(leaf)[i], q)
    alone = quantize(x[index], codec)
    assert jax.tree.structure(part) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, part, alone)
    np.testing.assert_array_equal(
      np.asarray(restored)[index], dequantize(alone)
    )


@every_codec
def test_slices_work_inside_a_loop(name):
  codec = CODECS[name]
  x = input_for(codec, (3, 8, 64))
  q = quantize(x, codec)

  def body(i, total):
    part = jax.tree.map(
      lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1), q
    )
    return total + dequantize(part)[0]

  total = jax.jit(lambda: jax.lax.fori_loop(0, 3, body, jnp.zeros((8, 64))))()
  expected = np.asarray(dequantize(q)).sum(0)
  np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)


def test_vectors_can_be_stacked_too():
  x = normal((3, 300))
  codec = dynamic(8, signed=True)
  q = quantize(x, codec, matrix_axes=1)
  assert q.shape == (300,) and q.scale.shape == (3, 2)
  alone = quantize(x[1], codec)
  np.testing.assert_array_equal(np.asarray(q.codes)[1], alone.codes)


@pytest.mark.parametrize(
  ('codec', 'shape', 'codes', 'blocks'),
  [
    (dynamic(8, signed=True), (3, 64, 40), (3, 64, 40), 10),
    (dynamic(8, signed=False), (1000,), (1000,), 4),
    (dynamic(4, signed=True, block=128), (3, 64, 41), (3, 64, 21), 21),
    (linear(4), (64, 40), (64, 20), 20),
    (affine(8), (8, 8), (8, 8), 1),
    (affine(4, block=None), (3, 7, 30), (3, 7, 15), 7),
  ],
)
def test_storage_is_codes_and_four_bytes_per_block(codec, shape, codes, blocks):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  q = jax.eval_shape(lambda x: quantize(x, codec), x)
  assert q.codes.shape == codes and q.codes.dtype == jnp.uint8
  per_block = [q.scale] if q.zero is None else [q.scale, q.zero]
  for leaf in per_block:
    assert leaf.shape == (*shape[:-2], blocks) and leaf.dtype == jnp.float32
  stack = int(np.prod(shape[:-2], dtype=int))
  nbytes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(q)]
  assert sum(nbytes) == (
    int(np.prod(codes)) + 4 * stack * blocks * len(per_block)
  )


@every_codec
def test_blocks_of_zeros_are_exact(name):
  codec = CODECS[name]
  x = input_for(codec, (16, 256))
  x[1:3] = 0
  restored = np.asarray(dequantize(quantize(x, codec)))
  np.testing.assert_array_equal(restored[1:3], 0)
  assert np.isfinite(restored).all()


@pytest.mark.parametrize('name', ['signed8', 'unsigned8', 'linear4', 'affine8'])
@pytest.mark.parametrize('scale', [1e-41, 1e-30, 1e30])
def test_extreme_scales_stay_finite(name, scale):
  codec = CODECS[name]
  x = input_for(codec, (16, 256)) * np.float32(scale)
  restored = np.asarray(dequantize(quantize(x, codec)))
  assert np.isfinite(restored).all()
  assert np.abs(restored).max() <= np.abs(x).max() * 1.01


@pytest.mark.parametrize(
  ('name', 'bound'),
  # Half a cell of the highest decade, relative to the block's largest.
  [
    ('signed8', 0.45 / 64),
    ('unsigned8', 0.45 / 128),
    ('signed4', 0.45 / 4),
    ('linear4', 1 / 16),
    ('affine8', 1.1 / 255),
    ('affine4', 1.1 / 15),
  ],
)
def test_error_is_within_half_a_cell(name, bound):
  codec = CODECS[name]
  x = input_for(codec, (16, 256))
  error = np.abs(np.asarray(dequantize(quantize(x, codec))) - x)
  size = x.max() - x.min() if codec.kind == 'affine' else np.abs(x).max()
  assert error.max() <= bound * size * 1.001


@pytest.mark.parametrize(
  ('build', 'text'),
  [
    (lambda: linear(16), 'bits must be 8 or 4, got 16.'),
    (
      lambda: affine(8, block=0),
      'block must be at least 1, or None for rows, got 0.',
    ),
    (
      lambda: Codec('log', 8, True, 256),
      "Unknown kind 'log'; expected one of ('dynamic', 'linear', 'affine', "
      "'nf4').",
    ),
    (
      lambda: quantize(np.ones(4), affine(8), matrix_axes=2),
      'An array of shape [4] holds no matrices of 2 axes: matrix_axes must be '
      '1 or 2, and the array have as many.',
    ),
    (
      lambda: quantize(np.ones(4), linear(4), key=jax.random.key(0)),
      "Stochastic rounding is for 'affine' codecs, got 'linear'. Leave key "
      'out.',
    ),
  ],
)
def test_bad_option_is_an_error(build, text):
  with pytest.raises(ValueError) as error:
    build()
  assert str(error.value) == text


def test_floor_keeps_positive_elements_off_zero():
  x = np.float32([[1.0, 1e-3, 1e-12, 1e-30, 0.0]])
  plain, floored = (
    np.asarray(dequantize(quantize(x, dynamic(8, signed=False, floor=floor))))
    for floor in (False, True)
  )
  assert plain[0, 2:].tolist() == [0, 0, 0]
  # The first positive value: the middle of the first half of a decade.
  np.testing.assert_allclose(floored[0, 2:], [3.25e-7, 3.25e-7, 0], rtol=1e-5)
  np.testing.assert_array_equal(plain[0, :2], floored[0, :2])
