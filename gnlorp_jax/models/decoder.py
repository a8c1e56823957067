"""A pre-norm decoder with RMSNorm, rotary positions and a gated MLP.

`make` turns the configuration of a family, such as `llama.LlamaConfig`, into
pure functions of a dict of arrays, laid out as

  embed/embedding [V, D]
  layers/attn/{q,k,v,o}_proj/kernel, layers/mlp/{gate,up,down}_proj/kernel
    [L, in, out], and biases [L, out] where a family has them; qkv_proj and
    gate_up_proj where they are fused
  layers/attn/{q,k}_norm/scale [L, H] where queries and keys are normed
  layers/{attn,mlp}_norm/scale [L, D], and layers/{attn,mlp}_post_norm/scale
    where outputs are normed too
  norm/scale [D]
  lm_head/kernel [D, V], absent when the head is tied to the embedding

The layers are one stack, whatever differs between them: a layer finds its own
window and frequencies by its number.

Shape suffixes in this file:
  L     layers
  B, T  batch, position in the sequence
  D     width of the residual stream
  N, K  query heads, key/value heads
  S     slots of the cache
  H     width of one head
  V     vocabulary
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.models import attention, interface, layers, rope
from gnlorp_jax.models.decoder_config import DecoderConfig
from gnlorp_jax.models.interface import Cache

LABEL_RULES: tuple[tuple[str, str], ...] = (
  (r'layers/(attn|mlp)/.*/kernel', 'low_rank'),
  (r'.*', 'full'),
)
"""Which parameters are trained how: (regex over the path, label), first match
wins. The matrices of the blocks are projected; embedding, head, norms and
biases not.
"""


class Context(NamedTuple):
  """Where the tokens of packed rows stand.

  Attributes:
    positions_BT: int32, from 0 in each document.
    segments_BT: int32, the documents' numbers.
  """

  positions_BT: jax.Array
  segments_BT: jax.Array


def context_of(
  tokens_BT: jax.Array, segments_BT: jax.Array | None = None
) -> Context | None:
  """What blocks must know of a batch: where its documents begin.

  Args:
    tokens_BT: Any.
    segments_BT: Numbers of documents, int32, each in one run of positions;
      None: every row is one document.

  Returns:
    The positions restart wherever the number changes. None where there is
    nothing to know.
  """
  del tokens_BT
  if segments_BT is None:
    return None
  number_BT = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
  before_BT = jnp.roll(segments_BT, 1, axis=1)
  is_first_BT = (segments_BT != before_BT) | (number_BT == 0)
  first_BT = jax.lax.cummax(jnp.where(is_first_BT, number_BT, 0), axis=1)
  return Context(number_BT - first_BT, segments_BT)


def _at(values: tuple[Any, ...], number: jax.Array | None) -> Any:
  """A layer's value: the only one there is, or an entry of an array."""
  if all(np.array_equal(value, values[0]) for value in values):
    return values[0]
  if number is None:
    raise ValueError(
      'The layers of this model differ, and no number of a layer was given. '
      'Call block(layer, x, context, number).'
    )
  return jnp.asarray(np.stack(values))[number]


def _window(config: DecoderConfig, number: jax.Array | None, length: int):
  """A layer's window, None where all of `length` positions are in it."""
  fits = (None if w is None or w >= length else w for w in config.windows)
  windows = tuple(fits)
  if set(windows) == {None}:
    return None
  return _at(tuple(length if w is None else w for w in windows), number)


