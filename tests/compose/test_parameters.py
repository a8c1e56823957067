"""How a run holds a model's weights: what trains, what stays, in which bits."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax import models, optim
from gnlorp_jax.compose import adaptation, optimizer, parameters
from gnlorp_jax.compose.folders import is_quantized
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import adapters, hf, llama, peft, roberta
from gnlorp_jax.models.families import gemma3_text
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from gnlorp_jax.training import sharding

pytestmark = pytest.mark.usefixtures('compiled_once')

D, F, V, L = 32, 48, 60, 3  # Width, feed-forward, vocabulary, layers.
TINY = llama.LlamaConfig(
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_layers=L,
  num_heads=2,
  max_seq_len=16,
)
EIGHT = StepConfig(mode='layerwise', weight_bits=8)


# The architecture.


def exported(folder, **changes):
  config = dataclasses.replace(TINY, **changes)
  weights = jax.jit(llama.make(config).init)(jax.random.key(0))
  hf.export(folder, weights, llama.HF_TENSORS, llama.config_to_hf(config))
  return config


def test_architecture_is_that_of_the_folder_to_start_from(tmp_path):
  found = exported(tmp_path / 'hf', num_layers=1)
  asked = dataclasses.replace(TINY, compute_dtype='bfloat16', remat=True)
  assert parameters.architecture(
    str(tmp_path / 'hf'), asked
  ) == dataclasses.replace(
    found, num_kv_heads=2, compute_dtype='bfloat16', remat=True
  )
  assert parameters.architecture(None, asked) == asked
  assert parameters.is_folder(str(tmp_path / 'hf'))
  assert not parameters.is_folder(None) and not parameters.is_folder('9m')


def test_architecture_may_be_a_preset():
  asked = dataclasses.replace(TINY, param_dtype='bfloat16')
  assert parameters.architecture('60m', asked) == llama.preset(
    '60m', param_dtype='bfloat16'
  )
  assert parameters.architecture('60m', TINY, num_layers=1).num_layers == 1
  assert parameters.architecture(None, TINY, num_layers=1).num_layers == 1


@pytest.mark.parametrize('keep', [True, False])
def test_dropout_of_the_run_may_be_kept(keep):
  asked = roberta.preset('tiny', hidden_dropout=0.3, param_dtype='bfloat16')
  found = parameters.architecture('base', asked, keep_dropout=keep)
  published = roberta.PRESETS['base']
  assert found.hidden_dropout == (0.3 if keep else published.hidden_dropout)
  assert found.param_dtype == 'bfloat16'
  assert found.num_layers == published.num_layers


def test_neither_folder_nor_preset_is_told(tmp_path):
  def message(init_from, model=TINY):
    with pytest.raises(ValueError) as error:
      parameters.architecture(init_from, model)
    return str(error.value)

  decoders = [name for name in models.presets() if name not in roberta.PRESETS]
  rest = (
    f' Presets: {decoders}. A model of the Hugging Face hub is named '
    "'hf:OWNER/NAME'."
  )
  unknown = 'is neither a folder nor a preset.'
  assert message('???') == f"init_from='???' {unknown}{rest}"
  assert message('Qwen2.5-0.5B') == (
    f"init_from='Qwen2.5-0.5B' {unknown} Did you mean 'qwen2.5-0.5b'?{rest}"
  )
  assert message('owner/name') == (
    f"init_from='owner/name' {unknown} Did you mean 'hf:owner/name'? A model "
    "of the Hugging Face hub is named 'hf:OWNER/NAME'."
  )
  (tmp_path / 'hf').mkdir()
  (tmp_path / 'hf' / 'config.json').write_text('{}')
  file = str(tmp_path / 'hf' / 'config.json')
  assert message(file) == (
    f'init_from={file!r} is a file: name its folder, {str(tmp_path / "hf")!r}.'
  )
  assert message(str(tmp_path)) == (
    f'{tmp_path} is the directory of a run: its model is {tmp_path / "hf"}.'
  )
  assert message('tiny') == (
    "init_from='tiny' holds an encoder (roberta), and a decoder is asked for. "
    'Name another model, or of train_lm.py another objective.'
  )
  assert message('7b', roberta.preset('tiny')).startswith(
    "init_from='7b' holds a decoder (llama), and an encoder is asked for."
  )


def test_adapters_have_what_is_given_and_the_usual_otherwise():
  assert adaptation.adapter_config(AdapterOptions(rank=3), TINY) is None
  found = adaptation.adapter_config(AdapterOptions(kind='dora', rank=3), TINY)
  assert (found.kind, found.rank, found.alpha) == ('dora', 3, 16)
  assert found.dropout == 0
  rules = ('q_proj/kernel',)
  found = adaptation.adapter_config(
    AdapterOptions(kind='lora', dropout=0.1, rules=rules), TINY
  )
  assert (found.rank, found.dropout, found.rules) == (8, 0.1, rules)


def message(call, *args, **options):
  with pytest.raises(ValueError) as error:
    call(*args, **options)
  return str(error.value)


@pytest.fixture(scope='module')
def peft_folder(tmp_path_factory):
  """PEFT's folder of DoRA for two of the kernels, and what it holds."""
  config = adapters.AdapterConfig(
    kind='dora', rank=2, alpha=5, rules=('q_proj', 'lm_head'), dropout=0.5
  )
  shapes = jax.eval_shape(llama.make(TINY).init, jax.random.key(0))
  arrays = jax.tree.map(
    lambda leaf: np.sin(np.arange(leaf.size, dtype='f')).reshape(leaf.shape),
    jax.eval_shape(
      functools.partial(adapters.init, config), shapes, jax.random.key(0)
    ),
  )
  folder = tmp_path_factory.mktemp('peft') / 'adapter'
  peft.export(folder, config, arrays, llama.HF_TENSORS)
  return str(folder), arrays


