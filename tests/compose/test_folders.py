"""Weights in Hugging Face folders, of models whose kernels are kept in 8 bits.

Shape suffixes in this file: B sequences, T positions, V vocabulary.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gnlorp_jax import optim
from gnlorp_jax.compose import folders, optimizer
from gnlorp_jax.compose.folders import is_quantized
from gnlorp_jax.compose.settings import OptimConfig, StepConfig
from gnlorp_jax.models import adapters, hf, llama
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.quantized.arrays import dequantize
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig

pytestmark = pytest.mark.usefixtures('compiled_once')

D, F, V, L, R = 32, 48, 60, 3, 4  # Width, feed-forward, vocabulary, ...
EIGHT = StepConfig(mode='layerwise', weight_bits=8)


def settings(model=None, step=EIGHT, **changes):
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
    optim=OptimConfig(name='gradnormlorp', rank=R),
    step=step,
    **changes,
  )


@functools.cache
def program_of(config):
  return recipe.plan(config, jax.devices()[:1]).program


def initial(config):
  """The weights that a run starts with."""
  trained, frozen = program_of(config).parameters.start(jax.random.key(0))
  assert not frozen
  return trained


def load(folder, config):
  """The weights of a run that starts from a folder."""
  return initial(dataclasses.replace(config, init_from=str(folder)))


def export(folder, params, model, adapter=None):
  folders.export(
    folder,
    folders.merged(params, adapter, model.param_dtype),
    functools.partial(
      hf.export, table=llama.HF_TENSORS, hf_config=llama.config_to_hf(model)
    ),
  )


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


# Folders.


@pytest.fixture(scope='module', params=['float32', 'bfloat16'])
def full(request, tmp_path_factory):
  """A folder of a full-precision model, its parameters and configuration."""
  config = settings({'param_dtype': request.param})
  params = jax.jit(llama.make(config.model).init)(jax.random.key(0))
  folder = tmp_path_factory.mktemp('full') / 'hf'
  export(folder, params, config.model)
  return types.SimpleNamespace(folder=folder, params=params, config=config)


def test_import_is_within_half_a_step_of_every_block(full):
  stored = load(full.folder, full.config)
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


@pytest.mark.parametrize('full', ['bfloat16'], indirect=True)
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
  load(full.folder, full.config)
  # When the next one is read, at most the one before is still around.
  assert len(alive) == 12 and max(alive) <= before + 1


@functools.cache
def trained(config):
  """Weights as training leaves them: rounded at random, on uneven grids."""
  params = initial(config)

  @jax.jit
  def train(layers):
    return optim.quantized_weights.requantize_weights(
      updated(layers), layers, jax.random.key(1)
    )

  return {**params, 'layers': train(params['layers'])}


@pytest.mark.parametrize(
  'dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)]
)
def test_export_holds_the_decoded_values_and_import_gives_the_codes_back(
  tmp_path, dtype
):
  config = settings({'param_dtype': dtype})
  params = trained(config)
  export(tmp_path / 'hf', params, config.model)
  tensors = safetensors.numpy.load_file(tmp_path / 'hf/model.safetensors')
  expected = decode(params['layers']['mlp']['down_proj']['kernel'])
  for layer in range(L):
    found = tensors[f'model.layers.{layer}.mlp.down_proj.weight']
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(found.T, expected[layer].astype(found.dtype))
  again = load(tmp_path / 'hf', config)
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
  export(tmp_path / 'second', again, config.model)
  second = safetensors.numpy.load_file(tmp_path / 'second/model.safetensors')
  for name in tensors:
    np.testing.assert_array_equal(second[name], tensors[name])


def test_damaged_file_of_scales_is_an_error(tmp_path):
  config = settings()
  export(tmp_path / 'hf', trained(config), config.model)
  path = tmp_path / 'hf' / folders.GRID_FILE
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match=f'Cannot read {path}: '):
    load(tmp_path / 'hf', config)


def test_scales_of_another_model_are_an_error(tmp_path):
  config = settings()
  export(tmp_path / 'hf', trained(config), config.model)
  path = tmp_path / 'hf' / folders.GRID_FILE
  grid = safetensors.numpy.load_file(path)
  name = 'layers/attn/q_proj/kernel'
  grid[f'{name}/scale'] = grid[f'{name}/scale'][:, :3]
  safetensors.numpy.save_file(grid, path)
  with pytest.raises(ValueError) as error:
    load(tmp_path / 'hf', config)
  assert str(error.value) == (
    f'{name} has scales (3, 3) and zeros (3, 4) in {path}, and (3, 4) blocks. '
    'If the weights beside it are of another run, remove this file.'
  )


@pytest.mark.slow
def test_export_gives_equal_logits_in_pytorch_and_layer_by_layer(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = settings()
  params = trained(config)
  export(tmp_path / 'hf', params, config.model)
  oracle, report = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path / 'hf', output_loading_info=True, dtype='auto'
  )
  assert not any(report.values()), report
  tokens_BT = np.random.default_rng(0).integers(0, V, (2, 16))
  with torch.no_grad():
    expected = oracle(torch.from_numpy(tokens_BT)).logits.numpy()
  apply = jax.jit(program_of(config).model.apply)
  # Logits of order 0.1 to 1, float32 on both sides.
  np.testing.assert_allclose(apply(params, tokens_BT), expected, atol=1e-5)
  # No dense copy: its temporaries do not grow with the layers.
  sizes = []
  for layers in (2, 18):
    deep = settings({'num_layers': layers, 'hidden_size': 64})
    built = program_of(deep)
    shapes = built.parameters.trained
    compiled = jax.jit(built.model.apply).lower(shapes, tokens_BT).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[1] - sizes[0] < 4 * (4 * 64 * 64 + 3 * 64 * F)


@pytest.mark.parametrize('full', ['bfloat16'], indirect=True)
def test_start_from_a_folder_is_on_the_mesh_and_as_stored(full):
  config = dataclasses.replace(full.config, init_from=str(full.folder))
  built = program_of(config)
  numbers = optimizer.numbers(config.optim, config.steps)
  now, frozen = built.start(jax.random.key(0), numbers)
  assert frozen == {}
  assert jax.tree.structure(now) == jax.tree.structure(built.abstract_state)
  for found, expected in zip(
    jax.tree.leaves(now), jax.tree.leaves(built.abstract_state), strict=True
  ):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.sharding == expected.sharding


# Adapters.


def with_adapters(adapter, bits):
  """The plain weights, and as stored with adapters that change something."""
  plain = jax.jit(llama.make(settings().model).init)(jax.random.key(0))
  beside = jax.jit(functools.partial(adapters.init, adapter))(
    plain, jax.random.key(1)
  )
  beside = jax.tree.map(
    lambda x: (
      np.asarray(x)
      + 0.05 * np.sin(np.arange(x.size, dtype='f')).reshape(x.shape)
    ),
    beside,
  )
  stored = plain
  if bits is not None:
    layers = jax.jit(
      functools.partial(
        optim.quantized_weights.quantize_weights,
        codec=optim.quantized_weights.CODECS[bits],
      )
    )(plain['layers'])
    stored = {**plain, 'layers': layers}
  return plain, adapters.combine(stored, beside)


@pytest.mark.parametrize(
  ('kind', 'bits'), [('lora', 8), ('lora', 4), ('gradnormlorp', None)]
)
def test_export_folds_adapters_into_their_kernels(tmp_path, kind, bits):
  """Also beside codes: what is written is the plain model, with no grid."""
  adapter = adapters.AdapterConfig(kind=kind, rank=2)
  plain, params = with_adapters(adapter, bits)
  export(tmp_path / 'hf', params, settings().model, adapter)
  assert not (tmp_path / 'hf' / folders.GRID_FILE).exists()
  shapes = jax.eval_shape(lambda: plain)
  found = hf.load_params(tmp_path / 'hf', llama.HF_TENSORS, shapes)

  @jax.jit
  def merge(params):
    exact = optim.quantized_weights.dequantize_weights(params, jnp.float32)
    return adapters.merge(adapter, exact)

  # The same sums, one layer at a time: float32 rounding.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    merge(params),
  )


def test_folder_is_read_in_4_bits_and_what_is_written_has_the_same_codes(
  full, tmp_path
):
  """Without a grid; of bfloat16 the scales are rounded to its digits."""
  dtype = full.config.model.param_dtype
  adapter = adapters.AdapterConfig(kind='lora', rank=2, rules=('q_proj',))
  keep = folders.keeper(str(full.folder), 4)
  kernel = full.params['layers']['mlp']['up_proj']['kernel']
  kept = keep('layers/mlp/up_proj/kernel', kernel)
  assert kept.codes.shape == (L, D, F // 2) and kept.codec.bits == 4
  error = np.abs(dequantize(kept) - kernel.astype(jnp.float32))
  # Half of the widest gap, of a block's largest.
  largest = np.repeat(kept.scale[..., None], 64, -1).reshape(kernel.shape)
  assert np.all(error <= 0.1525 * largest)
  stored = {**full.params}
  stored['layers'] = jax.tree.map_with_path(
    lambda path, x: keep(f'layers/{path_name(path)}', x), stored['layers']
  )
  export(tmp_path / 'hf', stored, full.config.model, adapter)
  assert not (tmp_path / 'hf' / folders.GRID_FILE).exists()
  written = hf.load_params(
    tmp_path / 'hf', llama.HF_TENSORS, jax.eval_shape(lambda: full.params)
  )['layers']['mlp']['up_proj']['kernel']
  again = keep('layers/mlp/up_proj/kernel', written)
  np.testing.assert_array_equal(again.codes, kept.codes)
  np.testing.assert_array_equal(
    again.scale, kept.scale.astype(dtype).astype(jnp.float32)
  )


def test_merged_stacks_are_made_layer_by_layer():
  adapter = adapters.AdapterConfig(kind='lora', rank=2, rules=('q_proj',))
  plain, params = with_adapters(adapter, 8)
  found = folders.merged(params, adapter, 'float32')
  assert jax.tree.structure(
    found, is_leaf=lambda x: isinstance(x, folders.LayerByLayer)
  ) == jax.tree.structure(plain)
  for name in ('q_proj', 'k_proj'):
    kernel = found['layers']['attn'][name]['kernel']
    assert isinstance(kernel, folders.LayerByLayer)
    assert kernel.shape == (L, D, D) and kernel[1].shape == (D, D)
    assert bool(kernel.arrays) == (name == 'q_proj')
  assert found['lm_head']['kernel'] is params['lm_head']['kernel']
