"""A post-norm encoder with LayerNorm, learned positions and GELU.

`make` (masked-LM head) and `make_classifier` (classification and regression
head) turn the configuration of a family, such as `roberta.RobertaConfig`, into
pure functions of a dict of arrays, laid out as

  embed/{tokens,positions,types}/embedding [V, D], [P, D], [types, D]
  embed/norm/{scale,bias} [D]
  layers/attn/{q,k,v,o}_proj/{kernel,bias}, layers/mlp/{up,down}_proj/...
    [L, in, out], [L, out]
  layers/{attn,mlp}_norm/{scale,bias} [L, D]
  lm_head/dense/{kernel,bias}, lm_head/norm/{scale,bias}, lm_head/bias [V]
  classifier/{dense,out}/{kernel,bias}

A model has one of the last two. The masked-LM head multiplies by the token
embeddings.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  N, H  heads, width of one head
  C     classes, or 1 for a regression
  V, P  vocabulary, rows of the table of positions
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnlorp_jax.models import attention, interface, layers


class _Attention(nn.Module):
  config: Any
  unmasked_implementation: attention.Implementation
  dense: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x_BTD, mask_BT):
    c = self.config

    def heads(name):
      y = self.dense(c.hidden_size, name=name)(x_BTD)
      return y.reshape(*x_BTD.shape[:-1], c.num_heads, c.head_size)

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
      implementation = self.unmasked_implementation if mask is None else 'xla'
      y_BTNH = jax.nn.dot_product_attention(
        *qkv_BTNH, mask=mask, implementation=implementation
      )
    return self.dense(c.hidden_size, name='o_proj')(y_BTNH.reshape(x_BTD.shape))


class _MLP(nn.Module):
  config: Any
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
  config: Any
  unmasked_implementation: attention.Implementation = 'xla'

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    mask_BT: jax.Array | None,
    number: jax.Array | None = None,
  ) -> jax.Array:
    del number  # All layers are alike.
    c = self.config
    attn = _Attention(c, self.unmasked_implementation, _dense(c), name='attn')
    y_BTD = _drop(self, c.hidden_dropout, attn(x_BTD, mask_BT))
    x_BTD = _norm(c, 'attn_norm')(x_BTD + y_BTD)
    y_BTD = _drop(self, c.hidden_dropout, _MLP(c, _dense(c), name='mlp')(x_BTD))
    return _norm(c, 'mlp_norm')(x_BTD + y_BTD)


def _is_real(config, tokens_BT):
  """Where there is no padding."""
  return tokens_BT != config.pad_id


class _Embeddings(nn.Module):
  config: Any

  def setup(self):
    c = self.config
    embed = functools.partial(
      layers.Embed,
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
    real_BT = _is_real(self.config, tokens_BT).astype(jnp.int32)
    # Padding has the position pad_id, the first token the one after.
    positions_BT = jnp.cumsum(real_BT, axis=1) * real_BT + self.config.pad_id
    x_BTD = self.tokens(tokens_BT) + self.positions(positions_BT)
    x_BTD = self.norm(x_BTD + self.types(jnp.zeros_like(tokens_BT)))
    return self.dropout(x_BTD, deterministic=not self.has_rng('dropout'))


class _Encoder(nn.Module):
  """What both models have in common; a subclass adds its head."""

  config: Any

  def setup(self):
    c = self.config
    self.embedder = _Embeddings(c, name='embed')
    policy = None if c.remat else layers.keep_marked
    self.layers = nn.remat(_Block, prevent_cse=False, policy=policy)(c)
    self.make_head()

  def embed(self, tokens_BT):
    interface.check_seq_len(tokens_BT, self.config.max_seq_len)
    return self.embedder(tokens_BT)

  def hidden(self, tokens_BT, segments_BT=None):
    _check_segments(segments_BT)
    scan = nn.scan(
      lambda block, x_BTD, mask_BT: (block(x_BTD, mask_BT), None),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast,
      length=self.config.num_layers,
    )
    mask_BT = _is_real(self.config, tokens_BT)
    return scan(self.layers, self.embed(tokens_BT), mask_BT)[0]

  def __call__(self, tokens_BT, segments_BT=None):
    return self.logits(self.hidden(tokens_BT, segments_BT))


class _MaskedLMHead(nn.Module):
  config: Any

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
  config: Any
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


def make(config: Any, device: jax.Device | None = None) -> interface.Model:
  """Builds the functions of a model with the masked-LM head.

  Args:
    config: The architecture, a family's configuration.
    device: One of those the functions will run on, which decides the kernel of
      the attention in `layer_fns`; None is the first of this process.

  Returns:
    The functions. Tokens are integers in [0, vocab_size), at most max_seq_len
    of them in a row (more raise ValueError when traced); those that equal
    pad_id are padding. `layer_fns.context` gives None: sequences are packed.

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

  def context(tokens_BT, segments_BT=None):
    _check_segments(segments_BT)

  return _functions(_MaskedLM(config), context, device)


def make_classifier(
  config: Any, num_outputs: int, device: jax.Device | None = None
) -> interface.Model:
  """Builds the functions of a model with a head over whole sequences.

  Args:
    config: The architecture, a family's configuration.
    num_outputs: Number of classes, or 1 for a regression.
    device: As in `make`.

  Returns:
    The functions; see `make`. `layer_fns.context` is True where there is no
    padding.

  Raises:
    ValueError: If `num_outputs` is less than 1.
  """
  if num_outputs < 1:
    raise ValueError(f'num_outputs={num_outputs} must be at least 1.')

  def context(tokens_BT, segments_BT=None):
    _check_segments(segments_BT)
    return _is_real(config, tokens_BT)

  return _functions(_Classifier(config, num_outputs), context, device)


def _check_segments(segments_BT):
  if segments_BT is not None:
    raise ValueError(
      f'segments of shape {segments_BT.shape} must be None: an encoder attends '
      'to all of a row. Put one document in a row, or use a decoder.'
    )


def _functions(module, context, device):
  config = module.config
  implementation = attention.implementation_for(
    jax.local_devices()[0] if device is None else device,
    config.compute_dtype,
    config.head_size,
  )
  logits = interface.as_function(module, 'logits')
  return interface.Model(
    config=config,
    init=interface.init_function(module, config.pad_id),
    hidden=interface.as_function(module, 'hidden'),
    logits=logits,
    apply=interface.as_function(module),
    layer_fns=interface.LayerFns(
      embed=interface.as_function(module, 'embed'),
      block=interface.as_block(_Block(config, implementation)),
      head=logits,
      context=context,
    ),
  )
