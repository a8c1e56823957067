import dataclasses
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnlorp_jax.models import _hf_files, hf, llama

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


@pytest.mark.parametrize('name', ['tied', 'untied'])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
def test_all_tensors_of_shards_of_each_dtype_are_read_exactly(
  tmp_path, name, dtype
):
  """Shards that transformers wrote, or wrote again what we exported."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model, params = build(name, 'float32' if dtype == 'float16' else dtype)
  export(tmp_path / 'out', model, params, max_shard_bytes=20_000)
  oracle, report = transformers.LlamaForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True, dtype=getattr(torch, dtype)
  )
  assert not any(report.values()), report
  oracle.save_pretrained(tmp_path / 'again', max_shard_size='20KB')
  assert len(list((tmp_path / 'again').glob('*.safetensors'))) > 2
  config = llama.config_from_hf(hf.load_config(tmp_path / 'again'))
  # Half precision has a place in float32, with no value changed.
  assert config.param_dtype == model.config.param_dtype
  expected = jax.tree.map(
    lambda x: np.asarray(x).astype(dtype).astype(x.dtype), params
  )
  assert_trees_equal(load(tmp_path / 'again', llama.make(config)), expected)


def test_sharded_kernels_are_turned_on_their_way(tmp_path):
  """Every axis over devices, with a dtype that is not the file's."""
  model, params = build()
  export(tmp_path / 'out', model, params)
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('a', 'b'))
  sharding = NamedSharding(mesh, PartitionSpec(None, 'a', 'b'))
  wanted = abstract(build(dtype='bfloat16')[0])
  up = wanted['layers']['mlp']['up_proj']
  up['kernel'] = up['kernel'].update(sharding=sharding)
  got = hf.load_params(tmp_path / 'out', llama.HF_TENSORS, wanted)
  kernel = got['layers']['mlp']['up_proj']['kernel']
  assert kernel.sharding == sharding
  assert {s.data.shape for s in kernel.addressable_shards} == {(3, 16, 24)}
  assert_trees_equal(got, jax.tree.map(lambda x: x.astype('bfloat16'), params))


def test_rows_of_a_layer_may_be_biases_and_norms(tmp_path):
  """What a family adds beside kernels is stacked and not turned."""
  layer = 'model.layers.{layer}'
  table = (
    ('layers/attn/q_proj/kernel', f'{layer}.self_attn.q_proj.weight', True),
    ('layers/attn/q_proj/bias', f'{layer}.self_attn.q_proj.bias', False),
    ('layers/attn/q_norm/scale', f'{layer}.self_attn.q_norm.weight', False),
    ('layers/attn/k_proj/bias', f'{layer}.self_attn.k_proj.bias', False),
  )
  rng = np.random.default_rng(0)
  params = {
    'layers': {
      'attn': {
        'q_proj': {
          'kernel': rng.normal(size=(3, 4, 6)).astype('f'),
          'bias': rng.normal(size=(3, 6)).astype('f'),
        },
        'q_norm': {'scale': rng.normal(size=(3, 2)).astype('f')},
      }
    }
  }
  hf.export(tmp_path / 'out', params, table, {})
  shapes = hf.tensor_shapes(tmp_path / 'out')
  assert shapes['model.layers.2.self_attn.q_proj.weight'] == (6, 4)
  assert shapes['model.layers.2.self_attn.q_proj.bias'] == (6,)
  like = jax.eval_shape(lambda: params)
  assert_trees_equal(hf.load_params(tmp_path / 'out', table, like), params)
  # And one that the checkpoint lacks is missed.
  attn = like['layers']['attn']
  attn['k_proj'] = {'bias': jax.ShapeDtypeStruct((3, 2), np.float32)}
  with pytest.raises(ValueError) as error:
    hf.load_params(tmp_path / 'out', table, like)
  missing = [f'model.layers.{i}.self_attn.k_proj.bias' for i in range(3)]
  assert str(error.value) == (
    f'Checkpoint does not fit model. Missing: {missing}. Extra: []. Shape: [].'
  )


# Copies of tied weights.


def export_copy(folder, change, max_shard_bytes=2**30, dtype='float32'):
  """A tied model, with its embedding once more as the head."""
  model, params = build('tied', dtype)
  head = jnp.asarray(change(np.array(params['embed']['embedding'])))
  untied = params | {'lm_head': {'kernel': head.T}}
  export(folder, model, untied, max_shard_bytes=max_shard_bytes)
  return model, params


def load_copy(folder, model):
  return hf.load_params(folder, llama.HF_TENSORS, abstract(model))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('max_shard_bytes', [2**30, 20_000])
