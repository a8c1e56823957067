"""Losses as the training step takes them: weighted sums, and sums of weights.

The cross-entropy of a language model never has all its logits at once; that of
a classifier is small.

Shape suffixes in this file:
  B  sequences
  K  classes
  T  positions of a sequence
  C  positions of a chunk
  N  chunks
  D  features
  V  vocabulary
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def chunked_cross_entropy(
  logits_fn: Callable[[jax.Array], jax.Array],
  x_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the cross-entropies of all positions.

  Computes ``sum_bt w_bt (logsumexp(z_bt) - z_bt[y_bt])`` with the logits
  ``z = logits_fn(x)``, weights w and targets y. Positions are worked through
  in chunks, so that only one chunk's logits exist at a time. Where a gradient
  is asked for, each chunk's is taken at once, from the logits at hand: they are
  computed once, and what waits for the backward pass is the gradient of x and
  of the arrays in `logits_fn`, of those that are differentiated: a frozen head
  has none. Chunks are cut along T, never along B: each
  chunk keeps the sharding of the batch.

  Args:
    logits_fn: Maps features ``[B, C, D]`` to logits ``[B, C, V]``, each
      position by itself; what is not float32 is cast.
    x_BTD: Features, any floating dtype.
    targets_BT: Integers in [0, V), also where the weight is 0.
    weights_BT: Non-negative weights; 0 leaves a position out.
    chunk_tokens: Largest number of positions in a chunk, all sequences and
      devices together, at least 1. A chunk holds at least one position of
      every sequence, however many there are.

  Returns:
    The weighted sum of the losses and the sum of the weights, float32 scalars.

  Raises:
    ValueError: If `chunk_tokens` is less than 1.

  Note:
    The gradients of arrays inside `logits_fn` are added up over the chunks in
    their own dtype. Keep a float32 head, or cast it inside `logits_fn`, where
    many chunks of a bfloat16 head would round too often. There is a first
    derivative only.
  """
  chunks = _in_chunks(x_BTD, targets_BT, weights_BT, chunk_tokens)
  # A function of all arrays that it differentiates is what a rule for gradients
  # needs. It is a new one each time: closure_convert remembers those it has
  # seen, with the arrays in them.
  float32_logits_fn, arrays = jax.closure_convert(
    lambda x_BCD: logits_fn(x_BCD).astype(jnp.float32), chunks[0][0]
  )
  loss_sum = _loss_of_chunks(float32_logits_fn, arrays, *chunks)
  return loss_sum, jnp.sum(weights_BT, dtype=jnp.float32)


