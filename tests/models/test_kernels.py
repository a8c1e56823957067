"""Adapters of kernels with several axes in or out, in boxes, and never used."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.models import adapters, interface

KINDS = ('lora', 'dora', 'gradnormlorp')
RANK = 3
LAYERS = 2
# Batch, positions, heads, features: all of different sizes.
INPUT = np.random.default_rng(2).normal(size=(2, 5, 4, 6)).astype(np.float32)
SEQUENCE = INPUT.reshape(2, 5, 24)


class Attention(nn.Module):
  """Flax's attention, whose kernels have heads, and a dense layer."""

  @nn.compact
  def __call__(self, x):
    x = nn.MultiHeadDotProductAttention(num_heads=4, name='attention')(x)
    return nn.Dense(7, name='dense')(x)


class Layer(nn.Module):
  """One layer of a scan."""

  names: bool = False

  @nn.compact
  def __call__(self, x, _):
    kernel_init = nn.initializers.lecun_normal()
    query, out = kernel_init, kernel_init
    if self.names:
      query = nn.with_partitioning(kernel_init, ('data', 'model', None))
      out = nn.with_partitioning(kernel_init, ('model', None, 'data'))
    heads = nn.DenseGeneral((4, 6), kernel_init=query, name='query')(x)
    dense = nn.DenseGeneral(24, axis=(-2, -1), kernel_init=out, name='out')
    return dense(jnp.tanh(heads)), None


class Stack(nn.Module):
  """Layers in a scan."""

  names: bool = False
  axis: int = 0

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      nn.remat(Layer),
      variable_axes={'params': self.axis},
      split_rngs={'params': True, 'dropout': True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: 'layer'},
    )
    return scan(self.names, name='layers')(x, None)[0]


NETS = {
  'attention': (Attention(), SEQUENCE),
  'scan': (Stack(), SEQUENCE),
  'two axes in': (nn.DenseGeneral(7, axis=(-2, -1)), INPUT),
  'axes apart, in descending order': (
    nn.DenseGeneral((2, 7), axis=(-1, 1)),
    INPUT,
  ),
  'batch axes': (nn.DenseGeneral((3, 2), batch_dims=(0, 1)), INPUT),
  'batch axes, nothing left': (
    nn.DenseGeneral(7, axis=(2, 3), batch_dims=(0, 1), use_bias=False),
    INPUT,
  ),
}


def config_of(kind, **fields):
  return adapters.AdapterConfig(
    **{'kind': kind, 'rank': RANK, 'alpha': 6.0, 'rules': ('kernel',), **fields}
  )


def apply_of(net):
  return lambda params, x, **rngs: net.apply({'params': params}, x, **rngs)


def randomised(params):
  """Random numbers in every array, around 1 in magnitudes, boxes kept."""
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(
      rng.normal(1.0 * ('magnitude' in str(path)), 0.3, x.shape), x.dtype
    ),
    params,
  )


def build(net, x, kind, **fields):
  """A configuration, a function, and random parameters with adapters."""
  config, apply = config_of(kind, **fields), apply_of(net)
  params = jax.eval_shape(net.init, jax.random.key(0), x)['params']
  init = functools.partial(
    adapters.init, config, call=lambda params: apply(params, x)
  )
  trainable = jax.eval_shape(init, params, jax.random.key(1))
  return config, apply, randomised(adapters.combine(params, trainable))


def shapes(tree):
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}


def is_adapter(path):
  return path.split('/')[-1] in ('lora_a', 'lora_b', 'magnitude')


