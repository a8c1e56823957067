import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from gnlorp_jax import optim
from gnlorp_jax.models import adapters, hf, llama
from tests.models import small_roberta

ROOT = pathlib.Path(__file__).parents[2]
KINDS = ('lora', 'dora', 'gradnormlorp')
SMALL = {
  'vocab_size': 40,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 2,
  'max_seq_len': 16,
}
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 12))
RANK = 3


class Net(nn.Module):
  """One adapted layer, with or without a bias."""

  use_bias: bool = True
  dtype: str | None = None

  @nn.compact
  def __call__(self, x):
    return nn.Dense(5, use_bias=self.use_bias, dtype=self.dtype, name='dense')(
      x
    )


class Stack(nn.Module):
  """Eight adapted layers in a scan."""

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      lambda layer, x, _: (jnp.tanh(layer(x)), None),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      length=8,
    )
    return scan(nn.Dense(64, name='layer'), x, None)[0]


def config_of(kind, **fields):
  return adapters.AdapterConfig(
    **{'kind': kind, 'rank': RANK, 'alpha': 6.0, **fields}
  )


def dense_params(kind, dtype='float32', seed=0):
  """Random numbers in every array of `Net`, NumPy float64 drawn."""
  rng = np.random.default_rng(seed)
  shapes = {
    'kernel': (7, 5),
    'bias': (5,),
    'lora_a': (7, RANK),
    'lora_b': (RANK, 5),
    'magnitude': (1, 5),
  }
  arrays = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  if kind == 'lora':
    del arrays['magnitude']
  for name in ('kernel', 'bias'):
    arrays[name] = arrays[name].astype(jnp.dtype(dtype))
  return {'dense': arrays}


# Compiled, a call is one program and not one per operation.


def init(config, params, seed=0):
  return jax.jit(functools.partial(adapters.init, config))(
    params, jax.random.key(seed)
  )


def merge(config, params):
  return jax.jit(functools.partial(adapters.merge, config))(params)


def apply_net(config, net=None, **options):
  net = net or Net()
  return jax.jit(
    adapters.adapted(
      config, lambda params, x: net.apply({'params': params}, x, **options)
    )
  )


def is_adapter(path):
  return path.split('/')[-1] in ('lora_a', 'lora_b', 'magnitude')


INPUT = np.random.default_rng(2).normal(size=(2, 6, 7)).astype(np.float32)
WEIGHT = np.random.default_rng(3).normal(size=(2, 6, 5)).astype(np.float32)


def gradients(config, params, x=INPUT):
  """Of a weighted sum of the outputs, with respect to the adapter."""
  apply = apply_net(config)
  frozen, trainable = adapters.split(params, is_adapter)

  def loss(trainable):
    return jnp.sum(apply(adapters.combine(frozen, trainable), x) * WEIGHT)

  return jax.jit(jax.grad(loss))(trainable)['dense']


@functools.cache
def build(kind, rules=('layers/.*/kernel',), **overrides):
  """A small LLaMA with adapters away from their start, and its parts."""
  model = llama.make(llama.LlamaConfig(**{**SMALL, **overrides}))
  rng = np.random.default_rng(0)

  def draw(path, x):
    # Kernels' columns have lengths around 1.
    mean = float(path[-1].key == 'magnitude')
    return jnp.asarray(rng.normal(mean, 0.2, x.shape), x.dtype)

  config = config_of(kind, rules=rules)
  key = jax.random.key(0)
  shapes = jax.eval_shape(model.init, key)
  params = jax.tree.map_with_path(draw, shapes)
  shapes = jax.eval_shape(functools.partial(adapters.init, config), shapes, key)
  trainable = jax.tree.map_with_path(draw, shapes)
  return model, config, params, trainable


@functools.cache
def base_apply():
  """Logits of the model without adapters, the same for all kinds."""
  return jax.jit(build('lora')[0].apply)


def squared_logits(apply, trainable, params):
  return jnp.mean(apply(adapters.combine(params, trainable), TOKENS) ** 2)


def assert_trees_close(got, expected, **tolerance):
  got, expected = (
    traverse_util.flatten_dict(tree, sep='/') for tree in (got, expected)
  )
  assert got.keys() == expected.keys()
  for path in expected:
    np.testing.assert_allclose(
      got[path], expected[path], err_msg=path, **tolerance
    )


# Against PEFT.