def chunked_guesses(
  logits_fn: Callable[[jax.Array], jax.Array],
  x_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  chunk_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The cross-entropies of all positions, and which guesses are right.

  For evaluation: a gradient would keep the logits of every chunk.

  Args:
    logits_fn: As in `chunked_cross_entropy`, as are the others.
    x_BTD: Features.
    targets_BT: Integers.
    weights_BT: Weights.
    chunk_tokens: Largest number of positions in a chunk.

  Returns:
    The weighted sum of the losses, the sum of the weights, and the weighted sum
    of the positions whose likeliest token is the target, float32 scalars.

  Raises:
    ValueError: If `chunk_tokens` is less than 1.
  """

  def add_chunk(
    sums: jax.Array, chunk: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, None]:
    x_BCD, targets_BC, weights_BC = chunk
    logits_BCV = logits_fn(x_BCD).astype(jnp.float32)
    losses_BC, _ = _losses_and_slopes(logits_BCV, targets_BC)
    is_right_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
    found = (losses_BC, jnp.ones_like(losses_BC), is_right_BC)
    return sums + jnp.stack([jnp.sum(x * weights_BC) for x in found]), None

  chunks = _in_chunks(x_BTD, targets_BT, weights_BT, chunk_tokens)
  sums, _ = jax.lax.scan(add_chunk, jnp.zeros((3,), jnp.float32), chunks)
  return sums[0], sums[1], sums[2]


def _in_chunks(x_BTD, targets_BT, weights_BT, chunk_tokens):
  """Features, targets and weights, each ``[N, B, C, ...]``."""
  if chunk_tokens < 1:
    raise ValueError(f'chunk_tokens={chunk_tokens} must be at least 1.')
  batch, positions = targets_BT.shape
  largest = max(1, chunk_tokens // batch)
  num_chunks = -(-positions // largest)
  return jax.tree.map(
    lambda array: _split_positions(array, num_chunks),
    (x_BTD, targets_BT, weights_BT.astype(jnp.float32)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_of_chunks(logits_fn, arrays, x_NBCD, targets_NBC, weights_NBC):
  def add_chunk(loss_sum, chunk):
    x_BCD, targets_BC, weights_BC = chunk
    losses_BC, _ = _losses_and_slopes(logits_fn(x_BCD, *arrays), targets_BC)
    return loss_sum + jnp.sum(losses_BC * weights_BC), None

  chunks = (x_NBCD, targets_NBC, weights_NBC)
  return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)[0]


def _loss_and_gradients(logits_fn, arrays, x_NBCD, targets_NBC, weights_NBC):
  """The loss, and the gradients of what is differentiated; None of the rest."""
  is_moved = [array.perturbed for array in arrays]
  arrays = [array.value for array in arrays]
  chunks = (x_NBCD.value, targets_NBC.value, weights_NBC.value)

  def add_chunk(sums, chunk):
    x_BCD, targets_BC, weights_BC = chunk

    def logits_of(x_BCD, *moved):
      rest = iter(moved)
      pairs = zip(arrays, is_moved, strict=True)
      return logits_fn(x_BCD, *(next(rest) if m else a for a, m in pairs))

    logits_BCV, pull_back = jax.vjp(
      logits_of, x_BCD, *_chosen(arrays, is_moved)
    )
    losses_BC, slopes_BCV = _losses_and_slopes(logits_BCV, targets_BC)
    grad_BCD, *grads = pull_back(slopes_BCV * weights_BC[..., None])
    chunk_sums = (jnp.sum(losses_BC * weights_BC), grads)
    rows = (
      grad_BCD if x_NBCD.perturbed else None,
      losses_BC if weights_NBC.perturbed else None,
    )
    return jax.tree.map(jnp.add, sums, chunk_sums), rows

  zeros = jax.tree.map(jnp.zeros_like, _chosen(arrays, is_moved))
  (loss_sum, grads), (grad_NBCD, losses_NBC) = jax.lax.scan(
    add_chunk, (jnp.zeros((), jnp.float32), zeros), chunks
  )
  rest = iter(grads)
  grads = [next(rest) if moved else None for moved in is_moved]
  return loss_sum, (grads, grad_NBCD, losses_NBC)


def _chosen(arrays, is_chosen):
  return [a for a, chosen in zip(arrays, is_chosen, strict=True) if chosen]


def _scale_gradients(logits_fn, residuals, slope):
  del logits_fn
  grads, grad_NBCD, losses_NBC = jax.tree.map(
    lambda g: (slope * g).astype(g.dtype), residuals
  )
  return grads, grad_NBCD, None, losses_NBC


_loss_of_chunks.defvjp(
  _loss_and_gradients, _scale_gradients, symbolic_zeros=True
)


def _losses_and_slopes(logits_BCV, targets_BC):
  """Cross-entropies ``[B, C]`` and their derivatives by the logits."""
  largest_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
  exp_BCV = jnp.exp(logits_BCV - largest_BC1)
  sum_BC1 = jnp.sum(exp_BCV, axis=-1, keepdims=True)
  target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
  losses_BC = (jnp.log(sum_BC1) + (largest_BC1 - target_BC1))[..., 0]
  # A comparison, not a scatter: XLA fuses it with the rest.
  target_BCV = jax.nn.one_hot(
    targets_BC, logits_BCV.shape[-1], dtype=logits_BCV.dtype
  )
  return losses_BC, exp_BCV / sum_BC1 - target_BCV


def cross_entropy(
  logits_BK: jax.Array, labels_B: jax.Array, weights_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the cross-entropies of a classifier.

  Args:
    logits_BK: float32 logits of the classes.
    labels_B: Integers in [0, K), also where the weight is 0.
    weights_B: Non-negative weights; 0 leaves a sequence out.

  Returns:
    The weighted sum of the losses and the sum of the weights, float32 scalars.
  """
  losses_B = optax.softmax_cross_entropy_with_integer_labels(
    logits_BK, labels_B
  )
  return _weighted_sums(losses_B, weights_B)


def squared_error(
  outputs_B1: jax.Array, targets_B: jax.Array, weights_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the squared errors of a regression.

  Args:
    outputs_B1: float32 predictions ``[B, 1]``.
    targets_B: Finite targets, also where the weight is 0.
    weights_B: Non-negative weights; 0 leaves a sequence out.

  Returns:
    The weighted sum of the losses and the sum of the weights, float32 scalars.

  Note:
    Not halved: `transformers` trains STS-B with the same ``MSELoss``.
  """
  losses_B = jnp.square(outputs_B1[:, 0] - targets_B.astype(jnp.float32))
  return _weighted_sums(losses_B, weights_B)


def _weighted_sums(losses_B, weights_B):
  weights_B = weights_B.astype(jnp.float32)
  return jnp.sum(losses_B * weights_B), jnp.sum(weights_B)


def _split_positions(x_BTX, num_chunks):
  """Cuts axis 1 into equal chunks, ``[N, B, C, ...]``, padded with zeros."""
  batch, positions = x_BTX.shape[:2]
  length = -(-positions // num_chunks)
  padding = [(0, 0)] * x_BTX.ndim
  padding[1] = (0, num_chunks * length - positions)
  x_BNCX = jnp.pad(x_BTX, padding).reshape(
    batch, num_chunks, length, *x_BTX.shape[2:]
  )
  return jnp.moveaxis(x_BNCX, 1, 0)
