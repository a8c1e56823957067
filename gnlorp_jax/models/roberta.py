"""RoBERTa: a post-norm encoder with LayerNorm, learned positions and GELU.

Flax inside, plain nested dicts outside: `make` (masked-LM head) and
`make_classifier` (classification and regression head) turn a configuration into
pure functions of a dict of arrays, laid out as

  embed/{tokens,positions,types}/embedding [V, D], [P, D], [types, D]
  embed/norm/{scale,bias} [D]
  layers/attn/{q,k,v,o}_proj/{kernel,bias}, layers/mlp/{up,down}_proj/...
    [L, in, out], [L, out]
  layers/{attn,mlp}_norm/{scale,bias} [L, D]
  lm_head/dense/{kernel,bias}, lm_head/norm/{scale,bias}, lm_head/bias [V]
  classifier/{dense,out}/{kernel,bias}

of the last two, the one that the model has. The masked-LM head multiplies by
the token embeddings.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  N, H  heads, width of one head
  C     classes, or 1 for a regression
  V, P  vocabulary, rows of the table of positions
"""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnlorp_jax.models import configuration, layers
from gnlorp_jax.models import hf as hf_files

_logger = logging.getLogger(__name__)

Params = dict[str, Any]
Dtype = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig:
  """Architecture of a RoBERTa encoder and the dtypes it works in."""

  vocab_size: int
  """Number of token ids; every id is in [0, vocab_size)."""
  hidden_size: int
  """Width of the residual stream, a multiple of num_heads."""
  intermediate_size: int
  """Width inside the feed-forward layers."""
  num_layers: int
  """Number of blocks."""
  num_heads: int
  """Number of attention heads per block."""
  max_seq_len: int
  """Longest sequence the model accepts, in tokens, padding included."""
  num_types: int = 1
  """Rows of the table of token types, of which the first is used."""
  pad_id: int = 1
  """Id of the padding token: no position attends to it."""
  layer_norm_eps: float = 1e-5
  """Added to the variance in LayerNorm."""
  hidden_dropout: float = 0.1
  """Share of features dropped after the embeddings and after each sublayer,
  while training."""
  attention_dropout: float = 0.1
  """Share of attention weights dropped while training."""
  classifier_dropout: float | None = None
  """Share of features dropped in the classifier; None: as hidden_dropout."""
  initializer_std: float = 0.02
  """Standard deviation of the initial kernels and embeddings."""
  param_dtype: Dtype = 'float32'
  """Dtype the parameters are stored in."""
  compute_dtype: Dtype = 'float32'
  """Dtype of activations and matrix products."""
  remat: bool = False
  """Recompute each block in the backward pass: less memory, more time. Without,
  the outputs of its dense layers are kept and the rest is recomputed."""

  def __post_init__(self):
    configuration.check_positive(
      self,
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_layers',
      'num_heads',
      'max_seq_len',
      'num_types',
      'layer_norm_eps',
      'initializer_std',
    )
    configuration.check_heads(self)
    if not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f'pad_id={self.pad_id} must be in [0, vocab_size={self.vocab_size}).'
      )
    for name in ('hidden_dropout', 'attention_dropout', 'classifier_dropout'):
      value = getattr(self, name)
      if value is not None and not 0 <= value < 1:
        raise ValueError(f'{name}={value} must be in [0, 1).')
    configuration.check_dtypes(self)

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def num_positions(self) -> int:
    """Rows of the table of positions, of which the first come to no use."""
    return self.max_seq_len + self.pad_id + 1


def _sized(hidden_size, intermediate_size, num_heads, num_layers):
  return RobertaConfig(
    vocab_size=50265,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_layers=num_layers,
    max_seq_len=512,
  )


PRESETS: dict[str, RobertaConfig] = {
  'tiny': _sized(128, 512, 2, 4),
  'mini': _sized(256, 1024, 4, 6),
  'small': _sized(512, 2048, 8, 6),
  'base': _sized(768, 3072, 12, 12),
  'large': _sized(1024, 4096, 16, 24),
}
"""``base`` and ``large`` of RoBERTa (arXiv:1907.11692), and small ones of
ours for experiments."""


def preset(name: str, **overrides: Any) -> RobertaConfig:
  """A configuration by name, with some fields replaced.

  Args:
    name: Key of `PRESETS`.
    **overrides: Fields of `RobertaConfig` and their values.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such name.

  Examples:
    >>> preset('base', param_dtype='bfloat16').hidden_size
    768
  """
  return dataclasses.replace(
    configuration.find_preset(name, PRESETS), **overrides
  )