def peft_model(base, config, target_modules):
  peft = pytest.importorskip('peft')
  return peft.get_peft_model(
    base,
    peft.LoraConfig(
      r=config.rank,
      lora_alpha=config.alpha,
      lora_dropout=config.dropout,
      use_dora=config.kind == 'dora',
      use_rslora=config.rank_stabilized,
      target_modules=target_modules,
    ),
  )


def peft_parameters(layer):
  """PEFT's parameters of an adapted layer, by our names."""
  found = {
    'lora_a': layer.lora_A['default'].weight,
    'lora_b': layer.lora_B['default'].weight,
  }
  if 'default' in layer.lora_magnitude_vector:
    found['magnitude'] = layer.lora_magnitude_vector['default'].weight
  return found


def set_peft(layer, arrays):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    for name, parameter in peft_parameters(layer).items():
      parameter.copy_(tensor(arrays[name].T).reshape(parameter.shape))


def tensor(x):
  torch = pytest.importorskip('torch')
  return torch.from_numpy(np.array(x))


def ours(name, x):
  """A PEFT tensor as an array in our layout."""
  x = x.detach().numpy()
  return x[None] if name == 'magnitude' else x.T


def peft_dense(config, params):
  torch = pytest.importorskip('torch')
  base = torch.nn.ModuleDict({'dense': torch.nn.Linear(7, 5)})
  with torch.no_grad():
    base['dense'].weight.copy_(tensor(params['dense']['kernel'].T))
    base['dense'].bias.copy_(tensor(params['dense']['bias']))
  model = peft_model(base, config, ['dense'])
  return model, model.base_model.model['dense']


@pytest.mark.parametrize(
  ('kind', 'is_stabilized'),
  [('lora', False), ('lora', True), ('dora', False)],
)
def test_layer_is_that_of_peft(kind, is_stabilized):
  pytest.importorskip('peft')
  config = config_of(kind, rules=('kernel',), rank_stabilized=is_stabilized)
  params = dense_params(kind)
  model, layer = peft_dense(config, params)
  start = init(config, params)['dense']
  for name, parameter in peft_parameters(layer).items():
    expected = ours(name, parameter)
    assert start[name].shape == expected.shape
    if name != 'lora_a':
      np.testing.assert_allclose(start[name], expected, rtol=1e-6)

  set_peft(layer, params['dense'])
  y = layer(tensor(INPUT))
  (y * tensor(WEIGHT)).sum().backward()
  np.testing.assert_allclose(
    apply_net(config)(params, INPUT), y.detach().numpy(), atol=2e-5
  )
  grads = gradients(config, params)
  for name, parameter in peft_parameters(layer).items():
    np.testing.assert_allclose(
      grads[name], ours(name, parameter.grad), atol=1e-4, err_msg=name
    )
  merged = merge(config, params)['dense']
  assert set(merged) == {'kernel', 'bias'}
  expected = model.merge_and_unload()['dense'].weight
  np.testing.assert_allclose(merged['kernel'], ours('', expected), atol=1e-5)


@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_dropout_is_that_of_peft(kind, monkeypatch):
  torch = pytest.importorskip('torch')
  pytest.importorskip('peft')
  config = config_of(kind, dropout=0.25)
  params = dense_params(kind)
  mask = np.random.default_rng(4).random(INPUT.shape) < 0.75

  class Mask(torch.nn.Module):
    def forward(self, x):
      return x * tensor(mask) / 0.75

  _, layer = peft_dense(config, params)
  set_peft(layer, params['dense'])
  layer.lora_dropout['default'] = Mask()
  expected = layer.train()(tensor(INPUT)).detach().numpy()
  monkeypatch.setattr(jax.random, 'bernoulli', lambda *args: jnp.asarray(mask))
  apply = apply_net(config, rngs={'dropout': jax.random.key(0)})
  np.testing.assert_allclose(apply(params, INPUT), expected, atol=2e-5)
  assert np.abs(apply_net(config)(params, INPUT) - expected).max() > 0.1