def test_adapters_to_start_from_say_what_they_are(peft_folder):
  folder, _ = peft_folder
  options = AdapterOptions(kind='dora', dropout=0.1, init_from=folder)
  find = adaptation.adapter_config
  found = find(options, TINY)
  assert (found.kind, found.rank, found.alpha) == ('dora', 2, 5)
  # Dropout is a matter of the run.
  assert (found.dropout, len(found.rules)) == (0.1, 2)
  agreed = dataclasses.replace(options, rank=2, alpha=5.0)
  assert find(agreed, TINY) == found
  assert message(find, dataclasses.replace(options, rank=4), TINY) == (
    f'adapter.rank=4 is asked for, and the adapters in {folder} have 2. Leave '
    'it out.'
  )
  other = dataclasses.replace(options, rank_stabilized=True)
  assert 'have False. Leave it out.' in message(find, other, TINY)
  lora = AdapterOptions(kind='lora', init_from=folder)
  assert message(find, lora, TINY) == (
    f"adapter.kind='lora' is asked for, and the adapters in {folder} have "
    "'dora'. Give adapter.kind='dora'."
  )
  assert message(find, options, roberta.preset('tiny')) == (
    'Folders of PEFT are read and written of decoders alone, and this is '
    "'roberta'. Export or name a merged model."
  )
  none = AdapterOptions(kind='lora', init_from=f'{folder}/none')
  assert 'is no folder.' in message(find, none, TINY)
  assert message(find, AdapterOptions(init_from=folder), TINY) == (
    f'adapter.init_from={folder!r} needs adapter.kind: lora or dora, as the '
    'adapters there are.'
  )
  assert 'needs the kind of the adapters there' in message(
    AdapterOptions, kind='gradnormlorp', init_from=folder
  )


# What trains.


def settings(model=None, step=None, adapter=None, **changes):
  return TrainConfig(
    batch_size=2,
    model=dataclasses.replace(TINY, **(model or {})),
    data=DataConfig(seq_len=8),
    step=step or StepConfig(),
    adapter=adapter or AdapterOptions(),
    **{'optim': OptimConfig(name='gradnormlorp', rank=4)} | changes,
  )


@functools.cache
def program_of(config):
  return recipe.plan(config, jax.devices()[:1]).program


def plan(config):
  return program_of(config).parameters


def names(tree):
  return {
    path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=is_quantized
    )
  }


ALL = names(jax.eval_shape(llama.make(TINY).init, jax.random.key(0)))
KERNELS = {n for n in ALL if n.startswith('layers/') and n.endswith('/kernel')}


def test_everything_trains_without_adapters_and_rules():
  found = plan(settings())
  assert names(found.trained) == ALL and found.frozen == {}
  assert len(KERNELS) == 7
  tree = {'a': jnp.ones(2)}
  assert found.decode(tree) is found.decode_exact(tree) is tree
  assert found.join(tree, {}) is tree
  assert found.start_frozen(jax.random.key(0)) == {}


