"""Optimizers beside the transformations of Optax that people combine them with.

Every partner is compared with what it does by definition. Three optimizers take
turns, which differ in what they ask of a partner: `gradnormlorp` reads the
parameters, `q_galore` keeps its state in few bits, `ldadam` has a buffer of
errors.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim

every_kind = pytest.mark.parametrize(
  'name', ['gradnormlorp', 'q_galore', 'ldadam']
)


def take_steps(tx, params, grads):
  """Parameters after every step, stacked, and the last state."""

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  def run(params, grads):
    (_, state), after = jax.lax.scan(step, (params, tx.init(params)), grads)
    return after, state

  return jax.jit(run)(params, grads)


@pytest.fixture(scope='module')
def plain_run(make, params, stacked):
  """What `take_steps` returns for an alias by itself, cached."""

  @functools.cache
  def run(name):
    return take_steps(make(name), params, stacked)

  return run


def at(tree, index):
  return jax.tree.map(lambda x: x[np.asarray(index)], tree)


def assert_close(found, expected, rtol=1e-6, atol=1e-6):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
    found,
    expected,
  )


def test_clipping_is_that_of_the_gradients(make, params, stacked):
  leaves = [np.reshape(g, (3, -1)) for g in jax.tree.leaves(stacked)]
  norm = np.linalg.norm(np.concatenate(leaves, axis=1), axis=1)
  clipped = jax.tree.map(
    lambda g: g / norm.reshape(-1, *[1] * (g.ndim - 1)), stacked
  )
  tx = optax.chain(optax.clip_by_global_norm(1.0), make('gradnormlorp'))
  found, _ = take_steps(tx, params, stacked)
  expected, _ = take_steps(make('gradnormlorp'), params, clipped)
  # Adam divides by roots of squares: roundings of the norm show.
  assert_close(found, expected, rtol=1e-4)


def test_schedules_count_the_steps(make, params, stacked, plain_run):
  schedule = optax.piecewise_constant_schedule(1e-2, {1: 0.0, 2: 1.0})
  found, _ = take_steps(make('ldadam', schedule), params, stacked)
  assert_close(at(found, 0), at(plain_run('ldadam')[0], 0))
  # From the second step on the rate is 0.
  assert_close(at(found, 2), at(found, 0), rtol=0, atol=0)


def test_injected_numbers_are_the_ones_that_count(params, stacked, plain_run):
  # Those of the other two: tests/optim/test_conformance.py.
  static = ('rank', 'update_proj_gap', 'basis_bits', 'moment_bits')
  tx = optax.inject_hyperparams(optim.q_galore, static_args=static)(
    1e-2, rank=3, update_proj_gap=2, weight_decay=0.1
  )
  found, state = take_steps(tx, params, stacked)
  # In float32, 1 - b2 is off by 5e-5, and a code may be the next one.
  assert_close(found, plain_run('q_galore')[0], rtol=1e-3, atol=1e-4)
  state.hyperparams['learning_rate'] = jnp.zeros([])
  updates, _ = jax.jit(tx.update)(at(stacked, 0), state, params)
  assert_close(updates, jax.tree.map(np.zeros_like, params), atol=2e-7)


@every_kind
def test_accumulated_gradients_are_their_mean(
  name, make, params, stacked, plain_run
):
  # Every gradient comes in two halves that differ.
  halves = jax.tree.map(
    lambda g: np.stack([0.5 * g, 1.5 * g], axis=1).reshape(-1, *g.shape[1:]),
    stacked,
  )
  found, _ = take_steps(optax.MultiSteps(make(name), 2), params, halves)
  assert_close(
    jax.tree.map(lambda x: x[1::2], found), plain_run(name)[0], rtol=1e-5
  )


@every_kind
def test_apply_if_finite_steps_over_a_bad_gradient(
  name, make, params, stacked, plain_run
):
  def inserted(g):
    bad = np.full_like(g[:1], np.nan)
    return np.concatenate([g[:1], bad, g[1:]])

  tx = optax.apply_if_finite(make(name, skip_nonfinite=False), 5)
  cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, 'bfloat16'))
  # Of any dtype: its two branches must agree.
  jax.eval_shape(tx.update, cast(params), tx.init(cast(params)), cast(params))
  found, state = take_steps(tx, params, jax.tree.map(inserted, stacked))
  assert int(state.total_notfinite) == 1
  assert_close(at(found, [0, 2, 3]), plain_run(name)[0])
  assert_close(at(found, 1), at(found, 0), rtol=0, atol=0)


def test_conditionally_mask_keeps_parameters_and_state(make, params, stacked):
  tx = optax.conditionally_mask(
    make('q_galore'), lambda step, **_: step != 1, forward_extra_args=True
  )
  found, _ = take_steps(tx, params, stacked)
  assert_close(at(found, 1), at(found, 0), rtol=0, atol=0)
  kept = jax.tree.map(lambda g: g[np.array([0, 2])], stacked)
  expected, _ = take_steps(make('q_galore'), params, kept)
  assert_close(at(found, [0, 2]), expected)


@every_kind
def test_partition_with_another_optimizer(name, make, params, stacked):
  labels = {'a': 'ours', 'b': 'theirs'}
  tx = optax.partition({'ours': make(name), 'theirs': optax.sgd(0.1)}, labels)
  found, _ = take_steps(tx, params, stacked)
  alone, _ = take_steps(make(name), {'a': params['a']}, {'a': stacked['a']})
  assert_close(found['a'], alone['a'])
  summed = np.cumsum(stacked['b']['kernel'], axis=0)
  expected = params['b']['kernel'] - 0.1 * summed
  assert_close(found['b']['kernel'], expected, rtol=1e-5)
  rows = {row.name: row for row in optim.report(params, tx)}
  assert [row.label for row in rows.values()] == ['full', 'low_rank', 'other']
  assert rows['b/kernel'].state_bytes == 0


def test_masked_steps_where_the_mask_says(make, params, stacked):
  tx = optax.masked(make('gradnormlorp'), {'a': True, 'b': False})
  found, _ = take_steps(tx, params, stacked)
  alone, _ = take_steps(
    make('gradnormlorp'), {'a': params['a']}, {'a': stacked['a']}
  )
  assert_close(found['a'], alone['a'])
  # What is masked passes as it is.
  expected = params['b']['kernel'] + np.cumsum(stacked['b']['kernel'], axis=0)
  assert_close(found['b']['kernel'], expected, rtol=1e-5)


def test_lookahead_synchronises(make, params, stacked, plain_run):
  tx = optax.lookahead(make('q_galore'), sync_period=2, slow_step_size=0.25)

  @jax.jit
  def run(params, grads):
    both = optax.LookaheadParams.init_synced(params)

    def step(carry, grads):
      both, state = carry
      updates, state = tx.update(grads, state, both)
      return (optax.apply_updates(both, updates), state), both

    return jax.lax.scan(step, (both, tx.init(both)), grads)[1]

  found = run(jax.tree.map(jnp.asarray, params), stacked)
  fast = plain_run('q_galore')[0]
  assert_close(at(found.fast, 1), at(fast, 0))
  # After two steps the slow ones have gone a quarter of the way.
  expected = jax.tree.map(lambda p, f: p + 0.25 * (f[1] - p), params, fast)
  assert_close(at(found.slow, 2), expected)
  assert_close(at(found.fast, 2), expected)


def test_schedule_free_averages_the_iterates(make, params, stacked, plain_run):
  tx = optax.contrib.schedule_free(make('gradnormlorp'), 1e-2, b1=0.9)
  found, state = take_steps(tx, params, stacked)
  # z is what the optimizer steps on, at gradients of the mixed points.
  assert_close(at(found, 0), at(plain_run('gradnormlorp')[0], 0))
  averaged = optax.contrib.schedule_free_eval_params(state, at(found, 2))
  distance = jax.tree.map(
    lambda x, p: float(np.abs(x - p).max()), averaged, params
  )
  assert 1e-3 < min(jax.tree.leaves(distance))
  assert max(jax.tree.leaves(distance)) < 0.1


def test_ema_averages_the_updates(make, params, stacked, plain_run):
  tx = optax.chain(make('ldadam'), optax.ema(0.5, debias=False))

  @jax.jit
  def first(params, grads):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)

  half = jax.tree.map(
    lambda p, q: p + 0.5 * (q[0] - p), params, plain_run('ldadam')[0]
  )
  assert_close(first(params, at(stacked, 0)), half)


@every_kind
def test_counts_and_trees_of_a_state_are_found(name, make, params, plain_run):
  state = plain_run(name)[1]
  counts = [x for _, x in optax.tree.get_all_with_path(state, 'count')]
  assert {int(x) for x in counts} == {3}
  assert int(optax.tree.get(state, 'skipped')) == 0
  tx = make(name)
  zeros = optax.tree.map_params(tx, jnp.zeros_like, state)
  assert jax.tree.structure(zeros) == jax.tree.structure(state)