def test_equal_copy_is_read_over_and_not_written(
  tmp_path, monkeypatch, dtype, max_shard_bytes
):
  monkeypatch.setattr(_hf_files, '_COMPARED', 3 * 32)  # Three rows at once.

  def with_nan(embedding):
    embedding[3, 4] = np.nan
    return embedding

  model, params = export_copy(
    tmp_path / 'a', lambda x: x, max_shard_bytes, dtype
  )
  assert 'lm_head.weight' in hf.tensor_shapes(tmp_path / 'a')
  got = load_copy(tmp_path / 'a', model)
  assert_trees_equal(got, params)
  config = llama.config_to_hf(model.config)
  hf.export(tmp_path / 'b', got, llama.HF_TENSORS, config)
  assert 'lm_head.weight' not in hf.tensor_shapes(tmp_path / 'b')
  # A checkpoint without a copy is as good.
  assert_trees_equal(load_copy(tmp_path / 'b', model), params)
  export_copy(tmp_path / 'c', with_nan, max_shard_bytes, dtype)
  with pytest.raises(ValueError, match='in 1 of 1280 values, first in row 3,'):
    load_copy(tmp_path / 'c', model)


def test_copy_that_differs_is_refused_before_anything_is_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(_hf_files, '_COMPARED', 7 * 32)
  monkeypatch.setattr(hf, '_read', None)

  def change(embedding):
    embedding[[20, 33], 5] += 1e-3
    return embedding

  model, _ = export_copy(tmp_path / 'out', change)
  with pytest.raises(ValueError) as error:
    load_copy(tmp_path / 'out', model)
  assert str(error.value) == (
    'lm_head.weight differs from model.embed_tokens.weight in 2 of 1280 '
    'values, first in row 20, but the model ties the two. If the checkpoint '
    "does not, say so: tie_embeddings=False in the model's configuration, "
    '"tie_word_embeddings": false in config.json. Or else remove '
    'lm_head.weight.'
  )
  monkeypatch.undo()
  untied = llama.make(dataclasses.replace(model.config, tie_embeddings=False))
  got = load_copy(tmp_path / 'out', untied)
  assert np.any(got['lm_head']['kernel'].T != got['embed']['embedding'])


def test_copy_of_another_shape_is_refused(tmp_path):
  model, params = build('tied')
  export(tmp_path, model, params)
  rewrite(tmp_path, lambda t: t.update({'lm_head.weight': np.ones((40, 2))}))
  with pytest.raises(ValueError, match=r'Shape: \[.lm_head.weight: \(40, 2\)'):
    load_copy(tmp_path, model)


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
  assert str(error.value) == (
    f'{index} has no object "weight_map", which says in which file each tensor '
    'is. Get it and the weights from one checkpoint.'
  )


def exported_shards(folder):
  model, params = build()
  export(folder, model, params, max_shard_bytes=20_000)
  return model, folder / 'model.safetensors.index.json'


def change_index(path, change):
  index = json.loads(path.read_text())
  change(index['weight_map'])
  path.write_text(json.dumps(index))


def test_index_that_places_tensors_where_they_are_not_is_refused(tmp_path):
  model, index = exported_shards(tmp_path / 'out')
  first, second = sorted((tmp_path / 'out').glob('*.safetensors'))[:2]
  change_index(index, lambda places: places.update({'x.weight': second.name}))
  with pytest.raises(ValueError) as error:
    load(tmp_path / 'out', model)
  assert str(error.value) == (
    f"{second} lacks the tensors ['x.weight'], which "
    'model.safetensors.index.json says it holds. Get both files from the same '
    'checkpoint.'
  )


@pytest.mark.parametrize('place', ['../x', '..', '/x', '', 3, None])
def test_index_that_leaves_its_folder_is_refused(tmp_path, place):
  model, index = exported_shards(tmp_path / 'out')
  change_index(index, lambda places: places.update({'x.weight': place}))
  with pytest.raises(ValueError) as error:
    load(tmp_path / 'out', model)
  assert str(error.value) == (
    f'{index} places x.weight in {place!r}; it must be the name of a file in '
    'the same folder.'
  )


def test_index_decides_between_two_files_with_a_tensor(tmp_path):
  model, index = exported_shards(tmp_path / 'out')
  expected = load(tmp_path / 'out', model)
  first, second = sorted((tmp_path / 'out').glob('*.safetensors'))[:2]
  tensors = safetensors.numpy.load_file(second)
  name = next(iter(safetensors.numpy.load_file(first)))
  tensors[name] = np.zeros(hf.tensor_shapes(tmp_path / 'out')[name], 'f')
  safetensors.numpy.save_file(tensors, second)
  assert_trees_equal(load(tmp_path / 'out', model), expected)


