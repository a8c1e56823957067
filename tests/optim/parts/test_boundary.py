"""Boxes and shardings of states: every array has those of its own axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

from gnlorp_jax import optim

NAMES = {
  'square': {'kernel': ('embed', 'mlp')},
  'stack': {'kernel': ('layers', 'embed', None), 'bias': ('layers', None)},
  'tall': {'kernel': ('mlp', 'embed')},
  'embed': {'embedding': ('vocab', 'embed')},
  'query': {'kernel': ('embed', 'heads', None)},
}
SHAPES = {
  'square': {'kernel': (8, 8)},
  'stack': {'kernel': (3, 4, 16), 'bias': (3, 16)},
  'tall': {'kernel': (16, 8)},
  'embed': {'embedding': (32, 8)},
  'query': {'kernel': (8, 4, 3)},
}
OPTIONS = {
  'param_labels': [('kernel', 'low_rank'), ('.*', 'full')],
  'kernel_axes': [('query', 1, 2)],
}


def is_tuple(x):
  return isinstance(x, tuple)


PARAMS = jax.tree.map(
  lambda shape: np.ones(shape, np.float32), SHAPES, is_leaf=is_tuple
)
BOXED = jax.tree.map(
  lambda x, names: nn.Partitioned(x, names), PARAMS, NAMES, is_leaf=is_tuple
)


def specs_of(tx):
  """Specs of a state by the fields on the way and the parameter's name."""
  state = jax.eval_shape(tx.init, BOXED)
  specs = nn.get_partition_spec(state)
  found = {}
  for path, spec in jax.tree_util.tree_leaves_with_path(
    specs, is_leaf=lambda x: isinstance(x, P)
  ):
    keys = [str(getattr(k, 'name', getattr(k, 'key', ''))) for k in path]
    owner = next((k for k in keys if k in SHAPES), None)
    if owner is not None:
      fields = [k for k in keys if k in FIELDS]
      found[(owner, *fields)] = tuple(spec)
  return found


FIELDS = (
  *('mu', 'nu', 'basis', 'refresh_count', 'codes', 'scale', 'magnitude'),
  *('error', 'recovery', 'row', 'col', 'bias', 'v_norm', 'similarity'),
)


def test_moments_and_bases_of_galore():
  specs = specs_of(optim.galore(1e-2, rank=2, **OPTIONS))
  # The shorter axis is compressed: a basis lives on it, moments on the other.
  assert specs['tall', 'basis'] == ('embed', None)
  assert specs['tall', 'mu'] == ('mlp', None)
  # Of square ones the inputs.
  assert specs['square', 'basis'] == ('embed', None)
  assert specs['square', 'nu'] == ('mlp', None)
  assert specs['stack', 'mu'] == ('layers', None, None)
  assert specs['stack', 'basis'] == ('layers', 'embed', None)
  assert specs['stack', 'refresh_count'] == ('layers',)
  assert specs['stack', 'mu', 'bias'] == ('layers', None)
  assert specs['embed', 'nu'] == ('vocab', 'embed')
  # [8, 12], the outputs merged under the name of the first.
  assert specs['query', 'basis'] == ('embed', None)
  assert specs['query', 'mu'] == ('heads', None)


def test_long_side_and_both_sides():
  specs = specs_of(optim.galore(1e-2, rank=2, side='long', **OPTIONS))
  assert specs['square', 'mu'] == ('embed', None)
  assert specs['tall', 'mu'] == ('embed', None)
  specs = specs_of(optim.galore(1e-2, rank=2, side='both', **OPTIONS))
  assert specs['tall', 'mu'] == (None, None)


def test_magnitudes_of_gradnormlorp():
  tx = optim.gradnormlorp(1e-2, rank=2, norm_state='tracked', **OPTIONS)
  specs = specs_of(tx)
  assert specs['square', 'v_norm'] == (None, 'mlp')
  assert specs['stack', 'magnitude', 'mu'] == ('layers', None, None)
  assert specs['tall', 'magnitude', 'nu'] == (None, 'embed')
  assert specs['tall', 'mu'] == ('mlp', None)


def test_errors_of_ldadam_in_full_and_in_few_bits():
  specs = specs_of(optim.ldadam(1e-2, rank=2, **OPTIONS))
  assert specs['tall', 'error'] == ('mlp', 'embed')
  assert specs['tall', 'mu'] == ('mlp', None)
  specs = specs_of(optim.ldadam(1e-2, rank=2, error_bits=8, **OPTIONS))
  # Codes are of the transpose.
  assert specs['tall', 'error', 'codes'] == ('embed', 'mlp')
  assert specs['stack', 'error', 'scale'] == ('layers', None)


