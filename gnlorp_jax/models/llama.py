"""LLaMA: a pre-norm decoder with RMSNorm, rotary positions and SwiGLU.

Flax inside, plain nested dicts outside: `make` turns a configuration into pure
functions of a dict of arrays, laid out as

  embed/embedding [V, D]
  layers/attn/{q,k,v,o}_proj/kernel, layers/mlp/{gate,up,down}_proj/kernel
    [L, in, out]
  layers/{attn,mlp}_norm/scale [L, D]
  norm/scale [D]
  lm_head/kernel [D, V], absent when the head is tied to the embedding

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  V     vocabulary
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnlorp_jax.models import configuration, layers
from gnlorp_jax.models import hf as hf_files

Params = dict[str, Any]
Dtype = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Architecture of a LLaMA model and the dtypes it works in."""

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
  max_seq_len: int
  """Longest sequence the model accepts, in tokens."""
  rms_norm_eps: float = 1e-6
  """Added to the mean square in RMSNorm."""
  rope_theta: float = 10000.0
  """Base of the rotary frequencies."""
  tie_embeddings: bool = False
  """Use the embedding matrix as the head as well."""
  initializer_std: float = 0.02
  """Standard deviation of the initial kernels and embeddings."""
  param_dtype: Dtype = 'float32'
  """Dtype the parameters are stored in."""
  compute_dtype: Dtype = 'float32'
  """Dtype of activations and matrix products."""
  remat: bool = False
  """Keep the inputs of the blocks alone for the backward pass, and compute them
  again there: less memory, more time. Otherwise the products of the kernels and
  the results of the attention are kept as well."""

  def __post_init__(self):
    configuration.check_positive(
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
    configuration.check_heads(self)
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
    configuration.check_dtypes(self)

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
  return dataclasses.replace(
    configuration.find_preset(name, PRESETS), **overrides
  )


class _Block(nn.Module):
  config: LlamaConfig
  attention: layers.Attention

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    norm = functools.partial(
      nn.RMSNorm,
      epsilon=c.rms_norm_eps,
      dtype=c.compute_dtype,
      param_dtype=c.param_dtype,
    )
    dense = functools.partial(
      nn.Dense,
      use_bias=False,
      dot_general=layers.dot_general,
      dtype=c.compute_dtype,
      param_dtype=c.param_dtype,
      kernel_init=layers.normal_init(c.initializer_std),
    )
    attn = layers.CausalSelfAttention(
      c.num_heads,
      c.kv_heads,
      c.head_dim,
      c.rope_theta,
      self.attention,
      dense,
      name='attn',
    )
    mlp = layers.SwiGLU(c.intermediate_size, dense, name='mlp')
    x_BTD += attn(norm(name='attn_norm')(x_BTD))
    return x_BTD + mlp(norm(name='mlp_norm')(x_BTD))


class _Llama(nn.Module):
  config: LlamaConfig
  attention: layers.Attention

  def setup(self):
    c = self.config
    init = layers.normal_init(c.initializer_std)
    dtypes = {'dtype': c.compute_dtype, 'param_dtype': c.param_dtype}
    self.embedder = nn.Embed(
      c.vocab_size, c.hidden_size, embedding_init=init, name='embed', **dtypes
    )
    policy = None if c.remat else layers.keep_marked
    block = nn.remat(_Block, prevent_cse=False, policy=policy)
    self.layers = block(c, self.attention)
    self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps, **dtypes)
    if not c.tie_embeddings:
      self.lm_head = nn.Dense(
        c.vocab_size,
        use_bias=False,
        dot_general=layers.dot_general,
        kernel_init=init,
        **dtypes,
      )

  def embed(self, tokens_BT):
    max_seq_len = self.config.max_seq_len
    if tokens_BT.shape[1] > max_seq_len:
      raise ValueError(
        f'Sequence of {tokens_BT.shape[1]} tokens is longer than '
        f'max_seq_len={max_seq_len}. Use shorter sequences or raise '
        'max_seq_len.'
      )
    return self.embedder(tokens_BT)

  def hidden(self, tokens_BT):
    scan = nn.scan(
      lambda block, x_BTD, _: (block(x_BTD), None),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.config.num_layers,
    )
    x_BTD, _ = scan(self.layers, self.embed(tokens_BT), None)
    return self.norm(x_BTD)

  def logits(self, x):
    head = self.embedder.attend if self.config.tie_embeddings else self.lm_head
    return head(x).astype(jnp.float32)

  def head(self, x):
    return self.logits(self.norm(x))

  def __call__(self, tokens_BT):
    return self.logits(self.hidden(tokens_BT))


