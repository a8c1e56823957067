"""A pre-norm decoder with RMSNorm, rotary positions and SwiGLU.

`make` turns the configuration of a family, such as `llama.LlamaConfig`, into
pure functions of a dict of arrays, laid out as

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

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnlorp_jax.models import interface, layers


class _Block(nn.Module):
  config: Any
  attention: layers.Attention

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, mask_BT: jax.Array | None = None
  ) -> jax.Array:
    if mask_BT is not None:
      raise ValueError(
        f'mask_BT of shape {mask_BT.shape} must be None: a decoder attends to '
        'all positions up to a token, and tokens before padding see none of '
        'it. Leave the mask out.'
      )
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


class _Decoder(nn.Module):
  config: Any
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
    interface.check_seq_len(tokens_BT, self.config.max_seq_len)
    return self.embedder(tokens_BT)

  def hidden(self, tokens_BT):
    # The model itself drops nothing; its adapters may.
    scan = nn.scan(
      lambda block, x_BTD, _: (block(x_BTD), None),
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
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


def make(config: Any, device: jax.Device | None = None) -> interface.Model:
  """Builds the functions of a model.

  Args:
    config: The architecture, a family's configuration.
    device: One of those the functions will run on, which decides the kernel of
      the attention; None is the first of this process.

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
  attention = layers.attention_implementation(
    jax.devices()[0] if device is None else device,
    config.compute_dtype,
    config.head_dim,
  )
  module = _Decoder(config, attention)
  return interface.Model(
    config=config,
    init=interface.init_function(module),
    hidden=interface.as_function(module, 'hidden'),
    logits=interface.as_function(module, 'logits'),
    apply=interface.as_function(module),
    layer_fns=interface.LayerFns(
      embed=interface.as_function(module, 'embed'),
      block=interface.as_block(_Block(config, attention)),
      head=interface.as_function(module, 'head'),
      mask=lambda tokens_BT: None,
    ),
  )
