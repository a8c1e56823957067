"""What happens at a refresh: lazy intervals, and moments that move along."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import (
  LazyRefresh,
  galore,
  gradnormlorp,
  inspect,
  projections,
  with_low_rank_projection,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.subspace.moments import moment_rule

EXACT = projections.get('svd', solver='exact')


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


# Lazy refreshes.


def basis_of(grad, rank):
  """Leading right singular vectors of grad.T, largest entry positive."""
  v = np.linalg.svd(np.asarray(grad, np.float64).T)[2][:rank].T
  return v * np.sign(v[np.abs(v).argmax(0), np.arange(rank)])


def lazy_intervals(grads, rank, gap, lazy):
  """The published rule for one matrix: refreshes and interval at each step."""
  interval, queue, basis, rows, refreshes = gap, [], None, [], 0
  for count, grad in enumerate(grads):
    if basis is None or count % interval == 0:
      new = basis_of(grad, rank)
      refreshes += 1
      if basis is not None:
        value = {
          'overlap': (np.sum((basis.T @ new) ** 2) / rank - rank / len(new))
          / (1 - rank / len(new)),
          'cosine': basis[:, 0] @ new[:, 0],
          'abs_cosine': abs(basis[:, 0] @ new[:, 0]),
        }[lazy.similarity]
        queue = (queue + [value])[-lazy.queue :]
        if len(queue) == lazy.queue and np.mean(queue) >= lazy.threshold:
          interval *= lazy.factor
      basis = new
    rows.append((refreshes, interval))
  return rows


@pytest.mark.parametrize('similarity', ['overlap', 'abs_cosine', 'cosine'])
def test_intervals_grow_by_the_published_rule(similarity):
  # The first matrix rests; the second turns at random; the third comes back
  # with the sign of its leading direction flipped every time.
  rest = normal((6, 8))
  flip = rest.copy()
  flip[:, 1:] *= 0.01
  grads = [
    np.stack([rest, normal((6, 8), seed), flip * (-1) ** (seed // 2)])
    for seed in range(30)
  ]
  lazy = LazyRefresh(threshold=0.6, queue=2, similarity=similarity)
  tx = with_low_rank_projection(
    optax.identity(),
    2,
    2,
    projection=EXACT,
    spread_refreshes=False,
    lazy_refresh=lazy,
  )
  state = jax.jit(tx.init)(grads[0])
  update = jax.jit(tx.update)
  expected = [
    lazy_intervals([g[i] for g in grads], 2, 2, lazy) for i in range(3)
  ]
  for count, grad in enumerate(grads):
    _, state = update(grad, state)
    rows = [rows[count] for rows in expected]
    assert state.subspace.refresh_count.tolist() == [row[0] for row in rows]
    assert state.subspace.lazy.gap.tolist() == [row[1] for row in rows]
  assert expected[0][-1][1] > 2  # It grew for the one at rest.
  # Planned at 15 of the 30 steps; what was not done was saved.
  refreshes = np.array([rows[-1][0] for rows in expected])
  np.testing.assert_array_equal(state.subspace.lazy.saved, 15 - refreshes)
  saved = inspect.saved_refreshes((state,))['']
  np.testing.assert_array_equal(saved, 15 - refreshes)
  stats = inspect.subspace_stats((state,))['']
  assert stats.saved_refreshes == pytest.approx(np.mean(15 - refreshes))


def test_unrelated_subspaces_of_half_the_space_do_not_lengthen_intervals():
  # They overlap by a half, which says nothing about the gradients.
  tx = with_low_rank_projection(
    optax.identity(),
    16,
    2,
    projection=EXACT,
    lazy_refresh=LazyRefresh(queue=2),
  )
  state = jax.jit(tx.init)(np.zeros((32, 64), np.float32))
  update = jax.jit(tx.update)
  for seed in range(24):
    _, state = update(normal((32, 64), seed), state)
  assert 0.4 < state.subspace.overlap < 0.7
  assert state.subspace.lazy.gap == 2


def test_intervals_stop_growing_before_they_overflow():
  lazy = LazyRefresh(threshold=-1, factor=1000, queue=1)
  tx = with_low_rank_projection(
    optax.identity(), 2, 1, projection=EXACT, lazy_refresh=lazy
  )
  grad = normal((4, 6))
  state = jax.jit(tx.init)(grad)
  update = jax.jit(tx.update)
  _, state = update(grad, state)
  near = np.int32(2**31 - 2)
  lazy_state = state.subspace.lazy._replace(gap=near)
  subspace = state.subspace._replace(lazy=lazy_state)
  _, state = update(grad, state._replace(count=near, subspace=subspace))
  assert state.subspace.refresh_count == 2
  assert state.subspace.lazy.gap == near


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'threshold': 2.0},
      'LazyRefresh.threshold must be in [-1, 1], got 2.0.',
    ),
    ({'queue': 0}, 'LazyRefresh.queue must be at least 1, got 0.'),
    ({'factor': 0}, 'LazyRefresh.factor must be at least 1, got 0.'),
    (
      {'factor': 1},
      'LazyRefresh.factor must be at least 2, got 1. Use lazy_refresh=None to '
      'keep the intervals.',
    ),
    (
      {'similarity': 'sine'},
      "Unknown LazyRefresh.similarity 'sine'; expected one of ('overlap', "
      "'abs_cosine', 'cosine').",
    ),
  ],
)
def test_bad_lazy_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    gradnormlorp(1e-3, lazy_refresh=LazyRefresh(**options))
  assert str(error.value) == text


# Moments at a refresh.

GAP, STEPS = 3, 8
EPS = 1e-8


@functools.cache
def trajectory(mode, side='short', spread=False):
  """Directions of projected Adam on a stack of two matrices."""
  rule = moment_rule(mode, 0.9, 0.99)
  inner = scale_by_adam(0.9, 0.99, EPS, count_per_matrix=True)
  tx = with_low_rank_projection(
    inner,
    3,
    GAP,
    projection=EXACT,
    side=side,
    spread_refreshes=spread,
    on_refresh=rule,
  )
  grads = [normal((2, 6, 9), seed) for seed in range(STEPS)]
  state = jax.jit(tx.init)(grads[0])
  update = jax.jit(tx.update)
  found, states = [], []
  for grad in grads:
    updates, state = update(grad, state)
    found.append(updates)
    states.append(state.inner_state)
  return grads, found, states


def test_reset_starts_adam_again():
  grads, found, states = trajectory('reset')
  assert states[-1].count.tolist() == [2, 2]  # Steps since the refresh.
  fresh_grads = grads[GAP:]
  tx = with_low_rank_projection(
    scale_by_adam(0.9, 0.99, EPS),
    3,
    100,
    projection=EXACT,
    spread_refreshes=False,
  )
  fresh = jax.jit(tx.init)(grads[0])
  update = jax.jit(tx.update)
  for step in range(GAP):  # From the first refresh to the next one.
    expected, fresh = update(fresh_grads[step], fresh)
    np.testing.assert_allclose(found[GAP + step], expected, atol=1e-5)


@pytest.mark.parametrize('side', ['short', 'both'])
def test_rotate_moves_moments_as_written(side):
  grads, _, states = trajectory('rotate', side)
  for i in range(2):
    m = v = bases = None
    for t, stack in enumerate(grads, 1):
      grad = np.asarray(stack[i], np.float64)
      if (t - 1) % GAP == 0:
        old = bases
        # 6 x 9: `in` is the shorter axis; both have a basis for `both`.
        bases = [basis_of(grad, 3)]
        bases.append(basis_of(grad.T, 3) if side == 'both' else np.eye(9))
        if old is not None:
          x, y = (a.T @ b for a, b in zip(old, bases, strict=True))
          c1, c2 = 1 - 0.9 ** (t - 1), 1 - 0.99 ** (t - 1)
          variance = v / c2 - (m / c1) ** 2
          m = x.T @ m @ y
          variance = (x.T**2) @ variance @ (y**2)
          v = c2 * np.abs(variance + (m / c1) ** 2)
      low = bases[0].T @ grad @ bases[1]
      m = 0.1 * low + (0.9 * m if m is not None else 0)
      v = 0.01 * low**2 + (0.99 * v if v is not None else 0)
      # Ours are [out, r] where `in` alone is compressed. Entries are of order
      # one; float32's singular vectors are good to a few 1e-6.
      turned = np.transpose if side == 'short' else np.asarray
      np.testing.assert_allclose(turned(states[t - 1].mu[i]), m, atol=1e-5)
      np.testing.assert_allclose(turned(states[t - 1].nu[i]), v, atol=1e-5)


def test_rotation_by_an_equal_basis_changes_nothing():
  # The same gradient at every step: the basis stays, and so must the moments.
  grad = normal((6, 9))
  updates = {}
  for mode in ('keep', 'rotate'):
    tx = with_low_rank_projection(
      scale_by_adam(count_per_matrix=True),
      3,
      2,
      projection=EXACT,
      on_refresh=moment_rule(mode, 0.9, 0.999),
    )
    state = jax.jit(tx.init)(grad)
    update = jax.jit(tx.update)
    for step in range(6):
      updates[mode], state = update(grad * np.float32(step + 1), state)
  np.testing.assert_allclose(updates['keep'], updates['rotate'], atol=1e-4)


def test_only_refreshed_matrices_move():
  _, _, states = trajectory('reset', spread=True)
  # Two matrices take turns: at counts 0, 3, 6 and 1, 4, 7.
  assert states[-1].count.tolist() == [2, 1]


@pytest.mark.parametrize(
  'inner', [optax.identity(), optax.scale_by_adam(), scale_by_adam()]
)
def test_moments_without_a_count_of_each_matrix_are_an_error(inner):
  tx = with_low_rank_projection(
    inner, 2, on_refresh=moment_rule('reset', 0.9, 0.999)
  )
  with pytest.raises(ValueError, match=r'count_per_matrix=True') as error:
    tx.init({'kernel': jnp.zeros((4, 6))})
  assert 'Use that as inner, or on_refresh=None.' in str(error.value)


def test_unknown_mode_is_an_error():
  with pytest.raises(ValueError) as error:
    gradnormlorp(1e-3, moments_on_refresh='turn')
  assert str(error.value) == (
    "Unknown moments_on_refresh 'turn'; expected one of ('keep', 'reset', "
    "'rotate')."
  )


@pytest.mark.parametrize(
  'options',
  [
    {
      'projection': projections.get('svd', solver='eigh'),
      'moments_on_refresh': 'rotate',
      'lazy_refresh': LazyRefresh(similarity='cosine'),
    },
    {
      'side': 'both',
      'basis_bits': 16,
      'moments_on_refresh': 'rotate',
      'lazy_refresh': LazyRefresh(similarity='abs_cosine'),
    },
    {
      'projection': projections.get('random', distribution='rademacher'),
      'moments_on_refresh': 'reset',
      'lazy_refresh': LazyRefresh(),
    },
    {
      'projection': projections.get('dct', transform='dct3', norm=2),
      'lazy_refresh': LazyRefresh(similarity='cosine'),
    },
  ],
)
def test_x64_changes_no_type_of_what_a_refresh_does(options):
  # Of the default options all numbers are compared in test_conformance.py.
  params = {'kernel': normal((2, 6, 8))}
  tx = galore(1e-2, rank=2, **options)
  expected = jax.eval_shape(tx.init, params)
  with jax.enable_x64(True):
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
  assert updates['kernel'].dtype == jnp.float32
  for found in (state, after):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
      lambda x: (x.shape, x.dtype), expected
    )