def peft_llama_layers(model):
  """Our path and layer number of every adapted layer."""
  for path, name, _ in llama.HF_TENSORS:
    is_fused = path.split('/')[-2] in ('qkv_proj', 'gate_up_proj')
    if path.startswith('layers/') and path.endswith('kernel') and not is_fused:
      for number in range(SMALL['num_layers']):
        module = name.format(layer=number).removesuffix('.weight')
        layer = model.base_model.model.get_submodule(module)
        yield path.removesuffix('/kernel'), number, layer


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_llama_is_that_of_peft(kind, tmp_path):
  pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  model, config, params, trainable = build(kind)
  hf.export(
    tmp_path / 'out', params, llama.HF_TENSORS, llama.config_to_hf(model.config)
  )
  theirs = peft_model(
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'out'),
    config,
    'all-linear',
  )
  flat = traverse_util.flatten_dict(trainable, sep='/')
  for path, number, layer in peft_llama_layers(theirs):
    names = peft_parameters(layer)
    set_peft(layer, {name: flat[f'{path}/{name}'][number] for name in names})
  logits = theirs(tensor(TOKENS)).logits
  (logits**2).mean().backward()

  apply = adapters.adapted(config, model.apply)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def value_and_grad(trainable, params):
    logits = apply(adapters.combine(params, trainable), TOKENS)
    return jnp.mean(logits**2), logits

  (value, found), grads = value_and_grad(trainable, params)
  np.testing.assert_allclose(value, (logits**2).mean().item(), rtol=1e-5)
  np.testing.assert_allclose(found, logits.detach().numpy(), atol=3e-5)
  flat = traverse_util.flatten_dict(grads, sep='/')
  count = 0
  for path, number, layer in peft_llama_layers(theirs):
    for name, parameter in peft_parameters(layer).items():
      expected = ours(name, parameter.grad)
      assert np.abs(expected).max() > 1e-6
      np.testing.assert_allclose(
        flat[f'{path}/{name}'][number],
        expected,
        atol=1e-5 * np.abs(expected).max(),
        err_msg=f'{path}/{name}',
      )
      count += 1
  assert count == SMALL['num_layers'] * len(flat)


# Against closed forms and finite differences.


def weight_norm_loss(arrays):
  """The weighted sum of outputs of W = m V / |V|, NumPy float64."""
  v = arrays['kernel'] + 2.0 * arrays['lora_a'] @ arrays['lora_b']
  w = arrays['magnitude'] * v / np.linalg.norm(v, axis=0)
  return ((INPUT.astype(np.float64) @ w + arrays['bias']) * WEIGHT).sum()


def test_gradnormlorp_gradient_is_exact():
  params = dense_params('gradnormlorp')
  grads = gradients(config_of('gradnormlorp'), params)
  arrays = {
    name: np.asarray(x, np.float64) for name, x in params['dense'].items()
  }
  step = 1e-6
  for name in ('lora_a', 'lora_b', 'magnitude'):
    expected = np.zeros_like(arrays[name])
    for index in np.ndindex(expected.shape):
      bump = np.zeros_like(expected)
      bump[index] = step
      expected[index] = (
        weight_norm_loss({**arrays, name: arrays[name] + bump})
        - weight_norm_loss({**arrays, name: arrays[name] - bump})
      ) / (2 * step)
    np.testing.assert_allclose(grads[name], expected, atol=1e-4, err_msg=name)
  # DoRA's constant norm gives another gradient.
  other = gradients(config_of('dora'), params)
  assert np.abs(other['lora_b'] - grads['lora_b']).max() > 1


@pytest.mark.parametrize('kind', ['dora', 'gradnormlorp'])
def test_zero_column_has_the_gradient_of_lora(kind):
  params = dense_params(kind)
  params['dense']['kernel'][:, 2] = 0
  config = config_of(kind, rules=('kernel',))
  trainable = init(config, params)
  params['dense'].update(trainable['dense'])
  y = apply_net(config)(params, INPUT)
  expected = jax.jit(Net().apply)({'params': params}, INPUT)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  grads = gradients(config, params)
  assert all(np.isfinite(x).all() for x in grads.values())
  a = np.asarray(params['dense']['lora_a'])
  dw = np.einsum('bti,bto->io', INPUT, WEIGHT)
  np.testing.assert_allclose(
    grads['lora_b'][:, 2], 2 * a.T @ dw[:, 2], rtol=1e-4
  )
  assert grads['magnitude'][0, 2] == 0


@pytest.mark.parametrize('kind', KINDS)
def test_dropout_has_the_mean_of_no_dropout(kind):
  config, params = config_of(kind, dropout=0.25), dense_params(kind)
  expected = apply_net(config)(params, INPUT)
  np.testing.assert_array_equal(
    expected, apply_net(config_of(kind))(params, INPUT)
  )

  def draw(key):
    return apply_net(config, rngs={'dropout': key})(params, INPUT)

  y = np.asarray(
    jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
  )
  error = y.mean(0) - expected
  assert (y.std(0) > 0.1).all()
  # 60 means: beyond 4.5 standard errors one in 2500 runs, and the key is fixed.
  assert (np.abs(error) < 4.5 * y.std(0) / 4000**0.5).all()


