"""LDAdam against its formulas in float64, and what its state promises."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from gnlorp_jax.optim import inspect, ldadam, scale_by_ldadam
from gnlorp_jax.optim.quantized.arrays import dequantize
from gnlorp_jax.optim.subspace.sides import Subspace
from gnlorp_jax.training import sharding

LR, B1, B2, EPS, RHO, DECAY = 0.01, 0.908, 0.99, 1e-8, 0.908, 0.1
# Coordinates of size 4 are rounded by some 5e-7, differently where sums are
# taken in another order, and Adam's first steps divide that by |g| + eps: this
# keeps it below 1e-5.
BIG_EPS = 0.1
SHAPES = [(6, 9), (9, 6), (6, 6)]


def normal(shape, seed=0):
  numbers = np.random.default_rng(seed).normal(size=shape)
  return numbers.astype(np.float32)


def qr(x):
  """QR with a positive diagonal of R."""
  q, r = np.linalg.qr(x)
  return q * np.sign(np.diagonal(r))


class Reference:
  """The published update in float64, in PyTorch's layout (out, in)."""

  def __init__(self, weight, first_basis, error_feedback):
    self.w = np.array(weight, np.float64)
    # Left where out <= in, square ones included.
    self.left = self.w.shape[0] <= self.w.shape[1]
    self.first = np.array(first_basis, np.float64)
    self.feedback = error_feedback
    self.error = np.zeros_like(self.w)
    self.k = 0

  def step(self, grad):
    a = np.array(grad, np.float64) + self.feedback * self.error
    a = a if self.left else a.T
    if self.k == 0:
      p, old = self.first, np.zeros_like(self.first)
      m = v = np.zeros((p.shape[1], a.shape[1]))
    else:
      old, m, v = self.p, self.m, self.v
      b = RHO * old @ m / (1 - B1**self.k) + (1 - RHO) * a
      p = qr(b @ (b.T @ old))
    g, c = p.T @ a, p.T @ old
    rotated = c @ m
    error = a - p @ g + B1 / (1 - B1) * (old @ m - p @ rotated)
    self.error = error if self.left else error.T
    if self.k > 0:
      c1, c2 = 1 - B1**self.k, 1 - B2**self.k
      v = c2 * np.abs(c**2 @ (v / c2 - m**2 / c1**2) + rotated**2 / c1**2)
    self.k += 1
    self.m = B1 * rotated + (1 - B1) * g
    self.v = B2 * v + (1 - B2) * g**2
    self.p = p
    step = (self.m / (1 - B1**self.k)) / (
      np.sqrt(self.v / (1 - B2**self.k)) + EPS
    )
    step = p @ step
    self.w = (1 - LR * DECAY) * self.w
    self.w = self.w - LR * (step if self.left else step.T)


def only_subspace(state):
  def is_subspace(node):
    return isinstance(node, Subspace)

  leaves = jax.tree.leaves(state, is_leaf=is_subspace)
  (subspace,) = filter(is_subspace, leaves)
  return subspace


def run(tx, grads, state=None):
  """All updates of a transformation, and its last state."""
  state = jax.jit(tx.init)(grads[0]) if state is None else state
  update = jax.jit(tx.update)
  made = []
  for grad in grads:
    updates, state = update(grad, state)
    made.append(np.asarray(updates))
  return np.stack(made), state


@pytest.mark.parametrize(
  ('shape', 'error_feedback'),
  [*((shape, True) for shape in SHAPES), (SHAPES[0], False)],
)
def test_follows_the_published_update(shape, error_feedback):
  w_IO = normal(shape)
  grads = normal((12, *shape), 1)
  tx = ldadam(
    LR,
    3,
    error_bits=32 if error_feedback else None,
    weight_decay=DECAY,
    skip_nonfinite=False,
  )

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update({'dense': {'kernel': grad}}, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), only_subspace(state).basis

  @jax.jit
  def train(params, grads):
    carry, bases = jax.lax.scan(step, (params, tx.init(params)), grads)
    return carry[0]['dense']['kernel'], bases

  kernel, bases = train({'dense': {'kernel': w_IO}}, grads)
  ((axis, bases),) = bases.items()
  assert axis == ('out' if shape[1] <= shape[0] else 'in')
  reference = Reference(w_IO.T, np.asarray(bases)[0], error_feedback)
  for grad in grads:
    reference.step(grad.T)
  # Reached: 7.2e-7, of weights up to 2.5.
  np.testing.assert_allclose(kernel, reference.w.T, rtol=0, atol=2e-6)


