"""How much each block of a decoder stands out: one number per layer.

What training of a few layers at a time may draw its layers by. All functions
take the matrices of the blocks by their names, ``attn/q_proj`` and so on, as
`kernels_of` finds them, and return float32 ``[L]``.

Shape suffixes in this file:
  L     layers
  B, T  sequences of a batch, positions
  D     width of the residual stream
  I, O  input and output axis of a kernel
  K     eigenvalues, ascending
  M     thresholds
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.models import kernels
from gnlorp_jax.models.interface import Model, Params

Kernels = dict[str, jax.Array]


def kernels_of(params: Params) -> Kernels:
  """The matrices of the blocks.

  Args:
    params: The parameters of a `Model`.

  Returns:
    Arrays ``[L, in, out]`` by the names of their layers, such as
    ``mlp/up_proj``; no biases, norms, embedding or head.
  """
  flat = traverse_util.flatten_dict(params['layers'], sep='/')
  return {
    path.removesuffix('/kernel'): leaf
    for path, leaf in flat.items()
    if path.endswith('/kernel')
  }


def input_squares(
  model: Model,
  params: Params,
  tokens_BT: jax.Array,
  is_token_BT: jax.Array,
) -> Kernels:
  """Sums of the squares of what the kernels of the blocks are given.

  One forward pass through the blocks, whose layers are scanned: what a layer
  reads is what the layers before it make of the tokens.

  Args:
    model: A decoder.
    params: Its parameters.
    tokens_BT: Integers; what pads a row stands behind its tokens.
    is_token_BT: Whether a position holds a token, bool. Others count nothing.

  Returns:
    By the name of a kernel ``sum_bt x_bti^2``, float32 ``[L, in]``, x being the
    input of its layer.
  """
  fns = model.layer_fns
  context = fns.context(tokens_BT)

  def body(x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, Kernels]:
    layer, number = xs
    found: Kernels = {}

    def intercept(next_fn, args, kwargs, call):
      if kernels.is_call_with('kernel', call):
        (x_BTI,) = (*args, *kwargs.values())
        found['/'.join(call.module.path)] = _sum_squares(x_BTI, is_token_BT)
      return next_fn(*args, **kwargs)

    with nn.intercept_methods(intercept):
      x_BTD = fns.block(layer, x_BTD, context, number)
    return x_BTD, found

  layers = params['layers']
  count = len(jax.tree.leaves(layers)[0])
  numbers_L = jnp.arange(count, dtype=jnp.int32)
  x_BTD = fns.embed(params, tokens_BT)
  return jax.lax.scan(body, x_BTD, (layers, numbers_L))[1]


def _sum_squares(x_BTI: jax.Array, is_token_BT: jax.Array) -> jax.Array:
  square_BTI = jnp.square(x_BTI.astype(jnp.float32))
  # Not a product: what padding holds need not be finite.
  return jnp.sum(jnp.where(is_token_BT[:, :, None], square_BTI, 0), (0, 1))


@functools.partial(jax.jit, static_argnames='thresholds')
def outlier_shares(
  kernels: Kernels, squares: Kernels, thresholds: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
  """Shares of weights that stand out among those of their layer.

  Computes, with the entries of all kernels of a layer in one set A,

    A_io = |W_io| sqrt(s_i),    D = 100 share of (A_io > M mean A)

  where s is the squared length of the input feature that the row i of a kernel
  multiplies. A constant factor of all A of a layer changes nothing, so s may be
  a sum or a mean; one of a single kernel does, for the mean is that of all.

  Args:
    kernels: Arrays ``[L, in, out]`` by name.
    squares: s of each, float32 ``[L, in]``, as of `input_squares`.
    thresholds: The M, each > 0.

  Returns:
    D in percent, ``[M, L]``, and how often the mean the largest A of a layer
    is, ``[L]``: a threshold from there on finds nothing in it.

  References:
    Li et al., `OwLore`, 2024, arXiv:2405.18380; the score is that of Yin et
    al., `OWL`, 2023, arXiv:2310.05175, of the metric of Sun et al., `Wanda`,
    2023, arXiv:2306.11695.

  Note:
    OWL feeds each block with the outputs of the blocks before, which is what
    one forward pass does, and averages s over sequences.
  """

  def one(layer: tuple[Kernels, Kernels]) -> tuple[jax.Array, jax.Array]:
    kernels, squares = layer
    sizes, total, count = [], jnp.zeros(()), 0
    for name, kernel_IO in kernels.items():
      size_IO = jnp.abs(kernel_IO.astype(jnp.float32))
      root_I = jnp.sqrt(squares[name])
      # Sums of sums: one float32 sum of millions of entries would drift.
      total += jnp.sum(jnp.sum(size_IO, axis=1) * root_I)
      count += kernel_IO.size
      sizes.append(size_IO * root_I[:, None])
    mean = total / count
    shares_M = [
      sum(jnp.sum(a_IO > m * mean) / count for a_IO in sizes)
      for m in thresholds
    ]
    largest = jnp.max(jnp.stack([jnp.max(a_IO) for a_IO in sizes]))
    times = jnp.where(mean > 0, largest / jnp.where(mean > 0, mean, 1), 0)
    return 100 * jnp.stack(shares_M), times

  shares_LM, times_L = jax.lax.map(one, (kernels, squares))
  return shares_LM.T, times_L


@jax.jit
def weight_norms(kernels: Kernels) -> jax.Array:
  """Frobenius norm of all matrices of a layer together.

  Args:
    kernels: Arrays ``[L, in, out]`` by name.

  Returns:
    ``[L]``.
  """

  def one(layer: Kernels) -> jax.Array:
    norms = [
      jnp.linalg.norm(jnp.linalg.norm(kernel_IO.astype(jnp.float32), axis=1))
      for kernel_IO in layer.values()
    ]
    return jnp.linalg.norm(jnp.stack(norms))

  return jax.lax.map(one, kernels)


@jax.jit
def hill_exponents(kernels: Kernels) -> jax.Array:
  """Exponent of the tail of a layer's spectra, the mean of its matrices.

  With the n eigenvalues of ``W^T W`` that are not 0 by shape, ascending, and
  k = n / 2 rounded down, Hill's estimator of the exponent of their density is

    alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k})

  A smaller alpha means a heavier tail: few directions of much weight, as long
  training leaves them.

  Args:
    kernels: Arrays ``[L, in, out]`` by name, in and out at least 2.

  Returns:
    ``[L]``, at least 1. Infinite where the upper half of a spectrum is flat,
    no number where a matrix is 0.

  References:
    Hill, `A simple general approach to inference about the tail of a
    distribution`, 1975; as a measure of layers, Lu et al., `AlphaPruning`,
    2024, arXiv:2410.10912.

  Note:
    Eigenvalues are squares of singular values: those of a Gram matrix would
    lose half of their digits. Kernels that a family fuses, such as queries,
    keys and values, are one matrix.
  """

  def exponent(kernel_IO: jax.Array) -> jax.Array:
    singular_K = jnp.linalg.svd(
      kernel_IO.astype(jnp.float32), compute_uv=False
    )[::-1]
    k = singular_K.size // 2
    logs_K = 2 * jnp.log(singular_K[-k - 1 :])
    return 1 + k / jnp.sum(logs_K[1:] - logs_K[0])

  def one(layer: Kernels) -> jax.Array:
    return jnp.mean(jnp.stack([exponent(kernel) for kernel in layer.values()]))

  return jax.lax.map(one, kernels)
