"""Models whose kernels are kept in 8 bits: start, folders, memory, samples.

Shape suffixes in this file: B sequences, T positions, V vocabulary.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gnlorp_jax import build, folders, optim, results
from gnlorp_jax.config import DataConfig, OptimConfig, StepConfig, TrainConfig
from gnlorp_jax.models import hf, llama
from gnlorp_jax.optim.quantization import QuantizedArray
from gnlorp_jax.training import sharding, state

D, F, V, L, R = 32, 48, 60, 3, 4  # Width, feed-forward, vocabulary, ...
EIGHT = StepConfig(mode='layerwise', weight_bits=8)
# Entries by hand, and blocks of 256 in a layer.
PROJECTED = L * (4 * D * D + 3 * D * F)
BLOCKS = L * (4 * 4 + 3 * 6)
NORMS = 2 * L * D
AROUND = 2 * V * D + D


def settings(model=None, step=EIGHT, **optim):
  return TrainConfig(
    batch_size=2,
    model=dataclasses.replace(
      llama.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=2,
        max_seq_len=16,
      ),
      **(model or {}),
    ),
    data=DataConfig(seq_len=8),
    optim=OptimConfig(**{'name': 'gradnormlorp', 'rank': R} | optim),
    step=step,
  )


def one_device():
  return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def initial(config):
  make = build._init_fn(config, llama.make(config.model))
  return jax.jit(make)(jax.random.key(0))


def is_quantized(node):
  return isinstance(node, QuantizedArray)


def kernels(layers):
  """Kernels by path, quantised or not."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): node
    for path, node in jax.tree_util.tree_leaves_with_path(
      layers, is_leaf=is_quantized
    )
    if path[-1].key == 'kernel'
  }


def blocks_of(values):
  """NumPy ``[L, blocks, 256]``; every kernel here has whole blocks."""
  return np.asarray(values, np.float32).reshape(L, -1, 256)


def decode(stored):
  """What a quantised kernel stands for, by NumPy."""
  value = blocks_of(stored.codes) - np.asarray(stored.zero)[..., None]
  return (value * np.asarray(stored.scale)[..., None]).reshape(
    stored.codes.shape
  )


def updated(stored):
  """Float32 values between those of the code."""
  return jax.tree.map(
    lambda x: x + 0.01 * jnp.sin(jnp.arange(1.0, x.size + 1)).reshape(x.shape),
    optim.quantized_weights.dequantize_weights(stored, jnp.float32),
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


# The start.


def temporaries(config, whole):
  """Bytes that initialising needs beside its result."""
  model = llama.make(config.model)
  make = build._init_fn(config, model)
  if whole:
    tx = build._on_stored(
      config,
      build.optimizer(config.optim, lambda count: 0.1, llama.LABEL_RULES),
    )
    make = state._initialiser(make, tx)
  compiled = jax.jit(make).lower(jax.random.key(0)).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
  'optim',
  [None, {'norm_state': 'tracked'}],
  ids=['weights', 'with the state'],
)
def test_initialising_needs_no_more_for_more_layers(optim):
  model = {'hidden_size': 64, 'intermediate_size': 128}
  layer = 4 * (4 * 64 * 64 + 3 * 64 * 128)
  few, many = (
    temporaries(
      settings({**model, 'num_layers': n}, **(optim or {})), optim is not None
    )
    for n in (2, 18)
  )
  # Sixteen layers more: less than one of them in full precision.
  assert abs(many - few) < layer


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_initial_weights_are_distributed_as_the_models_own(dtype):
  config = settings({'param_dtype': dtype, 'initializer_std': 0.05})
  params = initial(config)
  own = jax.eval_shape(llama.make(config.model).init, jax.random.key(0))
  decoded = build.weight_storage(config).load_exact(params['layers'])
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
  for name, kernel in kernels(params['layers']).items():
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
  stored = optim.quantized_weights.quantize_weights(
    {'up': {'kernel': jax.random.normal(jax.random.key(0), (1, 16, 32))}}
  )
  new = updated(stored)

  def codes(seed, number, layer):
    storage = build.weight_storage(dataclasses.replace(settings(), seed=seed))
    found = storage.store(new, stored, jnp.int32(number), jnp.int32(layer))
    return np.asarray(found['up']['kernel'].codes)

  first = codes(0, 5, 1)
  np.testing.assert_array_equal(codes(0, 5, 1), first)
  for other in ((1, 5, 1), (0, 6, 1), (0, 5, 2), (0, 1, 5)):
    assert (codes(*other) != first).mean() > 0.1