# Several axes in or out.


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', NETS)
def test_adapted_layers_compute_with_merged_kernels(name, kind):
  net, x = NETS[name]
  config, apply, both = build(net, x, kind)
  frozen, trainable = adapters.split(both, is_adapter)
  weights = np.random.default_rng(3).normal(size=apply(frozen, x).shape)

  def by_adapters(trainable):
    y = adapters.adapted(config, apply)(adapters.combine(frozen, trainable), x)
    return jnp.sum(y * weights), y

  def by_merging(trainable):
    merged = adapters.merge(config, adapters.combine(frozen, trainable))
    return jnp.sum(apply(merged, x) * weights), merged

  slopes, y = jax.jit(jax.grad(by_adapters, has_aux=True))(trainable)
  expected, merged = jax.jit(jax.grad(by_merging, has_aux=True))(trainable)
  assert shapes(merged) == shapes(frozen)
  np.testing.assert_allclose(y, apply(merged, x), rtol=1e-4, atol=1e-4)
  assert np.abs(y - apply(frozen, x)).max() > 0.1
  if kind == 'dora':  # Its norm is a constant in the backward pass.
    return
  for path, slope in traverse_util.flatten_dict(slopes, sep='/').items():
    other = traverse_util.flatten_dict(expected, sep='/')[path]
    tolerance = 1e-4 * np.abs(other).max()
    np.testing.assert_allclose(slope, other, atol=tolerance, err_msg=path)


def test_factors_are_matrices_of_merged_axes():
  _, _, both = build(*NETS['attention'], 'dora')
  _, trainable = adapters.split(both, is_adapter)
  heads = {'lora_a': (24, RANK), 'lora_b': (RANK, 24), 'magnitude': (1, 24)}
  assert shapes(trainable['attention']['query']) == heads
  assert shapes(trainable['attention']['out']) == heads
  _, _, both = build(*NETS['scan'], 'dora')
  assert both['layers']['query']['lora_a'].shape == (LAYERS, 24, RANK)
  _, _, both = build(*NETS['batch axes'], 'dora')
  assert shapes(adapters.split(both, is_adapter)[1]) == {
    'lora_a': (2, 5, 6, RANK),
    'lora_b': (2, 5, RANK, 6),
    'magnitude': (2, 5, 1, 6),
  }


def test_merged_kernel_is_the_closed_form():
  """One length per output unit, over all input axes."""
  config, _, both = build(*NETS['axes apart, in descending order'], 'dora')
  exact = {name: np.asarray(x, np.float64) for name, x in both.items()}
  change = np.einsum('ir,ro->io', exact['lora_a'], exact['lora_b'])
  v = exact['kernel'] + 2.0 * change.reshape(5, 6, 2, 7)
  length = np.sqrt(np.sum(v**2, axis=(0, 1)))
  expected = exact['magnitude'].reshape(2, 7) * v / length
  merged = adapters.merge(config, both)['kernel']
  np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
  start = adapters.init(
    config,
    {'kernel': both['kernel']},
    jax.random.key(0),
    lambda params: nn.DenseGeneral((2, 7), axis=(-1, 1), use_bias=False).apply(
      {'params': params}, INPUT
    ),
  )
  length = np.sqrt(np.sum(exact['kernel'] ** 2, axis=(0, 1)))
  np.testing.assert_allclose(start['magnitude'], length.reshape(1, 14), 1e-5)


def test_dropout_of_several_axes_is_that_of_the_matrix(monkeypatch):
  net, x = NETS['axes apart, in descending order']
  config, apply, both = build(net, x, 'dora', dropout=0.5)
  mask = np.random.default_rng(4).random((2, 4, 30)) < 0.5
  monkeypatch.setattr(jax.random, 'bernoulli', lambda *args: jnp.asarray(mask))
  rngs = {'dropout': jax.random.key(0)}
  y = adapters.adapted(config, apply)(both, x, rngs=rngs)
  # Positions and features are contracted, and heads are left.
  x_NI = x.transpose(0, 2, 1, 3).reshape(2, 4, 30)
  w_IO = np.reshape(both['kernel'], (30, 14))
  v_IO = w_IO + 2.0 * both['lora_a'] @ both['lora_b']
  c_O = (both['magnitude'] / jnp.linalg.norm(v_IO, axis=0, keepdims=True))[0]
  dropped = 2.0 * mask * x_NI
  expected = x_NI @ w_IO + np.reshape(both['bias'], (1, 1, 14))
  expected += dropped @ (v_IO - w_IO)
  expected += (c_O - 1).reshape(1, 1, 14) * (dropped @ v_IO)
  np.testing.assert_allclose(y.reshape(2, 4, 14), expected, atol=1e-4)


