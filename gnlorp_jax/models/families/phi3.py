"""Phi 3, 3.5, 4 and 4-mini: LLaMA's layers with fused products.

Note:
  Queries, keys and values are one kernel here too, and so are gate and up: an
  optimizer or an adapter sees what it sees in transformers, one matrix with one
  subspace, not three.
"""

import dataclasses
from typing import ClassVar

from gnlorp_jax.models import decoder_hf, interface
from gnlorp_jax.models.decoder import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.decoder import flops_per_token as flops_per_token
from gnlorp_jax.models.decoder import make as make
from gnlorp_jax.models.decoder import num_params as num_params
from gnlorp_jax.models.decoder_config import DecoderConfig
from gnlorp_jax.models.decoder_hf import HF_TENSORS as HF_TENSORS
from gnlorp_jax.models.decoder_hf import HF_UNREAD as HF_UNREAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(DecoderConfig):
  """Architecture of a Phi 3 or 4 model and the dtypes it works in."""

  model_type: ClassVar[str] = 'phi3'
  """Name of the family, in Hugging Face's configurations too."""
  fused: ClassVar[bool] = True
  """Whether queries, keys and values are one product, and gate and up one."""

  partial_rotary_factor: float = 1.0
  """Share of a head's features that turn with the position, in (0, 1]."""
  sliding_window: int | None = None
  """Positions that tokens attend to; None: all up to them."""

  def __post_init__(self):
    super().__post_init__()
    interface.check_positive(self, 'sliding_window')
    if not 0 < self.partial_rotary_factor <= 1:
      raise ValueError(
        f'partial_rotary_factor={self.partial_rotary_factor} must be in (0, 1].'
      )
    if self.rotary_width % 2 or not self.rotary_width:
      raise ValueError(
        f'partial_rotary_factor={self.partial_rotary_factor} of '
        f'{self.head_size} features are {self.rotary_width}: this must be even '
        'and positive, as rotary positions turn pairs of features.'
      )

  @property
  def rotary_width(self) -> int:
    """Features of a head that turn, the first ones."""
    return int(self.head_size * self.partial_rotary_factor)

  @property
  def windows(self) -> tuple[int | None, ...]:
    """Positions tokens of all layers attend to; None: all up to them."""
    return (self.sliding_window,)


def _published(hidden_size, intermediate_size, heads, num_layers, **others):
  num_heads, num_kv_heads = heads
  return Phi3Config(
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    num_layers=num_layers,
    rms_norm_eps=1e-5,
    **others,
  )


PRESETS: dict[str, Phi3Config] = {
  'phi-3-mini-4k': _published(
    *(3072, 8192, (32, 32), 32),
    vocab_size=32064,
    max_seq_len=4096,
    sliding_window=2047,
  ),
  'phi-4': _published(
    *(5120, 17920, (40, 10), 40),
    vocab_size=100352,
    max_seq_len=16384,
    rope_theta=250000.0,
  ),
}
"""Phi 3 and 4 by size."""


def _prepare(hf):
  # As transformers, which prefers the old spelling and takes all names of
  # scaling that this family ever had for one.
  scaling = dict(hf.get('rope_scaling') or hf.get('rope_parameters') or {})
  part = scaling.pop('partial_rotary_factor', None)
  kind = scaling.get('rope_type') or scaling.get('type')
  if kind in ('longrope', 'su', 'yarn'):
    original = hf.get('original_max_position_embeddings') or 4096
    scaling['rope_type'] = 'longrope'
    scaling['original_max_position_embeddings'] = original
    longest = hf.get('max_position_embeddings') or original
    scaling['factor'] = scaling.get('factor') or longest / original
  return {
    **hf,
    'rope_scaling': scaling,
    'rope_parameters': None,
    'partial_rotary_factor': None,  # Which others must not have.
    'rotary_part': part or hf.get('partial_rotary_factor'),
  }


def _read(hf):
  part, scaling = hf['rotary_part'], hf['rope_scaling']
  fields = {} if part is None else {'partial_rotary_factor': part}
  kind = scaling.get('rope_type') or scaling.get('type') or 'default'
  if kind in ('default', 'longrope'):
    return fields, []
  return fields, [f"rope_type={kind!r} (supported: 'default', 'longrope')"]


def _write(config):
  fields, scaling = {'rope_scaling': None}, config.rope_scaling
  if scaling is not None:
    original = scaling.original_max_position_embeddings
    fields = {
      'original_max_position_embeddings': original,
      # transformers 4 takes these three alone, and infers the others.
      'rope_scaling': {
        'type': 'longrope',
        'short_factor': list(scaling.short_factor),
        'long_factor': list(scaling.long_factor),
      },
    }
    if scaling.factor != config.max_seq_len / original:
      fields['rope_scaling']['factor'] = scaling.factor
    if scaling.attention_factor is not None:
      fields['rope_scaling']['attention_factor'] = scaling.attention_factor
  return {**fields, 'partial_rotary_factor': config.partial_rotary_factor}


_LAYOUT = decoder_hf.Layout(
  config=Phi3Config,
  name='Phi 3',
  architecture='Phi3ForCausalLM',
  fixed={
    'hidden_act': 'silu',
    'attention_bias': False,
    'resid_pdrop': 0.0,
    'embd_pdrop': 0.0,
  },
  defaults={'rms_norm_eps': 1e-5},
  fields={'sliding_window': 'sliding_window'},
  prepare=_prepare,
  read=_read,
  write=_write,
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
