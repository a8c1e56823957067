"""What a recipe finds before it reads its data."""

import dataclasses

import numpy as np
import pytest

from gnlorp_jax.data import chat, glue
from gnlorp_jax.recipes.glue import recipe as glue_recipe
from gnlorp_jax.recipes.pretrain import recipe as pretrain_recipe
from gnlorp_jax.recipes.pretrain.settings import TrainConfig


def test_weights_that_have_no_room_are_told_before_text_is_read(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(pretrain_recipe.data, 'load', None)
  model = dataclasses.replace(TrainConfig().model, vocab_size=2_000_000_000)
  config = TrainConfig(model=model, run_dir=str(tmp_path / 'run'))
  with pytest.raises(ValueError, match='the state of the optimizer alone take'):
    pretrain_recipe.prepare(config)


@pytest.mark.parametrize('name', ['batch_size', 'seq_len'])
def test_batch_that_has_no_room_is_told_before_text_is_read(
  monkeypatch, tmp_path, name
):
  monkeypatch.setattr(pretrain_recipe.data, 'load', None)
  small = TrainConfig()
  length = 128 if name == 'batch_size' else 2**21
  config = dataclasses.replace(
    small,
    batch_size=2**28 if name == 'batch_size' else 16,
    model=dataclasses.replace(small.model, max_seq_len=length),
    data=dataclasses.replace(small.data, seq_len=length),
    run_dir=str(tmp_path / 'run'),
  )
  with pytest.raises(
    ValueError, match='the least that batch_size=.* take [0-9.]+ '
  ):
    pretrain_recipe.prepare(config)


def test_least_length_of_batches_is_that_of_the_shortest_example():
  """A batch of GLUE is as long as its examples, not as max_length."""
  encoded = [np.zeros(length, np.int32) for length in (200, 20, 40)]
  assert glue.least_length(encoded, (16, 32, 256)) == 32
  examples = [chat.Example(ids, ids.astype(np.float32)) for ids in encoded]
  options = {'batch_size': 2, 'max_length': 256, 'pad_id': 0}
  for packing, least in ((False, 32), (True, 256)):
    made = chat.TrainingBatches(examples, packing=packing, **options)
    assert made.least_length == least


def test_batch_of_padding_is_refused():
  glue_recipe._check_batch(64, 16, 'mine')
  glue_recipe._check_batch(200, 100, 'mine')
  with pytest.raises(ValueError) as error:
    glue_recipe._check_batch(100_000, 16, 'mine')
  assert str(error.value) == (
    'batch_size=100000 is more than twice the 16 training examples of mine: '
    'the rest of every batch would be padding, which takes memory and time. '
    'Use at most 64.'
  )
