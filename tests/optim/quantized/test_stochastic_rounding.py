"""Stochastic rounding: where it lands, how often, and on what it depends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim.quantized.stochastic_rounding import (
  random_words,
  round_stochastically,
  stochastic_rounding,
  threefry,
)

BF16 = jnp.bfloat16
ULP = 2.0**-7  # bfloat16's, from 1 to 2
SIGMAS = 5  # Of a sampling error; one test in a million would fail by chance.


def apply(tx, params, updates, state):
  updates, state = tx.update(updates, state, params)
  return optax.apply_updates(params, updates), state


def neighbours(x):
  """The largest bfloat16 up to x and the smallest from x, by NumPy."""
  x = np.asarray(x, np.float32)
  nearest = x.astype(BF16)
  as_float = nearest.astype(np.float32)
  below = np.nextafter(nearest, BF16(-np.inf)).astype(np.float32)
  above = np.nextafter(nearest, BF16(np.inf)).astype(np.float32)
  return (
    np.where(as_float > x, below, as_float),
    np.where(as_float < x, above, as_float),
  )


def upper_share(x, low, high):
  """How often x should be rounded up, in float64; NaN where it is exact."""
  x, low, high = (np.asarray(a, np.float64) for a in (x, low, high))
  with np.errstate(invalid='ignore'):
    return (x - low) / (high - low)


def wild_pairs(n=20000):
  """Parameters and updates of any sign, size and ratio, some that cancel."""
  rng = np.random.default_rng(0)
  sign = rng.choice([-1, 1], n)
  p = sign * np.exp2(rng.uniform(-100, 100, n))
  u = rng.choice([-1, 1], n) * p * np.exp2(rng.uniform(-25, 25, n))
  u[: n // 4] = -p[: n // 4] * (1 + rng.uniform(-0.1, 0.1, n // 4))
  p = p.astype(BF16)
  return p, u.astype(np.float32)


@pytest.mark.parametrize(
  ('key', 'counter', 'expected'),
  [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
    (
      (0x13198A2E, 0x03707344),
      (0x243F6A88, 0x85A308D3),
      (0xC4923A9C, 0x483DF7A0),
    ),
  ],
)
def test_threefry_gives_the_published_answers(key, counter, expected):
  key, counter = (tuple(map(jnp.uint32, pair)) for pair in (key, counter))
  assert tuple(map(int, threefry(key, counter))) == expected


def test_every_bit_is_on_half_of_the_time_and_no_place_repeats():
  key = jnp.uint32(1), jnp.uint32(2)
  words = np.asarray(random_words(key, (8, 50, 100)))
  bits = words.reshape(-1, 1) >> np.arange(32, dtype=np.uint32) & 1
  sigma = 0.5 / np.sqrt(words.size)
  np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=SIGMAS * sigma)
  # 4e4 words of 2**32 have 0.2 pairs in common, on average.
  assert words.size - np.unique(words).size <= 3
  # Rows, columns and stacks: no two slices share their numbers.
  for axis in range(3):
    first, second = np.take(words, 0, axis), np.take(words, 1, axis)
    assert not np.intersect1d(first, second).size


@pytest.mark.parametrize('jit', [False, True])
def test_lands_on_a_neighbour_whatever_the_sizes(jit):
  p, u = map(jnp.asarray, wild_pairs())
  tx = stochastic_rounding(3)
  step = jax.jit(apply, static_argnums=0) if jit else apply
  moved, _ = step(tx, p, u, tx.init(p))
  assert moved.dtype == BF16
  total = np.asarray(p).astype(np.float32) + np.asarray(u)
  low, high = neighbours(total)
  moved = np.asarray(moved).astype(np.float32)
  assert ((moved == low) | (moved == high)).all()
  inexact = low != high
  share = upper_share(total, low, high)[inexact]
  surplus = ((moved == high)[inexact] - share).sum()
  assert abs(surplus) < SIGMAS * np.sqrt((share * (1 - share)).sum())


def test_is_unbiased():
  p = np.array([1, 1, -1, -1, 0, 0, 3e-30, 1e30, -2, 1, 1.9921875, 1], BF16)
  u = np.array(
    [
      ULP / 64,  # Nearest rounding loses it.
      -ULP / 100,
      ULP / 3,
      -ULP / 64,
      1.2345e-5,
      -1.2345e-5,
      1.1e-32,
      -3.3e27,
      1e5 / 7,  # It exceeds the parameter by orders of magnitude.
      -1e-20 - 1 + 1e-3,
      ULP * 0.7,  # Across a power of two.
      ULP / 2**10,
    ],
    np.float32,
  )
  seeds = 2**15

  def moved(seed):
    tx = stochastic_rounding(seed)
    params = jnp.asarray(p)
    return apply(tx, params, jnp.asarray(u), tx.init(params))[0]

  found = np.asarray(jax.jit(jax.vmap(moved))(jnp.arange(seeds)))
  total = p.astype(np.float32) + u
  low, high = neighbours(total)
  found = found.astype(np.float32)
  assert ((found == low) | (found == high)).all()
  # The upper one is a coin with the remainder's probability.
  share = upper_share(total, low, high)
  assert ((share > 0) & (share < 1)).all()
  bound = SIGMAS * np.sqrt(share * (1 - share) / seeds)
  error = (found == high).mean(axis=0) - share
  assert (np.abs(error) < bound).all(), (error, bound)
  assert (bound < 0.015).all()


def test_small_updates_add_up_that_nearest_rounding_loses():
  steps, n = 640, 4096
  tx = stochastic_rounding()
  u = jnp.full(n, -ULP / 64)
  start = jnp.full(n, 1.9, BF16)

  @jax.jit
  def train(params):
    def body(carry, _):
      return apply(tx, *carry[:1], u, carry[1]), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=steps)
    return params

  moved = np.asarray(train(start)).astype(np.float64) - float(start[0])
  # Each element took Binomial(steps, 1/64) steps of one unit.
  sigma = ULP * np.sqrt(steps / 64 * 63 / 64 / n)
  np.testing.assert_allclose(moved.mean(), -10 * ULP, atol=SIGMAS * sigma)
  np.testing.assert_array_equal(optax.apply_updates(start, u), start)


def test_sums_that_bfloat16_holds_are_met():
  rng = np.random.default_rng(0)
  p = rng.standard_normal(4000).astype(BF16)
  target = rng.standard_normal(4000).astype(BF16)
  target[:1000] = 0
  p[500:1500] = 0
  # Differences of float64 that float32 holds; the others cannot be asked for.
  u = target.astype(np.float64) - p.astype(np.float64)
  held = u == u.astype(np.float32)
  assert held.mean() > 0.9
  tx = stochastic_rounding()
  for update, expected in ((u, target), (0 * u, p)):
    params = jnp.asarray(p)
    moved, _ = apply(
      tx, params, jnp.asarray(update, jnp.float32), tx.init(params)
    )
    np.testing.assert_array_equal(np.asarray(moved)[held], expected[held])


def test_subnormal_numbers_are_rounded_or_flushed_to_zero():
  smallest_normal = 2.0**-126

  def flushed(x):
    return np.where(np.abs(x) < smallest_normal, np.float32(0), x)

  def is_neighbour(x, total):
    low, high = neighbours(total)
    return (x == low) | (x == high)

  tiny = np.exp2(np.linspace(-133, -115, 600))
  p = np.concatenate([tiny, -tiny]).astype(BF16)
  u = (np.concatenate([tiny[::-1], tiny]) / 7).astype(np.float32)
  tx = stochastic_rounding()
  params = jnp.asarray(p)
  moved, _ = apply(tx, params, jnp.asarray(u), tx.init(params))
  p, moved = p.astype(np.float32), np.asarray(moved).astype(np.float32)
  # A GPU computes with subnormal numbers; a CPU takes each for zero, be it the
  # parameter, the update, their sum, or the difference to the target.
  by_gpu = is_neighbour(moved, p + u)
  total = flushed(flushed(p) + flushed(u))
  by_cpu = is_neighbour(moved, total) | (moved == 0) | (moved == flushed(p))
  assert by_gpu.all() or by_cpu.all()
  # Beyond the reach of all that.
  large = (np.abs(p) >= 2.0**-117) & (np.abs(u) >= smallest_normal)
  assert large.sum() > 20
  assert by_gpu[large].all()


def test_the_ends_of_the_range():
  largest = float(jnp.finfo(BF16).max)
  unit = 2.0**120
  words = jnp.array([0, 0xFFFF], jnp.uint32)
  x = jnp.full(2, largest + unit / 2, jnp.float32)
  np.testing.assert_array_equal(
    round_stochastically(x, words), [largest, jnp.inf]
  )
  np.testing.assert_array_equal(
    round_stochastically(-x, words), [-largest, -jnp.inf]
  )
  for value in (jnp.inf, -jnp.inf, jnp.nan):
    x = jnp.full(2, value, jnp.float32)
    np.testing.assert_array_equal(round_stochastically(x, words), x)
  # A NaN of this pattern would turn into -0 if it were added to.
  odd = jax.lax.bitcast_convert_type(jnp.uint32([0x7FFFFFFF]), jnp.float32)
  assert jnp.isnan(round_stochastically(odd, words[1:])).all()


def test_parameters_of_other_dtypes_keep_their_updates():
  params = {
    'a': jnp.ones(3, jnp.float32),
    'b': jnp.ones(3, BF16),
    'c': jnp.ones((), jnp.float16),
  }
  u = jax.tree.map(lambda p: jnp.full(p.shape, 0.1234567), params)
  tx = stochastic_rounding()
  found, _ = tx.update(u, tx.init(params), params)
  np.testing.assert_array_equal(found['a'], u['a'])
  np.testing.assert_array_equal(found['c'], u['c'])
  assert (found['b'] != u['b']).all() and found['b'].dtype == jnp.float32


def test_seed_count_and_position_decide():
  params = {'a': jnp.ones((8, 16), BF16), 'b': jnp.ones((8, 16), BF16)}
  u = jax.tree.map(lambda p: jnp.full(p.shape, ULP / 2), params)
  tx = stochastic_rounding(1)
  state = tx.init(params)
  assert state.key.dtype == jnp.uint32 and state.count.dtype == jnp.int32
  first, after = tx.update(u, state, params)
  again, _ = tx.update(u, state, params)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  second, _ = tx.update(u, after, params)
  other, _ = tx.update(u, stochastic_rounding(2).init(params), params)
  draws = [first['a'], first['b'], second['a'], other['a']]
  for i, one in enumerate(draws):
    for two in draws[:i]:
      # Fair coins of 128 elements agree on about half of them.
      assert 0.25 < (one == two).mean() < 0.75


def test_resumes_to_the_bit_without_compiling_again():
  params = {'w': jnp.ones((8, 16), BF16)}
  tx = stochastic_rounding()
  u = {'w': jnp.full((8, 16), ULP / 3)}
  step = jax.jit(lambda p, s: apply(tx, p, u, s))
  state = tx.init(params)
  for t in range(6):
    if t == 3:
      saved = jax.tree.map(np.asarray, (params, state))
    params, state = step(params, state)
  resumed = jax.tree.map(jnp.asarray, saved)
  for _ in range(3):
    resumed = step(*resumed)
  jax.tree.map(np.testing.assert_array_equal, resumed, (params, state))
  assert step._cache_size() == 1


@pytest.mark.parametrize('spec', [('x', 'y'), ('y', None), (None, ('x', 'y'))])
def test_devices_change_nothing_and_need_not_talk(spec):
  mesh = jax.make_mesh((2, 2), ('x', 'y'))
  split = jax.sharding.NamedSharding(mesh, jax.P(None, *spec))
  rng = np.random.default_rng(0)
  p = rng.standard_normal((3, 8, 16)).astype(BF16)
  u = (rng.standard_normal(p.shape) * 1e-2).astype(np.float32)
  tx = stochastic_rounding()
  state = tx.init(p)
  step = jax.jit(apply, static_argnums=0)
  expected, _ = step(tx, jnp.asarray(p), jnp.asarray(u), state)
  args = tx, jax.device_put(p, split), jax.device_put(u, split), state
  found, _ = step(*args)
  assert found.sharding.is_equivalent_to(split, 3)
  np.testing.assert_array_equal(found, expected)
  program = step.lower(*args).compile().as_text()
  assert 'fusion' in program
  for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert word not in program


def test_needs_no_memory_beside_parameters_and_updates():
  params = [jnp.ones((256, 512), BF16) for _ in range(2)]
  tx = stochastic_rounding()
  u = [p.astype(jnp.float32) for p in params]
  step = jax.jit(apply, static_argnums=0, donate_argnums=1)
  compiled = step.lower(tx, params, u, tx.init(params)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1024


def test_missing_params_are_an_error():
  tx = stochastic_rounding()
  with pytest.raises(ValueError) as error:
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  assert str(error.value) == (
    'params is None: this transformation reads the parameters. Call '
    'update(grads, state, params).'
  )


def test_x64_draws_the_same_numbers():
  p, u = wild_pairs(1000)
  tx = stochastic_rounding(seed=3)

  def moved():
    params, _ = jax.jit(functools.partial(apply, tx))(p, u, tx.init(p))
    return np.asarray(params)

  expected = moved()
  with jax.enable_x64(True):
    found = moved()
  assert found.dtype == BF16
  np.testing.assert_array_equal(found, expected)
