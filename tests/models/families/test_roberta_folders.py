"""Weights of RoBERTa in folders of Hugging Face."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnlorp_jax.models import heads, hf, roberta
from tests.models.small_roberta import (
  LABELS,
  MASKED_LM,
  SMALL,
  abstract,
  assert_trees_equal,
  build,
  export,
  paths,
  sequences,
)

# Import.


def rewrite(folder, change):
  """Replaces the tensors of a folder by what `change` makes of them."""
  path = folder / 'model.safetensors'
  tensors = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, path)


def encoder(params):
  return {key: params[key] for key in ('embed', 'layers')}


def load_classifier(folder, num_outputs, key=0, options=None, **fields):
  """With the folder's configuration, some fields replaced."""
  described = hf.load_config(folder)
  config = roberta.config_from_hf(described)
  config = dataclasses.replace(config, **fields)
  labels = LABELS.get(num_outputs, ('no', 'yes'))
  options = {'head': heads.match(described, labels)} | (options or {})
  return roberta.load_classifier(
    folder, config, num_outputs, jax.random.key(key), **options
  )


EXTRAS = {
  'roberta.pooler.dense.weight': (32, 32),
  'roberta.pooler.dense.bias': (32,),
  'roberta.embeddings.position_ids': (1, 20),
  'roberta.embeddings.token_type_ids': (1, 20),
}
COPIES = {
  'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight',
  'lm_head.decoder.bias': 'lm_head.bias',
}


def added(shapes):
  zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  return lambda tensors: {**tensors, **zeros}


def copied(tensors):
  return tensors | {copy: tensors[name] for copy, name in COPIES.items()}


@pytest.mark.parametrize('extras', [{}, EXTRAS])
@pytest.mark.parametrize('copies', [dict, copied])
def test_masked_lm_is_read_beside_what_it_does_not_use(
  tmp_path, extras, copies
):
  model, params = build()
  export(tmp_path, MASKED_LM, model, params)
  rewrite(tmp_path, added(extras))
  rewrite(tmp_path, copies)
  got = hf.load_params(
    tmp_path, roberta.HF_TENSORS, abstract(model), unread=roberta.HF_UNREAD
  )
  assert_trees_equal(got, params)


@pytest.mark.parametrize('copy', COPIES)
def test_copies_that_differ_are_refused(tmp_path, copy):
  model, params = build()
  export(tmp_path, MASKED_LM, model, params)

  def change(tensors):
    tensors = copied(tensors)
    tensors[copy] = tensors[copy].copy()
    tensors[copy][2] += 1
    return tensors

  rewrite(tmp_path, change)
  with pytest.raises(ValueError, match=f'{copy} differs from {COPIES[copy]} '):
    hf.load_params(
      tmp_path, roberta.HF_TENSORS, abstract(model), unread=roberta.HF_UNREAD
    )


@pytest.mark.parametrize('extras', [{}, EXTRAS])
@pytest.mark.parametrize('head', [3, 1])
def test_fitting_classifier_is_read(tmp_path, caplog, head, extras):
  caplog.set_level(logging.INFO)
  model, params = build(head)
  export(tmp_path, head, model, params)
  rewrite(tmp_path, added(extras))
  assert_trees_equal(load_classifier(tmp_path, head), params)
  assert caplog.messages == [f'The classifier is that of {tmp_path}.']


