"""Random projections against explicit NumPy, closed moments and themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.inspect import report, state_bytes, subspace_stats
from gnlorp_jax.optim.methods.galore import galore
from gnlorp_jax.optim.projections.random import RandomBasis
from gnlorp_jax.optim.subspace.lazy import LazyRefresh
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection

DISTRIBUTIONS = ('normal', 'rademacher')


def random(granularity=1, distribution='normal'):
  return projections.get(
    'random', granularity=granularity, distribution=distribution
  )


def gradient(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def matrices(distribution, seed, size, rank):
  """P for many seeds, [*seed, size, rank]: the images of unit rows."""
  seed = np.asarray(seed, np.uint32)
  eye = np.broadcast_to(
    np.eye(size, dtype=np.float32), (*seed.shape, size, size)
  )
  project = jax.jit(random(distribution=distribution).project)
  return np.asarray(
    project(eye, RandomBasis(seed, size, rank, size)), np.float64
  )


def there_and_back_of(method):
  """A function to coordinates, the update from them and the next seeds."""

  def there_and_back(grads, basis):
    low = method.project(grads, basis)
    back = method.project_back(low, basis)
    return low, back, method.refresh(grads, basis, jnp.int32(7)).seed

  return there_and_back


def explicit(grad_MN, p_BR, granularity):
  """There and back of a turned gradient, in NumPy's float64."""
  m, n = grad_MN.shape
  cut = np.asarray(grad_MN, np.float64).reshape(-1, round(n / granularity))
  low = cut @ p_BR
  return low, (low @ p_BR.T).reshape(m, n)


@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_entries_have_mean_zero_and_variance_one_over_r(distribution):
  count, size, rank = 4000, 6, 3
  p = matrices(distribution, range(count), size, rank)
  # Five standard errors of a mean of count * size * rank entries; the fourth
  # moment of a normal is 3, which makes its square's variance 2.
  error = 5 / np.sqrt(p.size)
  assert abs(p.mean()) < error / np.sqrt(rank)
  assert abs((p**2).mean() * rank - 1) < error * np.sqrt(2)
  if distribution == 'rademacher':
    np.testing.assert_allclose(np.abs(p), 1 / np.sqrt(rank), rtol=1e-6)
  else:
    assert abs((p**4).mean() * rank**2 - 3) < error * np.sqrt(96)
  # Entry ij of P P^T is a mean of r products: variance 1 / r off the diagonal,
  # 2 / r on it at most.
  outer = np.mean(p @ p.mT, axis=0)
  bound = 5 * np.sqrt(2 / (rank * count))
  np.testing.assert_allclose(outer, np.eye(size), atol=bound)


@pytest.mark.parametrize(
  ('side', 'granularity', 'distribution'),
  [
    ('in', 1, 'normal'),
    ('in', 4, 'normal'),
    ('out', 1 / 4, 'normal'),
    ('in', 2, 'rademacher'),
    ('out', 1 / 2, 'rademacher'),
  ],
)
def test_there_and_back_equals_numpy(side, granularity, distribution):
  shape = (8, 12)
  grad = gradient(shape)
  method = random(granularity, distribution)
  tx = with_low_rank_projection(
    optax.trace(0.0), 2, projection=method, side=side
  )
  updates, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(grad)
  turned = grad if side == 'out' else grad.T
  basis = state.subspace.basis[side]
  assert basis.size == round(turned.shape[1] / granularity)
  p = matrices(distribution, basis.seed, basis.size, basis.rank)
  low, back = explicit(turned, p, granularity)
  np.testing.assert_allclose(state.inner_state.trace, low, atol=1e-5)
  expected = back if side == 'out' else back.T
  np.testing.assert_allclose(updates, expected, atol=2e-5)


@pytest.mark.parametrize(
  ('granularity', 'distribution'),
  [(1, 'normal'), (3, 'rademacher'), (1 / 2, 'normal')],
)
def test_there_and_back_is_unbiased(granularity, distribution):
  grad = gradient((4, 6))
  method = random(granularity, distribution)
  count = 20_000
  size = method.init((4, 6), 1, 0).size
  basis = RandomBasis(np.arange(count, dtype=np.uint32), size, 1, 6)
  many = np.broadcast_to(grad, (count, 4, 6))
  back = jax.jit(lambda g, b: method.project_back(method.project(g, b), b))(
    many, basis
  )
  # One entry is g_i p_i^2 + sum_j g_j p_i p_j: variance below 3 |g|^2 (r = 1).
  largest = np.linalg.norm(grad, axis=None)
  bound = 5 * np.sqrt(3 / count) * largest
  np.testing.assert_allclose(np.mean(back, axis=0), grad, atol=bound)


