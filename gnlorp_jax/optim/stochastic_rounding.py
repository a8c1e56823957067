r"""Stochastic rounding: bfloat16 parameters that lose no update on average.

Nearest rounding drops every update below half a unit in the last place, some
0.4 % of a bfloat16 parameter. Rounding up with the probability of the
remainder keeps its mean.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.checks import check_params
from gnlorp_jax.optim.labels import path_name

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


def round_stochastically(x: jax.Array, words: jax.Array) -> jax.Array:
  """Rounds to a neighbour in bfloat16, unbiased over uniform `words`.

  The bits of a float are ordered like its magnitude, so adding to the lower
  half, which bfloat16 drops, carries into the next bfloat16 away from zero,
  across powers of two as well. The remainder out of 2**16 is the probability
  that a random number of 16 bits does.

  Args:
    x: Any shape, float32. Infinities and NaN stay as they are.
    words: Random, shaped like x, uint32, of which the lower half is used.

  Returns:
    The rounded values, float32. (Going through bfloat16 instead would leave it
    to the compiler: XLA may drop such a pair of conversions.)
  """
  lower_half = jnp.uint32(0xFFFF)
  pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
  rounded = (pattern + (words & lower_half)) & ~lower_half
  rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x)


class StochasticRoundingState(NamedTuple):
  """State of `stochastic_rounding`."""

  # int32 [], updates so far; optax's name for it is also a tuple's method.
  count: jax.Array  # type: ignore[assignment]
  key: jax.Array  # uint32 [2], the generator's key, never changed


def stochastic_rounding(
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Makes `optax.apply_updates` round bfloat16 parameters stochastically.

  The last link of a chain: it replaces each update by the one that takes the
  parameter to a neighbour of ``float32(parameter) + update`` in bfloat16, the
  upper with the probability of the remainder. A sum that bfloat16 holds
  exactly is met exactly. Parameters of other dtypes keep their updates.

  The random numbers depend on the seed, the count of updates, the path of the
  parameter and the place of the element in it; not on devices. They are drawn
  element by element, without communication between shards. A step that goes
  through stacked parameters slice by slice draws the same numbers if it tells
  `update` where the slices start on the first axis, as ``first``.

  Args:
    seed: Seed of the generator.

  Returns:
    A transformation whose updates for bfloat16 parameters are float32; its
    `update` needs `params`.

  Raises:
    ValueError: At `update`, if `params` is missing.

  Examples:
    >>> tx = optax.chain(optax.sgd(1.0), stochastic_rounding())
    >>> w = jnp.ones(1000, jnp.bfloat16)
    >>> grads = jnp.full(1000, 2.0**-9)  # Half a step below 1.
    >>> updates, _ = tx.update(grads, tx.init(w), w)
    >>> moved = optax.apply_updates(w, updates)
    >>> sorted(set(moved.tolist()))
    [0.99609375, 1.0]

  References:
    Gupta et al., `Deep Learning with Limited Numerical Precision`, 2015,
    arXiv:1502.02551, section 3.

  Note:
    The sum is one of float32: what is below half a unit of that, 2**-17 of
    bfloat16's unit, is lost as ever. Where the hardware takes subnormal numbers
    for zero, as CPUs do under XLA, parameters below 2**-118 in magnitude may
    stay where they are.
  """

  def init_fn(params: optax.Params) -> StochasticRoundingState:
    del params
    # Named, as the key's size must not depend on the user's default.
    key = jax.random.key(seed, impl='threefry2x32')
    return StochasticRoundingState(
      count=jnp.zeros([], jnp.int32), key=jax.random.key_data(key)
    )

  def update_fn(
    updates: optax.Updates,
    state: StochasticRoundingState,
    params: optax.Params | None = None,
    *,
    first: jax.typing.ArrayLike = 0,
    **extra_args: Any,
  ) -> tuple[optax.Updates, StochasticRoundingState]:
    del extra_args
    check_params(params)
    key = state.key[0], state.key[1]
    step = state.count.astype(jnp.uint32)

    def rounded(path: Any, u: jax.Array, param: jax.Array) -> jax.Array:
      if param.dtype != jnp.bfloat16:
        return u
      name = zlib.crc32(path_name(path).encode())
      leaf_key = threefry(key, (step, jnp.uint32(name)))
      start = param.astype(jnp.float32)
      target = round_stochastically(
        start + u.astype(jnp.float32),
        random_words(leaf_key, param.shape, first),
      )
      # Adding the parameter again may miss the target by a rounding of
      # float32, far less than what nearest rounding to bfloat16 mends.
      return target - start

    updates = jax.tree_util.tree_map_with_path(rounded, updates, params)
    count = optax.safe_increment(state.count)
    return updates, StochasticRoundingState(count, state.key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