# Boxes.


def unboxed_paths(tree):
  flat = traverse_util.flatten_dict(nn.get_partition_spec(tree), sep='/')
  return {path: spec for path, spec in flat.items() if is_adapter(path)}


@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_boxed_parameters_give_boxed_adapters_of_the_same_numbers(kind):
  mesh = Mesh(np.reshape(jax.devices()[:4], (2, 2)), ('data', 'model'))
  _, _, plain = build(Stack(), SEQUENCE, kind)
  config, apply, both = build(Stack(names=True), SEQUENCE, kind)
  specs = unboxed_paths(both)
  expected = {
    'layers/query/lora_a': P('layer', 'data', None),
    'layers/query/lora_b': P('layer', None, 'model'),
    'layers/out/lora_a': P('layer', 'model', None),
    'layers/out/lora_b': P('layer', None, 'data'),
  }
  if kind == 'dora':
    expected['layers/query/magnitude'] = P('layer', None, 'model')
    expected['layers/out/magnitude'] = P('layer', None, 'data')
  assert specs == expected

  both = nn.meta.replace_boxed(both, plain)
  run = jax.jit(adapters.adapted(config, apply))
  y = run(plain, SEQUENCE)
  np.testing.assert_array_equal(run(both, SEQUENCE), y)
  merge = jax.jit(functools.partial(adapters.merge, config))
  frozen, _ = adapters.split(both, is_adapter)
  merged = merge(both)
  assert jax.tree.structure(merged) == jax.tree.structure(frozen)
  for got, other in zip(
    jax.tree.leaves(merged), jax.tree.leaves(merge(plain)), strict=True
  ):
    np.testing.assert_array_equal(got, other)

  # Layers are on no axis of the mesh.
  rules = (('layer', None), ('data', 'data'), ('model', 'model'))
  shardings = nn.logical_to_mesh_sharding(
    nn.get_partition_spec(both), mesh, rules
  )
  placed = jax.device_put(nn.unbox(both), shardings)
  sharded = run(nn.meta.replace_boxed(both, placed), SEQUENCE)
  np.testing.assert_allclose(sharded, y, atol=1e-4)
  factor = placed['layers']['out']['lora_a']
  assert factor.sharding == NamedSharding(mesh, P(None, 'model', None))


def test_logical_names_and_their_rules_are_kept():
  rules = (('embed', 'data'), ('mlp', 'model'))
  kernel_init = nn.with_logical_partitioning(
    nn.initializers.lecun_normal(), ('embed', 'mlp'), rules=rules
  )
  net = nn.Dense(8, kernel_init=kernel_init)
  _, _, both = build(net, SEQUENCE, 'dora')
  factor = both['lora_b']
  assert isinstance(factor, nn.LogicallyPartitioned)
  assert factor.rules == rules
  assert both['lora_a'].names == ('embed', None)
  assert factor.names == both['magnitude'].names == (None, 'mlp')
  _, trainable = adapters.split(both, is_adapter)
  assert nn.logical_to_mesh(nn.get_partition_spec(trainable), rules) == {
    'lora_a': P('data', None),
    'lora_b': P(None, 'model'),
    'magnitude': P(None, 'model'),
  }


def test_rules_and_messages_know_nothing_of_boxes():
  net = Stack(names=True)
  params = jax.eval_shape(net.init, jax.random.key(0), SEQUENCE)['params']
  rules = ('/query/kernel$',)
  _, _, both = build(net, SEQUENCE, 'dora', rules=rules)
  assert 'lora_a' in both['layers']['query']
  assert 'lora_a' not in both['layers']['out']
  with pytest.raises(ValueError) as error:
    adapters.init(config_of('lora', rules=('key',)), params, jax.random.key(0))
  assert str(error.value) == (
    "The adapter rule 'key' matches no kernel. Correct its regex. Similar "
    "paths: ['layers/out/kernel', 'layers/query/kernel']."
  )


