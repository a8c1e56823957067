import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training import sharding
from gnlorp_jax.training import state as state_lib

RULES = (('.*', sharding.shard_largest_axis('fsdp', min_size=1024)),)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(2, 2)


def test_state_is_initialised_in_shards(tiny_lm, mesh):
  state = state_lib.create(
    tiny_lm.init, optax.adamw(1e-3), jax.random.key(0), mesh, RULES
  )
  moments = state.opt_state[0]
  for tree in (state.params, moments.mu, moments.nu):
    kernel = tree['blocks']['up']  # [2, 32, 64]
    assert kernel.sharding.spec == P(None, None, 'fsdp')
    assert {s.data.shape for s in kernel.addressable_shards} == {(2, 32, 32)}
  assert state.step.sharding.is_fully_replicated
  assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)


def test_sharded_init_never_makes_a_whole_array():
  def init(key):
    return {'kernel': jax.random.normal(key, (1024, 1024))}

  def peak_bytes(mesh):
    target = state_lib.abstract(init, optax.sgd(1.0), jax.random.key(0), mesh)
    initialise = jax.jit(init, out_shardings=state_lib.shardings(target.params))
    memory = initialise.lower(jax.random.key(0)).compile().memory_analysis()
    return memory.output_size_in_bytes + memory.temp_size_in_bytes

  whole = peak_bytes(sharding.make_mesh(1, 1))
  assert peak_bytes(sharding.make_mesh(1, 4)) < 1.01 * whole / 4


def test_state_equals_unsharded_initialisation(tiny_lm, mesh):
  tx = optax.adamw(1e-3)
  key = jax.random.key(3)
  state = state_lib.create(tiny_lm.init, tx, key, mesh, RULES)
  params = jax.jit(tiny_lm.init)(key)
  # The random bits are the same; scaling them may be fused differently.
  chex.assert_trees_all_close(state.params, params, rtol=1e-6)
  chex.assert_trees_all_equal(
    jax.device_get(state.opt_state), jax.device_get(tx.init(params))
  )


def test_abstract_state_describes_the_real_one(tiny_lm, mesh):
  arguments = (
    tiny_lm.init,
    optax.adamw(1e-3),
    jax.random.key(0),
    mesh,
    RULES,
  )
  expected = state_lib.abstract(*arguments)
  state = state_lib.create(*arguments)
  assert jax.tree.structure(expected) == jax.tree.structure(state)
  for struct, leaf in zip(
    jax.tree.leaves(expected), jax.tree.leaves(state), strict=True
  ):
    assert isinstance(struct, jax.ShapeDtypeStruct)
    assert (struct.shape, struct.dtype) == (leaf.shape, leaf.dtype)
    assert struct.sharding == leaf.sharding


@pytest.mark.parametrize('convert', [np.asarray, jnp.asarray])
def test_given_params_survive_donation(tiny_lm, mesh, convert):
  params = jax.tree.map(convert, tiny_lm.init(jax.random.key(0)))
  before = jax.tree.map(np.array, params)
  state = state_lib.from_params(params, optax.adamw(1e-3), mesh, RULES)
  chex.assert_trees_all_equal(jax.device_get(state.params), before)
  assert state.opt_state[0].mu['head'].sharding.spec == P(None, 'fsdp')
  overwrite = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  jax.block_until_ready(overwrite(state))
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), before)


@pytest.mark.parametrize('copies', [1, 4])
def test_given_params_survive_where_their_place_is_kept(tiny_lm, copies):
  """One device, whose arrays lie there already, or one of several copies."""
  mesh = sharding.make_mesh(copies, 1, devices=jax.devices()[:copies])
  params = tiny_lm.init(jax.random.key(0))
  if copies == 1:
    params = jax.device_put(params, sharding.batch_sharding(mesh))
  before = jax.tree.map(np.array, params)
  state = state_lib.from_params(params, optax.sgd(1.0), mesh)
  overwrite = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  jax.block_until_ready(overwrite(state))
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), before)


def test_uncovered_state_is_an_error(tiny_lm, mesh):
  rules = (('^params/', sharding.replicate), ('^s', sharding.replicate))
  with pytest.raises(ValueError, match=r"covers \['opt_state/0/count'"):
    state_lib.create(
      tiny_lm.init, optax.adamw(1e-3), jax.random.key(0), mesh, rules
    )