# Folders.


@pytest.fixture(scope='module', params=['float32', 'bfloat16'])
def full(request, tmp_path_factory):
  """A folder of a full-precision model, its parameters and configuration."""
  config = settings({'param_dtype': request.param})
  params = llama.make(config.model).init(jax.random.key(0))
  folder = tmp_path_factory.mktemp('full') / 'hf'
  folders.export(folder, params, config.model)
  return types.SimpleNamespace(folder=folder, params=params, config=config)


def test_import_is_within_half_a_step_of_every_block(full):
  stored = folders.load(full.folder, full.config, one_device())
  assert not (full.folder / folders.GRID_FILE).exists()
  exact = kernels(full.params['layers'])
  for name, kernel in kernels(stored['layers']).items():
    values = blocks_of(exact[name])
    step = (values.max(-1) - values.min(-1)) / 255
    error = np.abs(blocks_of(decode(kernel)) - values)
    # Half a step and a rounding of float32, of numbers of up to 255 steps.
    assert np.all(error <= step[..., None] * (0.5 + 255 * 2.0**-23)), name
  for key in ('embed', 'norm', 'lm_head'):
    assert_same(stored[key], full.params[key])


def test_one_kernel_is_in_full_precision_at_a_time(full, monkeypatch):
  alive = []
  read = hf._read

  def watched(leaf, tensors, files):
    live = [
      x for x in jax.live_arrays() if x.ndim == 3 and x.dtype == leaf.dtype
    ]
    alive.append(len(live))
    return read(leaf, tensors, files)

  before = len(
    [
      x
      for x in jax.live_arrays()
      if x.ndim == 3 and x.dtype == full.config.model.param_dtype
    ]
  )
  monkeypatch.setattr(hf, '_read', watched)
  folders.load(full.folder, full.config, one_device())
  # When the next one is read, at most the one before is still around.
  assert len(alive) == 12 and max(alive) <= before + 1


def trained(config):
  """Weights as training leaves them: rounded at random, on uneven grids."""
  params = initial(config)
  new = updated(params['layers'])
  layers = optim.quantized_weights.requantize_weights(
    new, params['layers'], jax.random.key(1)
  )
  return {**params, 'layers': layers}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_export_holds_the_decoded_values_and_import_gives_the_codes_back(
  tmp_path, dtype
):
  config = settings({'param_dtype': dtype})
  params = trained(config)
  folders.export(tmp_path / 'hf', params, config.model)
  tensors = safetensors.numpy.load_file(tmp_path / 'hf/model.safetensors')
  expected = decode(params['layers']['mlp']['down_proj']['kernel'])
  for layer in range(L):
    found = tensors[f'model.layers.{layer}.mlp.down_proj.weight']
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(found.T, expected[layer].astype(found.dtype))
  again = folders.load(tmp_path / 'hf', config, one_device())
  if dtype == 'bfloat16':
    for name, kernel in kernels(params['layers']).items():
      found = kernels(again['layers'])[name]
      np.testing.assert_array_equal(found.scale, kernel.scale)
      np.testing.assert_array_equal(found.zero, kernel.zero)
      # Beyond 128 steps from zero bfloat16's unit is a step.
      off = blocks_of(found.codes) - blocks_of(kernel.codes)
      size = np.abs(
        blocks_of(kernel.codes) - np.asarray(kernel.zero)[..., None]
      )
      assert np.abs(off).max() <= 1
      assert np.all(size[off != 0] >= 128)
    return
  assert_same(again, params)
  # And once more, out of what was read.
  folders.export(tmp_path / 'hf', again, config.model)
  second = safetensors.numpy.load_file(tmp_path / 'hf/model.safetensors')
  for name in tensors:
    np.testing.assert_array_equal(second[name], tensors[name])


