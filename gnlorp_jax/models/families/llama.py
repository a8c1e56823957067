"""LLaMA: sizes of the decoder of `decoder.make`, and Hugging Face's names."""

import dataclasses
import math
from typing import Any, ClassVar

import jax

from gnlorp_jax.models import hf as hf_files
from gnlorp_jax.models import interface
from gnlorp_jax.models.decoder import make
from gnlorp_jax.models.interface import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Architecture of a LLaMA model and the dtypes it works in."""

  model_type: ClassVar[str] = 'llama'
  """Name of the family, in Hugging Face's configurations too."""

  vocab_size: int
  """Number of token ids; every id is in [0, vocab_size)."""
  hidden_size: int
  """Width of the residual stream, a multiple of num_heads."""
  intermediate_size: int
  """Width inside the feed-forward layers."""
  num_layers: int
  """Number of blocks."""
  num_heads: int
  """Number of query heads per block."""
  num_kv_heads: int | None = None
  """Number of key/value heads, a divisor of num_heads; None: num_heads."""
  max_seq_len: int = dataclasses.field(metadata=interface.FREE_ON_RESUME)
  """Longest sequence the model accepts, in tokens."""
  rms_norm_eps: float = 1e-6
  """Added to the mean square in RMSNorm."""
  rope_theta: float = 10000.0
  """Base of the rotary frequencies."""
  tie_embeddings: bool = False
  """Use the embedding matrix as the head as well."""
  initializer_std: float = dataclasses.field(
    default=0.02, metadata=interface.FREE_ON_RESUME
  )
  """Standard deviation of the initial kernels and embeddings."""
  param_dtype: Dtype = dataclasses.field(
    default='float32', metadata=interface.KEPT_FROM_RUN
  )
  """Dtype the parameters are stored in."""
  compute_dtype: Dtype = dataclasses.field(
    default='float32', metadata=interface.CHOSEN_BY_RUN
  )
  """Dtype of activations and matrix products."""
  remat: bool = dataclasses.field(default=False, metadata=interface.FREE_IN_RUN)
  """Keep the inputs of the blocks alone for the backward pass, and compute them
  again there: less memory, more time. Otherwise the products of the kernels and
  the results of the attention are kept as well."""

  def __post_init__(self):
    interface.check_positive(
      self,
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_layers',
      'num_heads',
      'num_kv_heads',
      'max_seq_len',
      'rms_norm_eps',
      'rope_theta',
      'initializer_std',
    )
    interface.check_heads(self)
    if self.head_dim % 2:
      raise ValueError(
        f'hidden_size / num_heads = {self.head_dim} must be even: rotary '
        'positions turn pairs of features. Change hidden_size or num_heads.'
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of '
        f'num_kv_heads={self.num_kv_heads}.'
      )
    interface.check_dtypes(self)

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Number of key/value heads with the default filled in."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


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
}
"""The configurations of the GaLore pre-training protocol (arXiv:2403.03507)."""


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


LABEL_RULES: tuple[tuple[str, str], ...] = (
  (r'layers/(attn|mlp)/.*/kernel', 'low_rank'),
  (r'.*', 'full'),
)
"""Which parameters are trained how: (regex over the path, label), first match
wins. The matrices of the blocks are projected; embedding, head and norms not.
"""


