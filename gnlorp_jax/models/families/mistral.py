"""Mistral 7B and Mistral Nemo: LLaMA's layers, with a window and free heads."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowedConfig):
  """Architecture of a Mistral model and the dtypes it works in."""

  model_type: ClassVar[str] = 'mistral'
  """Name of the family, in Hugging Face's configurations too."""

  def __post_init__(self):
    super().__post_init__()
    if self.sliding_layers is not None:
      raise ValueError(
        f'sliding_layers={self.sliding_layers} must be None: all layers of a '
        'Mistral slide, or none.'
      )


PRESETS: dict[str, MistralConfig] = {
  'mistral-7b': MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
  ),
}
"""Mistral 7B v0.3."""


def _read(hf):
  fields, reasons = decoder_hf.read_windows(hf, lambda layer: True)
  if fields.get('sliding_layers') is not None:
    reasons.append(
      f'layer_types={hf["layer_types"]!r} (supported: all layers alike)'
    )
  return fields, reasons


_LAYOUT = decoder_hf.Layout(
  config=MistralConfig,
  name='Mistral',
  architecture='MistralForCausalLM',
  fixed={'hidden_act': 'silu'},
  # A window of null is none; an absent one is transformers' default.
  defaults={'num_key_value_heads': 8},
  read=lambda hf: _read({'sliding_window': 4096, **hf}),
  write=lambda config: {'sliding_window': config.sliding_window},
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