def test_layers_of_a_scan_drop_by_themselves():
  """Layer l writes which of the features 0 to 6 it kept to its own seven."""
  config = config_of('lora', rank=7, dropout=0.5)
  layer = {
    'kernel': np.tile(np.eye(64, dtype=np.float32), (8, 1, 1)),
    'bias': np.zeros((8, 64), np.float32),
    'lora_a': np.tile(np.eye(64, 7, dtype=np.float32), (8, 1, 1)),
    'lora_b': np.stack([np.eye(7, 64, 7 + 7 * i) for i in range(8)]),
  }
  x = np.zeros((32, 64), np.float32)
  x[:, :7] = 1
  y = apply_net(config, Stack(), rngs={'dropout': jax.random.key(0)})(
    {'layer': jax.tree.map(np.float32, layer)}, x
  )
  kept = np.asarray(y)[:, 7:63].reshape(32, 8, 7) != 0
  assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(kept.size)
  assert len({kept[:, i].tobytes() for i in range(8)}) == 8


@pytest.mark.parametrize('kind', KINDS)
def test_half_precision_follows_the_layer(kind):
  config, params = config_of(kind), dense_params(kind, 'bfloat16')
  exact = jax.tree.map(np.float32, params)
  y = apply_net(config, Net(dtype='bfloat16'))(params, INPUT)
  expected = apply_net(config)(exact, INPUT)
  assert y.dtype == jnp.bfloat16
  # A dozen roundings to 8 bits.
  error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
  assert 1e-4 < error < 0.02
  merged = merge(config, params)['dense']['kernel']
  assert merged.dtype == jnp.bfloat16
  whole = np.asarray(merge(config, exact)['dense']['kernel'])
  np.testing.assert_array_equal(merged, whole.astype(jnp.bfloat16))


# In a model.


@pytest.mark.parametrize('kind', KINDS)
def test_model_starts_unchanged_and_merges(kind):
  model, config, params, trainable = build(kind)
  apply = jax.jit(adapters.adapted(config, model.apply))
  base = base_apply()
  logits = base(params, TOKENS)
  start = init(config, params, seed=2)
  np.testing.assert_allclose(
    apply(adapters.combine(params, start), TOKENS), logits, atol=1e-5
  )
  both = adapters.combine(params, trainable)
  changed = apply(both, TOKENS)
  assert np.abs(changed - logits).max() > 0.1
  # Without the wrapper the adapters are not looked at.
  np.testing.assert_array_equal(base(both, TOKENS), logits)
  merged = merge(config, both)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  np.testing.assert_allclose(base(merged, TOKENS), changed, atol=1e-5)


def test_recomputing_and_pieces_give_the_same():
  # Two adapters take XLA less time than seven.
  rules = ('q_proj/kernel', 'down_proj/kernel')
  model, config, params, trainable = build('gradnormlorp', rules)
  recomputing = build('gradnormlorp', rules, remat=True)[0]

  def value_and_grad(model):
    apply = adapters.adapted(config, model.apply)
    loss = functools.partial(squared_logits, apply)
    return jax.jit(jax.value_and_grad(loss))(trainable, params)

  value, grads = value_and_grad(model)
  same_value, same_grads = value_and_grad(recomputing)
  np.testing.assert_allclose(same_value, value, rtol=1e-6)
  assert_trees_close(same_grads, grads, atol=1e-6, rtol=1e-4)

  embed, block, head = map(jax.jit, adapters.adapt(config, model).layer_fns[:3])
  both = adapters.combine(params, trainable)
  x = embed(both, TOKENS)
  for number in range(SMALL['num_layers']):
    x = block(jax.tree.map(lambda x, n=number: x[n], both['layers']), x)
  np.testing.assert_allclose(jnp.mean(head(both, x) ** 2), value, rtol=1e-5)


