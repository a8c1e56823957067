"""Gemma 2: four norms a block, GeGLU, caps, windows in every other layer.

Note:
  In bfloat16 transformers caps the scores and the logits in bfloat16; here both
  are float32 from the product to the end. The root of the width, by which
  embeddings are multiplied, is rounded to the dtype of the computation, as
  there; of a bfloat16 checkpoint computed in float32 it is not rounded. Norms
  multiply by 1 plus their parameter in float32 before they round, as there.
"""

import dataclasses
from typing import ClassVar

from gnlorp_jax.models import decoder_hf, interface
from gnlorp_jax.models.attention import ScoreRule
from gnlorp_jax.models.decoder import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.decoder import flops_per_token as flops_per_token
from gnlorp_jax.models.decoder import make as make
from gnlorp_jax.models.decoder import num_params as num_params
from gnlorp_jax.models.decoder_hf import HF_POST_NORM_TENSORS
from gnlorp_jax.models.decoder_hf import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.families import _gemma

HF_TENSORS = HF_POST_NORM_TENSORS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(_gemma.GemmaConfig):
  """Architecture of a Gemma 2 model and the dtypes it works in."""

  model_type: ClassVar[str] = 'gemma2'
  """Name of the family, in Hugging Face's configurations too."""

  attn_logit_softcapping: float | None = 50.0
  """Largest size of a score, or None."""
  final_logit_softcapping: float | None = 30.0
  """Largest size of a logit, or None."""

  def __post_init__(self):
    super().__post_init__()
    interface.check_positive(self, 'attn_logit_softcapping')

  @property
  def score_rule(self) -> ScoreRule:
    """How products of queries and keys become scores."""
    return super().score_rule._replace(softcap=self.attn_logit_softcapping)


def _slides(layer):
  return layer % 2 == 0


def _published(hidden_size, intermediate_size, heads, num_layers):
  num_heads, num_kv_heads = heads
  return Gemma2Config(
    vocab_size=256000,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=256,
    num_layers=num_layers,
    max_seq_len=8192,
    sliding_window=4096,
    sliding_layers=tuple(_slides(layer) for layer in range(num_layers)),
    tie_embeddings=True,
  )


PRESETS: dict[str, Gemma2Config] = {
  'gemma-2-2b': _published(2304, 9216, (8, 4), 26),
  'gemma-2-9b': _published(3584, 14336, (16, 8), 42),
}
"""Gemma 2 by size."""


_CAPS = 'attn_logit_softcapping', 'final_logit_softcapping'
_LAYOUT = decoder_hf.Layout(
  config=Gemma2Config,
  name='Gemma 2',
  architecture='Gemma2ForCausalLM',
  fixed=_gemma.FIXED,
  defaults=_gemma.DEFAULTS,
  fields=_gemma.FIELDS,
  read=lambda hf: _gemma.read(hf, _slides, *_CAPS),
  write=lambda config: _gemma.write(config, *_CAPS),
)
config_from_hf, config_to_hf = _LAYOUT.config_from_hf, _LAYOUT.config_to_hf
