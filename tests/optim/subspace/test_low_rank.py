"""Low-rank projection: sides, schedule, equivalences and hard gradients."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.fira import fira_recovery
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.quantized_basis import quantize_basis
from gnlorp_jax.optim.subspace.refresh import refresh_offsets
from gnlorp_jax.optim.subspace.sides import compressed_axes

SIDES = ('short', 'long', 'in', 'out', 'both')


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def wrapped(rank=3, gap=4, scale=1.0, solver='exact', inner=None, **options):
  return with_low_rank_projection(
    inner or optax.identity(),
    rank,
    gap,
    scale,
    projection=projections.get('svd', solver=solver),
    **options,
  )


@functools.cache
def compiled(**options):
  """`init` and `update` of `wrapped`, which tests share."""
  tx = wrapped(**options)
  return jax.jit(tx.init), jax.jit(tx.update)


def best_approximation(grad, rank):
  u, s, vt = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
  return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize(
  ('side', 'wide', 'tall', 'square'),
  [
    ('short', ('in',), ('out',), ('in',)),
    ('long', ('out',), ('in',), ('out',)),
    ('in', ('in',), ('in',), ('in',)),
    ('out', ('out',), ('out',), ('out',)),
    ('both', ('in', 'out'), ('in', 'out'), ('in', 'out')),
  ],
)
def test_side_names_the_compressed_axes(side, wide, tall, square):
  # Flax kernels (in, out): GaLore's std compresses `in` of wide and square.
  assert compressed_axes((7, 4, 6), side) == wide
  assert compressed_axes((6, 4), side) == tall
  assert compressed_axes((4, 4), side) == square


@pytest.mark.parametrize('side', SIDES)
def test_first_update_is_the_best_low_rank_approximation(side):
  shapes = [(2, 3, 6, 9)]
  if side not in ('in', 'out'):  # Of a matrix the same as `short` or `long`.
    shapes += [(9, 6)]
  if side == 'short':
    shapes += [(6, 9), (6, 6)]
  grads = [normal(shape) for shape in shapes]
  tx = wrapped(rank=3, side=side, scale=0.5)
  all_updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(grads)
  for updates, grad in zip(all_updates, grads, strict=True):
    np.testing.assert_allclose(
      updates, 0.5 * best_approximation(grad, 3), atol=1e-5
    )


@pytest.mark.parametrize(
  ('side', 'basis', 'low'),
  [
    ('short', {'in': (5, 6, 2)}, (5, 9, 2)),
    ('long', {'out': (5, 9, 2)}, (5, 6, 2)),
    ('both', {'in': (5, 6, 2), 'out': (5, 9, 2)}, (5, 2, 2)),
  ],
)
def test_state_has_the_documented_shapes(side, basis, low):
  tx = wrapped(rank=2, side=side, inner=optax.scale_by_adam())
  state = jax.eval_shape(tx.init, {'kernel': jnp.zeros((5, 6, 9))})
  subspace = state.subspace['kernel']
  assert jax.tree.map(jnp.shape, subspace.basis) == basis
  assert subspace.refresh_count.shape == subspace.energy.shape == (5,)
  assert state.inner_state.mu['kernel'].shape == low


@pytest.mark.parametrize(
  ('solver', 'side', 'spread'),
  [
    ('power', 'short', False),
    ('power', 'short', True),
    ('power', 'long', False),
    ('eigh', 'short', False),
    ('exact', 'both', False),
    ('power', 'both', True),
  ],
)
def test_stack_of_kernels_equals_each_by_itself(solver, side, spread):
  grads = normal((7, 3, 6, 8))  # Seven steps of three matrices.
  init, update = compiled(solver=solver, side=side, spread_refreshes=spread)
  state = init(grads[0])
  init, single_update = compiled(
    solver=solver, side=side, spread_refreshes=False
  )
  states = [init(grads[0, i]) for i in range(3)]
  refreshes = []
  for t, grad in enumerate(grads):
    updates, state = update(grad, state)
    refreshes.append(np.asarray(state.subspace.refresh_count))
    if spread:  # A matrix by itself has another phase: compare until then.
      if t > 0:
        continue
    for i in range(3):
      expected, states[i] = single_update(grad[i], states[i])
      np.testing.assert_allclose(updates[i], expected, atol=3e-5)
  if spread:  # After the first step, one matrix at a time.
    assert (np.diff(np.sum(refreshes, axis=1)) <= 1).all()
    assert refreshes[-1].min() >= 2


@pytest.mark.parametrize('stacks', [[1], [3, 1, 1], [8, 8, 8], [11]])
@pytest.mark.parametrize('gap', [1, 2, 7, 10])
@pytest.mark.parametrize('spread', [False, True])
def test_schedule_refreshes_every_matrix_once_per_interval(stacks, gap, spread):
  offsets = refresh_offsets([(n,) for n in stacks], gap, spread)
  assert [offset_s.shape for offset_s in offsets] == [(n,) for n in stacks]
  for offset_s in offsets:
    assert offset_s.min() >= 0
    assert offset_s.max() < gap


def test_offsets_keep_the_leading_axes():
  (flat_s,) = refresh_offsets([(6,)], 30, spread=True)
  (offset,) = refresh_offsets([(2, 3)], 30, spread=True)
  np.testing.assert_array_equal(offset, flat_s.reshape(2, 3))


def test_unspread_schedule_follows_published_code():
  for offset_s in refresh_offsets([(4,), (2,)], gap=5, spread=False):
    np.testing.assert_array_equal(offset_s, 0)


def test_spread_schedule_keeps_steps_alike():
  # LLaMA-60M: seven kernels of eight layers, T = 200.
  offsets = np.concatenate(refresh_offsets([(8,)] * 7, 200, spread=True))
  assert len(np.unique(offsets)) == 56


def test_basis_stays_between_refreshes_and_follows_at_one():
  init, update = compiled(rank=2, gap=3)
  grads = [normal((6, 8), seed) for seed in range(4)]
  state = init(grads[0])
  bases = []
  for grad in grads:
    _, state = update(grad, state)
    bases.append(np.asarray(state.subspace.basis['in']))
  np.testing.assert_array_equal(bases[0], bases[2])
  assert np.abs(bases[3] - bases[2]).max() > 0.1


@pytest.mark.parametrize('solver', ['exact', 'eigh', 'power'])
@pytest.mark.parametrize('value', [0.0, jnp.nan, jnp.inf])
def test_unusable_gradient_keeps_the_basis(solver, value):
  init, update = compiled(gap=1, solver=solver)
  good = normal((2, 6, 8))
  _, state = update(good, init(good))
  bad = good.copy()
  bad[1] = value
  _, after = update(bad, state)
  np.testing.assert_array_equal(
    after.subspace.basis['in'][1], state.subspace.basis['in'][1]
  )
  assert after.subspace.refresh_count.tolist() == [2, 1]
  assert np.isfinite(after.subspace.energy).all()


def test_first_basis_waits_for_the_first_usable_gradient():
  init, update = compiled(gap=100)
  good = normal((2, 6, 8))
  late = good.copy()
  late[1] = 0
  state = init(good)
  for grad in (late, late, good, good):
    updates, state = update(grad, state)
  assert state.subspace.refresh_count.tolist() == [1, 1]
  np.testing.assert_allclose(
    updates[1], best_approximation(good[1], 3), atol=1e-5
  )


def test_extreme_scales_fit_a_basis():
  init, update = compiled(solver='power')
  for scale in (1e-25, 1e25):
    grad = normal((6, 8)) * np.float32(scale)
    updates, state = update(grad, init(grad))
    assert np.isfinite(updates).all()
    assert 0.5 < state.subspace.energy <= 1.0


def test_energy_and_overlap_are_those_of_the_subspaces():
  init, update = compiled(rank=2, gap=1)
  first, second = normal((6, 8)), normal((6, 8), 1)
  _, state = update(first, init(first))
  old = np.asarray(state.subspace.basis['in'], np.float64)
  _, state = update(second, state)
  new = np.asarray(state.subspace.basis['in'], np.float64)
  s = np.linalg.svd(np.asarray(second, np.float64), compute_uv=False)
  np.testing.assert_allclose(
    state.subspace.energy, np.sum(s[:2] ** 2) / np.sum(s**2), rtol=1e-4
  )
  np.testing.assert_allclose(
    state.subspace.overlap, np.sum((old.T @ new) ** 2) / 2, rtol=1e-4
  )


def test_accumulating_before_or_after_projection_is_the_same():
  # Linearity: the seam that lets gradients be summed in the subspace.
  init, update = compiled(gap=100)
  parts = normal((4, 6, 8))
  _, state = update(parts[0], init(parts[0]))
  together, _ = update(np.sum(parts, axis=0), state)
  apart = sum(np.asarray(update(part, state)[0]) for part in parts)
  np.testing.assert_allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'fix'),
  [
    ((6, 8), ''),
    ((2, 6, 8), ' If it has several axes in or out, give kernel_axes.'),
  ],
)
def test_rank_above_the_short_axis_is_clipped_and_logged(caplog, shape, fix):
  tx = wrapped(rank=100)
  with caplog.at_level(logging.WARNING):
    state = tx.init({'kernel': jnp.zeros(shape)})
  assert state.subspace['kernel'].basis['in'].shape == (*shape[:-2], 6, 6)
  assert caplog.messages == [
    f"rank 100 exceeds the shorter axis of 'kernel' {list(shape)}: clipped to "
    f'6, which compresses nothing on that axis.{fix}'
  ]
  grad = normal(shape)
  updates, _ = jax.jit(tx.update)({'kernel': grad}, state)
  np.testing.assert_allclose(updates['kernel'], grad, atol=1e-5)


@pytest.mark.parametrize('side', ['short', 'both'])
def test_step_needs_one_full_size_temporary(side):
  # One float32 update, and small arrays: a refresh works on one matrix, and
  # the bases are updated in place.
  shape = (16, 64, 96)
  tx = wrapped(rank=4, side=side, inner=optax.scale_by_adam(), solver='power')
  grad = jnp.zeros(shape)
  state = jax.eval_shape(tx.init, grad)
  step = jax.jit(tx.update, donate_argnums=(0, 1))
  memory = step.lower(grad, state).compile().memory_analysis()
  full = grad.size * 4
  assert memory.temp_size_in_bytes < 1.4 * full
  assert memory.alias_size_in_bytes >= full


def test_nothing_is_factorised_between_refreshes():
  # A projection that counts its calls on the host: a select instead of a loop
  # would call it at every step.
  calls = []
  svd = projections.get('svd')

  def refresh(grad_MN, basis, count):
    jax.debug.callback(lambda: calls.append(1))
    return svd.refresh(grad_MN, basis, count)

  tx = with_low_rank_projection(
    optax.identity(), 3, 4, projection=svd._replace(refresh=refresh)
  )
  grad = normal((3, 6, 8))
  state = jax.jit(tx.init)(grad)
  update = jax.jit(tx.update)
  made = []
  for _ in range(9):
    _, state = update(grad, state)
    jax.effects_barrier()
    made.append(len(calls))
  # Three first fits; then blocks 0, 1, 2 at counts 4k, 4k + 1, 4k + 2.
  assert made == [3, 4, 5, 5, 6, 7, 8, 8, 9]


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'rank': 0}, 'rank must be at least 1, got 0.'),
    (
      {'rank': 2.5},
      'rank must be an integer known at build time, got 2.5: it fixes shapes '
      'or the program. With optax.inject_hyperparams, list it in '
      "static_args=('rank', ...).",
    ),
    ({'gap': 0}, 'update_proj_gap must be at least 1, got 0.'),
    (
      {'side': 'left'},
      "Unknown side 'left'; expected one of ('short', 'long', 'in', 'out', "
      "'both').",
    ),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    wrapped(**options)
  assert str(error.value) == text


def test_vector_cannot_be_projected():
  with pytest.raises(ValueError) as error:
    wrapped().init({'bias': jnp.zeros(4)})
  assert str(error.value) == (
    "Parameter 'bias' of shape [4] is no kernel: a kernel has at least two "
    "axes, [*, in, out]. Label it 'full'."
  )


def test_projected_sgd_descends_where_the_gradient_is_low_rank():
  target = normal((12, 3)) @ normal((3, 10), 1)
  tx = optax.chain(wrapped(rank=3, gap=5, solver='power'), optax.sgd(0.2))
  w = jnp.zeros((12, 10))
  state = jax.jit(tx.init)(w)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(w, state):
    updates, state = tx.update(w - target, state)
    return optax.apply_updates(w, updates), state

  for _ in range(60):
    w, state = step(w, state)
  np.testing.assert_allclose(w, target, atol=1e-3)


def test_full_rank_projection_of_sgd_changes_nothing():
  # A square basis is a rotation, and SGD does not see rotations.
  params = {'kernel': normal((3, 8, 12))}
  tx = with_low_rank_projection(optax.sgd(0.1), rank=8)
  updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p)))(params)
  np.testing.assert_allclose(
    updates['kernel'], -0.1 * params['kernel'], atol=1e-5
  )


def test_recovery_with_error_feedback_is_an_error():
  with pytest.raises(ValueError) as error:
    wrapped(recovery=fira_recovery(), error_bits=8)
  assert str(error.value) == (
    'error_bits=8 would feed back what this method already takes from outside '
    'the subspace: use error_bits=None.'
  )


def test_bases_of_both_sides_remember_the_coordinates_of_a_step():
  tx = with_low_rank_projection(
    optax.identity(),
    3,
    projection=projections.get('svd', tracking=0.75),
    side='both',
  )
  grad = normal((2, 6, 8))
  _, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(grad)
  bases = state.subspace.basis
  low_sRR = (
    bases['in'].columns_NR.mT @ jnp.asarray(grad) @ bases['out'].columns_NR
  )
  for axis, low in (('out', low_sRR), ('in', low_sRR.mT)):
    np.testing.assert_allclose(
      bases[axis].moment_RR, 0.25 * low.mT @ low, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('bits', [16, 8])
def test_what_bases_of_few_bits_remember_adds_up(bits):
  """Steps of a thousandth are below a rounding of few bits."""
  projection = quantize_basis(projections.get('svd', tracking=0.999), bits)
  basis = projection.init((6, 64), 3, 0)
  low = jnp.asarray(normal((6, 3)))

  @jax.jit
  def remembered(basis):
    return jax.lax.fori_loop(
      0, 1000, lambda _, basis: projection.remember(low, basis), basis
    )

  after = remembered(basis)
  jax.tree.map(
    np.testing.assert_array_equal, after.columns_NR, basis.columns_NR
  )
  np.testing.assert_allclose(
    after.moment_RR, (1 - 0.999**1000) * low.T @ low, rtol=1e-3, atol=1e-5
  )
