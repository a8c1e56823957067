"""Layers shared by the models.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  I, O  input and output of a kernel
"""

import functools
from collections.abc import Callable
from typing import Any

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
  """`product` for `flax.linen.Dense`; the backward pass keeps its result.

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
  return keep(product(x, kernel_IO, precision))


def product(
  x: jax.Array,
  kernel_IO: jax.Array,
  precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
  """``x @ kernel``, faster in its gradient.

  JAX takes the gradient of a kernel as the product of the slopes with x, and
  XLA's CPU code first writes the slopes in another order, with all element-wise
  work before it, which takes longer than the product. Here the narrower of the
  two is the one that is turned round.

  Args:
    x: ``[*, I]``.
    kernel_IO: The kernel, of the dtype of x.
    precision: Of this product and of both its gradients.

  Returns:
    ``[*, O]``, see `rounded_once`.

  Note:
    There is a reverse mode only: `jax.jvp` raises.
  """
  return _product(precision, x, kernel_IO)


def rounded_once(multiply: Callable[..., Any], x: Any, y: Any) -> Any:
  """A product of two arrays, of bfloat16 ones summed in float32 on CPUs too.

  On GPUs a product in bfloat16 is summed in float32 and then rounded, whatever
  it is asked for. XLA's CPU code does so, and uses the matrix units of a
  processor that has them, only where the result is to be float32.

  Args:
    multiply: Maps x, y and ``preferred_element_type=None`` to their product.
    x: First operand.
    y: Second operand, of the dtype of x.

  Returns:
    The product, in the dtype of x.
  """
  if x.dtype != jnp.bfloat16:
    return multiply(x, y)

  def through_float32(x, y):
    product = multiply(x, y, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)

  # Not on GPUs: XLA merges products of the same x there, and then writes the
  # float32 result before it rounds.
  return jax.lax.platform_dependent(x, y, cpu=through_float32, default=multiply)


def _multiply(precision, x, y, axes):
  multiply = functools.partial(
    jax.lax.dot_general,
    dimension_numbers=(axes, ((), ())),
    precision=precision,
  )
  return rounded_once(multiply, x, y)


def _product_of(precision, x, kernel_IO):
  return _multiply(precision, x, kernel_IO, ((x.ndim - 1,), (0,)))


def _product_with_residuals(precision, x, kernel_IO):
  return _product_of(precision, x, kernel_IO), (x, kernel_IO)


def _product_gradients(precision, residuals, slopes):
  x, kernel_IO = residuals
  multiply = functools.partial(_multiply, precision)
  x_grad = multiply(slopes, kernel_IO, ((x.ndim - 1,), (1,)))
  positions = tuple(range(x.ndim - 1))
  axes = (positions, positions)
  # XLA turns the first operand round: let it be the narrower one.
  if x.shape[-1] <= slopes.shape[-1]:
    return x_grad, multiply(x, slopes, axes)
  return x_grad, multiply(slopes, x, axes).T


_product = jax.custom_vjp(_product_of, nondiff_argnums=(0,))
_product.defvjp(_product_with_residuals, _product_gradients)


class Embed(nn.Embed):
  """`nn.Embed` whose `attend` is a product of this module."""

  def attend(self, query: jax.Array) -> jax.Array:
    """Products of a query ``[*, D]`` with every embedding, ``[*, V]``."""
    query, embedding = self.promote_dtype(
      query, self.embedding, dtype=self.dtype
    )
    return product(query, embedding.T)


class ZeroCenteredRMSNorm(nn.Module):
  """RMSNorm whose scale is 1 plus its parameter, as in Gemma.

  Attributes:
    epsilon: Added to the mean square.
    dtype: Of the result; the norm is computed in float32.
    param_dtype: Of the parameter, which starts at 0.
  """

  epsilon: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Norms the last axis."""
    shape = (x.shape[-1],)
    scale = self.param('scale', nn.initializers.zeros, shape, self.param_dtype)
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(
      jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon
    )
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * (1 + scale)).astype(self.dtype)


class GatedMLP(nn.Module):
  """Gated feed-forward layer: ``down(activation(gate(x)) * up(x))``.

  Attributes:
    hidden_size: Width between the projections.
    dense: Builds a projection from its output width and name.
    activation: Of the gate.
    fused: Whether gate and up are one product.

  References:
    Shazeer, `GLU Variants Improve Transformer`, 2020, arXiv:2002.05202.
  """

  hidden_size: int
  dense: Callable[..., nn.Module]
  activation: Callable[[jax.Array], jax.Array]
  fused: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Applies the layer to every position by itself."""
    if self.fused:
      both = self.dense(2 * self.hidden_size, name='gate_up_proj')(x_BTD)
      gate, up = jnp.split(both, 2, axis=-1)
    else:
      gate = self.dense(self.hidden_size, name='gate_proj')(x_BTD)
      up = self.dense(self.hidden_size, name='up_proj')(x_BTD)
    y = self.activation(gate) * up
    return self.dense(x_BTD.shape[-1], name='down_proj')(y)