@pytest.mark.parametrize(
  'source, found, extras',
  [
    (MASKED_LM, 'none', {**EXTRAS, 'lm_head.decoder.weight': (61, 32)}),
    (3, "one, but its classes are ('no', 'yes', 'perhaps')", {}),
    ('bare', 'none', EXTRAS),
  ],
)
def test_other_folders_give_their_encoder_and_a_new_classifier(
  tmp_path, caplog, source, found, extras
):
  caplog.set_level(logging.INFO)
  head = MASKED_LM if source == 'bare' else source
  model, params = build(head, initializer_std=0.5)
  export(tmp_path, head, model, params)
  rewrite(tmp_path, added(extras))
  if source == 'bare':
    rewrite(
      tmp_path,
      lambda tensors: {
        name.removeprefix('roberta.'): tensor
        for name, tensor in tensors.items()
        if name.startswith('roberta.')
      },
    )

  def load(key):
    return load_classifier(tmp_path, 2, key)

  got = load(0)
  assert_trees_equal(encoder(got), encoder(params))
  assert f'The classifier of 2 outputs is new: {tmp_path} has {found}.' in (
    caplog.messages
  )
  like = roberta.make_classifier(model.config, 2)
  assert jax.tree.structure(got) == jax.tree.structure(abstract(like))
  dense, out = got['classifier']['dense'], got['classifier']['out']
  assert out['kernel'].shape == (32, 2)
  assert not np.any(dense['bias']) and not np.any(out['bias'])
  # 1024 and 64 values: four standard errors.
  assert abs(np.std(dense['kernel']) / 0.5 - 1) < 0.09
  assert abs(np.std(out['kernel']) / 0.5 - 1) < 0.36
  if source == 'bare':
    assert_trees_equal(load(0), got)
    other = load(1)
    assert_trees_equal(encoder(other), encoder(got))
    assert np.any(other['classifier']['out']['kernel'] != out['kernel'])


NLI = ('contradiction', 'neutral', 'entailment')
MNLI = ('entailment', 'neutral', 'contradiction')


