"""Every optimizer on meshes with automatic and with explicit shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.optim.parts.boundary import axes_by_rules, for_any_tree
from tests.ecosystem.names import NAMES

# Divided along an axis; along one beside which another has no even share; not
# at all; and stacked, divided along the outputs.
SHAPES = {
  'fsdp': {'kernel': (16, 8), 'bias': (8,)},
  'replicated': {'kernel': (6, 8)},
  # Its compressed axis is the divided one.
  'square': {'kernel': (8, 8)},
  'stacked': {'kernel': (2, 6, 8)},
  # Held as [out, in].
  'uneven': {'weight': (16, 6)},
}
SPECS = {
  'fsdp': {'kernel': P('fsdp', None), 'bias': P('fsdp')},
  'replicated': {'kernel': P()},
  'square': {'kernel': P('fsdp', None)},
  'stacked': {'kernel': P(None, None, 'fsdp')},
  'uneven': {'weight': P('fsdp', None)},
}


def random(seed, *stack):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.standard_normal((*stack, *shape)).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


PARAMS, GRADS = random(0), random(1, 3)


# Behind the boundary every optimizer's arrays are XLA's to divide, and how they
# are held before it is the same for all. A few optimizers are shown every kind
# of array; the rest the two whose divided axis is the compressed one, or lies
# beside one without an even share, and what is not projected.
ALL_KINDS = ('adamw', 'galore', 'gradnormlorp')


def shown(name, tree):
  """What an optimizer is tried on."""
  if name in ALL_KINDS:
    return tree
  bias = {'bias': tree['fsdp']['bias']}
  return {'fsdp': bias, 'square': tree['square'], 'stacked': tree['stacked']}


def steps_of(tx):
  """A function from parameters to parameters and state after three steps."""

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  def run(params, grads):
    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

  return jax.jit(run)


@pytest.fixture(scope='module')
def on_one_device(make):
  @functools.cache
  def run(alias):
    return steps_of(make(alias))(shown(alias, PARAMS), shown(alias, GRADS))

  return run


# Behind the boundary axes are automatic, whatever they are before it: explicit
# ones show both to every optimizer. Automatic ones pass it as one device does.
KINDS = {
  AxisType.Explicit: NAMES,
  AxisType.Auto: ('adamw', 'gradnormlorp'),
}


def put(mesh, tree, *stack, specs=SPECS):
  return jax.tree.map(
    lambda x, spec: jax.device_put(
      x, NamedSharding(mesh, P(*(None,) * len(stack), *spec))
    ),
    tree,
    specs,
  )


@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    pytest.param(name, kind, id=f'{name}-{kind.name}')
    for kind, names in KINDS.items()
    for name in names
  ],
)
def test_mesh_equals_one_device(name, kind, make, on_one_device):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(kind,))
  start, grads, specs = (shown(name, tree) for tree in (PARAMS, GRADS, SPECS))
  with jax.set_mesh(mesh):
    params, _ = steps_of(make(name))(
      put(mesh, start, specs=specs), put(mesh, grads, 3, specs=specs)
    )
  expected, _ = on_one_device(name)
  # A number between two codes may get the other one, and a basis of 4 bits
  # turns by some hundredths.
  tolerance = 0.1 if name == 'q_galore' else 1e-4
  for found, plain, before in zip(
    *map(jax.tree.leaves, (params, expected, start)), strict=True
  ):
    moved = np.linalg.norm(plain - before)
    assert np.linalg.norm(found - plain) < tolerance * moved + 1e-6
  if kind == AxisType.Explicit:
    for array, spec in zip(
      jax.tree.leaves(params), jax.tree.leaves(specs), strict=True
    ):
      ndim = array.ndim
      assert (
        tuple(jax.typeof(array).sharding.spec) == (*spec, *[None] * 9)[:ndim]
      )


def moments_of(state):
  """Types of the first moments by the parameter's name."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path)
    if '.mu' in name and 'low_rank' in name:
      found[name.split("['")[-2].split("'")[0]] = jax.typeof(leaf)
  return found


def test_states_keep_the_axes_that_they_share_with_kernels(make):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    state = jax.jit(make('galore').init)(put(mesh, PARAMS))
  shardings = {
    name: (kind.shape, tuple(kind.sharding.spec))
    for name, kind in moments_of(state).items()
  }
  # The shorter axis is compressed, to rank 3.
  assert shardings == {
    'fsdp': ((16, 3), ('fsdp', None)),
    'replicated': ((8, 3), (None, None)),
    'square': ((8, 3), (None, None)),
    'stacked': ((2, 8, 3), (None, 'fsdp', None)),
    'uneven': ((16, 3), ('fsdp', None)),
  }


def test_adamw_keeps_weights_as_they_are(make):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    state = jax.jit(make('adamw').init)(put(mesh, PARAMS))
  low_rank = state.inner_state.inner_states['low_rank'].inner_state[0]
  mu = low_rank.mu['uneven']['weight']
  assert (mu.shape, tuple(jax.typeof(mu).sharding.spec)) == (
    (16, 6),
    ('fsdp', None),
  )


@pytest.mark.parametrize('init', [jax.jit, lambda init: init])
def test_a_mesh_need_not_be_set(init, make, on_one_device):
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Explicit,))
  tx = make('galore')
  params = put(mesh, PARAMS)
  state = init(tx.init)(params)
  update = jax.jit(tx.update)
  for number in range(3):
    grads = put(mesh, jax.tree.map(lambda g, i=number: g[i], GRADS))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    params,
    on_one_device('galore')[0],
  )


def test_other_arguments_reach_an_inner_optimizer_on_an_explicit_mesh():
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Explicit,))

  def update(updates, state, params=None, *, value, by):
    return jax.tree.map(lambda u: by(u, value), updates), state

  tx = for_any_tree(
    optax.GradientTransformationExtraArgs(lambda params: (), update),
    axes_by_rules(),
  )
  params = put(mesh, PARAMS)
  with jax.set_mesh(mesh):
    updates, _ = jax.jit(
      lambda p, value: tx.update(p, (), p, value=value, by=jnp.multiply)
    )(params, jnp.float32(3))
  jax.tree.map(
    lambda u, p: np.testing.assert_array_equal(u, 3 * p), updates, PARAMS
  )