def test_factored_moments():
  options = {'param_labels': OPTIONS['param_labels'][:1] + [('.*', 'full')]}
  specs = specs_of(
    optim.projfactor(
      1e-2,
      rank=2,
      granularity=1,
      **options | {'kernel_axes': OPTIONS['kernel_axes']},
    )
  )
  assert specs['tall', 'recovery', 'row'] == ('mlp',)
  assert specs['tall', 'recovery', 'col'] == ('embed',)
  assert specs['stack', 'recovery', 'col'] == ('layers', 'embed')


def test_few_bits():
  big = {'embed': {'embedding': nn.Partitioned(np.ones((64, 128)), ('v', 'e'))}}
  tx = optim.adamw(1e-2, moment_bits=[('.*', 4)])
  state = jax.eval_shape(tx.init, big)
  specs = nn.get_partition_spec(state)
  mu = specs.inner_state.inner_states['full'].inner_state[0].mu
  # Two numbers share a byte, so that outputs are no axis of the codes.
  assert tuple(mu['embed']['embedding'].codes) == ('v', None)
  assert tuple(mu['embed']['embedding'].scale) == (None,)


def test_boxes_of_what_another_optimizer_has_are_no_ones():
  boxed = {
    'a': {'kernel': nn.Partitioned(np.ones((8, 4)), ('x', 'y'))},
    'b': {'kernel': nn.Partitioned(np.ones((16, 6)), ('u', 'v'))},
  }
  galore = optim.galore(1e-2, rank=2)
  by_partition = optax.partition(
    {'theirs': optax.sgd(0.1), 'ours': galore},
    lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: 'theirs' if path[0].key == 'a' else 'ours', params
    ),
  )
  by_mask = optax.masked(galore, {'a': False, 'b': True})
  for tx in (by_partition, by_mask, optax.MultiSteps(galore, 2)):
    specs = nn.get_partition_spec(jax.eval_shape(tx.init, boxed))
    found = {
      jax.tree_util.keystr(path): tuple(spec)
      for path, spec in jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda x: isinstance(x, P)
      )
      if "['b']" in jax.tree_util.keystr(path)
    }
    moments = {spec for path, spec in found.items() if '.mu' in path}
    bases = {spec for path, spec in found.items() if '.basis' in path}
    assert (moments, bases) == ({('u', None)}, {('v', None)})
    updates, _ = jax.eval_shape(
      lambda p, tx=tx: tx.update(p, tx.init(p), p), boxed
    )
    assert jax.tree.structure(updates) == jax.tree.structure(boxed)