@pytest.mark.parametrize(
  ('granularity', 'distribution'), [(2, 'normal'), (1 / 2, 'rademacher')]
)
def test_stack_equals_its_slices(granularity, distribution):
  method = random(granularity, distribution)
  grads = gradient((2, 3, 6, 8))
  first = jax.jit(lambda: method.init(grads.shape, 2, 5))()
  assert first.seed.dtype == jnp.uint32
  assert len(np.unique(first.seed)) == 6
  there_and_back = jax.jit(there_and_back_of(method))
  low, back, seeds = there_and_back(grads, first)
  for index in np.ndindex(2, 3):
    one = dataclasses.replace(first, seed=np.asarray(first.seed)[index])
    low_one, back_one, seed = there_and_back(grads[index], one)
    np.testing.assert_allclose(low[index], low_one, atol=1e-5)
    np.testing.assert_allclose(back[index], back_one, atol=1e-5)
    assert seed == seeds[index]


def test_parameters_and_sides_have_seeds_of_their_own():
  tx = with_low_rank_projection(
    optax.identity(), 2, projection='random', side='both'
  )
  params = {name: jnp.zeros((3, 6, 6)) for name in ('a', 'b')}
  state = jax.jit(tx.init)(params)
  seeds = [
    state.subspace[name].basis[axis].seed
    for name in ('a', 'b')
    for axis in ('in', 'out')
  ]
  assert len(np.unique(seeds)) == 12


def test_seeds_change_exactly_at_a_refresh():
  tx = with_low_rank_projection(
    *(optax.identity(), 2, 4), projection='random', spread_refreshes=False
  )
  grads = gradient((10, 3, 6, 8))
  state, again = jax.jit(tx.init)(grads[0]), tx.init(grads[0])
  update = jax.jit(tx.update)
  seeds = [np.asarray(state.subspace.basis['in'].seed)]
  for grad in grads:
    _, state = update(grad, state)
    seeds.append(np.asarray(state.subspace.basis['in'].seed))
  changed = (np.diff(np.array(seeds, np.int64), axis=0) != 0).all(axis=1)
  assert np.flatnonzero(changed).tolist() == [0, 4, 8]
  for t in range(5):  # Another gradient, the same seeds: no global generator.
    _, again = update(-grads[t], again)
  np.testing.assert_array_equal(again.subspace.basis['in'].seed, seeds[5])


@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_mesh_draws_the_same_matrices(distribution):
  there_and_back = jax.jit(there_and_back_of(random(2, distribution)))
  grads = gradient((4, 8, 16))
  mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  basis = RandomBasis(np.arange(4, dtype=np.uint32), 8, 2, 16)
  expected = there_and_back(grads, basis)
  grads = jax.device_put(grads, NamedSharding(mesh, P(None, None, 'x')))
  *there_back, seeds = there_and_back(grads, basis)
  for actual, desired in zip(there_back, expected, strict=False):
    np.testing.assert_allclose(actual, desired, atol=1e-5)
  np.testing.assert_array_equal(seeds, expected[-1])


def test_checkpoint_restores_every_bit(tmp_path):
  tx = with_low_rank_projection(
    *(optax.scale_by_adam(), 2, 2), projection=random(2)
  )
  grad = gradient((3, 8, 16))
  update = jax.jit(tx.update)
  _, state = update(grad, jax.jit(tx.init)(grad))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(
      tmp_path / 'state', jax.eval_shape(tx.init, grad)
    )
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  expected = update(-grad, state)
  jax.tree.map(np.testing.assert_array_equal, update(-grad, restored), expected)


def test_bfloat16_gradient_is_accumulated_in_float32():
  method = random(2, 'rademacher')
  grad = gradient((6, 64)).astype(jnp.bfloat16)
  basis = jax.jit(lambda: method.init(grad.shape, 3, 0))()
  project = jax.jit(method.project)
  low = project(grad, basis)
  assert low.dtype == jnp.float32
  # Signs are exact in bfloat16: nothing is lost but float32's rounding.
  np.testing.assert_allclose(
    low, project(grad.astype(np.float32), basis), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ('granularity', 'similarity'), [(4, 'overlap'), (1 / 4, 'abs_cosine')]
)
def test_statistics_are_sensible(granularity, similarity):
  lazy = LazyRefresh(threshold=0.9, queue=1, similarity=similarity)
  tx = with_low_rank_projection(
    *(optax.identity(), 6, 1),
    projection=random(granularity),
    side='in',
    lazy_refresh=lazy,
  )
  grads = gradient((4, 8, 96, 100))
  state = jax.jit(tx.init)(grads[0])
  update = jax.jit(tx.update)
  for grad in grads:
    _, state = update(grad, state)
  subspace = state.subspace
  assert subspace.refresh_count.tolist() == [4] * 8
  # Means over eight matrices, with ample room: the squared length of a
  # projected gradient is right on average, and independent subspaces share
  # rank / size of their directions.
  size = 96 / granularity
  np.testing.assert_allclose(np.mean(subspace.energy), 1, atol=0.3)
  np.testing.assert_allclose(np.mean(subspace.overlap), 6 / size, rtol=0.3)
  assert np.abs(subspace.lazy.similarity).max() < 0.75
  assert subspace.lazy.gap.tolist() == [1] * 8


def test_a_basis_overlaps_itself():
  method = random(2)

  @jax.jit
  def turn():
    basis = method.init((4, 4000), 3, 0)
    return method.turn(basis, basis)

  # Inner products of 2000 standard normals over 2000: errors of sqrt(2 / 2000).
  np.testing.assert_allclose(turn(), np.eye(3), atol=5 * np.sqrt(2 / 2000))


