"""A feature of every example: its gradient by one matrix of the last block.

An example's loss is the mean over the positions at which it is learned, so that
neither padding nor neighbours change it. Of the model one forward pass without
dropout is taken up to the last block, and nothing of it is kept.

Shape suffixes in this file:
  B, T    rows of a chunk of the pool, positions
  D       features of the residual stream
  I, O    axes of the matrix: the values' columns alone
  J, K    the same of a sketch
  M       directions
  F       entries of a feature
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.training.objectives import Pieces
from gnlorp_jax.training.parameters import LAYERS, Parameters, outer
from gnlorp_jax.training.step import Batch

EPS = 1e-3  # How far the paper moves the matrix along a direction.


class Tail(NamedTuple):
  """The end of a model, from the last block on, and the matrix in it.

  Attributes:
    pieces: The loss without dropout, layer by layer.
    parameters: How weights are held.
    path: Of the matrix in a layer, such as ``('attn', 'v_proj', 'kernel')``.
    start: Its first column that counts; those from there to the end do.
    shape: I and O.
    num_layers: Layers of the model.
  """

  pieces: Pieces
  parameters: Parameters
  path: tuple[str, ...]
  start: int
  shape: tuple[int, int]
  num_layers: int

  @property
  def last(self) -> jax.Array:
    """The number of the last block."""
    return jnp.int32(self.num_layers - 1)


class Weights(NamedTuple):
  """What of a model the tail reads, decoded."""

  outer: Any  # without the layers
  layer: Any  # the last one


def weights_of(tail: Tail, stored: Any) -> Weights:
  """The weights of the tail.

  Args:
    tail: The tail.
    stored: All weights as a run stores them, trained and frozen ones joined.
  """
  decode = tail.parameters.decode
  layer = jax.tree.map(lambda x: x[-1], stored[LAYERS])
  return Weights(decode(outer(stored)), decode(layer))


def before_last(
  tail: Tail, stored: Any, weights: Weights, batch: Batch
) -> jax.Array:
  """The input of the last block, ``[B, T, D]``; each layer is decoded in turn.

  Args:
    tail: The model.
    stored: As of `weights_of`.
    weights: Of the tail, embedding and head among them.
    batch: Rows.
  """
  x_BTD = tail.pieces.embed(weights.outer, batch)

  def body(number: jax.Array, x_BTD: jax.Array) -> jax.Array:
    layer = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False),
      stored[LAYERS],
    )
    layer = tail.parameters.decode(layer)
    return tail.pieces.block(layer, x_BTD, batch, number)

  return jax.lax.fori_loop(0, tail.num_layers - 1, body, x_BTD)


def of_mean_losses(batch: Batch) -> Batch:
  """The batch with weights that sum up to 1 in every row that has any."""
  sums_B1 = batch['weights'].sum(axis=1, keepdims=True)
  weights = batch['weights'] / jnp.where(sums_B1 > 0, sums_B1, 1)
  return batch | {'weights': weights}


def _moved(tail: Tail, layer: Any, change_IO: jax.Array) -> Any:
  """The layer with `change_IO` added to the matrix, rounded once."""
  flat = traverse_util.flatten_dict(layer)
  whole = flat[tail.path]
  exact = whole.astype(jnp.promote_types(whole.dtype, jnp.float32))
  moved = exact.at[:, tail.start :].add(change_IO)
  return traverse_util.unflatten_dict(
    flat | {tail.path: moved.astype(whole.dtype)}
  )


def exact_gradients(
  tail: Tail,
  weights: Weights,
  x_BTD: jax.Array,
  batch: Batch,
  sketch: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """Gradients of every row's loss by the matrix, in one backward pass.

  Rows do not see each other, so the gradient of the sum of their losses by a
  change of the matrix that each row has for itself is that of each. The block
  alone is worked through row by row; the head sees all rows, chunk by chunk.
  Gradients G of all rows of the chunk exist at once, also where a sketch ``L' G
  R`` is what is returned.

  Args:
    tail: The model.
    weights: Of the tail.
    x_BTD: Input of the last block.
    batch: Rows.
    sketch: L ``[I, J]`` and R ``[O, K]``; None returns all of G.

  Returns:
    float32 ``[B, I O]``, or ``[B, J K]``.

  Note:
    CoLM estimates them from two forward passes of the last layer for each of
    few directions (`derivatives`). This costs what one direction does.
  """
  batch = of_mean_losses(batch)
  rows = {k: batch[k] for k in ('inputs', 'segments') if k in batch}
  shape = tail.shape
  if sketch is not None:
    shape = sketch[0].shape[1], sketch[1].shape[1]

  def block(
    change: jax.Array, x_TD: jax.Array, row: dict[str, jax.Array]
  ) -> jax.Array:
    if sketch is not None:
      change = sketch[0] @ change @ sketch[1].T
    layer = _moved(tail, weights.layer, change)
    one = {name: array[None] for name, array in row.items()}
    return tail.pieces.block(layer, x_TD[None], one, tail.last)[0]

  def loss(changes: jax.Array) -> jax.Array:
    y_BTD = jax.vmap(block)(changes, x_BTD, rows)
    return tail.pieces.loss(weights.outer, y_BTD, batch)[0]

  grads = jax.grad(loss)(jnp.zeros((len(x_BTD), *shape), jnp.float32))
  return grads.reshape(len(x_BTD), -1)


def losses(
  tail: Tail, weights: Weights, layer: Any, x_BTD: jax.Array, batch: Batch
) -> jax.Array:
  """The loss of every row, float32 ``[B]``, with this last layer."""
  batch = of_mean_losses(batch)
  y_BTD = tail.pieces.block(layer, x_BTD, batch, tail.last)

  # A sum is all that the head gives; its slope by a row's weight is the row's.
  def scaled(scale_B: jax.Array) -> jax.Array:
    weighted = batch['weights'] * scale_B[:, None]
    return tail.pieces.loss(
      weights.outer, y_BTD, batch | {'weights': weighted}
    )[0]

  return jax.grad(scaled)(jnp.ones(len(x_BTD), jnp.float32))


def direction(tail: Tail, key: jax.Array, number: jax.Array) -> jax.Array:
  """The direction of that number, standard normal ``[I, O]``."""
  return jax.random.normal(jax.random.fold_in(key, number), tail.shape)


def derivatives(
  tail: Tail,
  weights: Weights,
  x_BTD: jax.Array,
  batch: Batch,
  key: jax.Array,
  count: int,
) -> jax.Array:
  """Derivatives of every row's loss along random directions.

  Computes ``(l_i(W + eps z_j) - l_i(W - eps z_j)) / (2 eps)`` for the same
  directions z in every step, by two forward passes of the tail each.

  Args:
    tail: The model.
    weights: Of the tail.
    x_BTD: Input of the last block.
    batch: Rows.
    key: Decides the directions.
    count: M, at least 1.

  Returns:
    float32 ``[B, M]``.

  References:
    CoLM, section 4.2; Spall, `SPSA`, 1992; Malladi et al., `MeZO`, 2023,
    arXiv:2305.17333.

  Note:
    The release moves the stored weights to and fro, which in bfloat16 leaves
    them elsewhere; here nothing is moved. In bfloat16 the moved matrix is
    rounded, so that the derivatives are coarse.
  """

  def along(number: jax.Array) -> jax.Array:
    step_IO = EPS * direction(tail, key, number)
    up_B, down_B = (
      losses(tail, weights, _moved(tail, weights.layer, s), x_BTD, batch)
      for s in (step_IO, -step_IO)
    )
    return (up_B - down_B) / (2 * EPS)

  return jax.lax.map(along, jnp.arange(count)).T


def reconstructed(
  tail: Tail, derivatives_BM: jax.Array, key: jax.Array
) -> jax.Array:
  """Estimates of the gradients, the mean of ``s_ij z_j``: ``[B, I O]``."""
  count = derivatives_BM.shape[1]

  def add(sum_BF: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
    z_F = direction(tail, key, number).ravel()
    return sum_BF + derivatives_BM[:, number][:, None] * z_F[None], None

  zero_BF = jnp.zeros((len(derivatives_BM), math.prod(tail.shape)))
  return jax.lax.scan(add, zero_BF, jnp.arange(count))[0] / count


def sketch_shape(shape: tuple[int, int], entries: int) -> tuple[int, int]:
  """J and K of a sketch of at most `entries` numbers of a matrix ``[I, O]``.

  Examples:
    >>> sketch_shape((4096, 1024), 4096), sketch_shape((8, 1024), 4096)
    ((64, 64), (8, 512))
  """
  short = min(math.isqrt(entries), *shape)
  long = min(entries // short, max(shape))
  return (short, long) if shape[0] <= shape[1] else (long, short)


def sketch_of(
  tail: Tail, entries: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Random signs L and R: inner products of sketches are right on average.

  Args:
    tail: Says the shape of the matrix.
    entries: Most entries of a sketch.
    key: Decides the signs.

  Returns:
    ``[I, J]`` and ``[O, K]``, float32; the identity where nothing is saved.
  """

  def side(number: int, size: int, count: int) -> jax.Array:
    if count == size:
      return jnp.eye(size)
    key_of = jax.random.fold_in(key, number)
    return jax.random.rademacher(key_of, (size, count), jnp.float32) / (
      count**0.5
    )

  sizes = sketch_shape(tail.shape, entries)
  return side(0, tail.shape[0], sizes[0]), side(1, tail.shape[1], sizes[1])
