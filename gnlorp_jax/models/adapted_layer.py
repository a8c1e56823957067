"""What a layer with an adapter computes: LoRA, DoRA and GradNormLoRP.

A kernel ``W_0`` stays as it is; what trains are the factors A and B of a
change of rank r and, in two of the three, one magnitude m per output unit. With
``V = W_0 + s A B`` and ``s = alpha / r``, or
``alpha / sqrt(r)`` where it is rank-stabilised, the layer computes with

* ``lora``: ``W = V``,
* ``dora``: ``W = m V / |V|``, the norm a constant in the backward pass,
* ``gradnormlorp``: the same W, differentiated through the norm as well.

Shape suffixes in this file:
  I, O  a kernel's input and output axes
  R     rank of the change
  1O    one value per output unit, [*, 1, out]
"""

import dataclasses
import functools
import math
import re
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from gnlorp_jax.models import kernels
from gnlorp_jax.models.interface import Params
from gnlorp_jax.models.layers import keep

Kind = Literal['lora', 'dora', 'gradnormlorp']

# Of the arrays beside a kernel.
NAMES = ('lora_a', 'lora_b', 'magnitude')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """What is adapted, and how."""

  kind: Kind
  """``lora``, ``dora`` or ``gradnormlorp``."""
  rank: int = 8
  """Rank of the change of a kernel, at least 1."""
  alpha: float = 16.0
  """The change is multiplied by alpha / rank; greater than 0."""
  rank_stabilized: bool = False
  """Whether it is multiplied by alpha / sqrt(rank) instead, so that a higher
  rank changes no less (rsLoRA, Kalajdzievski, 2023, arXiv:2312.03732)."""
  dropout: float = 0.0
  """Share of the adapter's inputs that is dropped in training, in [0, 1)."""
  rules: tuple[str, ...] = ('layers/(attn|mlp)/.*/kernel',)
  """Regexes over the ``/``-joined paths of kernels; one that occurs in a path
  is enough to adapt the kernel."""

  def __post_init__(self):
    if self.kind not in get_args(Kind):
      raise ValueError(
        f'Unknown kind {self.kind!r}; expected one of {get_args(Kind)}.'
      )
    if not isinstance(self.rank, int) or self.rank < 1:
      raise ValueError(f'rank={self.rank!r} must be an integer of at least 1.')
    if not 0 < self.alpha < math.inf:
      raise ValueError(f'alpha={self.alpha} must be positive and finite.')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} must be in [0, 1).')
    if not isinstance(self.rules, tuple) or not self.rules:
      raise ValueError(
        f'rules={self.rules!r} must be a tuple of at least one regex, such as '
        "('attn/.*/kernel',)."
      )
    for rule in self.rules:
      try:
        re.compile(rule)
      except re.error as error:
        raise ValueError(
          f'The rule {rule!r} is no regex: {error}. Correct it.'
        ) from error

  @property
  def scale(self) -> float:
    """What the product of the factors is multiplied by."""
    if self.rank_stabilized:
      return self.alpha / math.sqrt(self.rank)
    return self.alpha / self.rank