def test_state_is_a_seed_and_is_reported():
  params = {'a': {'kernel': jnp.zeros((5, 16, 32))}}
  tx = galore(1e-2, rank=2, projection=random(4, 'rademacher'))
  state = jax.jit(tx.init)(params)
  assert state_bytes(state)['bases'] == 5 * 4
  assert state_bytes(state)['moments'] == 2 * 5 * (32 * 4) * 2 * 4
  (row,) = report(params, tx)
  assert (row.label, row.rank, row.side) == ('low_rank', 2, 'in')
  assert list(subspace_stats(state)) == ['a/kernel']


def test_both_sides_work_at_granularity_one():
  tx = with_low_rank_projection(
    optax.identity(), 2, projection='random', side='both'
  )
  grad = gradient((6, 8))
  updates, _ = jax.eval_shape(lambda g: tx.update(g, tx.init(g)), grad)
  assert updates.shape == grad.shape


def test_regression_descends():
  target = gradient((16, 12))
  tx = with_low_rank_projection(*(optax.identity(), 2, 1), projection=random(2))
  w = jnp.zeros_like(target)
  state = jax.jit(tx.init)(w)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(w, state):
    updates, state = tx.update(w - target, state)
    return w - 0.1 * updates, state

  for _ in range(200):
    w, state = step(w, state)
  assert np.linalg.norm(w - target) < 0.01 * np.linalg.norm(target)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'granularity': value},
      'granularity must be a positive integer or one over an integer, such as '
      f'4 or 1/4, got {value}.',
    )
    for value in (0, -2, 1.5, 0.75, float('inf'), float('nan'))
  ]
  + [
    (
      {'distribution': 'gaussian'},
      "Unknown distribution 'gaussian'; expected one of ('normal', "
      "'rademacher').",
    )
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    projections.get('random', **options)
  assert str(error.value) == text


def init_error(shape, rank, granularity, **options):
  tx = with_low_rank_projection(
    options.pop('inner', optax.identity()),
    rank,
    projection=random(granularity),
    **options,
  )
  with pytest.raises(ValueError) as error:
    tx.init(jnp.zeros(shape))
  return str(error.value)


@pytest.mark.parametrize('granularity', [3, 1 / 5])
def test_granularity_that_does_not_fit_is_an_error_at_init(granularity):
  assert init_error((8, 12), 2, granularity) == (
    f'granularity {granularity} cannot reshape a gradient [m, n] of [12, 8], '
    'compressed on n: n / granularity and m * granularity must be integers. '
    'Use a granularity that fits all projected kernels, or label this one '
    "'full'."
  )


@pytest.mark.parametrize(
  ('n', 'rank', 'pieces'),
  [(128, 1, 64), (128, 4, 32), (100, 1, 4), (7, 3, 1), (96, 1, 32), (6, 6, 1)],
)
def test_granularity_of_none_fits_every_matrix(n, rank, pieces):
  basis = random(None).init((200, n), rank, 0)
  assert (basis.size, basis.length) == (n // pieces, n)
  # As if it were given.
  given = random(pieces)
  grad = gradient((4, n))
  np.testing.assert_array_equal(
    random(None).project(grad, basis), given.project(grad, basis)
  )


def test_rank_that_compresses_nothing_is_an_error_at_init():
  assert init_error((8, 12), 3, 4) == (
    'rank 3 exceeds n / granularity = 8 / 4 = 2: the coordinates would be '
    'larger than the gradient. Lower rank or granularity.'
  )


def test_both_sides_with_a_granularity_are_an_error_at_init():
  assert init_error((8, 12), 2, 2, side='both') == (
    "A random basis for n = 8 met a gradient of n = 16: with side='both' a "
    "granularity other than 1 (2) reshapes the other side's coordinates. Use "
    'another side or granularity=1.'
  )


def test_rotating_moments_is_an_error_at_init():
  tx = galore(1e-2, projection='random', moments_on_refresh='rotate')
  with pytest.raises(ValueError) as error:
    tx.init({'kernel': jnp.zeros((8, 12))})
  assert str(error.value) == (
    'Moments cannot be rotated from one random basis to the next: the two are '
    'independent, and the product of their matrices is no rotation. Use '
    "moments_on_refresh='keep', as published, or 'reset'."
  )


@pytest.mark.parametrize('mode', ['keep', 'reset'])
def test_moments_can_be_kept_or_reset(mode):
  tx = galore(1e-2, 2, 1, projection=random(2), moments_on_refresh=mode)
  params = {'kernel': gradient((8, 12))}
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  for _ in range(2):
    updates, state = update(params, state, params)
  counts = [
    jax.tree.leaves(node.count)[0]
    for node in jax.tree.leaves(state, is_leaf=is_adam)
    if is_adam(node) and jax.tree.leaves(node.mu)
  ]
  # The first refresh has no moments to move; the second starts them again.
  assert counts == [2 if mode == 'keep' else 1]


def is_adam(node):
  return isinstance(node, optax.ScaleByAdamState)
