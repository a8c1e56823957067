import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnlorp_jax.models import hf, llama

CONFIGS = {
  'tied': {'tie_embeddings': True, 'rope_theta': 500.0},
  'untied': {'num_kv_heads': 4, 'rms_norm_eps': 1e-3},
  'grouped': {'num_kv_heads': 2},
}


def build(name='grouped', dtype='float32'):
  """A small model and random parameters."""
  sizes = {
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_layers': 3,
    'num_heads': 4,
    'max_seq_len': 16,
    'param_dtype': dtype,
  }
  model = llama.make(llama.LlamaConfig(**{**sizes, **CONFIGS[name]}))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(
      rng.normal(scale=0.2, size=leaf.shape), leaf.dtype
    ),
    abstract(model),
  )
  return model, params


def abstract(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def export(folder, model, params, **options):
  config = llama.config_to_hf(model.config, bos_token_id=1, eos_token_id=2)
  hf.export(folder, params, llama.HF_TENSORS, config, **options)


def load(folder, model):
  return hf.load_params(folder, llama.HF_TENSORS, abstract(model))


def load_stories(shared):
  folder = shared / 'data/weights/stories260K'
  model = llama.make(llama.config_from_hf(hf.load_config(folder)))
  golden = np.load(folder / 'golden_logits.npz')
  return model, load(folder, model), golden


def pytorch_logits(folder, tokens):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model, report = transformers.LlamaForCausalLM.from_pretrained(
    folder, output_loading_info=True, dtype='auto'
  )
  assert not any(report.values()), report
  with torch.no_grad():
    logits = model(torch.from_numpy(np.array(tokens, np.int64))).logits
  return logits.float().numpy()


def assert_trees_equal(got, expected):
  got, expected = (
    traverse_util.flatten_dict(tree, sep='/') for tree in (got, expected)
  )
  assert got.keys() == expected.keys()
  for path in expected:
    assert got[path].dtype == expected[path].dtype, path
    np.testing.assert_array_equal(got[path], expected[path], err_msg=path)


# Against real weights and against PyTorch.


def test_stories_gives_golden_logits(shared):
  model, params, golden = load_stories(shared)
  logits = jax.jit(model.apply)(params, golden['ids'][None, :64])
  (logits,) = np.asarray(logits)
  np.testing.assert_allclose(logits, golden['logits'], atol=1e-4)
  np.testing.assert_array_equal(logits.argmax(-1), golden['ids'][1:])


def test_exported_stories_are_the_original_tensors(shared, tmp_path):
  model, params, _ = load_stories(shared)
  export(tmp_path / 'out', model, params)
  got, expected = (
    safetensors.numpy.load_file(folder / 'model.safetensors')
    for folder in (tmp_path / 'out', shared / 'data/weights/stories260K')
  )
  assert_trees_equal(got, expected)


@pytest.mark.parametrize('max_shard_bytes', [2**30, 300_000])
def test_exported_stories_gives_equal_logits_in_pytorch(
  shared, tmp_path, max_shard_bytes
):
  model, params, golden = load_stories(shared)
  export(tmp_path / 'out', model, params, max_shard_bytes=max_shard_bytes)
  tokens = golden['ids'][None, :64]
  got = pytorch_logits(tmp_path / 'out', tokens)
  expected = pytorch_logits(shared / 'data/weights/stories260K', tokens)
  np.testing.assert_array_equal(got, expected)
  # Logits of up to 22, float32 on both sides. PyTorch itself is 1.4e-5 away
  # from the golden logits, made by another build of it.
  logits = jax.jit(model.apply)(params, tokens)
  np.testing.assert_allclose(logits, got, atol=3e-5)


@pytest.mark.parametrize(
  ('name', 'max_shard_bytes'),
  [('tied', 2**30), ('untied', 20_000), ('grouped', 2**30)],
)
def test_export_gives_equal_logits_in_pytorch(tmp_path, name, max_shard_bytes):
  model, params = build(name)
  export(tmp_path / 'out', model, params, max_shard_bytes=max_shard_bytes)
  tokens = np.random.default_rng(1).integers(0, 40, (2, 16))
  expected = pytorch_logits(tmp_path / 'out', tokens)
  assert expected.std() > 0.1
  # Logits of order 1, float32 on both sides.
  logits = jax.jit(model.apply)(params, jnp.asarray(tokens, jnp.int32))
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_bfloat16_reaches_pytorch_bit_for_bit(tmp_path):
  torch = pytest.importorskip('torch')
  safetensors_torch = pytest.importorskip('safetensors.torch')
  model, params = build(dtype='bfloat16')
  export(tmp_path / 'out', model, params)
  got = safetensors_torch.load_file(tmp_path / 'out/model.safetensors')
  assert all(tensor.dtype == torch.bfloat16 for tensor in got.values())
  kernel = params['layers']['attn']['k_proj']['kernel'][2]
  np.testing.assert_array_equal(
    got['model.layers.2.self_attn.k_proj.weight'].float().numpy(),
    np.asarray(kernel, np.float32).T,
  )


# Round trips.


@pytest.mark.parametrize(
  ('name', 'dtype', 'max_shard_bytes'),
  [
    ('tied', 'bfloat16', 20_000),
    ('untied', 'float32', 2**30),
    ('grouped', 'float32', 20_000),
    ('grouped', 'bfloat16', 2**30),
  ],
)
def test_round_trip_is_exact(tmp_path, name, dtype, max_shard_bytes):
  model, params = build(name, dtype)
  export(tmp_path / 'out', model, params, max_shard_bytes=max_shard_bytes)
  config = llama.config_from_hf(hf.load_config(tmp_path / 'out'))
  kv_heads = model.config.kv_heads
  assert {**vars(config)} == {**vars(model.config), 'num_kv_heads': kv_heads}
  assert_trees_equal(load(tmp_path / 'out', model), params)


def test_shards_are_indexed_and_keep_to_their_size(tmp_path):
  model, params = build()
  export(tmp_path / 'out', model, params, max_shard_bytes=20_000)
  files = sorted(p.name for p in (tmp_path / 'out').glob('*.safetensors'))
  count = len(files)
  assert count > 2
  assert files == [
    f'model-{i:05d}-of-{count:05d}.safetensors' for i in range(1, count + 1)
  ]
  index = json.loads(
    (tmp_path / 'out/model.safetensors.index.json').read_text()
  )
  found, total = {}, 0
  for name in files:
    tensors = safetensors.numpy.load_file(tmp_path / 'out' / name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= 20_000
    total += size
    found.update({tensor: name for tensor in tensors})
  assert index == {'metadata': {'total_size': total}, 'weight_map': found}
  assert total == 4 * llama.num_params(model.config)


def test_single_file_needs_no_index(tmp_path):
  model, params = build()
  export(tmp_path / 'new/out', model, params)
  files = {path.name for path in (tmp_path / 'new/out').iterdir()}
  assert files == {'config.json', 'model.safetensors'}


def test_load_casts_to_the_dtype_asked_for(tmp_path):
  model, params = build()
  export(tmp_path / 'out', model, params)
  got = load(tmp_path / 'out', build(dtype='bfloat16')[0])
  expected = jax.tree.map(
    lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params
  )
  assert_trees_equal(got, expected)


def test_load_places_shards_on_their_devices(tmp_path):
  model, params = build()
  export(tmp_path / 'out', model, params)
  mesh = Mesh(np.array(jax.devices()[:4]), ('fsdp',))
  sharding = NamedSharding(mesh, PartitionSpec('fsdp'))
  wanted = abstract(model)
  wanted['embed']['embedding'] = wanted['embed']['embedding'].update(
    sharding=sharding
  )
  got = hf.load_params(tmp_path / 'out', llama.HF_TENSORS, wanted)
  embedding = got['embed']['embedding']
  assert embedding.sharding == sharding
  assert [s.data.shape for s in embedding.addressable_shards] == [(10, 32)] * 4
  assert_trees_equal(got, params)
  # And a sharded array is exported whole.
  export(tmp_path / 'again', model, got)
  assert_trees_equal(load(tmp_path / 'again', model), params)


# Refusals.


def rewrite(folder, change):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')


def test_mismatch_names_every_tensor(tmp_path):
  model, params = build()
  export(tmp_path, model, params)

  def change(tensors):
    del tensors['model.norm.weight']
    del tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.layers.3.mlp.up_proj.weight'] = np.zeros((2, 2), np.float32)
    tensors['lm_head.bias'] = np.zeros(40, np.float32)
    tensors['model.layers.0.self_attn.k_proj.weight'] = np.zeros(
      (32, 32), np.float32
    )

  rewrite(tmp_path, change)
  with pytest.raises(ValueError) as error:
    load(tmp_path, model)
  assert str(error.value) == (
    'Checkpoint does not fit model. '
    "Missing: ['model.layers.1.mlp.up_proj.weight', 'model.norm.weight']. "
    "Extra: ['lm_head.bias', 'model.layers.3.mlp.up_proj.weight']. "
    "Shape: ['model.layers.0.self_attn.k_proj.weight: (32, 32) in the "
    "checkpoint, (16, 32) in the model']."
  )


def test_known_buffers_are_ignored(tmp_path):
  model, params = build()
  export(tmp_path, model, params)
  name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  rewrite(tmp_path, lambda t: t.update({name: np.ones(4, np.float32)}))
  assert_trees_equal(load(tmp_path, model), params)


def test_only_tensors_that_may_stay_unread_do(tmp_path):
  model, params = build()
  export(tmp_path, model, params)
  extra = {name: np.ones(2, np.float32) for name in ('pooler.a', 'pooler.b.c')}
  rewrite(tmp_path, lambda tensors: tensors.update(extra))

  def load_without(unread):
    return hf.load_params(
      tmp_path, llama.HF_TENSORS, abstract(model), unread=unread
    )

  assert_trees_equal(load_without(r'pooler\..*|head\..*'), params)
  # The regex is over whole names.
  with pytest.raises(ValueError) as error:
    load_without(r'pooler\..')
  assert str(error.value) == (
    "Checkpoint does not fit model. Missing: []. Extra: ['pooler.b.c']. "
    'Shape: [].'
  )
  with pytest.raises(ValueError, match=r"Extra: \['pooler.a', 'pooler.b.c'\]"):
    load(tmp_path, model)


@pytest.mark.parametrize('max_shard_bytes', [2**30, 20_000])
def test_tensor_shapes_are_those_in_the_files(tmp_path, max_shard_bytes):
  model, params = build()
  export(tmp_path / 'out', model, params, max_shard_bytes=max_shard_bytes)
  expected = {}
  for path in (tmp_path / 'out').glob('*.safetensors'):
    for name, tensor in safetensors.numpy.load_file(path).items():
      expected[name] = tensor.shape
  got = hf.tensor_shapes(tmp_path / 'out')
  assert got == expected
  assert got['model.layers.2.self_attn.k_proj.weight'] == (16, 32)


def test_folder_without_weights_is_refused(tmp_path):
  (tmp_path / 'pytorch_model.bin').touch()
  with pytest.raises(ValueError) as error:
    load(tmp_path, build()[0])
  assert str(error.value) == (
    f'{tmp_path} holds neither model.safetensors nor '
    'model.safetensors.index.json. Other formats are not read; convert them '
    "with transformers' save_pretrained."
  )


def test_damaged_and_absent_files_are_named(tmp_path):
  model, params = build()
  export(tmp_path / 'out', model, params, max_shard_bytes=20_000)
  first, second = sorted((tmp_path / 'out').glob('*.safetensors'))[:2]
  first.write_bytes(first.read_bytes()[:1000])
  with pytest.raises(ValueError, match=f'Cannot read {first}: '):
    load(tmp_path / 'out', model)
  shutil.copy(second, first)
  second.unlink()
  with pytest.raises(ValueError, match=f'Cannot read {second}: '):
    load(tmp_path / 'out', model)
  index = tmp_path / 'out/model.safetensors.index.json'
  index.write_text('{}')
  with pytest.raises(ValueError) as error:
    load(tmp_path / 'out', model)
  assert str(error.value) == f'{index} has no object "weight_map".'


@pytest.mark.parametrize('text', [None, '', '{"hidden_size": '])
def test_unreadable_config_is_named(tmp_path, text):
  path = tmp_path / 'config.json'
  if text is not None:
    path.write_text(text)
  with pytest.raises(ValueError, match=f'Cannot read {path}: '):
    hf.load_config(tmp_path)


def test_config_that_is_no_object_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('[1]')
  with pytest.raises(ValueError) as error:
    hf.load_config(tmp_path)
  path = tmp_path / 'config.json'
  assert str(error.value) == f'{path} must hold a JSON object, not [1].'


def test_parameter_without_a_name_is_refused(tmp_path):
  model, params = build()
  params['lm_head']['bias'] = jnp.zeros(40)
  with pytest.raises(ValueError) as error:
    export(tmp_path / 'out', model, params)
  assert str(error.value) == (
    "No Hugging Face name for the parameters ['lm_head/bias']; add rows for "
    'them to the table.'
  )


def test_export_overwrites_nothing(tmp_path):
  model, params = build()
  (tmp_path / 'out').mkdir()
  export(tmp_path / 'out', model, params)
  before = (tmp_path / 'out/model.safetensors').read_bytes()
  with pytest.raises(ValueError) as error:
    export(tmp_path / 'out', model, jax.tree.map(jnp.zeros_like, params))
  assert str(error.value) == (
    f'Cannot export to {tmp_path / "out"}: it exists, and an export overwrites '
    'nothing. Choose another folder or remove it.'
  )
  assert (tmp_path / 'out/model.safetensors').read_bytes() == before


def test_failed_export_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(*args, **options):
    raise OSError('No space left on device')

  model, params = build()
  monkeypatch.setattr(safetensors.numpy, 'save_file', fail)
  with pytest.raises(OSError, match='No space left'):
    export(tmp_path / 'out', model, params)
  assert not list(tmp_path.iterdir())


# Configurations.

HF_CONFIG = {
  'model_type': 'llama',
  'vocab_size': 40,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 16,
}


@pytest.mark.parametrize(
  'rope, theta',
  [
    ({}, 10000.0),
    ({'rope_theta': 7.0, 'rope_scaling': None}, 7.0),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 8.0}}, 8.0),
  ],
)
def test_rope_theta_is_read_in_every_form(rope, theta):
  assert llama.config_from_hf({**HF_CONFIG, **rope}).rope_theta == theta


