"""Models: Flax inside, plain nested dicts outside."""

import importlib
from types import ModuleType

from gnlorp_jax.models.families.llama import LlamaConfig
from gnlorp_jax.models.families.roberta import RobertaConfig

Config = LlamaConfig | RobertaConfig


def family(config: Config) -> ModuleType:
  """The module of a model: what is said of it in one name for all of them.

  Args:
    config: The architecture.

  Returns:
    The module of `families` that its `model_type` names. All have `make`,
    `LABEL_RULES`, `HF_TENSORS`, `HF_UNREAD`, `config_from_hf`, `config_to_hf`,
    `num_params` and `flops_per_token`.
  """
  return importlib.import_module(f'{__name__}.families.{config.model_type}')
