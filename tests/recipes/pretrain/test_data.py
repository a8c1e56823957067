"""Text to tokens and batches, as a pre-training run asks for them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tokenizers

from gnlorp_jax.compose.settings import AdapterOptions
from gnlorp_jax.data import tokenizer as tokenizer_lib
from gnlorp_jax.models import llama, roberta
from gnlorp_jax.recipes.pretrain import data
from gnlorp_jax.recipes.pretrain.settings import (
  MASKED,
  DataConfig,
  TrainConfig,
)
from gnlorp_jax.training import sharding

TINY = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=16,
)
MESH = sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  words = [f'word{i % 37}' for i in range(6000)]
  (folder / 'text.txt').write_text(' '.join(words))
  (folder / 'other.txt').write_text(' '.join(words[::-1][:500]))
  return folder


def config_of(source, **changes):
  options = changes.pop('data', {})
  default = MASKED if changes.pop('masked', False) else TrainConfig()
  model = roberta.preset('tiny', vocab_size=300)
  return dataclasses.replace(
    default,
    batch_size=4,
    model=TINY if default.objective == 'causal' else model,
    data=DataConfig(
      source=str(source / 'text.txt'),
      seq_len=16,
      cache_dir=str(source / 'cache'),
      **options,
    ),
    **changes,
  )


def test_start_from_weights_uses_their_tokenizer(tmp_path):
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'</s>': 0, 'a': 1}, unk_token='</s>')
  )
  config = TrainConfig(init_from=str(tmp_path))
  with pytest.raises(ValueError) as error:
    data.load_tokenizer(config, config.model)
  assert str(error.value) == (
    f'{tmp_path} has no tokenizer.json, and its weights fit no other tokens: '
    'name the tokenizer as data.tokenizer.'
  )
  words.save(str(tmp_path / 'tokenizer.json'))
  assert data.load_tokenizer(config, config.model).vocab_size == 2


def test_another_tokenizer_may_be_named(source, tmp_path):
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'</s>': 0, 'a': 1}, unk_token='</s>')
  )
  path = tmp_path / 'tokenizer.json'
  words.save(str(path))
  config = config_of(
    source, init_from=str(source), data={'tokenizer': str(path)}
  )
  assert data.load_tokenizer(config, config.model).vocab_size == 2


def test_start_from_a_preset_trains_a_tokenizer(source):
  """Its weights are random: they know no tokens."""
  config = config_of(source, init_from='9m')
  assert data.load_tokenizer(config, TINY).vocab_size <= 300


def test_all_sources_are_looked_for_before_one_is_read(source, monkeypatch):
  config = config_of(source, data={'validation_source': 'validaton.txt'})
  monkeypatch.setattr(data, 'load_tokenizer', None)
  with pytest.raises(ValueError, match=r"Unknown data source 'validaton\.txt'"):
    data.load(config, TINY)


@pytest.fixture
def beginning(tmp_path):
  """A folder whose tokenizer puts a token before every text."""
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {'<s>': 0, '</s>': 1, 'a': 2, 'x': 3}, unk_token='x'
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  words.save(str(tmp_path / 'tokenizer.json'))
  return str(tmp_path)


def test_documents_begin_with_a_token_if_asked_to(source, beginning):
  options = {'tokenizer': beginning, 'validation_fraction': 0.2}
  plain = data.load(config_of(source, data=options), TINY)
  begun = data.load(config_of(source, data=options | {'add_bos': True}), TINY)
  assert begun.training.tokens == plain.training.tokens + 1
  np.testing.assert_array_equal(
    begun.training.items()[:3], [0, *plain.training.items()[:2]]
  )


def test_what_the_texts_of_a_trained_model_began_with_is_told(
  source, beginning, caplog
):
  begins = {'add_bos': True}
  data.load(config_of(source, init_from=beginning, data=begins), TINY)
  data.load(config_of(source, data={'tokenizer': beginning}), TINY)
  assert 'begins every text' not in caplog.text
  data.load(config_of(source, init_from=beginning), TINY)
  assert (
    "The tokenizer begins every text with '<s>', and so, most likely, did the "
    f'texts that the model in {beginning} learned from; with '
    'data.add_bos=False the documents of this run do not.'
  ) in caplog.text


def test_padding_of_another_tokenizer_is_told():
  class Tokenizer:
    vocab_size, pad_id = 300, 0

  model = roberta.preset('tiny', vocab_size=300)
  with pytest.raises(ValueError) as error:
    data.check_tokenizer(Tokenizer(), model, masked=True)
  assert str(error.value) == (
    'The tokenizer pads with id 0, the model with model.pad_id=1. Set the '
    'latter to the former.'
  )
  data.check_tokenizer(Tokenizer(), TINY, masked=False)


def test_tokenizer_larger_than_the_model_is_told():
  class Tokenizer:
    vocab_size, pad_id = 301, 0

  with pytest.raises(ValueError, match='the model has vocab_size=300'):
    data.check_tokenizer(Tokenizer(), TINY, masked=False)


def test_validation_text_is_the_end_or_another(source):
  config = config_of(source, data={'validation_fraction': 0.2})
  text = data.load(config, TINY)
  assert text.tokenizer.vocab_size <= 300
  tokens = text.training.tokens
  assert text.training.start == 0
  assert text.training.stop == text.validation.start
  assert text.validation.stop == tokens
  assert text.training.stop == pytest.approx(0.8 * tokens, rel=0.05)
  other = config_of(
    source, data={'validation_source': str(source / 'other.txt')}
  )
  text = data.load(other, TINY)
  assert (text.training.start, text.training.stop) == (0, tokens)
  assert text.validation.tokens < tokens / 4


CASES = {
  'causal': ({}, {'inputs', 'targets', 'weights'}),
  'adapters': (
    {'adapter': AdapterOptions(kind='lora')},
    {'inputs', 'targets', 'weights'},
  ),
  'adapters with dropout': (
    {'adapter': AdapterOptions(kind='lora', dropout=0.1)},
    {'inputs', 'targets', 'weights', 'seeds'},
  ),
  'dropout without adapters': (
    {'adapter': AdapterOptions(dropout=0.1)},
    {'inputs', 'targets', 'weights'},
  ),
  'documents apart': (
    {'data': {'document_mask': True}},
    {'inputs', 'targets', 'weights', 'segments'},
  ),
  'documents apart, with dropout': (
    {
      'data': {'document_mask': True},
      'adapter': AdapterOptions(kind='lora', dropout=0.1),
    },
    {'inputs', 'targets', 'weights', 'segments', 'seeds'},
  ),
  'masked': (
    {'masked': True},
    {'inputs', 'targets', 'weights', 'positions', 'seeds'},
  ),
  'masked adapters with dropout': (
    {'masked': True, 'adapter': AdapterOptions(kind='lora', dropout=0.1)},
    {'inputs', 'targets', 'weights', 'positions', 'seeds'},
  ),
}


@pytest.mark.parametrize('case', CASES)
def test_batches_are_those_that_are_compiled_for(source, case):
  changes, names = CASES[case]
  config = config_of(source, **changes)
  abstract = data.abstract_batch(config, MESH)
  assert set(abstract) == names
  batches = data.training_batches(config, data.load(config, config.model))
  batch = next(batches)
  batches.close()
  assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
    k: (x.shape, x.dtype) for k, x in abstract.items()
  }
  for leaf in abstract.values():
    assert leaf.sharding == sharding.batch_sharding(MESH)


def test_seeds_of_dropout_are_drawn_anew_and_follow_the_position(source):
  config = config_of(source, adapter=AdapterOptions(kind='lora', dropout=0.1))
  text = data.load(config, TINY)
  make = functools.partial(data.training_batches, config, text)
  batches = make()
  first, second = next(batches), next(batches)
  position = batches.get_state()
  third = next(batches)
  batches.close()
  seeds = np.concatenate([b['seeds'] for b in (first, second, third)])
  assert len(set(seeds.tolist())) == len(seeds)
  resumed = make()
  resumed.set_state(position)
  again = next(resumed)
  resumed.close()
  jax.tree.map(np.testing.assert_array_equal, again, third)
  # The text and its order are those of a run without dropout.
  plain = data.training_batches(config_of(source), text)
  expected = next(plain)
  plain.close()
  for name, rows in expected.items():
    np.testing.assert_array_equal(first[name], rows)


def test_evaluation_visits_every_sequence_once_and_anew(source):
  config = config_of(source)
  text = data.load(config, TINY)
  make = data.evaluation_batches(config, text)
  sums = []
  for _ in range(2):
    batches = make()
    sums.append(sum(float(b['weights'].sum()) for b in batches))
    batches.close()
  length = text.validation.stop - text.validation.start
  assert sums[0] == sums[1] == (length - 1) // 16 * 16


def test_tokenizer_of_the_masked_objective_has_a_mask(source):
  config = config_of(source, masked=True)
  found = data.load_tokenizer(config, config.model)
  assert isinstance(found, tokenizer_lib.Tokenizer)
  assert found.mask_id is not None and found.pad_id == config.model.pad_id
