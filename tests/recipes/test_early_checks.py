"""What a recipe finds before it reads its data."""

import dataclasses

import pytest

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
