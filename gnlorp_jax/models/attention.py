"""Attention of a decoder: causal, in documents, windows and with a cache.

Shape suffixes in this file:
  B, T  batch, position that attends
  S     position that is attended to
  N, K  query heads, key/value heads (N a multiple of K)
  G     query heads of one key/value head, N / K
  H     width of one head
"""

import functools
import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.models.layers import keep, rounded_once

Implementation = Literal['cudnn', 'xla']


def implementation_for(
  device: jax.Device, dtype: jax.typing.DTypeLike, head_dim: int
) -> Implementation:
  """What `jax.nn.dot_product_attention` should use on a device.

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


class ScoreRule(NamedTuple):
  """How products of queries and keys become scores.

  Attributes:
    scale: What a product is multiplied by.
    softcap: Largest size of a score, approached as ``softcap tanh(score /
      softcap)``; None has no limit.
  """

  scale: float
  softcap: float | None = None

  def of(self, products: jax.Array) -> jax.Array:
    """The scores of float32 products."""
    scores = products * self.scale
    if self.softcap is None:
      return scores
    return self.softcap * jnp.tanh(scores / self.softcap)


def causal(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  implementation: Implementation,
  rule: ScoreRule,
  segments_BT: jax.Array | None = None,
  window: jax.Array | int | None = None,
) -> jax.Array:
  """Each position's mean of the values up to it, weighted by its scores.

  Args:
    q_BTNH: Queries; query head n reads key/value head ``n // (N / K)``.
    k_BSKH: Keys, as many positions as queries.
    v_BSKH: Values.
    implementation: 'cudnn' is that of `jax.nn.dot_product_attention`, which
      takes no softcap; where it would need a mask for an odd number of
      positions, and where `jax.shard_map` leaves axes to the compiler, 'xla'
      takes its place. That is plain products with a gradient of their own: it
      keeps the result and one number a row, and computes the weights again from
      the scores, where JAX's own would keep the weights of all heads.
    rule: From products to scores.
    segments_BT: Numbers of documents: a position attends to those of its own
      number. None: all are of one document.
    window: Positions that are attended to, the position itself included, > 0:
      an int, or an int32 scalar array. None: all up to it.

  Returns:
    Array of the shape and dtype of `q_BTNH`. Scores and their softmax are
    float32.

  References:
    Dao et al., `FlashAttention`, 2022, arXiv:2205.14135, appendix B.2 for the
    gradient. Here nothing is split in tiles: the scores of one layer exist.
  """
  needs_mask = segments_BT is not None or isinstance(window, jax.Array)
  # Of a mask, cuDNN's gradient takes even lengths alone.
  is_odd = needs_mask and q_BTNH.shape[1] % 2
  if implementation == 'cudnn' and not is_odd and not _is_partly_manual():
    return _cudnn(q_BTNH, k_BSKH, v_BSKH, rule.scale, segments_BT, window)
  batch, seq_len, num_heads, head_dim = q_BTNH.shape
  num_kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(
    *(batch, seq_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
  )
  y_BKGTH = _attend(
    rule,
    q_BTKGH.transpose(0, 2, 3, 1, 4),
    k_BSKH.transpose(0, 2, 1, 3),
    v_BSKH.transpose(0, 2, 1, 3),
    segments_BT,
    window,
  )
  return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _is_partly_manual() -> bool:
  """Whether `jax.shard_map` leaves some axes of the mesh to the compiler.

  There JAX cannot say how its call of cuDNN is split, and fails (0.10).
  """
  mesh = jax.sharding.get_abstract_mesh()
  return bool(mesh.manual_axes) and mesh.manual_axes != mesh.axis_names


def _cudnn(q_BTNH, k_BSKH, v_BSKH, scale, segments_BT, window):
  """The fused kernel; where a mask has to be given, it reads one in full."""
  mask_B1TS = None
  if segments_BT is not None or isinstance(window, jax.Array):
    seq_len = q_BTNH.shape[1]
    mask_B1TS = _visible(seq_len, segments_BT, window)[:, None]
    window = None
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=mask_B1TS,
    scale=scale,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation='cudnn',
  )


def _visible(seq_len, segments_BT, window):
  """Which positions each attends to, bool ``[1 or B, T, S]``."""
  visible_BTS = jnp.tri(seq_len, dtype=bool)[None]
  if window is not None:
    number_T = jnp.arange(seq_len)
    visible_BTS &= (number_T[:, None] - number_T[None] < window)[None]
  if segments_BT is not None:
    visible_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return visible_BTS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q_BKGTH, k_BKSH, v_BKSH, segments_BT, window):
  inputs = q_BKGTH, k_BKSH, v_BKSH, segments_BT, window
  return _attend_with_residuals(rule, *inputs)[0]


def _products(q_BKGTH, k_BKSH):
  return jnp.einsum(
    'bkgth,bksh->bkgts', q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
  )


def _where_visible(scores_BKGTS, segments_BT, window):
  seq_len = scores_BKGTS.shape[-1]
  visible_B11TS = _visible(seq_len, segments_BT, window)[:, None, None]
  visible_BKGTS = jnp.broadcast_to(visible_B11TS, scores_BKGTS.shape)
  return jnp.where(visible_BKGTS, scores_BKGTS, -jnp.inf)


def _attend_with_residuals(rule, q_BKGTH, k_BKSH, v_BKSH, segments_BT, window):
  scores_BKGTS = _where_visible(
    rule.of(_products(q_BKGTH, k_BKSH)), segments_BT, window
  )
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
  inputs = q_BKGTH, k_BKSH, v_BKSH, segments_BT, window
  return y_BKGTH, (*inputs, y_BKGTH, log_sum_BKGT1)


def _attend_gradients(rule, residuals, slopes_BKGTH):
  q_BKGTH, k_BKSH, v_BKSH, segments_BT, window, *rest = residuals
  y_BKGTH, log_sum_BKGT1 = rest
  scores_BKGTS = rule.of(_products(q_BKGTH, k_BKSH))
  weights_BKGTS = jnp.exp(
    _where_visible(scores_BKGTS, segments_BT, window) - log_sum_BKGT1
  )
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
  if rule.softcap is not None:
    score_slopes_BKGTS *= 1 - jnp.square(scores_BKGTS / rule.softcap)
  score_slopes_BKGTS *= rule.scale
  score_slopes_BKGTS = score_slopes_BKGTS.astype(q_BKGTH.dtype)

  def product(subscripts, x, y):
    return rounded_once(functools.partial(jnp.einsum, subscripts), x, y)

  weights_BKGTS = weights_BKGTS.astype(v_BKSH.dtype)
  return (
    product('bkgts,bksh->bkgth', score_slopes_BKGTS, k_BKSH),
    # XLA turns the first operand round: let it be the narrow one.
    product('bkgth,bkgts->bkhs', q_BKGTH, score_slopes_BKGTS).mT,
    product('bkgth,bkgts->bkhs', slopes_BKGTH, weights_BKGTS).mT,
    None,
    None,
  )


_attend.defvjp(_attend_with_residuals, _attend_gradients)


def cached(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  rule: ScoreRule,
  positions_BT: jax.Array,
  positions_BS: jax.Array,
  window: jax.Array | int | None = None,
) -> jax.Array:
  """New tokens' means of all values that a cache holds up to them.

  Args:
    q_BTNH: Queries of the new tokens.
    k_BSKH: Keys of all slots, those of the new tokens among them.
    v_BSKH: Values of all slots.
    rule: From products to scores.
    positions_BT: Positions of the new tokens; what comes of one less than 0 has
      no meaning.
    positions_BS: Positions of what the slots hold; a slot less than 0 is empty.
    window: As of `causal`.

  Returns:
    Array of the shape and dtype of `q_BTNH`. Has no gradient of its own.
  """
  distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
  visible_BTS = (distance_BTS >= 0) & (positions_BS >= 0)[:, None, :]
  if window is not None:
    visible_BTS &= distance_BTS < window
  batch, length, num_heads, head_dim = q_BTNH.shape
  num_kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(
    batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim
  )
  products_BKGTS = jnp.einsum(
    'btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  # Not minus infinity: a row of padding sees nothing, and must not be NaN.
  scores_BKGTS = jnp.where(
    visible_BTS[:, None, None], rule.of(products_BKGTS), -1e30
  )
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
  y_BTKGH = jnp.einsum(
    'bkgts,bskh->btkgh',
    weights_BKGTS.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  return y_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