def test_names_may_be_fewer_than_axes():
  kernel = nn.Partitioned(jnp.ones((6, 4, 2)), ('data',))
  net = nn.DenseGeneral((4, 2), use_bias=False)
  trainable = adapters.init(
    config_of('lora'),
    {'kernel': kernel},
    jax.random.key(0),
    lambda params: net.apply({'params': params}, jnp.ones((1, 6))),
  )
  assert trainable['lora_a'].names == ('data', None)
  assert trainable['lora_b'].names == (None, None)


# What is never used.


def message(function, *args, **kwargs):
  with pytest.raises(ValueError) as error:
    function(*args, **kwargs)
  return str(error.value)


def plain_function(params, x):
  return x @ params['dense']['kernel']


DENSE = {'dense': {'kernel': np.ones((24, 7), np.float32)}}


def test_function_without_layers_is_refused_before_it_trains():
  config = config_of('lora')
  assert message(
    adapters.init,
    config,
    DENSE,
    jax.random.key(0),
    lambda params: plain_function(params, SEQUENCE),
  ) == (
    "The function applies no layer of Flax Linen to the kernels ['dense/kernel'"
    ']: adapters there would be ignored. Give one that applies the whole model '
    'by Module.apply, or change the rules so that they leave these out.'
  )
  both = adapters.combine(
    DENSE, adapters.init(config, DENSE, jax.random.key(0))
  )
  for wrapped in (plain_function, jax.jit(plain_function)):
    assert message(adapters.adapted(config, wrapped), both, SEQUENCE) == (
      "The adapters of ['dense'] are ignored: the function that `adapted` "
      'wraps applies no layer of Flax Linen there, or JAX traced it before. '
      'Wrap one that does so by Module.apply, once and before jax.jit does, or '
      'say is_part=True if others use them.'
    )


def test_model_of_plain_functions_is_refused():
  model = interface.Model(
    config=None,
    init=lambda key: {'dense': {'kernel': jax.random.normal(key, (7, 5))}},
    hidden=plain_function,
    logits=plain_function,
    apply=lambda params, tokens: params['dense']['kernel'][tokens],
    layer_fns=interface.LayerFns(*[plain_function] * 4),
  )
  assert message(adapters.adapt, config_of('lora'), model).startswith(
    'The function applies no layer of Flax Linen to the kernels '
    "['dense/kernel']"
  )
  assert message(adapters.adapt, config_of('lora'), Attention()) == (
    'adapt takes a gnlorp_jax Model, but got a Attention. Of any other model, '
    'wrap the function that applies it: adapted(config, model.apply).'
  )


class Unused(nn.Module):
  """A model of two layers that can do without the second."""

  def setup(self):
    self.first, self.second = nn.Dense(24), nn.Dense(24)

  def __call__(self, x):
    return self.second(self.first(x))

  def part(self, x):
    return self.first(x)


def test_kernel_that_the_function_leaves_out_is_refused():
  net = Unused()
  config, apply, both = build(net, SEQUENCE, 'lora')
  frozen, _ = adapters.split(both, is_adapter)

  def part(params, x):
    return net.apply({'params': params}, x, method='part')

  assert message(
    adapters.init,
    config,
    frozen,
    jax.random.key(0),
    lambda params: part(params, SEQUENCE),
  ).startswith(
    'The function applies no layer of Flax Linen to the kernels '
    "['second/kernel']"
  )
  assert message(adapters.adapted(config, part), both, SEQUENCE).startswith(
    "The adapters of ['second'] are ignored"
  )
  y = adapters.adapted(config, part, is_part=True)(both, SEQUENCE)
  merged = adapters.merge(config, both)
  np.testing.assert_allclose(y, part(merged, SEQUENCE), rtol=1e-4, atol=1e-4)
  # Variables, parameters of a part and keywords are found as well.
  assert np.all(
    adapters.adapted(config, net.apply)({'params': both}, SEQUENCE)
    == adapters.adapted(config, apply)(params=both, x=SEQUENCE)
  )
  assert np.all(
    adapters.adapted(
      config, lambda params, x: apply_of(nn.Dense(24))(params['first'], x)
    )({'first': both['first']}, SEQUENCE)
    == y
  )


