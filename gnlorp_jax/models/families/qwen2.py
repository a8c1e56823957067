"""Qwen 2 and 2.5: LLaMA's layers, with biases of queries, keys and values."""

import dataclasses
from typing import ClassVar

from gnlorp_jax.models import decoder_hf
from gnlorp_jax.models.decoder import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.decoder import flops_per_token as flops_per_token
from gnlorp_jax.models.decoder import make as make
from gnlorp_jax.models.decoder import num_params as num_params
from gnlorp_jax.models.decoder_config import WindowedConfig
from gnlorp_jax.models.decoder_hf import HF_TENSORS as HF_TENSORS
from gnlorp_jax.models.decoder_hf import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.families import _qwen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
  """Architecture of a Qwen 2 or 2.5 model and the dtypes it works in."""

  model_type: ClassVar[str] = 'qwen2'
  """Name of the family, in Hugging Face's configurations too."""
  qkv_bias: ClassVar[bool] = True
  """Whether queries, keys and values have biases."""


def _published(hidden_size, intermediate_size, heads, num_layers, **others):
  num_heads, num_kv_heads = heads
  return Qwen2Config(
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    num_layers=num_layers,
    **{
      'vocab_size': 151936,
      'max_seq_len': 32768,
      'rope_theta': 1e6,
      **others,
    },
  )


PRESETS: dict[str, Qwen2Config] = {
  'qwen2.5-0.5b': _published(896, 4864, (14, 2), 24, tie_embeddings=True),
  'qwen2.5-1.5b': _published(1536, 8960, (12, 2), 28, tie_embeddings=True),
  'qwen2.5-7b': _published(
    3584, 18944, (28, 4), 28, vocab_size=152064, max_seq_len=131072
  ),
}
"""Qwen 2.5 by size."""


_LAYOUT = decoder_hf.Layout(
  config=Qwen2Config,
  name='Qwen2',
  architecture='Qwen2ForCausalLM',
  fixed={'hidden_act': 'silu'},
  defaults={'num_key_value_heads': 32},
  read=_qwen.read,
  write=_qwen.write,
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