def _exact(x: jax.Array) -> jax.Array:
  """The array in float32, or in float64 if it is that."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def direction(
  config: AdapterConfig, w_IO: jax.Array, a_IR: jax.Array, b_RO: jax.Array
) -> jax.Array:
  """The changed kernel ``V = W0 + s A B``, in float32 at least."""
  w_IO, a_IR, b_RO = map(_exact, (w_IO, a_IR, b_RO))
  product_IO = jnp.matmul(a_IR, b_RO, precision=jax.lax.Precision.HIGHEST)
  return w_IO + config.scale * product_IO


def column_norm(x_IO: jax.Array) -> jax.Array:
  """Length of each column, ``[*, 1, out]``; its gradient at 0 is 0.

  In float32 at least.
  """
  square_1O = jnp.sum(jnp.square(_exact(x_IO)), axis=-2, keepdims=True)
  is_zero = square_1O == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square_1O)))


def gain(m_1O: jax.Array, norm_1O: jax.Array) -> jax.Array:
  """What a column of V is multiplied by, ``m / |V|``, or 1 where V is zero."""
  is_zero = norm_1O == 0
  return jnp.where(is_zero, 1, m_1O / jnp.where(is_zero, 1, norm_1O))


def check_arrays(config: AdapterConfig, where: str, arrays: Params) -> None:
  """Raises a ValueError unless a layer's arrays are those of `config`.

  Args:
    config: The configuration of the adapters.
    where: The layer's path, for messages.
    arrays: The arrays of its adapter, by name.
  """
  wanted = set(NAMES if config.kind != 'lora' else NAMES[:2])
  if set(arrays) != wanted:
    raise ValueError(
      f'{where!r} has the adapter arrays {sorted(arrays)}, but '
      f'kind={config.kind!r} has {sorted(wanted)}. Use the configuration that '
      'they were made with.'
    )
  rank = arrays['lora_a'].shape[-1]
  if rank != config.rank:
    raise ValueError(
      f'{where!r} has an adapter of rank {rank}, but rank={config.rank}. Use '
      'the configuration that it was made with.'
    )


def as_matrices(
  where: str, kernel: jax.Array, arrays: Params, shape: tuple[int, ...]
) -> jax.Array:
  """A kernel as the matrices that its adapter's factors change.

  Args:
    where: The layer's path, for messages.
    kernel: The kernel.
    arrays: The arrays of its adapter, by name.
    shape: Of the kernel as matrices, ``[*, in, out]``.

  Returns:
    The kernel in that shape.

  Raises:
    ValueError: If the factors are not of that shape, or the kernel is not.
  """
  *stack, n_in, n_out = shape
  a_shape, b_shape = arrays['lora_a'].shape, arrays['lora_b'].shape
  fits = a_shape[:-1] == (*stack, n_in) and b_shape[-1] == n_out
  fits = fits and b_shape[:-1] == (*stack, a_shape[-1])
  if not fits or math.prod(shape) != kernel.size:
    raise ValueError(
      f'{where!r} has adapter factors of shapes {a_shape} and {b_shape}, which '
      f'do not fit its kernel of shape {kernel.shape}. Draw them by init from '
      'this model, and show it the axes of kernels by the argument `call`.'
    )
  return kernel.reshape(shape)


def _drop(config: AdapterConfig, module: nn.Module, x: jax.Array) -> jax.Array:
  """Input with the dropout of a training step on it, or the input itself."""
  if config.dropout == 0 or not module.has_rng('dropout'):
    return x
  share = 1 - config.dropout
  mask = jax.random.bernoulli(module.make_rng('dropout'), share, x.shape)
  return jnp.where(mask, x / share, 0)


def adapted_output(
  config: AdapterConfig,
  module: nn.Dense | nn.DenseGeneral,
  x: jax.Array,
  y: jax.Array,
) -> jax.Array:
  """An adapted layer's output, from its input and the output without adapter.

  With c = m / |V| that is ``x W0 + b + d + (c - 1) (x W0 + d)``, where d is the
  change of the output. Written so, the backward pass needs but one array of the
  output's size, and a c near 1 keeps its digits in bfloat16.
  """
  axes, where = kernels.axes_of(module), '/'.join(module.path)
  weights = nn.unbox(module.variables['params'])
  arrays = {name: weights[name] for name in NAMES if name in weights}
  check_arrays(config, where, arrays)
  shape = kernels.matrix_shape(weights['kernel'].shape, axes)
  w_IO = as_matrices(where, weights['kernel'], arrays, shape)
  a_IR, b_RO = arrays['lora_a'], arrays['lora_b']
  matmul = functools.partial(kernels.multiply, precision=module.precision)
  x = kernels.merge_input_axes(module, x.astype(y.dtype))
  y_shape, y = y.shape, y.reshape(*x.shape[:-1], shape[-1])
  dropped = _drop(config, module, x)
  low = keep(config.scale * matmul(dropped, a_IR.astype(y.dtype)))
  change = matmul(low, b_RO.astype(y.dtype))
  if config.kind == 'lora':
    return (y + change).reshape(y_shape)

  # V would be kept for the backward pass, once for every layer of a scan.
  @jax.checkpoint
  def norm(w_IO, a_IR, b_RO):
    return column_norm(direction(config, w_IO, a_IR, b_RO))

  norm_1O = keep(norm(w_IO, a_IR, b_RO))
  if config.kind == 'dora':
    norm_1O = jax.lax.stop_gradient(norm_1O)
  m_1O = arrays['magnitude'].astype(jnp.float32)
  gain_O = gain(m_1O, norm_1O).squeeze(-2)
  if dropped is not x:
    base = keep(matmul(dropped, w_IO.astype(y.dtype)))
  elif module.use_bias:
    bias_O = weights['bias'].astype(y.dtype).reshape(gain_O.shape)
    base = y - kernels.along_outputs(bias_O, y)
  else:
    base = y
  excess = kernels.along_outputs((gain_O - 1).astype(y.dtype), y)
  rest = excess * (base + change)
  return (y + change + rest).reshape(y_shape)
