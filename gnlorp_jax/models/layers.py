"""Layers shared by the models.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  N, K  query heads, key/value heads (N a multiple of K)
  H     width of one head
"""

import re
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


def normal_init(std: float) -> jax.nn.initializers.Initializer:
  """Normal initializer that draws in float32, whatever dtype it returns.

  Args:
    std: Standard deviation, > 0.

  Returns:
    A function of `(key, shape, dtype)`.

  Note:
    `jax.nn.initializers.normal` draws in the dtype asked for. In bfloat16 that
    gives 128 different values, none further out than 2.6 standard deviations.
  """
  draw = jax.nn.initializers.normal(std)

  def init(key, shape, dtype=jnp.float32, out_sharding=None):
    return draw(key, shape, jnp.float32, out_sharding).astype(dtype)

  return init


def apply_rope(x_BTNH: jax.Array, theta: float) -> jax.Array:
  """Rotates pairs of features by an angle that grows with the position.

  Feature i and feature i + H/2 form a pair (the half-split convention of
  Hugging Face checkpoints), turned by ``t * theta ** (-2i / H)`` at position t.

  Args:
    x_BTNH: Queries or keys at positions 0 to T-1, any floating dtype, H even.
    theta: Base of the frequencies, > 1.

  Returns:
    Array of the shape and dtype of `x_BTNH`; computed in float32.

  References:
    Su et al., `RoFormer: Enhanced Transformer with Rotary Position Embedding`,
    2021, arXiv:2104.09864, equation 34.
  """
  _, seq_len, _, head_dim = x_BTNH.shape
  frequency = theta ** (
    -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  )
  angle = jnp.outer(jnp.arange(seq_len, dtype=jnp.float32), frequency)
  angle = angle[None, :, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = (left * cos - right * sin, right * cos + left * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


Attention = Literal['cudnn', 'xla']


def attention_implementation(
  device: jax.Device, dtype: jax.typing.DTypeLike, head_dim: int
) -> Attention:
  """The kernel `jax.nn.dot_product_attention` should use on a device.

  cuDNN's fused attention never stores the [B, N, T, T] scores, but takes only
  half precision and heads of at most 128 features, a multiple of 8, and
  needs an NVIDIA GPU of compute capability 8.0 or later.

  Args:
    device: The device, which need not be of this machine.
    dtype: Dtype of queries, keys and values.
    head_dim: Width of one head.

  Returns:
    'cudnn' where it applies, otherwise 'xla'.
  """
  capability = str(getattr(device, 'compute_capability', ''))
  # An AMD device also has a capability, but one that is no number.
  nvidia = re.fullmatch(r'\d+\.\d+', capability) and float(capability) >= 8
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  fits = head_dim <= 128 and head_dim % 8 == 0
  return 'cudnn' if nvidia and half and fits else 'xla'


class CausalSelfAttention(nn.Module):
  """Grouped-query causal self-attention with rotary positions, no biases.

  Attributes:
    num_heads: Number of query heads.
    num_kv_heads: Number of key/value heads, a divisor of `num_heads`.
    head_dim: Width of one head, even.
    rope_theta: Base of the rotary frequencies.
    attention: The kernel of `jax.nn.dot_product_attention`.
    dense: Builds a projection from its output width and name; it decides
      dtypes and initialisation.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  attention: Attention
  dense: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Attends from every position to itself and the positions before it."""

    def heads(name: str, count: int) -> jax.Array:
      y = self.dense(count * self.head_dim, name=name)(x_BTD)
      return y.reshape(*x_BTD.shape[:-1], count, self.head_dim)

    q_BTNH = apply_rope(heads('q_proj', self.num_heads), self.rope_theta)
    k_BTKH = apply_rope(heads('k_proj', self.num_kv_heads), self.rope_theta)
    v_BTKH = heads('v_proj', self.num_kv_heads)
    y_BTNH = jax.nn.dot_product_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      is_causal=True,
      implementation=self.attention,
    )
    y_BTD = y_BTNH.reshape(*x_BTD.shape[:-1], -1)
    return self.dense(x_BTD.shape[-1], name='o_proj')(y_BTD)


class SwiGLU(nn.Module):
  """Gated feed-forward layer: ``down(silu(gate(x)) * up(x))``, no biases.

  Attributes:
    hidden_size: Width between the projections.
    dense: Builds a projection from its output width and name.

  References:
    Shazeer, `GLU Variants Improve Transformer`, 2020, arXiv:2002.05202.
  """

  hidden_size: int
  dense: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Applies the layer to every position by itself."""
    gate = self.dense(self.hidden_size, name='gate_proj')(x_BTD)
    up = self.dense(self.hidden_size, name='up_proj')(x_BTD)
    y = jax.nn.silu(gate) * up
    return self.dense(x_BTD.shape[-1], name='down_proj')(y)
