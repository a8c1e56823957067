"""Random bits that depend on an element's place alone, and fuse everywhere."""

import math

import jax
import jax.numpy as jnp

# 32-bit words of a generator's key or counter, unsigned.
Words = tuple[jax.Array, jax.Array]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # Keeps a key of zeros from being a special one.


def threefry(key: Words, counter: Words) -> Words:
  """Threefry-2x32 with 20 rounds: two random words for each key and counter.

  Args:
    key: uint32, of a shape that broadcasts with the counter's.
    counter: uint32.

  Returns:
    Two arrays, uint32.

  References:
    Salmon et al., `Parallel random numbers: as easy as 1, 2, 3`, 2011,
    doi:10.1145/2063384.2063405, section 4.3.

  Note:
    It is the function behind `jax.random`. On CPUs that one runs it in a loop
    over whole arrays, 10 bytes and more per element; these plain operations
    fuse with the rounding, everywhere, and need no memory.
  """
  keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
  x, y = counter[0] + keys[0], counter[1] + keys[1]
  for block in range(1, 6):
    for rotation in _ROTATIONS[(block - 1) % 2]:
      x = x + y
      y = (y << rotation | y >> (32 - rotation)) ^ x
    x = x + keys[block % 3]
    y = y + keys[(block + 1) % 3] + jnp.uint32(block)
  return x, y


def random_words(
  key: Words, shape: tuple[int, ...], first: jax.typing.ArrayLike = 0
) -> jax.Array:
  """A random word for each element of an array, uint32.

  Its counter is the element's place: the index of its row and that within the
  row, so that it is the same number however the array is split over devices.
  `first` is the index on the first axis at which the array starts in the one
  that it is a slice of.
  """
  rows = jnp.uint32(math.prod(shape[1:-1]))
  row = jnp.full(shape, jnp.asarray(first).astype(jnp.uint32) * rows)
  column = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape) - 1):
    stride = jnp.uint32(math.prod(shape[axis + 1 : -1]))
    row += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  if shape:
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  return threefry(key, (row, column))[0]
