"""What Gemma 2 and the text part of Gemma 3 have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from gnlorp_jax.models import decoder_hf, interface
from gnlorp_jax.models.attention import ScoreRule
from gnlorp_jax.models.decoder_config import WindowedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(WindowedConfig):
  """Architecture of a Gemma model and the dtypes it works in."""

  activation: ClassVar[Literal['silu', 'gelu_tanh']] = 'gelu_tanh'
  """Of the gate in the feed-forward layers."""
  post_norms: ClassVar[bool] = True
  """Whether the outputs of attention and feed-forward layers are normed too."""
  norms_from_one: ClassVar[bool] = True
  """Whether a norm multiplies by 1 plus its parameter, not by the parameter."""
  scaled_embeddings: ClassVar[bool] = True
  """Whether embeddings are multiplied by the root of their width."""

  query_pre_attn_scalar: float = 256
  """Products of queries and keys are divided by its root."""
  final_logit_softcapping: float | None = None
  """Largest size of a logit, or None."""

  def __post_init__(self):
    super().__post_init__()
    interface.check_positive(
      self, 'query_pre_attn_scalar', 'final_logit_softcapping'
    )

  @property
  def score_rule(self) -> ScoreRule:
    """How products of queries and keys become scores."""
    return ScoreRule(self.query_pre_attn_scalar**-0.5)

  @property
  def final_softcap(self) -> float | None:
    """Largest size of a logit, or None."""
    return self.final_logit_softcapping


FIXED = {
  # transformers reads the first of these two spellings.
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_act': 'gelu_pytorch_tanh',
  'attention_bias': False,
  'use_bidirectional_attention': False,
}
"""Of `decoder_hf.Layout`."""
DEFAULTS = {
  'num_key_value_heads': 4,
  'head_dim': 256,
  'tie_word_embeddings': True,
  'use_bidirectional_attention': False,
}
"""Of `decoder_hf.Layout`."""
FIELDS = {'query_pre_attn_scalar': 'query_pre_attn_scalar'}
"""Of `decoder_hf.Layout`."""


def read(
  hf: Mapping[str, Any], slides: Callable[[int], bool], *caps: str
) -> tuple[dict[str, Any], list[str]]:
  """Windows and caps, as of `decoder_hf.Layout.read`.

  Args:
    hf: The JSON object.
    slides: Whether a layer slides where the object has no `layer_types`.
    *caps: Fields of which null means no cap, and absence the default of ours.

  Returns:
    The fields, and reasons why they are not supported.
  """
  hf = {'sliding_window': 4096, **hf}
  fields, reasons = decoder_hf.read_windows(hf, slides)
  types = hf.get('layer_types') or [decoder_hf.SLIDING]
  if hf['sliding_window'] is None and decoder_hf.SLIDING in types:
    reasons.append('sliding_window=None (supported: a number, as layers slide)')
  return {**fields, **{cap: hf[cap] for cap in caps if cap in hf}}, reasons


def write(config: GemmaConfig, *caps: str) -> dict[str, Any]:
  """The fields of a `config.json` that `read` reads."""
  return {
    'sliding_window': config.sliding_window,
    'layer_types': decoder_hf.layer_types(config),
    **{cap: getattr(config, cap) for cap in caps},
  }
