"""Models: Flax inside, plain nested dicts outside."""

from types import ModuleType

from gnlorp_jax.models import llama, roberta

Config = llama.LlamaConfig | roberta.RobertaConfig


def family(config: Config) -> ModuleType:
  """The module of a model: what is said of it in one name for all of them.

  Args:
    config: The architecture.

  Returns:
    `llama` or `roberta`. Both have `make`, `LABEL_RULES`, `HF_TENSORS`,
    `HF_UNREAD`, `config_from_hf`, `config_to_hf`, `num_params` and
    `flops_per_token`.
  """
  return roberta if isinstance(config, roberta.RobertaConfig) else llama
