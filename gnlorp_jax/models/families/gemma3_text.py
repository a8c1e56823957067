"""Gemma 3, its text part: normed queries and keys, five windows to one without.

The models that read nothing but text are of this type (270M, 1B). In the others
it is what their `text_config` says.

Note:
  As of `gemma2`. transformers reads a cap of the scores, and applies none to
  this family; here one is refused.
"""

import dataclasses
from typing import ClassVar

from gnlorp_jax.models import decoder_hf, interface, rope
from gnlorp_jax.models.decoder import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.decoder import flops_per_token as flops_per_token
from gnlorp_jax.models.decoder import make as make
from gnlorp_jax.models.decoder import num_params as num_params
from gnlorp_jax.models.decoder_hf import FULL, HF_POST_NORM_TENSORS, SLIDING
from gnlorp_jax.models.decoder_hf import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.families import _gemma
from gnlorp_jax.models.rope import Rope

HF_TENSORS = HF_POST_NORM_TENSORS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig(_gemma.GemmaConfig):
  """Architecture of a Gemma 3 model and the dtypes it works in."""

  model_type: ClassVar[str] = 'gemma3_text'
  """Name of the family, in Hugging Face's configurations too."""
  qk_norm: ClassVar[bool] = True
  """Whether queries and keys are normed before they are rotated."""

  rope_theta: float = 1e6
  """Base of the rotary frequencies in layers that do not slide."""
  rope_local_theta: float = 10000.0
  """Base of the rotary frequencies in layers that slide, never scaled."""

  def __post_init__(self):
    super().__post_init__()
    interface.check_positive(self, 'rope_local_theta')

  @property
  def ropes(self) -> tuple[Rope | None, ...]:
    """The rotary positions of each layer."""
    full, local = (
      Rope(self.rope_theta, self.rope_scaling),
      Rope(self.rope_local_theta),
    )
    return tuple(full if w is None else local for w in self.windows)


def _published(hidden_size, intermediate_size, num_layers):
  return Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    num_layers=num_layers,
    max_seq_len=32768,
    sliding_window=512,
    sliding_layers=tuple((i + 1) % 6 != 0 for i in range(num_layers)),
    tie_embeddings=True,
  )


PRESETS: dict[str, Gemma3TextConfig] = {
  'gemma-3-270m': _published(640, 2048, 18),
  'gemma-3-1b': _published(1152, 6912, 26),
}
"""Gemma 3 by size."""


def _prepare(hf):
  by_type = dict(hf.get('rope_parameters') or {})
  full, local = (by_type.pop(kind, None) or {} for kind in (FULL, SLIDING))
  return {
    **hf,
    'rope_parameters': by_type,  # Where `_read` allows none.
    'rope_scaling': {**full, **(hf.get('rope_scaling') or {})},
    'rope_local': {'rope_theta': hf.get('rope_local_base_freq'), **local},
  }


def _read(hf):
  every, reasons = hf['sliding_window_pattern'], []
  if not (isinstance(every, int) and every > 0):
    return {}, [f'sliding_window_pattern={every!r} (supported: a number > 0)']
  if hf['rope_parameters']:
    reasons.append(
      f'rope_parameters={hf["rope_parameters"]!r} (supported: those of '
      f'{FULL!r} and of {SLIDING!r})'
    )
  local = hf['rope_local']
  kind = local.get('rope_type') or local.get('type') or 'default'
  if kind != 'default':
    reasons.append(f"rope_type={kind!r} of {SLIDING!r} (supported: 'default')")
  fields, more = _gemma.read(
    hf, lambda layer: (layer + 1) % every != 0, 'final_logit_softcapping'
  )
  if local['rope_theta'] is not None:
    fields['rope_local_theta'] = local['rope_theta']
  return fields, [*reasons, *more]


def _write(config):
  return {
    'rope_local_base_freq': config.rope_local_theta,
    'rope_parameters': {
      FULL: rope.to_hf(config.rope_theta, config.rope_scaling),
      SLIDING: rope.to_hf(config.rope_local_theta, None),
    },
    **_gemma.write(config, 'final_logit_softcapping'),
  }


_LAYOUT = decoder_hf.Layout(
  config=Gemma3TextConfig,
  name='Gemma 3',
  architecture='Gemma3ForCausalLM',
  fixed={**_gemma.FIXED, 'attn_logit_softcapping': None},
  defaults={**_gemma.DEFAULTS, 'rope_theta': 1e6, 'sliding_window_pattern': 6},
  fields=_gemma.FIELDS,
  prepare=_prepare,
  read=_read,
  write=_write,
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