def test_function_that_was_compiled_without_adapters_is_refused():
  config, apply, both = build(Unused(), SEQUENCE, 'lora')
  compiled = jax.jit(apply)
  compiled(both, SEQUENCE)
  assert message(adapters.adapted(config, compiled), both, SEQUENCE).startswith(
    "The adapters of ['first', 'second'] are ignored"
  )
  # One that was compiled with them may be called again.
  compiled = jax.jit(lambda *args: apply(*args))
  run = adapters.adapted(config, lambda *args: compiled(*args))
  y = run(both, SEQUENCE)
  np.testing.assert_array_equal(run(both, SEQUENCE), y)
  merged = adapters.merge(config, both)
  np.testing.assert_allclose(y, apply(merged, SEQUENCE), rtol=1e-4, atol=1e-4)


JitDense = nn.jit(nn.Dense)


def test_axes_are_found_as_often_as_they_are_asked_for():
  """Also in what JAX has traced before, and in an adapted function."""
  net, config = JitDense(7), config_of('lora')
  apply = apply_of(net)
  params = net.init(jax.random.key(0), SEQUENCE)['params']
  first, second = (
    adapters.init(
      config,
      params,
      jax.random.key(0),
      lambda params: adapters.adapted(config, apply)(params, SEQUENCE),
    )
    for _ in range(2)
  )
  np.testing.assert_array_equal(first['lora_a'], second['lora_a'])


# Kernels whose axes are not known.


def test_other_layers_are_refused():
  net, x = nn.Conv(5, (3,)), SEQUENCE
  params = net.init(jax.random.key(0), x)
  apply, config = net.apply, config_of('lora')
  expected = (
    "'' has an adapter, but is a Conv: only nn.Dense and nn.DenseGeneral can "
    'be adapted. Change the rules so that they leave it out.'
  )
  key = jax.random.key(0)
  call = functools.partial(lambda x, params: apply(params, x), x)
  assert message(adapters.init, config, params, key, call) == expected
  both = adapters.combine(params, adapters.init(config, params, key))
  assert message(adapters.adapted(config, apply), both, x) == expected


def test_factors_of_other_axes_are_refused():
  """Without a call, attention's kernels pass for stacks of matrices."""
  net, config = Attention(), config_of('lora')
  params = net.init(jax.random.key(0), SEQUENCE)
  trainable = adapters.init(config, params, jax.random.key(0))
  both = adapters.combine(params, trainable)
  expected = (
    "'attention/query' has adapter factors of shapes (24, 4, 3) and (24, 3, 6),"
    ' which do not fit its kernel of shape (24, 4, 6). Draw them by init from '
    'this model, and show it the axes of kernels by the argument `call`.'
  )
  assert message(adapters.adapted(config, net.apply), both, SEQUENCE) == (
    expected
  )
  wrong = {'dense': dict(DENSE['dense'])}
  wrong['dense'].update(lora_a=np.ones((24, 3)), lora_b=np.ones((3, 9)))
  assert message(adapters.merge, config, wrong).startswith(
    "'dense' has adapter factors of shapes (24, 3) and (3, 9), which do not fit"
    ' its kernel of shape (24, 7).'
  )


def test_layers_on_another_axis_than_the_first_are_refused():
  net = Stack(axis=1)
  params = net.init(jax.random.key(0), SEQUENCE)['params']
  assert message(
    adapters.init,
    config_of('lora', rules=('query/kernel',)),
    params,
    jax.random.key(0),
    lambda params: apply_of(net)(params, SEQUENCE),
  ) == (
    "'layers/query' has a kernel of shape (24, 2, 4, 6), of which a layer sees "
    '(24, 4, 6): what stacks layers must be the first axis. Use '
    "variable_axes={'params': 0} in nn.scan, or change the rules so that they "
    'leave it out.'
  )