def damaged(data):
  """Files that end early, and headers that lie."""
  size = int.from_bytes(data[:8], 'little')
  return {
    'empty': b'',
    'end in the length': data[:5],
    'end in the header': data[: size // 2],
    'end in the data': data[:-4],
    'too long': data + b'0000',
    'length': b'\xff' * 8 + data[8:],
    'no JSON': data[:8] + b'!' * size + data[8 + size :],
    'no text': data[:8] + b'\xff' * size + data[8 + size :],
    'shape': data.replace(b'"shape":[40,32]', b'"shape":[41,32]'),
    'offsets': data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
    'dtype': data.replace(b'"F32"', b'"F99"'),
  }


@pytest.mark.parametrize('fault', sorted(damaged(bytes(100))))
def test_damaged_header_is_named(tmp_path, fault):
  model, params = build()
  export(tmp_path, model, params)
  path = tmp_path / 'model.safetensors'
  whole = path.read_bytes()
  path.write_bytes(damaged(whole)[fault])
  assert path.read_bytes() != whole
  with pytest.raises(ValueError, match=f'Cannot read {path}: '):
    load(tmp_path, model)


def test_weights_in_codes_are_refused(tmp_path):
  model, params = build()
  export(tmp_path, model, params)
  name = 'model.layers.1.mlp.up_proj.weight'
  rewrite(tmp_path, lambda t: t.update({name: t[name].astype(np.int8)}))
  with pytest.raises(ValueError) as error:
    load(tmp_path, model)
  assert str(error.value) == (
    f"{tmp_path} holds weights of other dtypes than ('BF16', 'F16', 'F32', "
    f"'F64'): {{'{name}': 'I8'}}. Quantised checkpoints are not read; use the "
    'original.'
  )


@pytest.mark.parametrize(
  ('change', 'wrong'),
  [
    (
      {'num_layers': 10**9},
      r'The model has 1000000000 layers, but .* holds 30 tensors in all: its '
      'config.json is not that of its weights. Get both from one checkpoint.',
    ),
    (
      {'vocab_size': 2**30},
      r'model.embed_tokens.weight: \(40, 32\) in the checkpoint, '
      r'\(1073741824, 32\) in the model',
    ),
    (
      {'hidden_size': 2**20},
      r'\(40, 32\) in the checkpoint, \(40, 1048576\) in the model',
    ),
  ],
)
def test_config_of_terabytes_is_refused_by_headers(
  tmp_path, monkeypatch, change, wrong
):
  model, params = build()
  export(tmp_path, model, params)
  monkeypatch.setattr(np, 'empty', None)
  giant = llama.make(dataclasses.replace(model.config, **change))
  with pytest.raises(ValueError, match=wrong):
    load(tmp_path, giant)


@pytest.mark.parametrize('max_shard_bytes', [2**30, 20_000])
def test_size_of_a_config_is_compared_with_the_files(tmp_path, max_shard_bytes):
  model, params = build()
  export(tmp_path / 'out', model, params, max_shard_bytes=max_shard_bytes)
  count = llama.num_params(model.config)
  hf.check_size(tmp_path / 'out', count)
  # A folder may hold a configuration alone, to plan with.
  hf.check_size(tmp_path, 10**15)
  giant = dataclasses.replace(model.config, num_layers=10**9)
  with pytest.raises(ValueError) as error:
    hf.check_size(tmp_path / 'out', llama.num_params(giant))
  assert str(error.value) == (
    f'{tmp_path / "out/config.json"} describes a model of 7,744,000,002,592 '
    f'parameters, but the files beside it hold {count:,} values: it is not '
    'theirs. Get config.json and weights from one checkpoint.'
  )


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
  # Whatever is there is not printed in full.
  (tmp_path / 'config.json').write_text(json.dumps(list(range(10_000))))
  with pytest.raises(ValueError, match=r'not \[0, 1, 2, 3, 4, 5, \.\.\.\]\.'):
    hf.load_config(tmp_path)


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


def test_exported_files_have_the_mode_of_new_files(tmp_path):
  model, params = build()
  before = os.umask(0o022)
  try:
    export(tmp_path / 'out', model, params)
  finally:
    os.umask(before)
  modes = {path.stat().st_mode & 0o777 for path in (tmp_path / 'out').iterdir()}
  assert modes == {0o644}


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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_processes_read_by_slices_is_what_one_reads(
  dtype, tmp_path, monkeypatch
):
  model, params = build(dtype=dtype)
  export(tmp_path / 'out', model, params)
  mesh = Mesh(np.array(jax.devices()[:4]), ('fsdp',))

  def split(leaf):
    last = leaf.ndim - 1
    axis = last if leaf.shape[-1] % 4 == 0 else last - 1
    names = ['fsdp' if i == axis else None for i in range(leaf.ndim)]
    of = NamedSharding(mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of)

  like = jax.tree.map(split, abstract(model))
  # As if other processes had some of the devices.
  monkeypatch.setattr(NamedSharding, 'is_fully_addressable', False)
  read = []
  own = hf._read_own
  monkeypatch.setattr(
    hf, '_read_own', lambda *parts: read.append(parts) or own(*parts)
  )
  found = hf.load_params(tmp_path / 'out', llama.HF_TENSORS, like)
  monkeypatch.undo()
  assert len(read) == len(jax.tree.leaves(params))
  assert_trees_equal(found, params)


def test_what_cannot_be_written_is_told_with_the_file(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
  try:
    with pytest.raises(OSError, match=r'tensors could not be written: .*large'):
      _hf_files.save(tmp_path / 'a.safetensors', {'a': np.zeros(2**20)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