class _Attention(nn.Module):
  config: RobertaConfig
  unmasked_kernel: layers.Attention
  dense: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x_BTD, mask_BT):
    c = self.config

    def heads(name):
      y = self.dense(c.hidden_size, name=name)(x_BTD)
      return y.reshape(*x_BTD.shape[:-1], c.num_heads, c.head_dim)

    qkv_BTNH = heads('q_proj'), heads('k_proj'), heads('v_proj')
    mask = None if mask_BT is None else mask_BT[:, None, None, :]
    if self.has_rng('dropout') and c.attention_dropout:
      # The kernels of jax.nn drop nothing.
      y_BTNH = nn.dot_product_attention(
        *qkv_BTNH,
        mask=mask,
        dropout_rng=self.make_rng('dropout'),
        dropout_rate=c.attention_dropout,
        broadcast_dropout=False,
        deterministic=False,
        dtype=c.compute_dtype,
      )
    else:
      # cuDNN takes no mask of keys alone, and no mask of an odd length.
      kernel = self.unmasked_kernel if mask is None else 'xla'
      y_BTNH = jax.nn.dot_product_attention(
        *qkv_BTNH, mask=mask, implementation=kernel
      )
    return self.dense(c.hidden_size, name='o_proj')(y_BTNH.reshape(x_BTD.shape))


class _MLP(nn.Module):
  config: RobertaConfig
  dense: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x_BTD):
    y = self.dense(self.config.intermediate_size, name='up_proj')(x_BTD)
    y = jax.nn.gelu(y, approximate=False)
    return self.dense(self.config.hidden_size, name='down_proj')(y)


def _dense(config):
  return functools.partial(
    nn.Dense,
    dot_general=layers.dot_general,
    dtype=config.compute_dtype,
    param_dtype=config.param_dtype,
    kernel_init=layers.normal_init(config.initializer_std),
  )


def _norm(config, name):
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=config.compute_dtype,
    param_dtype=config.param_dtype,
    name=name,
  )


def _drop(module, rate, x):
  """Drops features where the caller gave a key for it."""
  return nn.Dropout(rate, deterministic=not module.has_rng('dropout'))(x)


class _Block(nn.Module):
  config: RobertaConfig
  unmasked_kernel: layers.Attention = 'xla'

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    c = self.config
    attn = _Attention(c, self.unmasked_kernel, _dense(c), name='attn')
    y_BTD = _drop(self, c.hidden_dropout, attn(x_BTD, mask_BT))
    x_BTD = _norm(c, 'attn_norm')(x_BTD + y_BTD)
    y_BTD = _drop(self, c.hidden_dropout, _MLP(c, _dense(c), name='mlp')(x_BTD))
    return _norm(c, 'mlp_norm')(x_BTD + y_BTD)


class _Embeddings(nn.Module):
  config: RobertaConfig

  def setup(self):
    c = self.config
    embed = functools.partial(
      nn.Embed,
      features=c.hidden_size,
      embedding_init=layers.normal_init(c.initializer_std),
      dtype=c.compute_dtype,
      param_dtype=c.param_dtype,
    )
    self.tokens = embed(c.vocab_size)
    self.positions = embed(c.num_positions)
    self.types = embed(c.num_types)
    self.norm = _norm(c, None)
    self.dropout = nn.Dropout(c.hidden_dropout)

  def __call__(self, tokens_BT):
    real_BT = (tokens_BT != self.config.pad_id).astype(jnp.int32)
    # Padding has the position pad_id, the first token the one after.
    positions_BT = jnp.cumsum(real_BT, axis=1) * real_BT + self.config.pad_id
    x_BTD = self.tokens(tokens_BT) + self.positions(positions_BT)
    x_BTD = self.norm(x_BTD + self.types(jnp.zeros_like(tokens_BT)))
    return self.dropout(x_BTD, deterministic=not self.has_rng('dropout'))


class _Encoder(nn.Module):
  """What both models have in common; a subclass adds its head."""

  config: RobertaConfig

  def setup(self):
    c = self.config
    self.embedder = _Embeddings(c, name='embed')
    policy = None if c.remat else layers.keep_marked
    self.layers = nn.remat(_Block, prevent_cse=False, policy=policy)(c)
    self.make_head()

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
      lambda block, x_BTD, mask_BT: (block(x_BTD, mask_BT), None),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast,
      length=self.config.num_layers,
    )
    mask_BT = tokens_BT != self.config.pad_id
    return scan(self.layers, self.embed(tokens_BT), mask_BT)[0]

  def __call__(self, tokens_BT):
    return self.logits(self.hidden(tokens_BT))


