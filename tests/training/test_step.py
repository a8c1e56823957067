import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.training import sharding, step
from gnlorp_jax.training import state as state_lib

# An eps well above the rounding of the gradients, 1e-8 here: Adam's first step
# divides each gradient by its own size, and would blow their rounding up.
ADAMW = optax.adamw(1e-2, eps=1e-3)
RULES = (('.*', sharding.shard_largest_axis('fsdp', min_size=1024)),)


@functools.cache
def first_state(tiny_lm, tx):
  mesh = sharding.make_mesh(1, 1)
  key = jax.random.key(0)
  return jax.device_get(state_lib.create(tiny_lm.init, tx, key, mesh))


def start(tiny_lm, mesh, tx):
  state = first_state(tiny_lm, tx)
  return jax.device_put(
    state, sharding.infer_shardings(state, mesh, RULES), may_alias=False
  )


@functools.cache
def compiled_step(tiny_lm, mesh, tx, num_micro_batches):
  return step.jit_train_step(
    step.make_train_step(
      tiny_lm.loss_fn, tx, num_micro_batches=num_micro_batches
    ),
    start(tiny_lm, mesh, tx),
    mesh,
  )


def train(tiny_lm, mesh, tx, num_steps, num_micro_batches=1):
  state = start(tiny_lm, mesh, tx)
  train_step = compiled_step(tiny_lm, mesh, tx, num_micro_batches)
  for seed in range(num_steps):
    batch = sharding.put_batch(tiny_lm.make_batch(seed, 8), mesh)
    state, metrics = train_step(state, batch)
  return state, metrics


def linear_loss(params, batch):
  """Sum of w (x . p): its gradient is known by hand."""
  products = batch['inputs'] @ params['p'].astype(jnp.float32)
  return jnp.sum(batch['weights'] * products), jnp.sum(batch['weights'])


def linear_state(p, tx):
  params = {'p': jnp.asarray(p)}
  step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
  return state_lib.TrainState(step, skipped, params, tx.init(params))


def jitted(loss_fn, tx, **options):
  return jax.jit(step.make_train_step(loss_fn, tx, **options))


def test_step_equals_optax_by_hand(tiny_lm):
  tx = ADAMW
  mesh = sharding.make_mesh(1, 1)
  state, metrics = train(tiny_lm, mesh, tx, 1)

  def mean_loss(params):
    loss, weight = tiny_lm.loss_fn(params, tiny_lm.make_batch(0, 8))
    return loss / weight

  params = first_state(tiny_lm, tx).params
  loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
  updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
  moved = jax.tree.map(np.add, params, updates)
  chex.assert_trees_all_close(state.params, moved, atol=1e-6)
  assert int(state.step) == 1
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)

  def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

  np.testing.assert_allclose(
    metrics['grad_norm'], norm(jax.device_get(grads)), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['update_norm'], norm(jax.device_get(updates)), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['weight_norm'], norm(jax.device_get(state.params)), rtol=1e-6
  )
  assert metrics['weight_sum'] == tiny_lm.make_batch(0, 8)['weights'].sum()


def test_grad_norm_is_taken_before_clipping():
  tx = optax.sgd(1.0)
  batch = {'inputs': jnp.full((2, 3), 5.0), 'weights': jnp.ones(2)}
  _, metrics = jitted(linear_loss, tx, clip_global_norm=1e-3)(
    linear_state(np.zeros(3, np.float32), tx), batch
  )
  np.testing.assert_allclose(metrics['grad_norm'], 5 * 3**0.5, rtol=1e-6)
  np.testing.assert_allclose(metrics['update_norm'], 1e-3, rtol=1e-6)


def test_small_gradients_are_not_clipped():
  batch = {'inputs': jnp.full((2, 3), 5.0), 'weights': jnp.ones(2)}
  state = linear_state(np.zeros(3, np.float32), optax.sgd(1.0))
  _, metrics = jitted(linear_loss, optax.sgd(1.0), clip_global_norm=100.0)(
    state, batch
  )
  np.testing.assert_allclose(metrics['update_norm'], 5 * 3**0.5, rtol=1e-6)


def test_micro_batches_equal_one_big_batch(tiny_lm):
  mesh = sharding.make_mesh(1, 1)
  tx = optax.sgd(1.0)
  expected, expected_metrics = train(tiny_lm, mesh, tx, 2)
  state, metrics = train(tiny_lm, mesh, tx, 2, num_micro_batches=4)
  chex.assert_trees_all_close(state.params, expected.params, atol=1e-6)
  chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-6)


def test_micro_batch_mean_is_weighted_by_tokens():
  # Rows 0 and 2 form one micro-batch, 1 and 3 the other: a mean of means
  # would be 4.5.
  batch = {
    'inputs': jnp.array([[1.0], [8.0], [1.0], [8.0]]),
    'weights': jnp.array([1.0, 0.0, 2.0, 3.0]),
  }
  tx = optax.sgd(1.0)
  train_step = jitted(linear_loss, tx, num_micro_batches=2)
  state, metrics = train_step(linear_state(np.ones(1, np.float32), tx), batch)
  np.testing.assert_allclose(metrics['loss'], 27 / 6, rtol=1e-6)
  np.testing.assert_allclose(state.params['p'], 1 - 27 / 6, rtol=1e-6)