class _Attention(nn.Module):
  config: DecoderConfig
  implementation: attention.Implementation

  @nn.compact
  def __call__(self, x_BTD, context, number, cache):
    c = self.config
    q_BTNH, k_BSKH, v_BSKH = self.heads(x_BTD)
    if c.qk_norm:
      q_BTNH = _norm(c, 'q_norm')(q_BTNH)
      k_BSKH = _norm(c, 'k_norm')(k_BSKH)
    if cache is not None:
      positions_BT = cache.newest(x_BTD.shape[1])
    elif context is not None:
      positions_BT = context.positions_BT
    else:
      positions_BT = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
    rotation = self.rotation(number, cache, x_BTD.shape[1])
    q_BTNH = rope.rotate(q_BTNH, positions_BT, *rotation)
    k_BSKH = rope.rotate(k_BSKH, positions_BT, *rotation)
    if cache is None:
      segments_BT = None if context is None else context.segments_BT
      window = _window(c, number, x_BTD.shape[1])
      y_BTNH = attention.causal(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        self.implementation,
        c.score_rule,
        segments_BT,
        window,
      )
    else:
      cache = cache.put(number, k_BSKH, v_BSKH)
      k_BSKH, v_BSKH = cache.layer(number)
      window = _window(c, number, k_BSKH.shape[1])
      y_BTNH = attention.cached(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        c.score_rule,
        positions_BT,
        cache.positions_BS,
        window,
      )
    y_BTD = y_BTNH.reshape(*x_BTD.shape[:-1], -1)
    dense = _dense(c, c.o_bias)
    return dense(c.hidden_size, name='o_proj')(y_BTD), cache

  def heads(self, x_BTD):
    """Queries, keys and values."""
    c = self.config
    counts = c.num_heads, c.kv_heads, c.kv_heads

    def heads(name, count):
      dense = _dense(c, c.qkv_bias)
      y = dense(count * c.head_size, name=f'{name}_proj')(x_BTD)
      return y.reshape(*x_BTD.shape[:-1], count, c.head_size)

    if c.fused:
      cuts = counts[0], counts[0] + counts[1]
      return jnp.split(heads('qkv', sum(counts)), cuts, axis=2)
    return [heads(*each) for each in zip('qkv', counts, strict=True)]

  def rotation(self, number, cache, seq_len):
    """Frequencies ``[F]``, or ``[B, F]``, and the factor of cosines."""
    if cache is None:
      return self.rotation_at(number, seq_len)
    limit = rope.change_at(self.config.ropes)
    if limit is None:
      return self.rotation_at(number, seq_len)
    # Rows that stay within the original context, and such as outgrow it.
    short_F, factor = self.rotation_at(number, limit)
    long_F, _ = self.rotation_at(number, limit + 1)
    is_long_B1 = (cache.longest_B > limit)[:, None]
    return jnp.where(is_long_B1, long_F[None], short_F[None]), factor

  def rotation_at(self, number, length):
    """The same of rows of one length; a layer without has zeros."""
    width = self.config.rotary_width
    none = np.zeros(width // 2), 1.0
    found = [
      none if r is None else r.frequencies(width, length)
      for r in self.config.ropes
    ]
    frequencies, factors = zip(*found, strict=True)
    return _at(frequencies, number), _at(factors, number)


class _Block(nn.Module):
  config: DecoderConfig
  implementation: attention.Implementation

  @nn.compact
  def __call__(self, x_BTD, context=None, number=None, cache=None):
    """The next x; with a cache, the cache as well."""
    c = self.config
    attn = _Attention(c, self.implementation, name='attn')
    mlp = layers.GatedMLP(
      c.intermediate_size,
      _dense(c, c.has_mlp_bias),
      _ACTIVATIONS[c.activation],
      c.fused,
      name='mlp',
    )
    y_BTD, new_cache = attn(
      _norm(c, 'attn_norm')(x_BTD), context, number, cache
    )
    if c.post_norms:
      y_BTD = _norm(c, 'attn_post_norm')(y_BTD)
    x_BTD += y_BTD
    y_BTD = mlp(_norm(c, 'mlp_norm')(x_BTD))
    if c.post_norms:
      y_BTD = _norm(c, 'mlp_post_norm')(y_BTD)
    x_BTD = x_BTD + y_BTD
    return x_BTD if cache is None else (x_BTD, new_cache)


_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


def _norm(config, name):
  norm = layers.ZeroCenteredRMSNorm if config.norms_from_one else nn.RMSNorm
  return norm(
    epsilon=config.rms_norm_eps,
    dtype=config.compute_dtype,
    param_dtype=config.param_dtype,
    name=name,
  )


def _dense(config, use_bias):
  return functools.partial(
    nn.Dense,
    use_bias=use_bias,
    dot_general=layers.dot_general,
    dtype=config.compute_dtype,
    param_dtype=config.param_dtype,
    kernel_init=layers.normal_init(config.initializer_std),
  )


class _Decoder(nn.Module):
  config: DecoderConfig
  implementation: attention.Implementation

  def setup(self):
    c = self.config
    self.embedder = layers.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=layers.normal_init(c.initializer_std),
      name='embed',
      dtype=c.compute_dtype,
      param_dtype=c.param_dtype,
    )
    policy = None if c.remat else layers.keep_marked
    block = nn.remat(_Block, prevent_cse=False, policy=policy)
    self.layers = block(c, self.implementation)
    self.norm = _norm(c, None)
    if not c.tie_embeddings:
      self.lm_head = _dense(c, False)(c.vocab_size)

  def embed(self, tokens_BT):
    c, x_BTD = self.config, self.embedder(tokens_BT)
    interface.check_seq_len(tokens_BT, c.max_seq_len)
    if not c.scaled_embeddings:
      return x_BTD
    # Rounded as Hugging Face's Gemma rounds it.
    return x_BTD * jnp.asarray(math.sqrt(c.hidden_size), c.compute_dtype)

  def scan(self, fn):
    """``fn(block, carry, number of the layer, context)`` layer by layer."""
    return nn.scan(
      lambda block, *args: (fn(block, *args), None),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, nn.broadcast),
      length=self.config.num_layers,
    )

  def hidden(self, tokens_BT, segments_BT=None):
    # The model itself drops nothing; its adapters may.
    scan = self.scan(
      lambda block, x_BTD, number, context: block(x_BTD, context, number)
    )
    numbers_L = jnp.arange(self.config.num_layers, dtype=jnp.int32)
    context = context_of(tokens_BT, segments_BT)
    x_BTD, _ = scan(self.layers, self.embed(tokens_BT), numbers_L, context)
    return self.norm(x_BTD)

  def extend(self, tokens_BT, positions_BT, cache):
    scan = self.scan(
      lambda block, carry, number, _: block(carry[0], None, number, carry[1])
    )
    numbers_L = jnp.arange(self.config.num_layers, dtype=jnp.int32)
    carry = self.embed(tokens_BT), cache.open(positions_BT)
    (x_BTD, cache), _ = scan(self.layers, carry, numbers_L, None)
    return self.norm(x_BTD), cache

  def logits(self, x):
    c = self.config
    head = self.embedder.attend if c.tie_embeddings else self.lm_head
    logits = head(x).astype(jnp.float32)
    if c.final_softcap is not None:
      logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
    return logits

  def head(self, x):
    return self.logits(self.norm(x))

  def __call__(self, tokens_BT, segments_BT=None):
    return self.logits(self.hidden(tokens_BT, segments_BT))


