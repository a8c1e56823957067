"""Layers shared by the models.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  S     position that is attended to
  N, K  query heads, key/value heads (N a multiple of K)
  G     query heads of one key/value head, N / K
  H     width of one head
  I, O  input and output of a kernel
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


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


_KEPT = 'kept'


def keep(x: jax.Array) -> jax.Array:
  """Marks an array of a block that the backward pass shall not compute again.

  Args:
    x: Costs more to compute than to store.

  Returns:
    The same. `keep_marked` looks for the mark; elsewhere it means nothing.
  """
  return checkpoint_name(x, _KEPT)


def keep_marked(primitive: Any, *avals: Any, **params: Any) -> bool:
  """A policy for `jax.checkpoint`: the backward pass keeps what is marked.

  These are the products of `dot_general`, the results of attention, and of an
  adapter what takes a sum over many features. All else is cheap, and costs more
  to store than to compute again, on CPUs in time as well.
  """
  named = jax.checkpoint_policies.save_only_these_names(_KEPT)
  is_cudnn = primitive.name.startswith('dot_product_attention_fwd')
  return is_cudnn or named(primitive, *avals, **params)


def dot_general(
  x: jax.Array,
  kernel_IO: jax.Array,
  dimension_numbers: Any,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """`jax.lax.dot_general` for `flax.linen.Dense`, faster in its gradient.

  JAX takes the gradient of a kernel as the product of the slopes with x, and
  XLA's CPU code first writes the slopes in another order, with all element-wise
  work before it, which takes longer than the product. Here the narrower of the
  two is the one that is turned round.

  Args:
    x: ``[*, I]``.
    kernel_IO: The kernel.
    dimension_numbers: Must contract the last axis of x with the first one of
      the kernel, as `flax.linen.Dense` does.
    precision: Of this product and of both its gradients.
    preferred_element_type: None, or the dtype of x.

  Returns:
    ``[*, O]``.

  Raises:
    ValueError: If it is asked for another product, or if x and the kernel have
      different dtypes.

  Note:
    There is a reverse mode only: `jax.jvp` raises.
  """
  if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
    raise ValueError(
      f'dimension_numbers={dimension_numbers}: only the last axis of x can be '
      'contracted with the first one of a kernel. Use jax.lax.dot_general.'
    )
  if x.dtype != kernel_IO.dtype:
    raise ValueError(
      f'x is {x.dtype}, the kernel {kernel_IO.dtype}: both must have one '
      'dtype. Cast one of them, or set the dtype of the layer.'
    )
  if preferred_element_type not in (None, x.dtype):
    raise ValueError(
      f'preferred_element_type={preferred_element_type} must be None or the '
      f'dtype of x, {x.dtype}. Use jax.lax.dot_general.'
    )
  return _product(precision, x, kernel_IO)


def _product_of(precision, x, kernel_IO):
  axes = ((x.ndim - 1,), (0,))
  return jax.lax.dot_general(x, kernel_IO, (axes, ((), ())), precision)


def _product_with_residuals(precision, x, kernel_IO):
  y = keep(_product_of(precision, x, kernel_IO))
  return y, (x, kernel_IO)


def _product_gradients(precision, residuals, slopes):
  x, kernel_IO = residuals
  multiply = functools.partial(jax.lax.dot_general, precision=precision)
  x_grad = multiply(slopes, kernel_IO, (((x.ndim - 1,), (1,)), ((), ())))
  positions = tuple(range(x.ndim - 1))
  axes = ((positions, positions), ((), ()))
  # XLA turns the first operand round: let it be the narrower one.
  if x.shape[-1] <= slopes.shape[-1]:
    return x_grad, multiply(x, slopes, axes)
  return x_grad, multiply(slopes, x, axes).T


_product = jax.custom_vjp(_product_of, nondiff_argnums=(0,))
_product.defvjp(_product_with_residuals, _product_gradients)


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


def causal_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  implementation: Attention,
) -> jax.Array:
  """Each position's mean of the values up to it, weighted by its scores.

  Args:
    q_BTNH: Queries; query head n reads key/value head ``n // (N / K)``.
    k_BSKH: Keys, as many positions as queries.
    v_BSKH: Values.
    implementation: 'cudnn' is the kernel of `jax.nn.dot_product_attention`.
      'xla' is plain products with a gradient of their own: it keeps the result
      and one number a row, and computes the weights again from the scores,
      where JAX's own would keep the weights of all heads.

  Returns:
    Array of the shape and dtype of `q_BTNH`. Scores and their softmax are
    float32.

  References:
    Dao et al., `FlashAttention`, 2022, arXiv:2205.14135, appendix B.2 for the
    gradient. Here nothing is split in tiles: the scores of one layer exist.
  """
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation=implementation
    )
  batch, seq_len, num_heads, head_dim = q_BTNH.shape
  num_kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(
    *(batch, seq_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
  )
  y_BKGTH = _attend(
    q_BTKGH.transpose(0, 2, 3, 1, 4),
    k_BSKH.transpose(0, 2, 1, 3),
    v_BSKH.transpose(0, 2, 1, 3),
  )
  return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


@jax.custom_vjp
def _attend(q_BKGTH, k_BKSH, v_BKSH):
  return _attend_with_residuals(q_BKGTH, k_BKSH, v_BKSH)[0]


def _scores(q_BKGTH, k_BKSH):
  seq_len, head_dim = q_BKGTH.shape[-2:]
  scores_BKGTS = jnp.einsum(
    'bkgth,bksh->bkgts', q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
  )
  is_past_TS = jnp.tri(seq_len, dtype=bool)
  is_past_BKGTS = jnp.broadcast_to(is_past_TS, scores_BKGTS.shape)
  return jnp.where(is_past_BKGTS, scores_BKGTS * head_dim**-0.5, -jnp.inf)


def _attend_with_residuals(q_BKGTH, k_BKSH, v_BKSH):
  scores_BKGTS = _scores(q_BKGTH, k_BKSH)
  largest_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
  exp_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
  sum_BKGT1 = jnp.sum(exp_BKGTS, axis=-1, keepdims=True)
  y_BKGTH = jnp.einsum(
    'bkgts,bksh->bkgth',
    exp_BKGTS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  y_BKGTH = keep((y_BKGTH / sum_BKGT1).astype(q_BKGTH.dtype))
  log_sum_BKGT1 = keep(largest_BKGT1 + jnp.log(sum_BKGT1))
  return y_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, y_BKGTH, log_sum_BKGT1)


def _attend_gradients(residuals, slopes_BKGTH):
  q_BKGTH, k_BKSH, v_BKSH, y_BKGTH, log_sum_BKGT1 = residuals
  weights_BKGTS = jnp.exp(_scores(q_BKGTH, k_BKSH) - log_sum_BKGT1)
  # The mean, by the weights, of the slopes of a row's weights.
  mean_BKGT1 = jnp.sum(
    slopes_BKGTH.astype(jnp.float32) * y_BKGTH, axis=-1, keepdims=True
  )
  weight_slopes_BKGTS = jnp.einsum(
    'bkgth,bksh->bkgts',
    slopes_BKGTH,
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  score_slopes_BKGTS = weights_BKGTS * (weight_slopes_BKGTS - mean_BKGT1)
  score_slopes_BKGTS *= q_BKGTH.shape[-1] ** -0.5
  score_slopes_BKGTS = score_slopes_BKGTS.astype(q_BKGTH.dtype)
  return (
    jnp.einsum('bkgts,bksh->bkgth', score_slopes_BKGTS, k_BKSH),
    jnp.einsum('bkgts,bkgth->bksh', score_slopes_BKGTS, q_BKGTH),
    jnp.einsum(
      'bkgts,bkgth->bksh', weights_BKGTS.astype(v_BKSH.dtype), slopes_BKGTH
    ),
  )


_attend.defvjp(_attend_with_residuals, _attend_gradients)


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
    k_BSKH = apply_rope(heads('k_proj', self.num_kv_heads), self.rope_theta)
    v_BSKH = heads('v_proj', self.num_kv_heads)
    y_BTNH = causal_attention(q_BTNH, k_BSKH, v_BSKH, self.attention)
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