@pytest.mark.parametrize(
  'change, wrong',
  [
    ({'model_type': 'gemma'}, "model_type='gemma' (supported: 'llama')"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' (supported: 'silu')"),
    (
      {'rope_parameters': {'rope_type': 'llama3'}, 'attention_dropout': 0.5},
      "attention_dropout=0.5 (supported: 0.0), rope_type='llama3' lacks "
      "['factor', 'low_freq_factor', 'high_freq_factor']",
    ),
    (
      {'quantization_config': {'bits': 4}},
      "quantization_config={'bits': 4} (supported: None)",
    ),
  ],
)
def test_unsupported_fields_are_named(change, wrong):
  with pytest.raises(ValueError) as error:
    llama.config_from_hf({**HF_CONFIG, **change})
  assert str(error.value) == f'Unsupported LLaMA configuration: {wrong}.'


def test_missing_fields_are_named():
  config = dict(HF_CONFIG)
  del config['vocab_size'], config['num_hidden_layers']
  with pytest.raises(ValueError) as error:
    llama.config_from_hf(config)
  assert str(error.value) == (
    "Unsupported LLaMA configuration: the fields ['vocab_size', "
    "'num_hidden_layers'] are missing."
  )


def test_transformers_reads_the_exported_config(tmp_path):
  transformers = pytest.importorskip('transformers')
  model, params = build('tied', 'bfloat16')
  export(tmp_path / 'out', model, params)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert isinstance(config, transformers.LlamaConfig)
  assert config.rope_parameters['rope_theta'] == 500.0
  assert config.num_key_value_heads == 4
  assert config.tie_word_embeddings
  assert str(config.dtype).endswith('bfloat16')
  assert (config.bos_token_id, config.eos_token_id) == (1, 2)
  assert config.pad_token_id is None
  assert llama.config_from_hf(config.to_dict()) == llama.config_from_hf(
    hf.load_config(tmp_path / 'out')
  )
