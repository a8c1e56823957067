"""Numbers of the settings: all of them have an interval."""

import dataclasses
import math
import typing

import pytest

from gnlorp_jax import models
from gnlorp_jax.compose import settings
from gnlorp_jax.compose.coreset_settings import CoresetOptions
from gnlorp_jax.models.field_types import check_types
from gnlorp_jax.recipes.chat.settings import ChatConfig
from gnlorp_jax.recipes.evaluate.settings import EvaluateConfig
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig
from gnlorp_jax.recipes.layer_scores.settings import LayerScoresConfig
from gnlorp_jax.recipes.merge.settings import MergeConfig
from gnlorp_jax.recipes.pretrain import settings as pretrain
from gnlorp_jax.recipes.sft import settings as sft

ALL = (
  *(settings.OptimConfig(), settings.AdapterOptions(), settings.StepConfig()),
  *(
    settings.LayerSamplingOptions(),
    settings.TaskOptions(),
    settings.MeshConfig(),
  ),
  CoresetOptions(),
  *(pretrain.TrainConfig(), pretrain.DataConfig(), pretrain.SampleConfig()),
  *(sft.SftConfig(), sft.ChatDataConfig(), sft.SftEvalOptions()),
  *(GlueConfig(), TaskDataConfig(), MergeConfig(), EvaluateConfig()),
  *(LayerScoresConfig(), ChatConfig()),
  *{type(preset): preset for preset in models.presets().values()}.values(),
)


def numbers(config, kind):
  """Names of the fields that may be numbers of a kind."""
  hints = typing.get_type_hints(type(config))
  return [
    field.name
    for field in dataclasses.fields(config)
    if typing.get_origin(hints[field.name]) is not tuple
    and kind in (hints[field.name], *typing.get_args(hints[field.name]))
  ]


@pytest.mark.parametrize('config', ALL, ids=lambda c: type(c).__name__)
def test_every_number_must_be_finite(config):
  for name in numbers(config, float):
    for value in (math.nan, math.inf, -math.inf):
      with pytest.raises(ValueError, match=rf'{name}\b.*{value}'):
        dataclasses.replace(config, **{name: value})


def test_numbers_of_a_tuple_must_be_finite_too():
  with pytest.raises(ValueError, match=r'A weight of an expert .* got nan\.'):
    MergeConfig(experts=('a', 'b'), weights=(1.0, math.nan))
  with pytest.raises(ValueError, match=r'A learning rate .* got inf\.'):
    pretrain.TrainConfig(learning_rates='1e-3,inf')


@pytest.mark.parametrize('config', ALL, ids=lambda c: type(c).__name__)
def test_defaults_are_of_the_types_of_their_fields(config):
  check_types(config)
