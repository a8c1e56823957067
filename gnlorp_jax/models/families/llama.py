"""LLaMA 1 to 3.3 and what has its layers: SmolLM2, TinyLlama, R1's distills."""

import dataclasses
from typing import Any, ClassVar

from gnlorp_jax.models import decoder_hf, interface
from gnlorp_jax.models.decoder import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.decoder import flops_per_token as flops_per_token
from gnlorp_jax.models.decoder import make as make
from gnlorp_jax.models.decoder import num_params as num_params
from gnlorp_jax.models.decoder_config import DecoderConfig
from gnlorp_jax.models.decoder_hf import HF_TENSORS as HF_TENSORS
from gnlorp_jax.models.decoder_hf import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.rope import Llama3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
  """Architecture of a LLaMA model and the dtypes it works in."""

  model_type: ClassVar[str] = 'llama'
  """Name of the family, in Hugging Face's configurations too."""

  attention_bias: bool = False
  """Whether all projections of the attention have biases."""
  mlp_bias: bool = False
  """Whether the projections of the feed-forward layers have biases."""

  @property
  def qkv_bias(self) -> bool:
    """Whether queries, keys and values have biases."""
    return self.attention_bias

  @property
  def o_bias(self) -> bool:
    """Whether the output projection of the attention has a bias."""
    return self.attention_bias

  @property
  def has_mlp_bias(self) -> bool:
    """Whether the projections of the feed-forward layers have biases."""
    return self.mlp_bias


def _published(
  hidden_size, intermediate_size, num_heads, num_layers, **others
) -> LlamaConfig:
  return LlamaConfig(
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_layers=num_layers,
    **{'vocab_size': 32000, 'max_seq_len': 1024, **others},
  )


PRESETS: dict[str, LlamaConfig] = {
  '9m': _published(128, 352, 4, 4),
  '20m': _published(256, 688, 4, 4),
  '35m': _published(384, 1024, 8, 6),
  '40m': _published(416, 1024, 8, 8),
  '60m': _published(512, 1376, 8, 8),
  '71m': _published(512, 1368, 8, 12),
  '100m': _published(640, 1708, 10, 12, vocab_size=32100),
  '130m': _published(768, 2048, 12, 12),
  '250m': _published(768, 2560, 16, 24),
  '350m': _published(1024, 2736, 16, 24),
  '1b': _published(2048, 5461, 32, 24),
  '3b': _published(2560, 6848, 32, 32),
  '7b': _published(4096, 11008, 32, 32, max_seq_len=2048),
  'llama-3.1-8b': _published(
    4096,
    14336,
    32,
    32,
    num_kv_heads=8,
    vocab_size=128256,
    max_seq_len=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3(
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
    ),
  ),
}
"""The configurations of the GaLore pre-training protocol (arXiv:2403.03507),
and models of today by their names."""


def preset(name: str, **overrides: Any) -> LlamaConfig:
  """A published configuration by name, with some fields replaced.

  Args:
    name: Key of `PRESETS`.
    **overrides: Fields of `LlamaConfig` and their values.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such name.

  Examples:
    >>> preset('60m', param_dtype='bfloat16').hidden_size
    512
  """
  return dataclasses.replace(interface.find_preset(name, PRESETS), **overrides)


_LAYOUT = decoder_hf.Layout(
  config=LlamaConfig,
  name='LLaMA',
  architecture='LlamaForCausalLM',
  fixed={'hidden_act': 'silu'},
  fields={'attention_bias': 'attention_bias', 'mlp_bias': 'mlp_bias'},
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