@pytest.mark.parametrize('kind', ['lora', 'dora', 'gradnormlorp'])
def test_adapters_alone_train(kind):
  found = plan(settings(adapter=AdapterOptions(kind=kind, rank=2)))
  parts = ['lora_a', 'lora_b'] + ['magnitude'] * (kind != 'lora')
  expected = {n.replace('kernel', part) for n in KERNELS for part in parts}
  assert names(found.trained) == expected
  assert names(found.frozen) == ALL
  for leaf in jax.tree.leaves((found.trained, found.frozen)):
    assert isinstance(leaf.sharding, jax.sharding.NamedSharding)


@pytest.mark.parametrize('bits', [None, 8])
def test_what_is_labelled_frozen_does_not_train(bits):
  labels = (('embed|lm_head', 'frozen'), ('/attn/', 'low_rank'), ('.*', 'full'))
  config = settings(
    step=EIGHT if bits else None, optim=OptimConfig(param_labels=labels, rank=4)
  )
  built = program_of(config)
  found = built.parameters
  frozen = {n for n in ALL if n.startswith(('embed', 'lm_head'))}
  assert names(found.frozen) == frozen
  assert names(found.trained) == ALL - frozen
  # The optimizer is told of the rest alone, and has no state of the frozen.
  assert built.rules == labels[1:]
  shapes = {
    leaf.shape for leaf in jax.tree.leaves(built.abstract_state.opt_state)
  }
  assert not {(V, D), (D, V)} & shapes


def test_labels_and_adapters_go_together():
  """Rules over the paths of adapters; what they freeze joins the base."""
  labels = (('mlp', 'frozen'), ('.*', 'full'))
  found = plan(
    settings(
      adapter=AdapterOptions(kind='lora'),
      optim=OptimConfig(param_labels=labels),
    )
  )
  assert all('/attn/' in name for name in names(found.trained))
  assert len(names(found.trained)) == 8
  assert names(found.frozen) == ALL | {
    n.replace('kernel', part)
    for n in KERNELS
    if '/mlp/' in n
    for part in ('lora_a', 'lora_b')
  }


@pytest.mark.parametrize('is_frozen', [False, True])
def test_adapters_start_from_a_folder_and_return_to_one(
  peft_folder, tmp_path, is_frozen
):
  """Also those that label rules freeze, which no checkpoint holds."""
  folder, arrays = peft_folder
  labels = (('q_proj', 'frozen'), ('.*', 'full')) if is_frozen else None
  config = settings(
    adapter=AdapterOptions(kind='dora', init_from=folder),
    optim=OptimConfig(name='adamw', param_labels=labels),
  )
  built = program_of(config)
  found = built.parameters
  trained, frozen = found.start(jax.random.key(0))
  assert names(trained) == names(found.trained)
  assert names(frozen) == names(found.frozen)
  both = {
    path_name(p): x
    for p, x in jax.tree.leaves_with_path(found.join(trained, frozen))
  }
  for path, expected in jax.tree.leaves_with_path(arrays):
    assert both[path_name(path)].dtype == np.float32
    np.testing.assert_array_equal(both[path_name(path)], expected)
  assert_same(found.start_frozen(jax.random.key(0)), frozen)
  for number, (base, name) in enumerate(
    (
      ('60m', None),
      ('hf:owner/name@0123', 'owner/name'),
      (str(tmp_path), str(tmp_path)),
    )
  ):
    out = tmp_path / f'out{number}'
    adaptation.export_peft(out, trained, frozen, built.adapter, TINY, base=base)
    fields = json.loads((out / peft.CONFIG).read_text())
    assert fields['base_model_name_or_path'] == name
    assert fields['revision'] == ('0123' if 'hf:' in base else None)
  again, there = peft.read(out, llama.HF_TENSORS)
  assert_same(there, arrays)
  assert again == built.adapter
  deeper = dataclasses.replace(config.model, num_layers=L + 1)
  start = program_of(dataclasses.replace(config, model=deeper)).parameters.start
  text = message(start, jax.random.key(0))
  assert text.startswith(f'The adapters in {folder} are of another model.')
  assert "'layers/attn/q_proj/lora_a': ((3, 32, 2), (4, 32, 2))" in text


def test_what_else_trains_is_no_adapter_for_peft(tmp_path):
  config = adapters.AdapterConfig(kind='lora')
  write = functools.partial(message, adaptation.export_peft, tmp_path / 'out')
  beside = {'classifier': {'kernel': np.ones((2, 2))}}
  assert write(beside, {}, config, TINY, base=None) == (
    "['classifier/kernel'] train beside the adapters, and a folder of PEFT has "
    'no place for them. Export the merged model.'
  )
  assert write({}, {}, None, TINY, base=None) == (
    'The run has no adapters, so that there is nothing to write for PEFT. '
    'Export the model.'
  )