def test_first_basis_holds_the_energy_of_the_best():
  # Singular values that fall slowly, by a half every seven.
  grad = normal((2, 40, 60)) * 0.9 ** np.arange(60)[None, None]
  _, state = run(scale_by_ldadam(5), [grad])
  s = np.linalg.svd(np.asarray(grad, np.float64), compute_uv=False)
  best = np.sum(s[:, :5] ** 2, -1) / np.sum(s**2, -1)
  assert (state.subspace.energy > 0.99 * best).all()
  assert (state.subspace.energy <= best + 1e-5).all()
  assert state.subspace.refresh_count.tolist() == [1, 1]


@pytest.mark.parametrize('error_bits', [32, 4])
def test_stack_equals_each_matrix_by_itself(error_bits):
  tx = scale_by_ldadam(2, error_bits=error_bits, eps=BIG_EPS)
  grads = normal((4, 2, 2, 8, 6))
  together, _ = run(tx, grads)
  for index in np.ndindex(2, 2):
    alone, _ = run(tx, grads[(slice(None), *index)])
    np.testing.assert_allclose(
      together[(slice(None), *index)], alone, atol=1e-5
    )


def test_four_devices_equal_one():
  mesh = sharding.make_mesh(1, 4)
  rule = sharding.shard_largest_axis('fsdp', min_size=64)

  def spread(tree):
    return jax.tree.map(
      lambda x: jax.device_put(x, NamedSharding(mesh, rule(x.shape, mesh))),
      tree,
    )

  tx = scale_by_ldadam(4, eps=BIG_EPS)
  grads = [normal((2, 16, 32), seed) for seed in range(4)]
  expected, end = run(tx, grads)
  updates, state = run(tx, spread(grads), spread(jax.jit(tx.init)(grads[0])))
  np.testing.assert_allclose(updates, expected, atol=1e-5)
  np.testing.assert_allclose(state.error, end.error, atol=1e-5)


def test_error_carries_what_no_step_has_given_yet():
  # With P_t m_t the momentum that step t gives, in full size,
  #   e_T + b1 / (1 - b1) P_T m_T + sum P_t m_t = sum G_t
  # follows from the definition of e by induction.
  tx = scale_by_ldadam(2, b1=B1)
  grads = normal((9, 8, 6))
  state, given = jax.jit(tx.init)(grads[0]), 0
  update = jax.jit(tx.update)
  for grad in grads:
    _, state = update(grad, state)
    momentum = np.float64(state.mu) @ np.float64(state.subspace.basis['out']).T
    given = given + momentum
  owed = state.error + B1 / (1 - B1) * momentum
  np.testing.assert_allclose(given + owed, np.sum(grads, 0), atol=2e-5)
  assert np.abs(state.error).max() > 1


def test_without_momentum_updates_and_error_add_up_to_the_gradients():
  # A large eps makes Adam's direction the coordinates themselves.
  tx = scale_by_ldadam(2, b1=0.0, b2=0.0, eps=1e6)
  grads = normal((9, 8, 6))
  updates, state = run(tx, grads)
  np.testing.assert_allclose(
    1e6 * updates.sum(0) + state.error, grads.sum(0), atol=1e-4
  )
  without, state = run(
    scale_by_ldadam(2, b1=0.0, b2=0.0, eps=1e6, error_bits=None), grads
  )
  assert state.error is None
  assert np.abs(1e6 * without.sum(0) - grads.sum(0)).max() > 1