def test_specs_as_metadata_of_variables_are_names_too():
  kernel = nnx.Param(jnp.ones((16, 8)))
  kernel.set_metadata(out_sharding=P('y', 'z'))
  state = optim.galore(1e-2, rank=2).init({'up': {'kernel': kernel}})
  low_rank = state.inner_state.inner_states['low_rank'].inner_state[0]
  (mu,) = jax.tree.leaves(
    low_rank.inner_state.mu, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  assert tuple(mu.get_metadata('out_sharding')) == ('y', None)


@pytest.mark.parametrize(
  'params',
  [
    (jnp.ones((8, 4)), jnp.ones(4)),
    {'low_rank': jnp.ones((8, 4)), 'full': jnp.ones(4), 'frozen': jnp.ones(2)},
  ],
)
def test_flat_trees_are_no_states(params):
  rows = optim.report(params, optim.adamw(1e-2))
  assert [row.state_bytes for row in rows] == [
    8 * leaf.size for leaf in jax.tree.leaves(params)
  ]


def test_train_state_takes_its_shardings():
  mesh = jax.make_mesh(
    (2, 2), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(
        nn.initializers.lecun_normal(), ('fsdp', 'tp')
      )
      return nn.Dense(16, kernel_init=init)(x)

  model, x = Model(), jnp.ones((2, 8))

  def start():
    params = model.init(jax.random.key(0), x)['params']
    return TrainState.create(
      apply_fn=model.apply, params=params, tx=optim.galore(1e-2, rank=2)
    )

  shardings = nn.get_sharding(jax.eval_shape(start), mesh)
  state = jax.jit(start, out_shardings=shardings)()

  @jax.jit
  def step(state):
    grads = jax.grad(lambda p: jnp.sum(model.apply({'params': p}, x) ** 2))(
      state.params
    )
    return state.apply_gradients(grads=grads)

  after = step(state)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  low_rank = after.opt_state.inner_state.inner_states['low_rank'].inner_state
  mu = low_rank[0].inner_state.mu['Dense_0']['kernel']
  assert isinstance(mu, nn.Partitioned)
  assert (mu.value.shape, mu.names) == ((16, 2), ('tp', None))


def test_optimizer_of_nnx_has_specs_of_its_own_axes():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(
        8, 16, rngs=rngs, kernel_metadata={'out_sharding': ('fsdp', 'tp')}
      )

  def optimizer():
    model = Model(nnx.Rngs(0))
    return nnx.Optimizer(model, optim.galore(1e-2, rank=2), wrt=nnx.Param)

  automatic = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tp'), axis_types=automatic)
  with jax.set_mesh(mesh):
    optimizer = nnx.eval_shape(optimizer)
  specs = nnx.get_partition_spec(nnx.state(optimizer))
  found = {
    jax.tree_util.keystr(path): tuple(spec)
    for path, spec in jax.tree_util.tree_leaves_with_path(
      specs, is_leaf=lambda x: isinstance(x, P)
    )
  }
  of_kernel = {
    path: spec for path, spec in found.items() if "['kernel']" in path
  }
  basis = [spec for path, spec in of_kernel.items() if 'basis' in path]
  moments = [
    spec for path, spec in of_kernel.items() if 'mu' in path or 'nu' in path
  ]
  assert basis == [('fsdp', None)]
  assert moments == [('tp', None)] * 2


def test_labels_axes_and_reports_are_those_of_the_plain_tree():
  attention = {'query': {'kernel': np.ones((16, 4, 4), np.float32)}}
  stack = {'layers': {'kernel': np.ones((3, 16, 32), np.float32)}}
  params = {**attention, **stack}
  box = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)

  class Holder(nnx.Module):
    def __init__(self, tree):
      for name, value in tree.items():
        is_array = hasattr(value, 'shape')
        setattr(self, name, (nnx.Param if is_array else Holder)(value))

  variables = nnx.state(Holder(params), nnx.Param)
  given = {
    'param_labels': [('layers', 'low_rank'), ('query', 'low_rank')],
    'kernel_axes': [('query|key|value', 1, 2)],
  }
  for options in ({}, given):
    tx = optim.gradnormlorp(1e-2, rank=4, **options)
    rules = options.get('param_labels')
    expected = optim.report(params, tx, rules)
    assert [row.name for row in expected] == ['layers/kernel', 'query/kernel']
    assert optim.report(box, tx, rules) == expected
    assert optim.report(variables, tx, rules) == expected
  # A stack of three, and one matrix [16, 16].
  bases = {
    name: jax.tree.leaves(subspace.basis)[0].shape
    for name, subspace in optim.inspect.subspaces(
      jax.eval_shape(tx.init, box)
    ).items()
  }
  assert bases == {'layers/kernel': (3, 16, 4), 'query/kernel': (16, 4)}


@pytest.mark.parametrize('name', ['adamw', 'galore', 'apollo', 'ldadam'])
def test_complex_parameters_are_an_error_that_says_what_to_do(name):
  tx = getattr(optim, name)(1e-2)
  params = {'kernel': jnp.ones((8, 8), jnp.complex64)}
  with pytest.raises(ValueError) as error:
    tx.init(params)
  assert str(error.value) == (
    "Parameter 'kernel' is complex64: moments and subspaces are real. Wrap the "
    'optimizer in optax.contrib.split_real_and_imaginary, which shows it two '
    'arrays.'
  )
  split = optax.contrib.split_real_and_imaginary(tx)
  grads = {'kernel': jnp.full((8, 8), 1 + 2j, jnp.complex64)}
  updates, _ = jax.jit(split.update)(grads, split.init(params), params)
  moved = np.asarray(updates['kernel'])
  assert (moved.real < 0).all() and (moved.imag < 0).all()


def test_numbers_of_python_are_parameters_too():
  tx = optim.gradnormlorp(1e-2)
  params = {'dense': {'kernel': jnp.ones((4, 4))}, 'temperature': 2.0}
  grads = {'dense': {'kernel': jnp.ones((4, 4))}, 'temperature': 1.0}
  updates, _ = tx.update(grads, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new['temperature'], 1.99, rtol=1e-3)
