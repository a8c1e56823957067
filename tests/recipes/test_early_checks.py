"""What a recipe finds before it reads its data."""

import pytest

from gnlorp_jax.recipes.glue import recipe as glue_recipe
from gnlorp_jax.recipes.glue.settings import GlueConfig
from gnlorp_jax.recipes.pretrain import recipe as pretrain_recipe
from gnlorp_jax.recipes.pretrain.settings import TrainConfig
from gnlorp_jax.recipes.sft import recipe as sft_recipe
from gnlorp_jax.recipes.sft.settings import SftConfig


@pytest.mark.parametrize(
  ('check', 'kind', 'reader'),
  [
    (pretrain_recipe.prepare, TrainConfig, pretrain_recipe.data),
    (sft_recipe.prepare, SftConfig, sft_recipe.data),
    (
      lambda config: glue_recipe.check(config, []),
      GlueConfig,
      glue_recipe.tasks,
    ),
  ],
)
def test_run_directory_that_cannot_be_is_found_before_data_is_read(
  check, kind, reader, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    reader, 'load_tokenizer' if reader is glue_recipe.tasks else 'load', None
  )
  (tmp_path / 'file').touch()
  with pytest.raises(ValueError, match=r'is no directory, but a file\.'):
    check(kind(run_dir=str(tmp_path / 'file' / 'run')))