def test_error_in_few_bits_stays_near():
  grads = normal((5, 2, 8, 6))
  _, exact = run(scale_by_ldadam(2, eps=BIG_EPS), grads)
  for bits, tolerance in ((8, 0.02), (4, 0.3)):
    tx = scale_by_ldadam(2, eps=BIG_EPS, error_bits=bits)
    _, state = run(tx, grads)
    error = state.error
    assert error.scale.shape == error.zero.shape == (2, 6)  # One per output.
    assert error.codes.shape == (2, 6, 8 * bits // 8)
    distance = np.linalg.norm(dequantize(error).mT - exact.error)
    assert 0 < distance < tolerance * np.linalg.norm(exact.error)


def hard_gradients():
  full = normal((4, 12, 8))
  thin = normal((4, 12, 1)) @ normal((4, 1, 8), 1)
  index = np.arange(4)[:, None, None]
  rows = np.where(np.arange(8) < 2, full, 0)
  return {
    'zero': 0 * full,
    'rank one': thin,
    'two columns': rows,
    'the same': np.broadcast_to(thin[0], full.shape),
    'zero, then full': np.where(index > 0, full, 0),
    'full, then zero': np.where(index < 1, full, 0),
    'tiny': np.float32(1e-25) * full,
    'large': np.float32(1e15) * full,
  }


@pytest.mark.parametrize(
  'options', [{}, {'error_bits': None}, {'error_bits': 8, 'side': 'long'}]
)
def test_hard_gradients_leave_everything_finite(options):
  grads = np.stack(list(hard_gradients().values()), axis=1)  # [4, 8, 12, 8]
  updates, state = run(scale_by_ldadam(4, **options), grads)
  assert np.isfinite(updates).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  ((_, basis),) = state.subspace.basis.items()
  gram = np.asarray(basis).mT @ np.asarray(basis)
  np.testing.assert_allclose(
    gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-5
  )
  assert state.subspace.refresh_count.tolist() == [0, 4, 4, 4, 3, 4, 4, 4]
  assert (np.asarray(state.subspace.energy) <= 1 + 1e-5).all()


def test_first_basis_waits_for_the_first_usable_gradient():
  late = normal((2, 2, 12, 8))
  late[0, 1] = 0
  _, state = run(scale_by_ldadam(3), late)
  s = np.linalg.svd(np.asarray(late[1, 1], np.float64), compute_uv=False)
  assert state.subspace.refresh_count.tolist() == [2, 1]
  # As many iterations as if it had come first.
  best = np.sum(s[:3] ** 2) / np.sum(s**2)
  assert state.subspace.energy[1] > 0.99 * best


def test_step_without_a_finite_gradient_is_left_out():
  params = {'dense': {'kernel': normal((12, 8))}}
  tx = ldadam(1e-3, 3)
  update = jax.jit(tx.update)
  _, state = update(params, jax.jit(tx.init)(params), params)
  bad = jax.tree.map(np.array, params)
  bad['dense']['kernel'][0, 0] = np.nan
  updates, after = update(bad, state, params)
  assert not np.any(updates['dense']['kernel'])
  assert int(inspect.skipped_steps(after)) == 1
  jax.tree.map(
    np.testing.assert_array_equal, after.inner_state, state.inner_state
  )


def test_bfloat16_step_compiles_once_and_goes_on_from_a_copy_bit_for_bit():
  params = {'a': {'kernel': jnp.asarray(normal((2, 12, 8)), jnp.bfloat16)}}
  tx = ldadam(1e-2, 3, error_bits=8, update_dtype=jnp.float32)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, seed):
    grads = jax.tree.map(lambda p: p + jnp.sin(p * seed), params)
    updates, state = tx.update(grads, state, params)
    assert updates['a']['kernel'].dtype == jnp.float32
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  for seed in range(3):
    params, state = step(params, state, seed)
  saved = jax.tree.map(np.array, (params, state))
  ends = []
  for start in (saved, (params, state)):
    # Copies, as they are donated.
    params, state = jax.tree.map(jnp.array, start)
    for seed in range(3, 6):
      params, state = step(params, state, seed)
    ends.append(jax.tree.map(np.array, (params, state)))
  jax.tree.map(np.testing.assert_array_equal, *ends)
  assert params['a']['kernel'].dtype == jnp.bfloat16
  assert step._cache_size() == 1


