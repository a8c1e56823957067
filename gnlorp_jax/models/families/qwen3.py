"""Qwen 3, dense: normed queries and keys, heads of free width."""

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
class Qwen3Config(WindowedConfig):
  """Architecture of a dense Qwen 3 model and the dtypes it works in."""

  model_type: ClassVar[str] = 'qwen3'
  """Name of the family, in Hugging Face's configurations too."""
  qk_norm: ClassVar[bool] = True
  """Whether queries and keys are normed before they are rotated."""


def _published(hidden_size, intermediate_size, num_heads, num_layers, **others):
  return Qwen3Config(
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_kv_heads=8,
    head_dim=128,
    num_layers=num_layers,
    vocab_size=151936,
    max_seq_len=40960,
    rope_theta=1e6,
    **others,
  )


PRESETS: dict[str, Qwen3Config] = {
  'qwen3-0.6b': _published(1024, 3072, 16, 28, tie_embeddings=True),
  'qwen3-8b': _published(4096, 12288, 32, 36),
}
"""Qwen 3 by size."""


_LAYOUT = decoder_hf.Layout(
  config=Qwen3Config,
  name='Qwen3',
  architecture='Qwen3ForCausalLM',
  fixed={'hidden_act': 'silu', 'attention_bias': False},
  defaults={'num_key_value_heads': 32, 'head_dim': 128},
  read=_qwen.read,
  write=_qwen.write,
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