class _MaskedLMHead(nn.Module):
  config: RobertaConfig

  @nn.compact
  def __call__(self, x, attend):
    c = self.config
    x = jax.nn.gelu(
      _dense(c)(c.hidden_size, name='dense')(x), approximate=False
    )
    logits = attend(_norm(c, 'norm')(x))
    bias_V = self.param(
      'bias', nn.initializers.zeros, (c.vocab_size,), c.param_dtype
    )
    logits = logits.astype(jnp.float32)
    return logits + jnp.broadcast_to(bias_V.astype(jnp.float32), logits.shape)


class _MaskedLM(_Encoder):
  def make_head(self):
    self.lm_head = _MaskedLMHead(self.config)

  def logits(self, x):
    return self.lm_head(x, self.embedder.tokens.attend)


class _ClassifierHead(nn.Module):
  config: RobertaConfig
  num_outputs: int

  @nn.compact
  def __call__(self, x_BD):
    c = self.config
    rate = c.classifier_dropout
    rate = c.hidden_dropout if rate is None else rate
    x_BD = _dense(c)(c.hidden_size, name='dense')(_drop(self, rate, x_BD))
    x_BD = _drop(self, rate, jnp.tanh(x_BD))
    return _dense(c)(self.num_outputs, name='out')(x_BD)


class _Classifier(_Encoder):
  num_outputs: int

  def make_head(self):
    self.classifier = _ClassifierHead(self.config, self.num_outputs)

  def logits(self, x_BTD):
    return self.classifier(x_BTD[:, 0]).astype(jnp.float32)


class LayerFns(NamedTuple):
  """A masked-LM model in pieces, for a backward pass layer by layer.

  `embed`, then `block` for every layer, then `head` is `Model.apply` for
  sequences without padding, and without dropout.

  Attributes:
    embed: Maps (params, tokens ``[B, T]``) to x ``[B, T, D]``.
    block: Maps (one layer's slice of `params['layers']`, x ``[B, T, D]``) to x
      ``[B, T, D]``; every position attends to every other.
    head: Maps (params, x ``[*, D]``) to float32 logits ``[*, V]``.

  `embed` and `head` do without `params['layers']`.
  """

  embed: Callable[[Params, jax.Array], jax.Array]
  block: Callable[[Params, jax.Array], jax.Array]
  head: Callable[[Params, jax.Array], jax.Array]


class Model(NamedTuple):
  """A model as pure functions of a plain nested dict of parameters.

  Tokens that equal `RobertaConfig.pad_id` are padding. Dropout is active where
  a key is given, and takes its rates from the configuration.

  Attributes:
    config: The architecture.
    init: Maps a random key to params.
    hidden: Maps (params, tokens ``[B, T]``, dropout key = None) to x
      ``[B, T, D]`` after the last block, in compute dtype.
    logits: The head alone, in float32. Masked LM: maps (params, x ``[*, D]``)
      to ``[*, V]``, each position by itself. Classifier: maps (params, x
      ``[B, T, D]``, dropout key = None) to ``[B, C]``, from the first position.
    apply: Maps (params, tokens ``[B, T]``, dropout key = None) to float32
      logits, ``[B, T, V]`` or ``[B, C]``.
    layer_fns: The same in pieces; None for a classifier.
  """

  config: RobertaConfig
  init: Callable[[jax.Array], Params]
  hidden: Callable[..., jax.Array]
  logits: Callable[..., jax.Array]
  apply: Callable[..., jax.Array]
  layer_fns: LayerFns | None


