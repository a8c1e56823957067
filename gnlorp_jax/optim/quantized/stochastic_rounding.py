r"""Stochastic rounding: bfloat16 parameters that lose no update on average.

Nearest rounding drops every update below half a unit in the last place, some
0.4 % of a bfloat16 parameter. Rounding up with the probability of the
remainder keeps its mean.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import check_params
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.parts.random_bits import random_words, threefry


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