def test_damaged_file_of_scales_is_an_error(full, tmp_path):
  config = full.config
  folders.export(tmp_path / 'hf', trained(config), config.model)
  path = tmp_path / 'hf' / folders.GRID_FILE
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match=f'Cannot read {path}: '):
    folders.load(tmp_path / 'hf', config, one_device())


def test_export_gives_equal_logits_in_pytorch_and_layer_by_layer(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = settings()
  params = trained(config)
  folders.export(tmp_path / 'hf', params, config.model)
  oracle, report = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path / 'hf', output_loading_info=True, dtype='auto'
  )
  assert not any(report.values()), report
  tokens_BT = np.random.default_rng(0).integers(0, V, (2, 16))
  with torch.no_grad():
    expected = oracle(torch.from_numpy(tokens_BT)).logits.numpy()
  model = llama.make(config.model)
  apply = jax.jit(build.stored_apply(config, model))
  # Logits of order 0.1 to 1, float32 on both sides.
  np.testing.assert_allclose(apply(params, tokens_BT), expected, atol=1e-5)
  # No dense copy: its temporaries do not grow with the layers.
  sizes = []
  for layers in (2, 18):
    deep = settings({'num_layers': layers, 'hidden_size': 64})
    make = build._init_fn(deep, llama.make(deep.model))
    shapes = jax.eval_shape(make, jax.random.key(0))
    deep_apply = build.stored_apply(deep, llama.make(deep.model))
    compiled = jax.jit(deep_apply).lower(shapes, tokens_BT).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[1] - sizes[0] < 4 * (4 * 64 * 64 + 3 * 64 * F)


def test_start_from_a_folder_is_on_the_mesh_and_as_stored(full):
  config = dataclasses.replace(full.config, init_from=str(full.folder))
  parts = build.program(config, jax.devices()[:1])
  now = build.new_state(parts)
  assert jax.tree.structure(now) == jax.tree.structure(parts.abstract_state)
  for found, expected in zip(
    jax.tree.leaves(now), jax.tree.leaves(parts.abstract_state), strict=True
  ):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.sharding == expected.sharding


# What a run says about itself.


def run_of(config):
  parts = build.program(config, jax.devices()[:1])
  return types.SimpleNamespace(
    config=config,
    model=parts.model,
    tx=parts.tx,
    mesh=parts.mesh,
    abstract_state=parts.abstract_state,
  )


@pytest.mark.parametrize('clip', [None, 1.0])
def test_memory_is_that_of_a_count_by_hand(clip):
  config = settings(name='galore', clip_global_norm=clip)
  table = results.memory(run_of(config))
  entries = PROJECTED + NORMS + AROUND
  one = (PROJECTED + NORMS) // L
  assert table['parameters'] == {
    'this run': PROJECTED + 8 * BLOCKS + 4 * (NORMS + AROUND),
    'adamw': 4 * entries,
  }
  # Waiting for the norm: what is left of the projected kernels, R of 32 rows.
  left = L * R * (4 * D + 3 * F) + NORMS if clip else 0
  assert table['gradients'] == {
    'this run': 4 * (AROUND + one + left),
    'adamw': 4 * entries,
  }
  assert table['moments']['adamw'] == 8 * entries


def test_dry_run_counts_the_state_of_the_run():
  config = settings({'param_dtype': 'bfloat16'})
  rows = build.dry_run(config)
  assert sum(np.prod(row.shape) for row in rows) == PROJECTED + NORMS + AROUND
  held = optim.inspect.tree_bytes(run_of(config).abstract_state.opt_state)
  # Beside what belongs to a parameter there are some counts.
  assert 0 <= held - sum(row.state_bytes for row in rows) < 64