def test_classes_in_another_order_are_put_in_the_task_s(tmp_path, caplog):
  """A folder of `transformers` predicts here what it predicts there."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = roberta.config_to_hf(build()[0].config)
  oracle = transformers.RobertaForSequenceClassification(
    transformers.RobertaConfig(
      **{**config, 'initializer_range': 0.5},
      id2label=dict(enumerate(NLI)),
      label2id={name: i for i, name in enumerate(NLI)},
    )
  ).eval()
  oracle.save_pretrained(tmp_path)
  tokens = sequences([12, 11, 9, 8, 7, 6, 5, 4, 3, 2])
  ids = torch.from_numpy(np.array(tokens, np.int64))
  with torch.no_grad():
    outputs = oracle(ids, attention_mask=(ids != SMALL['pad_id']).long())
  expected = outputs.logits.numpy()
  assert len(set(expected.argmax(1))) > 1
  described = hf.load_config(tmp_path)
  head = heads.match(described, MNLI, 'mnli')
  caplog.set_level(logging.INFO)
  params = load_classifier(tmp_path, 3, options={'head': head})
  assert caplog.messages == [
    f'The classifier is that of {tmp_path}, its outputs in the order (2, 1, 0).'
  ]
  model = roberta.make_classifier(roberta.config_from_hf(described), 3)
  found = np.asarray(jax.jit(model.apply)(params, tokens))
  # Logits of up to 6, float32 on both sides.
  np.testing.assert_allclose(found, expected[:, ::-1], atol=5e-5)
  names = [MNLI[i] for i in found.argmax(axis=1)]
  assert names == [NLI[i] for i in expected.argmax(axis=1)]


def test_reordered_classifier_keeps_dtype_sharding_and_form(tmp_path):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  shapes = fsdp(abstract(roberta.make_classifier(model.config, 3)))
  got = load_classifier(
    tmp_path,
    3,
    options={
      'shapes': shapes,
      'head': heads.Head((1, 2, 0), ''),
      'convert': lambda path, array: {'codes': array},
    },
  )
  for path, leaf in paths(shapes).items():
    found = paths(got)[f'{path}/codes']
    assert found.sharding == leaf.sharding, path
    expected = np.asarray(paths(params)[path])
    if path.startswith('classifier/out/'):
      expected = expected[..., [1, 2, 0]]
    np.testing.assert_array_equal(found, expected)


def test_classifier_is_new_unless_asked_for(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  model, params = build(3)
  export(tmp_path, 3, model, params)
  got = load_classifier(tmp_path, 3, options={'head': heads.NEW})
  assert_trees_equal(encoder(got), encoder(params))
  assert not np.any(got['classifier']['out']['bias'])
  assert caplog.messages == [
    f'The classifier of 3 outputs is new: {tmp_path} has one, but a new one '
    'was asked for.'
  ]


@pytest.mark.parametrize('outputs', [3, 2])
def test_parameters_have_the_dtype_of_the_configuration(tmp_path, outputs):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  got = load_classifier(tmp_path, outputs, param_dtype='bfloat16')
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert_trees_equal(encoder(got), encoder(half))
  if outputs == 3:
    assert_trees_equal(got, half)


def fsdp(abstract_params):
  """Shapes with the last axis that four devices divide spread over them."""
  mesh = Mesh(np.array(jax.devices()[:4]), ('fsdp',))

  def spread(leaf):
    axes = [i for i, size in enumerate(leaf.shape) if size % 4 == 0]
    spec = [None] * len(leaf.shape)
    if axes:
      spec[axes[-1]] = 'fsdp'
    return jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=NamedSharding(mesh, PartitionSpec(*spec)),
    )

  return jax.tree.map(spread, abstract_params)


@pytest.mark.parametrize('outputs', [3, 2])
def test_classifier_is_read_into_fsdp_shardings(tmp_path, outputs):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  shapes = fsdp(abstract(roberta.make_classifier(model.config, outputs)))
  got = load_classifier(tmp_path, outputs, options={'shapes': shapes})
  assert_trees_equal(got, load_classifier(tmp_path, outputs))
  found = paths(got)
  for path, leaf in paths(shapes).items():
    assert found[path].sharding == leaf.sharding, path
  shards = found['layers/mlp/up_proj/kernel'].addressable_shards
  assert {shard.data.shape for shard in shards} == {(2, 32, 11)}
  kernel = found['classifier/dense/kernel'].addressable_shards
  assert {shard.data.shape for shard in kernel} == {(32, 8)}
  # The shapes of the caller are not taken apart.
  assert 'classifier' in shapes


@pytest.mark.parametrize('outputs', [3, 2])
def test_what_convert_makes_of_each_parameter_is_returned(tmp_path, outputs):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  seen = []

  def convert(path, array):
    seen.append(path)
    return {'codes': array + 1}

  got = load_classifier(tmp_path, outputs, options={'convert': convert})
  expected = load_classifier(tmp_path, outputs)
  assert sorted(seen) == sorted(paths(expected))
  assert_trees_equal(
    got, jax.tree.map(lambda array: {'codes': array + 1}, expected)
  )


def test_folder_of_robertamodel_gives_its_hidden_states(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = roberta.config_to_hf(build()[0].config)
  oracle = transformers.RobertaModel(
    transformers.RobertaConfig(**{**config, 'initializer_range': 0.2})
  ).eval()
  oracle.save_pretrained(tmp_path)
  assert 'pooler.dense.weight' in hf.tensor_shapes(tmp_path)
  model = roberta.make_classifier(build()[0].config, 3)
  params = load_classifier(tmp_path, 3)
  tokens = sequences()
  ids = torch.from_numpy(np.array(tokens, np.int64))
  mask = (ids != SMALL['pad_id']).long()
  with torch.no_grad():
    expected = oracle(ids, attention_mask=mask).last_hidden_state.numpy()
  real = np.asarray(tokens != SMALL['pad_id'])
  got = jax.jit(model.hidden)(params, tokens)
  np.testing.assert_allclose(got[real], expected[real], atol=1e-5)


def test_masked_lm_that_transformers_saved_is_read(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  oracle = transformers.RobertaForMaskedLM(
    transformers.RobertaConfig(**roberta.config_to_hf(build()[0].config))
  )
  oracle.save_pretrained(tmp_path)
  model = roberta.make(roberta.config_from_hf(hf.load_config(tmp_path)))
  assert model.config == build()[0].config
  params = hf.load_params(
    tmp_path, roberta.HF_TENSORS, abstract(model), unread=roberta.HF_UNREAD
  )
  np.testing.assert_array_equal(
    params['layers']['mlp']['up_proj']['kernel'][1],
    oracle.roberta.encoder.layer[1].intermediate.dense.weight.detach().T,
  )


def test_unexpected_and_missing_tensors_are_named(tmp_path):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  query = 'roberta.encoder.layer.{}.attention.self.query.weight'

  def change(tensors):
    tensors[query.format(2)] = tensors.pop(query.format(1))
    tensors['classifier.dense.bias'] = np.zeros(31, np.float32)
    return tensors

  rewrite(tmp_path, change)
  with pytest.raises(ValueError) as error:
    load_classifier(tmp_path, 3)
  assert str(error.value) == (
    f"Checkpoint does not fit model. Missing: ['{query.format(1)}']. "
    f"Extra: ['{query.format(2)}']. Shape: ['classifier.dense.bias: (31,) in "
    "the checkpoint, (32,) in the model']."
  )


def test_new_classifier_excuses_no_other_tensor(tmp_path):
  model, params = build()
  export(tmp_path, MASKED_LM, model, params)
  rewrite(tmp_path, added({'adapter.weight': (2,)}))
  with pytest.raises(ValueError, match=r"Extra: \['adapter.weight'\]"):
    load_classifier(tmp_path, 3)


# Export.


@pytest.mark.parametrize('head', [3, 1])
def test_exported_classifier_says_what_its_outputs_are(tmp_path, head):
  transformers = pytest.importorskip('transformers')
  model, params = build(head, layer_norm_eps=1e-4)
  export(tmp_path / 'out', head, model, params)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert isinstance(config, transformers.RobertaConfig)
  assert config.architectures == ['RobertaForSequenceClassification']
  assert config.num_labels == head
  if head == 1:
    assert config.problem_type == 'regression'
  else:
    assert config.problem_type == 'single_label_classification'
    assert config.id2label == {0: 'no', 1: 'yes', 2: 'perhaps'}
    assert config.label2id == {'no': 0, 'yes': 1, 'perhaps': 2}
  assert roberta.config_from_hf(config.to_dict()) == model.config


@pytest.mark.parametrize('head', [3, 1])
def test_exported_classifier_fits_its_task_as_transformers_saves_it(
  tmp_path, head
):
  transformers = pytest.importorskip('transformers')
  model, params = build(head)
  labels = LABELS[head]
  roberta.export_classifier(
    tmp_path / 'out', model.config, params, labels, 'mine'
  )
  transformers.AutoConfig.from_pretrained(tmp_path / 'out').save_pretrained(
    tmp_path / 'again'
  )
  for name in ('out', 'again'):
    described = hf.load_config(tmp_path / name)
    assert heads.match(described, labels, 'mine').outputs == tuple(range(head))
    assert heads.match(described, labels, 'other').outputs is None


@pytest.mark.parametrize(
  'head, labels, wrong',
  [
    (3, (), '0 labels () for 3 outputs'),
    (3, ('a', 'b'), "2 labels ('a', 'b') for 3 outputs"),
    (3, ('a', 'b', 'a'), "3 labels ('a', 'b', 'a') for 3 outputs"),
    (1, ('a',), "1 labels ('a',) for 1 outputs"),
  ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, head, labels, wrong):
  model, params = build(head)
  with pytest.raises(ValueError) as error:
    roberta.export_classifier(tmp_path / 'out', model.config, params, labels)
  assert str(error.value) == (
    f'{wrong}: give each class a name of its own, and a regression none.'
  )
  assert not (tmp_path / 'out').exists()
