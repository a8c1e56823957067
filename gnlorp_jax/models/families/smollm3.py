"""SmolLM3: LLaMA's layers, every fourth of them without rotary positions."""

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
from gnlorp_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(WindowedConfig):
  """Architecture of a SmolLM3 model and the dtypes it works in."""

  model_type: ClassVar[str] = 'smollm3'
  """Name of the family, in Hugging Face's configurations too."""

  rope_layers: tuple[bool, ...] | None = None
  """Which layers have rotary positions; None: all but every fourth."""

  def __post_init__(self):
    super().__post_init__()
    if (
      self.rope_layers is not None and len(self.rope_layers) != self.num_layers
    ):
      raise ValueError(
        f'rope_layers names {len(self.rope_layers)} layers, and num_layers='
        f'{self.num_layers}: give one value for each layer, or None.'
      )

  @property
  def rotated(self) -> tuple[bool, ...]:
    """Which layers have rotary positions, the default filled in."""
    every_fourth = tuple((i + 1) % 4 != 0 for i in range(self.num_layers))
    return every_fourth if self.rope_layers is None else self.rope_layers

  @property
  def ropes(self) -> tuple[Rope | None, ...]:
    """The rotary positions of each layer; None: it has none."""
    rope = Rope(self.rope_theta, self.rope_scaling)
    return tuple(rope if rotated else None for rotated in self.rotated)


PRESETS: dict[str, SmolLM3Config] = {
  'smollm3-3b': SmolLM3Config(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=11008,
    num_layers=36,
    num_heads=16,
    num_kv_heads=4,
    max_seq_len=65536,
    rope_theta=5e6,
    tie_embeddings=True,
  ),
}
"""SmolLM3 by size."""


def _read(hf):
  count = hf['num_hidden_layers']
  every, given = hf['no_rope_layer_interval'], hf.get('no_rope_layers')
  if not (isinstance(every, int) and every > 0):
    reason = f'no_rope_layer_interval={every!r} (supported: a number > 0)'
    return {}, [reason]
  # In spite of its name, 1 says that a layer has rotary positions.
  rotated = (
    [(i + 1) % every != 0 for i in range(count)] if given is None else given
  )
  if not (isinstance(rotated, list) and len(rotated) == count):
    return {}, [f'no_rope_layers={given!r} (supported: {count} values)']
  windows, reasons = {}, []
  if hf.get('use_sliding_window'):
    windows, reasons = decoder_hf.read_windows(hf, lambda i: not rotated[i])
  return {'rope_layers': tuple(map(bool, rotated)), **windows}, reasons


def _write(config):
  return {
    'no_rope_layers': [int(rotated) for rotated in config.rotated],
    'use_sliding_window': config.sliding_window is not None,
    'sliding_window': config.sliding_window,
    'layer_types': decoder_hf.layer_types(config),
  }


_LAYOUT = decoder_hf.Layout(
  config=SmolLM3Config,
  name='SmolLM3',
  architecture='SmolLM3ForCausalLM',
  fixed={'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False},
  defaults={
    'num_key_value_heads': 4,
    'no_rope_layer_interval': 4,
    'rope_theta': 2e6,
    'tie_word_embeddings': True,
  },
  read=_read,
  write=_write,
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