def test_micro_batch_gradients_are_summed_in_float32():
  # In bfloat16 the sum of 256 and 15 ones would stay at 256.
  inputs = np.ones((16, 1), np.float32)
  inputs[0] = 256
  batch = {'inputs': jnp.asarray(inputs), 'weights': jnp.ones(16)}
  tx = optax.sgd(1.0)
  train_step = jitted(linear_loss, tx, num_micro_batches=16)
  _, metrics = train_step(linear_state(jnp.zeros(1, jnp.bfloat16), tx), batch)
  np.testing.assert_allclose(
    metrics['grad_norm'], jnp.bfloat16(271 / 16).astype(jnp.float32)
  )


def test_bfloat16_params_are_rounded_once_from_float32_updates():
  # 1 + 2**-9 is half-way between two bfloat16 numbers: it rounds down, but
  # with 2**-12 more it must round up. A bfloat16 update loses the 2**-12.
  update = np.array([2**-8 + 2**-12, 2**-8], np.float32)
  tx = optax.stateless(lambda updates, params: {'p': jnp.asarray(update)})
  batch = {'inputs': jnp.ones((1, 2)), 'weights': jnp.ones(1)}
  state, _ = jitted(linear_loss, tx)(
    linear_state(jnp.ones(2, jnp.bfloat16), tx), batch
  )
  assert state.params['p'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    state.params['p'].astype(jnp.float32), [1 + 2**-7, 1]
  )


@pytest.mark.parametrize('num_micro_batches', [1, 2])
def test_state_keeps_its_dtypes(num_micro_batches):
  tx = ADAMW
  state = linear_state(jnp.ones(3, jnp.bfloat16), tx)
  batch = {'inputs': jnp.ones((2, 3)), 'weights': jnp.ones(2)}
  train_step = step.make_train_step(
    linear_loss, tx, num_micro_batches=num_micro_batches
  )
  new_state, metrics = jax.eval_shape(train_step, state, batch)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  assert metrics.pop('skipped_steps').dtype == jnp.int32
  assert {metric.dtype for metric in metrics.values()} == {jnp.dtype('float32')}


@pytest.mark.parametrize('num_micro_batches', [1, 2])
def test_batch_without_weight_changes_nothing(num_micro_batches):
  tx = optax.sgd(1.0)
  batch = {'inputs': jnp.ones((2, 3)), 'weights': jnp.zeros(2)}
  train_step = jitted(linear_loss, tx, num_micro_batches=num_micro_batches)
  state, metrics = train_step(linear_state(np.ones(3, np.float32), tx), batch)
  np.testing.assert_array_equal(state.params['p'], 1)
  assert metrics['loss'] == metrics['grad_norm'] == 0


@functools.cache
def adam_step():
  tx = optax.adam(0.1)
  return tx, jitted(linear_loss, tx)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_step_without_a_finite_gradient_is_left_out_and_counted(bad):
  tx, train_step = adam_step()
  good = {'inputs': np.ones((2, 3)), 'weights': np.ones(2)}
  poisoned = {**good, 'inputs': np.array([[1, bad, 1], [1, 1, 1]])}
  before, _ = train_step(linear_state(np.ones(3, np.float32), tx), good)
  after, metrics = train_step(before, poisoned)
  chex.assert_trees_all_equal(after.params, before.params)
  chex.assert_trees_all_equal(after.opt_state, before.opt_state)
  assert (int(after.step), int(after.skipped)) == (2, 1)
  assert metrics['skipped_steps'] == 1 and metrics['update_norm'] == 0
  _, metrics = train_step(after, good)
  assert metrics['skipped_steps'] == 1 and metrics['update_norm'] > 0