def test_matrix_regression_descends():
  # The target has full rank, four times that of the subspace.
  target = normal((16, 12)) / 4
  schedule = optax.cosine_decay_schedule(0.05, 200)
  tx = ldadam(schedule, 3, skip_nonfinite=False)
  w = np.zeros_like(target)
  state = jax.jit(tx.init)({'kernel': w})

  @jax.jit
  def step(w, state):
    updates, state = tx.update({'kernel': w - target}, state, {'kernel': w})
    return optax.apply_updates(w, updates['kernel']), state

  for _ in range(200):
    w, state = step(w, state)
  assert np.linalg.norm(w - target) < 0.05 * np.linalg.norm(target)


def test_report_and_statistics_know_the_subspaces():
  params = {
    'square': {'kernel': normal((2, 8, 8))},
    'wide': {'kernel': normal((8, 12))},
  }
  tx = ldadam(1e-3, 3)
  rows = {row.name: row for row in inspect.report(params, tx)}
  assert (rows['square/kernel'].rank, rows['square/kernel'].side) == (3, 'out')
  assert rows['wide/kernel'].side == 'in'
  # Basis, two moments, error and three statistics, of four bytes each.
  assert rows['wide/kernel'].state_bytes == 4 * (
    8 * 3 + 2 * 12 * 3 + 8 * 12 + 3
  )
  _, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  stats = inspect.subspace_stats(state)
  assert set(stats) == {'square/kernel', 'wide/kernel'}
  assert float(stats['wide/kernel'].refreshes) == 1
  assert 0.3 < float(stats['wide/kernel'].energy) <= 1


def test_rank_above_the_short_axis_is_clipped_and_logged(caplog):
  with caplog.at_level(logging.WARNING):
    state = scale_by_ldadam(100).init({'kernel': jnp.zeros((6, 8))})
  assert state.subspace['kernel'].basis['in'].shape == (6, 6)
  assert caplog.messages == [
    "rank 100 exceeds the shorter axis of 'kernel' [6, 8]: clipped to 6, which "
    'compresses nothing on that axis.'
  ]


def test_step_needs_two_full_size_temporaries():
  # Gradient with error, and the update: nothing is turned or blended in full.
  grad = jnp.zeros((16, 96, 64))
  tx = scale_by_ldadam(4)
  state = jax.eval_shape(tx.init, grad)
  step = jax.jit(tx.update, donate_argnums=(0, 1))
  memory = step.lower(grad, state).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2.5 * grad.size * 4


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'rank': 0}, 'rank must be at least 1, got 0.'),
    ({'rho': 1.0}, 'rho must be in [0, 1), got 1.0.'),
    ({'b1': 1.0}, 'b1 must be in [0, 1), got 1.0.'),
    (
      {'error_bits': 16},
      'error_bits must be None (no error feedback), 32, 8 or 4, got 16.',
    ),
    (
      {'side': 'left'},
      "Unknown side 'left'; expected one of ('short', 'long', 'in', 'out', "
      "'both').",
    ),
    (
      {'side': 'both'},
      "side='both' is not defined for LDAdam, whose moments keep one axis "
      "whole: use 'short', 'long', 'in' or 'out'.",
    ),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    ldadam(1e-3, **options)
  assert str(error.value) == text


def test_model_without_kernels_trains():
  params = {'bias': jnp.ones(4)}
  tx = ldadam(1e-2, 3)
  updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  assert (updates['bias'] < 0).all()