def num_params(config: LlamaConfig) -> int:
  """Number of parameters, from shapes alone: nothing is allocated."""
  abstract = jax.eval_shape(make(config).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def flops_per_token(config: LlamaConfig, seq_len: int) -> int:
  """Floating-point operations that training needs per token.

  A matrix of n weights costs 2n in the forward pass and 4n in the backward
  pass. Attention adds ``12 L D T``: two products (scores, mixing of values)
  of 2 D T forward and twice that backward in each of L layers. The embedding
  is a lookup and costs nothing; a tied head still costs its product.

  Args:
    config: The architecture.
    seq_len: Tokens per sequence, T.

  Returns:
    FLOPs per token, forward and backward. Divide tokens per second times this
    by the peak of the hardware for the model FLOP utilisation.

  References:
    Chowdhery et al., `PaLM`, 2022, arXiv:2204.02311, appendix B.

  Note:
    As there, the causal mask brings no discount, and recomputation (`remat`)
    and the optimizer do not count.
  """
  c = config
  attn = 2 * c.hidden_size * (c.num_heads + c.kv_heads) * c.head_dim
  mlp = 3 * c.hidden_size * c.intermediate_size
  matrices = c.num_layers * (attn + mlp) + c.hidden_size * c.vocab_size
  return 6 * matrices + 12 * c.num_layers * c.hidden_size * seq_len


_LAYER = 'model.layers.{layer}'

HF_TENSORS: tuple[tuple[str, str, bool], ...] = (
  ('embed/embedding', 'model.embed_tokens.weight', False),
  ('layers/attn/q_proj/kernel', f'{_LAYER}.self_attn.q_proj.weight', True),
  ('layers/attn/k_proj/kernel', f'{_LAYER}.self_attn.k_proj.weight', True),
  ('layers/attn/v_proj/kernel', f'{_LAYER}.self_attn.v_proj.weight', True),
  ('layers/attn/o_proj/kernel', f'{_LAYER}.self_attn.o_proj.weight', True),
  ('layers/mlp/gate_proj/kernel', f'{_LAYER}.mlp.gate_proj.weight', True),
  ('layers/mlp/up_proj/kernel', f'{_LAYER}.mlp.up_proj.weight', True),
  ('layers/mlp/down_proj/kernel', f'{_LAYER}.mlp.down_proj.weight', True),
  ('layers/attn_norm/scale', f'{_LAYER}.input_layernorm.weight', False),
  ('layers/mlp_norm/scale', f'{_LAYER}.post_attention_layernorm.weight', False),
  ('norm/scale', 'model.norm.weight', False),
  ('lm_head/kernel', 'lm_head.weight', True),
)
"""Our path, Hugging Face's name, whether the matrix is transposed there."""

HF_UNREAD = ''
"""A regex over tensors that a checkpoint may hold beside these: none."""

# Our field: Hugging Face's.
_HF_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'max_seq_len': 'max_position_embeddings',
  'rms_norm_eps': 'rms_norm_eps',
  'tie_embeddings': 'tie_word_embeddings',
  'initializer_std': 'initializer_range',
}

# Fields of Hugging Face's that change what is computed, and their only
# supported value, which is also what their absence means.
_HF_FIXED = {
  'model_type': LlamaConfig.model_type,
  'hidden_act': 'silu',
  'attention_bias': False,
  'attention_dropout': 0.0,
  'mlp_bias': False,
}


def config_from_hf(hf: dict[str, Any]) -> LlamaConfig:
  """Configuration from the contents of a Hugging Face `config.json`.

  Args:
    hf: The JSON object, as transformers 4 (`rope_theta`, `rope_scaling`) or
      transformers 5 (`rope_parameters`) writes it.

  Returns:
    The configuration. `param_dtype` is bfloat16 if the checkpoint is and
    float32 otherwise; `compute_dtype` and `remat` have their defaults.

  Raises:
    ValueError: If fields are missing or ask for what is not supported.
  """
  rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
  rope_type = rope.get('rope_type', rope.get('type', 'default'))
  hf_files.check_supported(
    'LLaMA',
    {**hf, 'rope_type': rope_type},
    {**_HF_FIXED, 'rope_type': 'default', 'quantization_config': None},
  )
  config = LlamaConfig(
    rope_theta=rope.get('rope_theta', hf.get('rope_theta', 10000.0)),
    **hf_files.read_fields('LLaMA', hf, LlamaConfig, _HF_FIELDS),
  )
  if hf.get('head_dim') is not None:
    hf_files.check_supported('LLaMA', hf, {'head_dim': config.head_dim})
  return config


def config_to_hf(
  config: LlamaConfig,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
) -> dict[str, Any]:
  """Contents of a Hugging Face `config.json` for transformers 4 and 5.

  Args:
    config: The architecture.
    bos_token_id: Id of the token that begins a sequence, if there is one.
    eos_token_id: Id of the token that ends a sequence, if there is one.
    pad_token_id: Id of the padding token, if there is one.

  Returns:
    A JSON object, the inverse of `config_from_hf`.
  """
  return {
    'architectures': ['LlamaForCausalLM'],
    **_HF_FIXED,
    **{theirs: getattr(config, ours) for ours, theirs in _HF_FIELDS.items()},
    'num_key_value_heads': config.kv_heads,
    'rope_theta': config.rope_theta,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': config.rope_theta,
    },
    'torch_dtype': config.param_dtype,
    'dtype': config.param_dtype,
    'bos_token_id': bos_token_id,
    'eos_token_id': eos_token_id,
    'pad_token_id': pad_token_id,
  }