class LayerFns(NamedTuple):
  """A model in pieces, for a backward pass that goes layer by layer.

  `embed`, then `block` for every layer, then `head` is `Model.apply`.

  Attributes:
    embed: Maps (params, tokens ``[B, T]``) to x ``[B, T, D]``.
    block: Maps (one layer's slice of `params['layers']`, x ``[B, T, D]``) to x
      ``[B, T, D]``.
    head: Maps (params, x ``[*, D]``) to float32 logits ``[*, V]``: final norm
      and head. Positions are independent, so a loss may call it piece by piece.

  `embed` and `head` do without `params['layers']`.
  """

  embed: Callable[[Params, jax.Array], jax.Array]
  block: Callable[[Params, jax.Array], jax.Array]
  head: Callable[[Params, jax.Array], jax.Array]


class Model(NamedTuple):
  """A model as pure functions of a plain nested dict of parameters.

  Attributes:
    config: The architecture.
    init: Maps a random key to params.
    hidden: Maps (params, tokens ``[B, T]``) to x ``[B, T, D]`` after the final
      norm, in compute dtype.
    logits: Maps (params, x ``[*, D]``) to float32 logits ``[*, V]``: the head
      alone. Positions are independent, so a loss may call it piece by piece.
    apply: Maps (params, tokens ``[B, T]``) to float32 logits ``[B, T, V]``.
    layer_fns: The same in pieces.
  """

  config: LlamaConfig
  init: Callable[[jax.Array], Params]
  hidden: Callable[[Params, jax.Array], jax.Array]
  logits: Callable[[Params, jax.Array], jax.Array]
  apply: Callable[[Params, jax.Array], jax.Array]
  layer_fns: LayerFns


def make(config: LlamaConfig, device: jax.Device | None = None) -> Model:
  """Builds the functions of a model.

  Args:
    config: The architecture.
    device: One of those the functions will run on, which decides the kernel of
      the attention; None is the first of this process.

  Returns:
    The functions. Tokens are integers in [0, vocab_size), at most max_seq_len
    of them in a row (more raise ValueError when traced).

  Note:
    In bfloat16 the norms and the rotation stay in float32 to the end, where
    Hugging Face's LLaMA rounds before it multiplies by the scale and by the
    cosines. The head multiplies in compute dtype, as is usual; its result is
    returned as float32 so that softmax and loss are computed in float32.
  """
  attention = layers.attention_implementation(
    jax.devices()[0] if device is None else device,
    config.compute_dtype,
    config.head_dim,
  )
  module, block = _Llama(config, attention), _Block(config, attention)

  def method(name):
    return lambda params, x: module.apply({'params': params}, x, method=name)

  # Flax finds the shapes by a forward pass, which jit drops.
  @jax.jit
  def init(key):
    return module.init(key, jnp.zeros((1, 1), jnp.int32))['params']

  return Model(
    config=config,
    init=init,
    hidden=method('hidden'),
    logits=method('logits'),
    apply=method('__call__'),
    layer_fns=LayerFns(
      embed=method('embed'),
      block=lambda params, x_BTD: block.apply({'params': params}, x_BTD),
      head=method('head'),
    ),
  )


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
  'model_type': 'llama',
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