def make(config: RobertaConfig, device: jax.Device | None = None) -> Model:
  """Builds the functions of a model with the masked-LM head.

  Args:
    config: The architecture.
    device: One of those the functions will run on, which decides the kernel of
      the attention in `layer_fns`; None is the first of this process.

  Returns:
    The functions. Tokens are integers in [0, vocab_size), at most max_seq_len
    of them in a row (more raise ValueError when traced).

  References:
    Liu et al., `RoBERTa: A Robustly Optimized BERT Pretraining Approach`, 2019,
    arXiv:1907.11692.

  Note:
    In bfloat16 the LayerNorms are computed in float32, as in PyTorch; logits
    are returned as float32 so that softmax and loss are computed in float32.
    Hugging Face's model also takes types of tokens and positions; RoBERTa has
    one type, and positions follow from the padding. PyTorch starts the
    embeddings of padding at zero and gives them no gradient from the lookup.
    Here they are like all others; only outputs at padding depend on them, and
    the logit of the padding token, whose embedding is its row of the head.
  """
  kernel = layers.attention_implementation(
    jax.devices()[0] if device is None else device,
    config.compute_dtype,
    config.head_dim,
  )
  module, block = _MaskedLM(config), _Block(config, kernel)
  model = _functions(module)
  return model._replace(
    layer_fns=LayerFns(
      embed=_method(module, 'embed'),
      block=lambda params, x_BTD: block.apply({'params': params}, x_BTD, None),
      head=model.logits,
    )
  )


def make_classifier(config: RobertaConfig, num_outputs: int) -> Model:
  """Builds the functions of a model with a head over whole sequences.

  Args:
    config: The architecture.
    num_outputs: Number of classes, or 1 for a regression.

  Returns:
    The functions; see `make`.

  Raises:
    ValueError: If `num_outputs` is less than 1.
  """
  if num_outputs < 1:
    raise ValueError(f'num_outputs={num_outputs} must be at least 1.')
  return _functions(_Classifier(config, num_outputs))


def _method(module, name):
  def function(params, x, key=None):
    rngs = {} if key is None else {'dropout': key}
    return module.apply({'params': params}, x, method=name, rngs=rngs)

  return function


def _functions(module):
  # Flax finds the shapes by a forward pass, which jit drops.
  @jax.jit
  def init(key):
    tokens_BT = jnp.full((1, 1), module.config.pad_id, jnp.int32)
    return module.init(key, tokens_BT)['params']

  return Model(
    config=module.config,
    init=init,
    hidden=_method(module, 'hidden'),
    logits=_method(module, 'logits'),
    apply=_method(module, '__call__'),
    layer_fns=None,
  )


LABEL_RULES: tuple[tuple[str, str], ...] = (
  (r'layers/(attn|mlp)/.*/kernel', 'low_rank'),
  (r'.*', 'full'),
)
"""Which parameters are trained how: (regex over the path, label), first match
wins. The matrices of the blocks are projected; embeddings, heads, norms and
biases not.
"""