def test_rule_that_matches_nothing_is_told():
  with pytest.raises(ValueError, match="'atn'"):
    plan(settings(optim=OptimConfig(param_labels=(('atn', 'full'),))))
  adapter = AdapterOptions(kind='lora', rules=('atn',))
  with pytest.raises(ValueError) as error:
    plan(settings(adapter=adapter))
  assert "The adapter rule 'atn' matches no kernel." in str(error.value)


def test_weights_in_8_bits_that_train_in_whole_steps_are_told():
  with pytest.raises(ValueError) as error:
    plan(settings(step=StepConfig(weight_bits=8)))
  assert str(error.value) == (
    "step.weight_bits=8 needs step.mode='layerwise', which rounds the updates "
    "of kernels stochastically, or adapters (adapter.kind='lora') beside "
    "kernels that stay as they are; got step.mode='whole' and "
    'adapter.kind=None.'
  )
  with pytest.raises(ValueError) as error:
    plan(settings(step=StepConfig(mode='layerwise', weight_bits=4)))
  assert str(error.value) == (
    "step.weight_bits=4 needs adapters (adapter.kind='lora') beside kernels "
    "that stay as they are; got step.mode='layerwise' and adapter.kind=None."
  )
  # Nothing that is kept in 8 bits trains: then whole steps may be.
  labels = (('layers/.*/kernel', 'frozen'), ('.*', 'full'))
  found = plan(
    settings(
      step=StepConfig(weight_bits=8), optim=OptimConfig(param_labels=labels)
    )
  )
  assert names(found.frozen) == KERNELS


@pytest.mark.parametrize('bits', [8, 4])
def test_base_of_adapters_may_be_in_few_bits(bits):
  step = StepConfig(weight_bits=bits)
  adapter = AdapterOptions(kind='gradnormlorp', rank=2)
  found = plan(settings(step=step, adapter=adapter))
  assert not any(map(is_quantized, leaves(found.trained)))
  quantized = [x for x in leaves(found.frozen) if is_quantized(x)]
  assert len(quantized) == len(KERNELS)
  assert {x.codec.bits for x in quantized} == {bits}
  trained, frozen = found.start(jax.random.key(3))
  again = found.start_frozen(jax.random.key(3))
  assert_same(frozen, again)
  # Magnitudes are the lengths of the columns that the codes stand for.
  exact = jax.jit(found.decode_exact)(frozen)
  kernel = exact['layers']['mlp']['up_proj']['kernel']
  np.testing.assert_allclose(
    trained['layers']['mlp']['up_proj']['magnitude'],
    np.linalg.norm(kernel, axis=1, keepdims=True),
    rtol=1e-6,
  )
  for tree, like in ((trained, found.trained), (frozen, found.frozen)):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
      assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
  # Without a change yet, merged weights are the decoded base.
  merged = found.merge(trained, frozen)['layers']['mlp']['up_proj']['kernel']
  np.testing.assert_allclose(merged[1], kernel[1], rtol=1e-6)


def leaves(tree):
  return jax.tree.leaves(tree, is_leaf=is_quantized)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_prefixes_beside_adapters_train_too():
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  found, rules = parameters.plan(
    llama.make,
    TINY,
    mesh=mesh,
    adapter=adaptation.adapter_config(AdapterOptions(kind='lora'), TINY),
    step=StepConfig(),
    rules=(('.*', 'full'),),
    beside_adapters=('lm_head/',),
  )
  assert 'lm_head/kernel' in names(found.trained)
  assert names(found.frozen) == ALL - {'lm_head/kernel'}
  assert rules == (('.*', 'full'),)
  trained, frozen = found.start(jax.random.key(0))
  assert names(trained) == names(found.trained)
  assert names(frozen) == names(found.frozen)


# Weights in 8 bits: the start.


def decode(stored):
  """What a quantised kernel stands for, by NumPy; it has whole blocks."""
  value = np.asarray(stored.codes, np.float32).reshape(L, -1, 256)
  value = value - np.asarray(stored.zero)[..., None]
  return (value * np.asarray(stored.scale)[..., None]).reshape(
    stored.codes.shape
  )