def make(
  config: DecoderConfig, device: jax.Device | None = None
) -> interface.Model:
  """Builds the functions of a model.

  Args:
    config: The architecture, a family's configuration.
    device: One of those the functions will run on, which decides the
      implementation of the attention; None is the first of this process.

  Returns:
    The functions. Tokens are integers in [0, vocab_size), at most max_seq_len
    of them in a row (more raise ValueError when traced). `hidden` is what comes
    after the final norm, and `layer_fns.head` is that norm and the head.

  Note:
    In bfloat16 the norms and the rotation stay in float32 to the end, where
    Hugging Face's LLaMA rounds before it multiplies by the scale and by the
    cosines. The head multiplies in compute dtype, as is usual; its result is
    returned as float32 so that softmax and loss are computed in float32.
  """
  implementation = attention.implementation_for(
    jax.local_devices()[0] if device is None else device,
    config.compute_dtype,
    config.head_size,
  )
  if config.score_rule.softcap is not None:
    implementation = 'xla'
  module = _Decoder(config, implementation)
  block = _Block(config, implementation)
  return interface.Model(
    config=config,
    init=interface.init_function(module),
    hidden=interface.as_function(module, 'hidden'),
    logits=interface.as_function(module, 'logits'),
    apply=interface.as_function(module),
    layer_fns=interface.LayerFns(
      embed=interface.as_function(module, 'embed'),
      block=interface.as_block(block),
      head=interface.as_function(module, 'head'),
      context=context_of,
      extend=lambda layer, x_BTD, number, cache: block.apply(
        {'params': layer}, x_BTD, None, number, cache
      ),
    ),
    extend=lambda params, tokens_BT, positions_BT, cache: module.apply(
      {'params': params}, tokens_BT, positions_BT, cache, method='extend'
    ),
    start_cache=functools.partial(start_cache, config),
  )


def start_cache(
  config: DecoderConfig,
  batch: int,
  slots: int,
  longest_B: jax.Array | None = None,
) -> Cache:
  """An empty cache.

  Args:
    config: The architecture.
    batch: Rows, B.
    slots: Tokens of a row, padding included, S.
    longest_B: The most tokens that each row will have, int32; None: S.

  Returns:
    The cache, in compute dtype.
  """
  shape = config.num_layers, batch, slots, config.kv_heads, config.head_size
  if longest_B is None:
    longest_B = jnp.full(batch, slots, jnp.int32)
  return Cache(
    k_LBSKH=jnp.zeros(shape, config.compute_dtype),
    v_LBSKH=jnp.zeros(shape, config.compute_dtype),
    positions_BS=jnp.full((batch, slots), -1, jnp.int32),
    length=jnp.zeros((), jnp.int32),
    longest_B=longest_B,
  )


def num_params(config: DecoderConfig) -> int:
  """Number of parameters, from shapes alone: nothing is allocated."""
  abstract = jax.eval_shape(make(config).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def flops_per_token(config: DecoderConfig, seq_len: int) -> int:
  """Floating-point operations that training needs per token.

  A matrix of n weights costs 2n in the forward pass and 4n in the backward
  pass. Attention adds ``12 N H T`` in each layer: two products (scores, mixing
  of values) of 2 N H T forward and twice that backward. The embedding is a
  lookup and costs nothing; a tied head still costs its product.

  Args:
    config: The architecture.
    seq_len: Tokens per sequence, T.

  Returns:
    FLOPs per token, forward and backward. Divide tokens per second times this
    by the peak of the hardware for the model FLOP utilisation.

  References:
    Chowdhery et al., `PaLM`, 2022, arXiv:2204.02311, appendix B.

  Note:
    As there, the causal mask brings no discount, nor does a window;
    recomputation (`remat`) and the optimizer do not count.
  """
  c = config
  width = c.num_heads * c.head_size
  attn = 2 * c.hidden_size * (width + c.kv_heads * c.head_size)
  mlp = 3 * c.hidden_size * c.intermediate_size
  matrices = c.num_layers * (attn + mlp) + c.hidden_size * c.vocab_size
  return 6 * matrices + 12 * c.num_layers * width * seq_len