def num_params(config: RobertaConfig) -> int:
  """Number of parameters with the masked-LM head, from shapes alone."""
  abstract = jax.eval_shape(make(config).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def flops_per_token(
  config: RobertaConfig, seq_len: int, predicted: float = 0.15
) -> float:
  """Floating-point operations that masked-LM training needs per token.

  Counted as `llama.flops_per_token` does: 6 for each weight of a matrix, ``12 L
  D T`` for attention, nothing for lookups.

  Args:
    config: The architecture.
    seq_len: Tokens per sequence, T.
    predicted: Share of the positions that the head is computed for.

  Returns:
    FLOPs per token, forward and backward.

  References:
    Chowdhery et al., `PaLM`, 2022, arXiv:2204.02311, appendix B.
  """
  c = config
  width = c.hidden_size
  blocks = c.num_layers * (4 * width**2 + 2 * width * c.intermediate_size)
  head = width**2 + width * c.vocab_size
  attention = 12 * c.num_layers * width * seq_len
  return 6 * (blocks + predicted * head) + attention


_LAYER = 'roberta.encoder.layer.{layer}'
_EMBEDDINGS = 'roberta.embeddings'


def _dense_rows(ours, theirs):
  return (
    (f'{ours}/kernel', f'{theirs}.weight', True),
    (f'{ours}/bias', f'{theirs}.bias', False),
  )


def _norm_rows(ours, theirs):
  return (
    (f'{ours}/scale', f'{theirs}.weight', False),
    (f'{ours}/bias', f'{theirs}.bias', False),
  )


HF_ENCODER_TENSORS: tuple[tuple[str, str, bool], ...] = (
  ('embed/tokens/embedding', f'{_EMBEDDINGS}.word_embeddings.weight', False),
  (
    'embed/positions/embedding',
    f'{_EMBEDDINGS}.position_embeddings.weight',
    False,
  ),
  (
    'embed/types/embedding',
    f'{_EMBEDDINGS}.token_type_embeddings.weight',
    False,
  ),
  *_norm_rows('embed/norm', f'{_EMBEDDINGS}.LayerNorm'),
  *_dense_rows('layers/attn/q_proj', f'{_LAYER}.attention.self.query'),
  *_dense_rows('layers/attn/k_proj', f'{_LAYER}.attention.self.key'),
  *_dense_rows('layers/attn/v_proj', f'{_LAYER}.attention.self.value'),
  *_dense_rows('layers/attn/o_proj', f'{_LAYER}.attention.output.dense'),
  *_norm_rows('layers/attn_norm', f'{_LAYER}.attention.output.LayerNorm'),
  *_dense_rows('layers/mlp/up_proj', f'{_LAYER}.intermediate.dense'),
  *_dense_rows('layers/mlp/down_proj', f'{_LAYER}.output.dense'),
  *_norm_rows('layers/mlp_norm', f'{_LAYER}.output.LayerNorm'),
)
"""Our path, Hugging Face's name, whether the matrix is transposed there."""

HF_TENSORS: tuple[tuple[str, str, bool], ...] = (
  *HF_ENCODER_TENSORS,
  *_dense_rows('lm_head/dense', 'lm_head.dense'),
  *_norm_rows('lm_head/norm', 'lm_head.layer_norm'),
  ('lm_head/bias', 'lm_head.bias', False),
)
"""The same with the head of `RobertaForMaskedLM`."""

HF_CLASSIFIER_TENSORS: tuple[tuple[str, str, bool], ...] = (
  *HF_ENCODER_TENSORS,
  *_dense_rows('classifier/dense', 'classifier.dense'),
  *_dense_rows('classifier/out', 'classifier.out_proj'),
)
"""The same with the head of `RobertaForSequenceClassification`."""

HF_UNREAD = (
  r'(roberta\.)?(pooler\..*|embeddings\.(position|token_type)_ids)'
  r'|lm_head\.decoder\..*'
)
"""What a checkpoint may hold beside the model, for `hf.load_params`: the pooler
of `RobertaModel`, buffers of early versions of transformers, and copies of the
tied embedding and bias."""

_HF_HEADS = r'(lm_head|classifier)\..*'

# Our field: Hugging Face's.
_HF_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'pad_id': 'pad_token_id',
  'layer_norm_eps': 'layer_norm_eps',
  'hidden_dropout': 'hidden_dropout_prob',
  'attention_dropout': 'attention_probs_dropout_prob',
  'classifier_dropout': 'classifier_dropout',
  'initializer_std': 'initializer_range',
  'num_types': 'type_vocab_size',
}
_HF_POSITIONS = 'max_position_embeddings'

# Fields of Hugging Face's that change what is computed, and their only
# supported value, which is also what their absence means.
_HF_FIXED = {
  'model_type': 'roberta',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
  'tie_word_embeddings': True,
  'is_decoder': False,
  'add_cross_attention': False,
}


def config_from_hf(hf: dict[str, Any]) -> RobertaConfig:
  """Configuration from the contents of a Hugging Face `config.json`.

  Args:
    hf: The JSON object, as transformers 4 or 5 writes it.

  Returns:
    The configuration. `param_dtype` is bfloat16 if the checkpoint is and
    float32 otherwise; `compute_dtype` and `remat` have their defaults.

  Raises:
    ValueError: If fields are missing or ask for what is not supported.
  """
  hf_files.check_supported(
    'RoBERTa', hf, {**_HF_FIXED, 'quantization_config': None}
  )
  # transformers' own defaults for what older files leave out.
  hf = {'pad_token_id': 1, 'type_vocab_size': 2, 'layer_norm_eps': 1e-12, **hf}
  fields = hf_files.read_fields(
    'RoBERTa', hf, RobertaConfig, _HF_FIELDS | {'max_seq_len': _HF_POSITIONS}
  )
  fields['max_seq_len'] -= hf['pad_token_id'] + 1
  return RobertaConfig(**fields)