def products(jaxpr):
  """Shape and contracted size of every matrix product in a program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      size = np.prod([shape[axis] for axis in contracted])
      yield eqn.outvars[0].aval.shape, size
    for inner in jaxprs_in_params(eqn.params):
      yield from products(inner)


@pytest.mark.parametrize('kind', KINDS)
def test_no_gradient_of_a_frozen_kernel_is_computed(kind):
  model, config, params, trainable = build(kind)
  apply = adapters.adapted(config, model.apply)
  loss = functools.partial(squared_logits, apply)
  shapes = {
    leaf.shape[1:]
    for path, leaf in traverse_util.flatten_dict(params, sep='/').items()
    if path.startswith('layers/') and path.endswith('kernel')
  }

  def of_kernel_size(argnums):
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(trainable, params).jaxpr
    # A dense layer's own rule takes both gradients; the compiler drops one.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [
      size
      for shape, size in products(jaxpr)
      if shape in shapes or shape[::-1] in shapes
    ]

  if kind == 'lora':  # Where one is asked for, it shows in the program:
    # it sums over the tokens, and V over the rank.
    assert of_kernel_size((0, 1)).count(TOKENS.size) == 7
  # V is formed for the norm, and again for the gradient through it.
  count = {'lora': 0, 'dora': 1, 'gradnormlorp': 2}[kind]
  assert of_kernel_size(0) == [RANK] * (7 * count)


def test_no_stack_of_kernels_is_kept():
  """V of all layers, were it kept for the backward pass, would show."""

  x = jnp.ones((2, 64))
  params = jax.eval_shape(Stack().init, jax.random.key(0), x)['params']
  temporary = {}
  for kind in ('dora', 'gradnormlorp'):
    config = config_of(kind, rules=('kernel',))
    apply = apply_net(config, Stack())

    def loss(trainable, params, apply=apply):
      return jnp.sum(apply(adapters.combine(params, trainable), x) ** 2)

    trainable = jax.eval_shape(
      functools.partial(adapters.init, config), params, jax.random.key(0)
    )
    compiled = jax.jit(jax.grad(loss)).lower(trainable, params).compile()
    temporary[kind] = compiled.memory_analysis().temp_size_in_bytes
  # One V and its gradient, of eight layers.
  assert temporary['gradnormlorp'] - temporary['dora'] <= 4 * 2 * 64 * 64


# Training.


def optimizer_of(name, kind):
  if name == 'adam':
    return optax.adam(0.02)
  labels = [('.*', 'low_rank')]
  if kind != 'lora':
    labels.insert(0, ('magnitude', 'full'))
  return getattr(optim, name)(
    0.02, rank=2, scale=1.0, side='both', param_labels=labels
  )


@pytest.mark.parametrize(
  ('kind', 'optimizer'),
  [
    ('lora', 'gradnormlorp'),
    ('gradnormlorp', 'gradnormlorp'),
    ('dora', 'galore'),
    ('dora', 'adam'),
  ],
)
def test_zero_factors_and_zero_columns_train(kind, optimizer):
  params = dense_params('lora')['dense']
  params['kernel'][:, 2] = 0
  frozen = {'dense': {'kernel': params['kernel'], 'bias': params['bias']}}
  config = config_of(kind, rules=('kernel',))
  trainable = init(config, frozen)
  apply, tx = apply_net(config), optimizer_of(optimizer, kind)

  def loss_fn(trainable):
    y = apply(adapters.combine(frozen, trainable), INPUT)
    return jnp.mean((y - WEIGHT) ** 2)

  def step(carry, _):
    trainable, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(trainable)
    updates, state = tx.update(grads, state, trainable)
    return (optax.apply_updates(trainable, updates), state), loss

  @jax.jit
  def fit(trainable):
    carry = trainable, tx.init(trainable)
    (trainable, _), losses = jax.lax.scan(step, carry, length=40)
    return trainable, losses

  trainable, losses = fit(trainable)
  assert np.isfinite(losses).all()
  assert losses[-1] < 0.8 * losses[0]
  merged = merge(config, adapters.combine(frozen, trainable))
  assert np.linalg.norm(merged['dense']['kernel'][:, 2]) > 0.02


# Parts.


def test_first_factor_is_drawn_as_in_peft():
  kernel = np.ones((3, 400, 50), jnp.bfloat16)
  config = config_of('dora', rank=20, rules=('kernel',))
  arrays = init(config, {'kernel': kernel})
  a = np.asarray(arrays['lora_a'])
  assert a.shape == (3, 400, 20)
  # Uniform in ±1/20: 24000 draws come within 1e-3 of the ends.
  assert 0.049 < a.max() < 0.05 and -0.05 <= a.min() < -0.049
  np.testing.assert_allclose(a.std(), 0.05 / 3**0.5, rtol=0.02)
  assert not np.array_equal(a[0], a[1])
  assert arrays['lora_b'].shape == (3, 20, 50)
  assert not np.any(arrays['lora_b'])
  np.testing.assert_allclose(
    arrays['magnitude'], np.full((3, 1, 50), 20.0), rtol=1e-6
  )
  assert all(x.dtype == jnp.float32 for x in arrays.values())


def test_rules_choose_kernels_and_init_needs_only_shapes():
  model = build('lora')[0]
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  config = config_of('dora', rules=('q_proj/kernel', 'lm_head'))
  shapes = jax.eval_shape(
    functools.partial(adapters.init, config), abstract, jax.random.key(0)
  )
  shapes = {
    path: leaf.shape
    for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items()
  }
  assert shapes == {
    'layers/attn/q_proj/lora_a': (2, 32, RANK),
    'layers/attn/q_proj/lora_b': (2, RANK, 32),
    'layers/attn/q_proj/magnitude': (2, 1, 32),
    'lm_head/lora_a': (32, RANK),
    'lm_head/lora_b': (RANK, 40),
    'lm_head/magnitude': (1, 40),
  }


@pytest.mark.parametrize('kind', KINDS)
def test_restart_preserves_what_a_layer_computes(kind):
  """To the last digits of float64, with a new A, and a B of zeros."""
  config = config_of(kind)
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    shapes = {
      'kernel': (2, 7, 5),
      'bias': (2, 5),
      'lora_a': (2, 7, RANK),
      'lora_b': (2, RANK, 5),
    }
    if kind != 'lora':
      shapes['magnitude'] = (2, 1, 5)
    layer = {
      name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()
    }
    new = adapters.restart(config, layer, jax.random.key(3))
    assert new.keys() == layer.keys()
    for name, x in new.items():
      assert (x.shape, x.dtype) == (layer[name].shape, jnp.float64)
    assert new['bias'] is layer['bias'] and not np.any(new['lora_b'])
    assert 0.9 * 7**-0.5 < np.abs(new['lora_a']).max() <= 7**-0.5
    assert np.any(new['lora_a'][0] != new['lora_a'][1])
    if kind == 'lora':
      expected = layer['kernel'] + config.scale * (
        layer['lora_a'] @ layer['lora_b']
      )
      np.testing.assert_allclose(new['kernel'], expected, rtol=0, atol=1e-12)
    x = rng.normal(size=(4, 7))
    apply = adapters.adapted(config, Net(dtype='float64').apply)
    for i in range(2):
      before, after = (
        apply({'params': {'dense': {n: w[i] for n, w in tree.items()}}}, x)
        for tree in (layer, new)
      )
      assert before.dtype == jnp.float64
      assert np.abs(np.asarray(after - before)).max() <= 1e-12
      plain = {'kernel': layer['kernel'][i], 'bias': layer['bias'][i]}
      untouched = Net(dtype='float64').apply({'params': {'dense': plain}}, x)
      assert np.abs(np.asarray(before - untouched)).max() > 0.1


def test_split_and_combine_are_inverse():
  _, _, params, trainable = build('dora')
  both = adapters.combine(params, trainable)
  frozen, adapter = adapters.split(both, is_adapter)
  assert_trees_close(frozen, params, rtol=0)
  assert_trees_close(adapter, trainable, rtol=0)


# Refusals.


@pytest.mark.parametrize(
  'fields, text',
  [
    (
      {'kind': 'LoRA'},
      "Unknown kind 'LoRA'; expected one of ('lora', 'dora', 'gradnormlorp').",
    ),
    ({'rank': 0}, 'rank=0 must be an integer of at least 1.'),
    ({'rank': 2.0}, 'rank=2.0 must be an integer of at least 1.'),
    ({'alpha': 0.0}, 'alpha=0.0 must be positive and finite.'),
    ({'dropout': 1.0}, 'dropout=1.0 must be in [0, 1).'),
    (
      {'rules': 'kernel'},
      "rules='kernel' must be a tuple of at least one regex, such as "
      "('attn/.*/kernel',).",
    ),
    (
      {'rules': ('(attn',)},
      "The rule '(attn' is no regex: missing ), unterminated subpattern at "
      'position 0. Correct it.',
    ),
  ],
)
def test_wrong_configurations_are_refused(fields, text):
  with pytest.raises(ValueError) as error:
    adapters.AdapterConfig(**{'kind': 'lora', **fields})
  assert str(error.value) == text


def test_rank_that_no_kernel_can_use_is_refused():
  params = {
    'wide': {'kernel': jnp.ones((64, 32))},
    'narrow': {'kernel': jnp.ones((64, 4))},
  }
  key = jax.random.key(0)
  rules = ('kernel',)
  # One rank is for all: the narrow one has fewer directions.
  found = adapters.init(config_of('lora', rank=32, rules=rules), params, key)
  assert found['narrow']['lora_a'].shape == (64, 32)
  with pytest.raises(ValueError) as error:
    adapters.init(config_of('lora', rank=100_000, rules=rules), params, key)
  assert str(error.value) == (
    'rank=100000 is more than any adapted kernel can use: the largest, wide, '
    'is 64 x 32. Use at most 32.'
  )


def test_rule_without_a_kernel_is_refused():
  _, _, params, _ = build('lora')
  config = config_of('lora', rules=('layers/attn/query/kernel',))
  with pytest.raises(ValueError) as error:
    adapters.init(config, params, jax.random.key(0))
  assert str(error.value).startswith(
    "The adapter rule 'layers/attn/query/kernel' matches no kernel. Correct "
    "its regex. Similar paths: ['layers/attn/"
  )


def test_overlap_is_refused():
  with pytest.raises(ValueError) as error:
    adapters.combine({'a': {'kernel': 1}}, {'a': {'kernel': 2, 'bias': 3}})
  assert str(error.value) == (
    "Both trees hold the parameters ['a/kernel']. Take them out of one, as "
    'with split.'
  )


@pytest.mark.parametrize('run', ['apply', 'merge'])
def test_other_configuration_is_refused(run):
  params = dense_params('dora')

  def message(config):
    with pytest.raises(ValueError) as error:
      if run == 'merge':
        adapters.merge(config, params)
      else:
        apply_net(config)(params, INPUT)
    return str(error.value)

  assert message(config_of('lora')) == (
    "'dense' has the adapter arrays ['lora_a', 'lora_b', 'magnitude'], but "
    "kind='lora' has ['lora_a', 'lora_b']. Use the configuration that they "
    'were made with.'
  )
  assert message(config_of('dora', rank=8)) == (
    "'dense' has an adapter of rank 3, but rank=8. Use the configuration that "
    'it was made with.'
  )


def test_adapter_without_kernel_is_refused():
  config = config_of('lora')
  _, trainable = adapters.split(dense_params('lora'), is_adapter)
  with pytest.raises(ValueError) as error:
    adapters.merge(config, trainable)
  assert str(error.value) == (
    "The adapter 'dense' has no kernel beside it. Combine it with the model's "
    'parameters first.'
  )


# The manual.


def test_programs_of_the_manual_run_as_they_stand(tmp_path, monkeypatch):
  text = (ROOT / 'docs' / 'finetuning.md').read_text()
  blocks = re.findall('```python\n(.*?)```', text, re.DOTALL)
  any_model, roberta = {}, {}
  assert len(blocks) == 2
  exec(compile(blocks[0], 'finetuning.md', 'exec'), any_model)
  assert any_model['loss'] < 0.1
  outputs = (
    any_model['adapted'](
      adapters.combine(any_model['frozen'], any_model['trainable']),
      any_model['x'],
    ),
    any_model['apply'](any_model['merged'], any_model['x']),
  )
  np.testing.assert_allclose(*outputs, atol=1e-4)
  # What the text says in words.
  rules = [('lora_', 'low_rank'), ('.*', 'full')]
  tx = optim.galore(1e-2, rank=2, side='both', param_labels=rules)
  jax.eval_shape(tx.init, any_model['trainable'])
  bare = adapters.adapted(any_model['config'], any_model['net'].apply)
  both = adapters.combine(any_model['frozen'], any_model['trainable'])
  np.testing.assert_allclose(
    bare({'params': both}, any_model['x']), outputs[0], atol=1e-6
  )

  monkeypatch.chdir(tmp_path)
  small_roberta.export(
    'roberta-base', small_roberta.MASKED_LM, *small_roberta.build()
  )
  exec(compile(blocks[1], 'finetuning.md', 'exec'), roberta)
  assert roberta['logits'].shape == (2, 2)