def test_donated_state_is_reused():
  mesh = sharding.make_mesh(1, 1)
  params = {'p': np.ones(3, np.float32)}
  state = state_lib.from_params(params, ADAMW, mesh)
  batch = {'inputs': np.ones((2, 3), 'f'), 'weights': np.ones(2, 'f')}
  batch = sharding.put_batch(batch, mesh)
  train_step = step.jit_train_step(
    step.make_train_step(linear_loss, ADAMW), state, mesh
  )
  compiled = train_step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes >= state_bytes
  compiled(state, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_sharded_training_equals_one_device(tiny_lm):
  tx = ADAMW
  mesh = sharding.make_mesh(2, 2)
  expected, _ = train(tiny_lm, sharding.make_mesh(1, 1), tx, 5, 2)
  state, _ = train(tiny_lm, mesh, tx, 5, 2)
  # Sums over devices are taken in another order, which changes a gradient by
  # up to 1e-8; five steps of lr * 1e-8 / eps = 1e-7 each.
  chex.assert_trees_all_close(
    jax.device_get(state.params), jax.device_get(expected.params), atol=1e-6
  )
  nu = state.opt_state[0].nu['blocks']['down']  # [2, 64, 32]
  assert {s.data.shape for s in nu.addressable_shards} == {(2, 32, 32)}
  # No step was compiled anew.
  assert compiled_step(tiny_lm, mesh, tx, 2)._cache_size() == 1


def test_micro_batches_are_cut_without_communication(tiny_lm):
  mesh = sharding.make_mesh(2, 2)
  rows = sharding.put_batch(tiny_lm.make_batch(0, 8), mesh)['inputs']
  split = jax.jit(lambda rows: step.split_rows(rows, 2))
  text = split.lower(rows).compile().as_text()
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text
  micro_batches = split(rows)
  np.testing.assert_array_equal(micro_batches[1], np.asarray(rows)[1::2])
  assert {s.data.shape for s in micro_batches.addressable_shards} == {
    (2, 1, rows.shape[1])
  }


def test_accumulated_gradients_are_sharded():
  # The float32 sums of a sharded parameter must not be whole on each device.
  def loss_fn(params, batch):
    out = batch['inputs'] @ params['kernel']
    return jnp.sum(out**2), jnp.sum(batch['weights'])

  def temp_bytes(mesh):
    tx = optax.sgd(1.0)
    state = state_lib.abstract(
      lambda key: {'kernel': jnp.zeros((1024, 2048))},
      tx,
      jax.random.key(0),
      mesh,
    )
    split = sharding.batch_sharding(mesh)
    batch = {
      'inputs': jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=split),
      'weights': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split),
    }
    train_step = step.jit_train_step(
      step.make_train_step(loss_fn, tx, num_micro_batches=2), state, mesh
    )
    memory = train_step.lower(state, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes

  whole = temp_bytes(sharding.make_mesh(1, 1))
  assert temp_bytes(sharding.make_mesh(1, 4)) < 1.1 * whole / 4


def test_eval_step_returns_sums(tiny_lm):
  mesh = sharding.make_mesh(2, 2)
  state = start(tiny_lm, mesh, optax.sgd(1.0))
  eval_step = step.jit_eval_step(tiny_lm.loss_fn, state.params, mesh)
  batch = tiny_lm.make_batch(0, 8)
  loss_sum, weight_sum = eval_step(
    state.params, sharding.put_batch(batch, mesh)
  )
  expected = jax.jit(tiny_lm.loss_fn)(jax.device_get(state.params), batch)
  np.testing.assert_allclose((loss_sum, weight_sum), expected, rtol=1e-6)


def test_batch_not_divisible_by_micro_batches_is_an_error():
  tx = optax.sgd(1.0)
  state = linear_state(np.ones(3, np.float32), tx)
  train_step = step.make_train_step(linear_loss, tx, num_micro_batches=3)
  text = (
    'A batch of 8 rows cannot be split into num_micro_batches=3: it must be '
    'a multiple.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    train_step(state, {'inputs': jnp.ones((8, 3)), 'weights': jnp.ones(8)})


def test_no_micro_batches_is_an_error(tiny_lm):
  with pytest.raises(
    ValueError, match='^num_micro_batches=0 must be at least 1.$'
  ):
    step.make_train_step(tiny_lm.loss_fn, optax.sgd(1.0), num_micro_batches=0)


@pytest.mark.parametrize('num_micro_batches', [1, 2])
def test_constants_are_neither_differentiated_nor_donated(num_micro_batches):
  def loss_fn(params, batch, frozen):
    scaled = {'p': params['p'] * frozen['scale']}
    return linear_loss(scaled, batch)

  tx, mesh = optax.sgd(0.5), sharding.make_mesh(1, 1)
  batch = {
    'inputs': np.arange(12, dtype=np.float32).reshape(4, 3),
    'weights': np.ones(4, np.float32),
  }
  scale = np.array([1.0, -2.0, 3.0], np.float32)
  state = state_lib.from_params({'p': np.zeros(3, np.float32)}, tx, mesh)
  frozen = jax.device_put(
    {'scale': scale}, sharding.infer_shardings({'scale': scale}, mesh)
  )
  train_step = step.jit_train_step(
    step.make_train_step(loss_fn, tx, num_micro_batches=num_micro_batches),
    state,
    mesh,
    frozen,
  )
  plain, _ = jitted(linear_loss, tx)(
    linear_state(np.zeros(3, np.float32), tx), batch
  )
  state, _ = train_step(state, sharding.put_batch(batch, mesh), frozen)
  # By the chain rule the step is the plain one, times what scales p.
  expected = np.asarray(plain.params['p']) * scale
  np.testing.assert_allclose(state.params['p'], expected, rtol=1e-6)
  np.testing.assert_array_equal(frozen['scale'], scale)
