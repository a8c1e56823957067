"""Models: Flax inside, plain nested dicts outside."""

import dataclasses
import importlib
import os
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from gnlorp_jax.models import families, hf
from gnlorp_jax.models.families.gemma2 import Gemma2Config
from gnlorp_jax.models.families.gemma3_text import Gemma3TextConfig
from gnlorp_jax.models.families.llama import LlamaConfig
from gnlorp_jax.models.families.mistral import MistralConfig
from gnlorp_jax.models.families.phi3 import Phi3Config
from gnlorp_jax.models.families.qwen2 import Qwen2Config
from gnlorp_jax.models.families.qwen3 import Qwen3Config
from gnlorp_jax.models.families.roberta import RobertaConfig
from gnlorp_jax.models.families.smollm3 import SmolLM3Config
from gnlorp_jax.models.interface import Model, Params

Config = (
  Gemma2Config
  | Gemma3TextConfig
  | LlamaConfig
  | MistralConfig
  | Phi3Config
  | Qwen2Config
  | Qwen3Config
  | SmolLM3Config
  | RobertaConfig
)


def family(config: Config) -> ModuleType:
  """The module of a model: what is said of it in one name for all of them.

  Args:
    config: The architecture.

  Returns:
    The module of `families` that its `model_type` names. All have `make`,
    `PRESETS`, `LABEL_RULES`, `HF_TENSORS`, `HF_UNREAD`, `config_from_hf`,
    `config_to_hf`, `num_params` and `flops_per_token`.
  """
  return importlib.import_module(f'{families.__name__}.{config.model_type}')


def family_names() -> tuple[str, ...]:
  """The families there are, by Hugging Face's `model_type`."""
  found = pkgutil.iter_modules(families.__path__)
  return tuple(sorted(m.name for m in found if not m.name.startswith('_')))


def family_of(hf_config: Mapping[str, Any]) -> ModuleType:
  """The module of the family that a Hugging Face configuration names.

  Args:
    hf_config: The JSON object of a `config.json`.

  Returns:
    As of `family`.

  Raises:
    ValueError: If it names none, or one that is not known.
  """
  name = hf_config.get('model_type')
  if name not in family_names():
    part = hf_config.get('text_config')
    hint = (
      f' Its text_config is of model_type={part.get("model_type")!r}: save '
      'that part by itself with transformers.'
      if isinstance(part, Mapping)
      else _described_by_class(hf_config)
    )
    raise ValueError(
      f'Unsupported model: model_type={name!r} (supported: '
      f'{list(family_names())}).{hint}'
    )
  return importlib.import_module(f'{families.__name__}.{name}')


def _described_by_class(hf_config: Mapping[str, Any]) -> str:
  """Which family a configuration without a `model_type` seems to be of.

  It is not taken for granted: families differ in what an absent field means.
  """
  named = hf_config.get('architectures')
  if hf_config.get('model_type') is not None or not isinstance(named, list):
    return ''
  for name in family_names():
    module = importlib.import_module(f'{families.__name__}.{name}')
    preset = next(iter(module.PRESETS.values()))
    if set(module.config_to_hf(preset)['architectures']) <= set(
      map(str, named)
    ):
      return (
        f' Its architectures={named!r} are of "model_type": "{name}": add it.'
      )
  return ''


def presets() -> dict[str, Config]:
  """The configurations of all families by their names."""
  found: dict[str, Config] = {}
  for name in family_names():
    found |= importlib.import_module(f'{families.__name__}.{name}').PRESETS
  return found


def load(folder: str | os.PathLike, **overrides: Any) -> tuple[Model, Params]:
  """A language model of a Hugging Face folder, and its parameters.

  Args:
    folder: What `save_pretrained` of transformers wrote, or the ``hf/`` of a
      run.
    **overrides: Fields of the configuration to replace, such as
      ``compute_dtype='bfloat16'``.

  Returns:
    The model, and its parameters on the first device.

  Raises:
    ValueError: If the folder holds no model of a known family, or is damaged.
  """
  hf_config = hf.load_config(folder)
  module = family_of(hf_config)
  config = dataclasses.replace(module.config_from_hf(hf_config), **overrides)
  model = module.make(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = hf.load_params(
    folder, module.HF_TENSORS, shapes, unread=module.HF_UNREAD
  )
  return model, params