def test_layers_that_differ_start_in_8_bits():
  config = dataclasses.replace(
    gemma3_text.PRESETS['gemma-3-270m'],
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_layers=L,
    sliding_layers=(True, False, True),
  )
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  found, _ = parameters.plan(
    gemma3_text.make,
    config,
    mesh=mesh,
    adapter=None,
    step=EIGHT,
    rules=gemma3_text.LABEL_RULES,
  )
  shapes = jax.eval_shape(found.start, jax.random.key(0))[0]['layers']
  quantized = kernels(shapes).values()
  assert {x.codes.shape[0] for x in quantized} == {L}


def kernels(layers):
  """Quantised kernels by path."""
  return {
    path_name(path): node
    for path, node in jax.tree_util.tree_leaves_with_path(
      layers, is_leaf=is_quantized
    )
    if is_quantized(node)
  }


def temporaries(config, whole):
  """Bytes that initialising needs beside its result."""
  built = program_of(config)
  if not whole:
    layout = built.parameters.start.func.__self__
    lowered = jax.jit(layout.random).lower(jax.random.key(0))
  else:
    numbers = optimizer.numbers(config.optim, config.steps)
    key = jax.random.key(0)
    lowered = built.init_optimizer.lower(built.parameters.trained, numbers, key)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [None, {'norm_state': 'tracked'}],
  ids=['weights', 'with the state'],
)
def test_initialising_needs_no_more_for_more_layers(options):
  model = {'hidden_size': 64, 'intermediate_size': 128}
  layer = 4 * (4 * 64 * 64 + 3 * 64 * 128)
  few, many = (
    temporaries(
      settings(
        {**model, 'num_layers': n},
        EIGHT,
        optim=OptimConfig(name='gradnormlorp', rank=4, **(options or {})),
      ),
      options is not None,
    )
    for n in (2, 18)
  )
  # Sixteen layers more: less than one of them in full precision.
  assert abs(many - few) < layer


def test_initial_weights_are_distributed_as_the_models_own():
  dtype = 'bfloat16'  # Of which float32 has everything but the rounding.
  config = settings({'param_dtype': dtype, 'initializer_std': 0.05}, EIGHT)
  held = plan(config)
  params, frozen = held.start(jax.random.key(0))
  assert frozen == {}
  own = jax.eval_shape(llama.make(config.model).init, jax.random.key(0))
  decoded = jax.eval_shape(held.decode_exact, params['layers'])
  for found, expected in zip(
    jax.tree.leaves({**params, 'layers': decoded}),
    jax.tree.leaves(own),
    strict=True,
  ):
    assert found.shape == expected.shape
  for key in ('embed', 'norm', 'lm_head'):
    dtypes = {x.dtype for x in jax.tree.leaves(params[key])}
    assert dtypes == {jnp.dtype(dtype)}
  np.testing.assert_array_equal(params['layers']['attn_norm']['scale'], 1)
  found = kernels(params['layers'])
  assert len(found) == 7
  for name, kernel in found.items():
    values = decode(kernel).astype(np.float64).reshape(L, -1)
    size = values[0].size
    # Mean and variance of a normal distribution, within five deviations, plus
    # that of the rounding.
    assert np.all(np.abs(values.mean(1)) < 5 * 0.05 / np.sqrt(size)), name
    ratio = values.var(1) / 0.05**2
    assert np.all(np.abs(ratio - 1) < 5 * np.sqrt(2 / size) + 1e-3), name
    # Layers are drawn independently.
    between = np.corrcoef(values) - np.eye(L)
    assert np.abs(between).max() < 5 / np.sqrt(size), name


def test_random_numbers_follow_step_layer_and_seed():
  kernel = np.random.default_rng(0).standard_normal((1, 16, 32))
  stored = jax.jit(optim.quantized_weights.quantize_weights)(
    {'up': {'kernel': np.float32(kernel)}}
  )
  new = {'up': {'kernel': np.float32(kernel + 0.01)}}

  @functools.cache
  def store(seed):
    return jax.jit(plan(settings(step=EIGHT, seed=seed)).store)

  def codes(seed, number, layer):
    found = store(seed)(new, stored, np.int32(number), np.int32(layer))
    return np.asarray(found['up']['kernel'].codes)

  first = codes(0, 5, 1)
  np.testing.assert_array_equal(codes(0, 5, 1), first)
  for other in ((1, 5, 1), (0, 6, 1), (0, 5, 2), (0, 1, 5)):
    assert (codes(*other) != first).mean() > 0.1