def config_to_hf(
  config: RobertaConfig,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
  architecture: str = 'RobertaForMaskedLM',
) -> dict[str, Any]:
  """Contents of a Hugging Face `config.json` for transformers 4 and 5.

  Args:
    config: The architecture.
    bos_token_id: Id of the token that begins a sequence, if there is one.
    eos_token_id: Id of the token that ends a sequence, if there is one.
    pad_token_id: Id of the padding token; it is the configuration's own.
    architecture: Name of transformers' class.

  Returns:
    A JSON object, the inverse of `config_from_hf`.

  Raises:
    ValueError: If `pad_token_id` is not the configuration's `pad_id`.
  """
  if pad_token_id not in (None, config.pad_id):
    raise ValueError(
      f'pad_token_id={pad_token_id} differs from the pad_id={config.pad_id} '
      'that the model was built with. Give the model the pad_id of its '
      'tokenizer.'
    )
  return {
    'architectures': [architecture],
    **_HF_FIXED,
    **{theirs: getattr(config, ours) for ours, theirs in _HF_FIELDS.items()},
    _HF_POSITIONS: config.num_positions,
    'torch_dtype': config.param_dtype,
    'dtype': config.param_dtype,
    'bos_token_id': bos_token_id,
    'eos_token_id': eos_token_id,
  }


def load_classifier(
  folder: str | os.PathLike,
  num_outputs: int,
  key: jax.Array,
  *,
  overrides: dict[str, Any] | None = None,
) -> tuple[Model, Params]:
  """Reads an encoder, and the classifier if the folder has one that fits.

  Args:
    folder: Hugging Face folder of a `RobertaForSequenceClassification`, a
      `RobertaForMaskedLM` or a `RobertaModel`.
    num_outputs: Number of classes, or 1 for a regression.
    key: Random key of a classifier that the folder does not have.
    overrides: Fields of the configuration to replace, such as dropout rates and
      dtypes.

  Returns:
    The model and its parameters.

  Raises:
    ValueError: As `config_from_hf` and `hf.load_params`.
  """
  config = config_from_hf(hf_files.load_config(folder))
  config = dataclasses.replace(config, **(overrides or {}))
  model = make_classifier(config, num_outputs)
  shapes = hf_files.tensor_shapes(folder)
  abstract = jax.eval_shape(model.init, key)
  unread = HF_UNREAD
  head = shapes.get('classifier.out_proj.weight')
  fits = head is not None and head[0] == num_outputs
  if fits:
    # Its classes may be those of another task.
    _logger.info('The classifier is that of %s.', folder)
  else:
    _logger.info(
      'The classifier of %d outputs is new: %s has %s.',
      num_outputs,
      folder,
      'none' if head is None else f'one of {head[0]}',
    )
    del abstract['classifier']
    unread += f'|{_HF_HEADS}'
  table = HF_CLASSIFIER_TENSORS
  if not any(name.startswith('roberta.') for name in shapes):
    # A bare `RobertaModel` names its tensors without the prefix.
    table = tuple(
      (ours, theirs.removeprefix('roberta.'), transposed)
      for ours, theirs, transposed in table
    )
  params = hf_files.load_params(folder, table, abstract, unread=unread)
  if not fits:
    params['classifier'] = _draw_classifier(config, num_outputs)(key)
  return model, params


@functools.cache
def _draw_classifier(
  config: RobertaConfig, num_outputs: int
) -> Callable[[jax.Array], Params]:
  """A new head from a key, compiled once for all the runs of a comparison."""
  init = make_classifier(config, num_outputs).init
  # Of the encoder that is drawn with it, the compiler leaves nothing.
  return jax.jit(lambda key: init(key)['classifier'])


def export_classifier(
  folder: str | os.PathLike,
  config: RobertaConfig,
  params: Params,
  labels: Sequence[str] = (),
) -> None:
  """Writes a folder that `RobertaForSequenceClassification` reads.

  Args:
    folder: Folder to create.
    config: The architecture.
    params: Parameters of the classifier, as plain arrays.
    labels: Names of the classes; none for a regression.

  Raises:
    ValueError: If the folder holds something already, or the names are not as
      many as the classes, all different.
  """
  num_outputs = params['classifier']['out']['bias'].shape[0]
  wanted = 0 if num_outputs == 1 else num_outputs
  if not len(labels) == len(set(labels)) == wanted:
    raise ValueError(
      f'{len(labels)} labels {tuple(labels)} for {num_outputs} outputs: give '
      'each class a name of its own, and a regression none.'
    )
  names = tuple(labels) or ('LABEL_0',)
  hf_config = {
    **config_to_hf(config, architecture='RobertaForSequenceClassification'),
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
    'problem_type': 'single_label_classification' if labels else 'regression',
  }
  hf_files.export(folder, params, HF_CLASSIFIER_TENSORS, hf_config)
