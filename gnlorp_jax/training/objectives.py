"""What is minimised and what is evaluated: a model and its loss together.

Of a model these functions ask for ``hidden``, ``logits``, ``apply`` and
``layer_fns``, whose functions all take a dropout key, None for none:

  hidden(params, tokens, key, segments), logits(params, x),
  apply(params, tokens, key), head_of(params)(x) where logits are computed
  piece by piece (None: by logits)
  layer_fns.embed(params, tokens, key), .block(layer, x, context, number, key),
  .head(params, x, key), .context(tokens, segments)

Batches are dicts of arrays ``[B, ...]``, of a language model

  inputs    int32 [B, T]
  targets   int32 [B, P], what to guess, and
  weights   float32 [B, P], how much each guess counts; P is T without positions
  positions int32 [B, P], where to guess; absent: everywhere
  segments  int32 [B, T], numbers of the documents in a row, each of which is
            read by itself; absent: every row is one document
  seeds     uint32 [B], for dropout; absent without

and of a classifier

  inputs    int32 [B, T]
  labels    [B], integers, or floats of a regression
  weights   float32 [B]
  seeds     uint32 [B]

Shape suffixes in this file:
  B, T  sequences of a batch, positions
  D     features
  C     classes
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.training import losses
from gnlorp_jax.training.step import Batch, LossFn, dropout_key

Sums = tuple[jax.Array, jax.Array]


class Pieces(NamedTuple):
  """A loss, layer by layer.

  `embed` and `loss` do without ``params['layers']``.

  Attributes:
    embed: Maps (params, a batch) to x ``[B, T, D]``.
    block: Maps (one layer's slice of ``params['layers']``, x, a batch, the
      number of the layer, an int32 scalar) to x.
    loss: Maps (params, x after the last block, a batch) to the weighted sum of
      the losses and the sum of the weights, float32 scalars.
    embed_keys: The top-level keys of `params` that `embed` reads.
  """

  embed: Callable[[Any, Batch], jax.Array]
  block: Callable[[Any, jax.Array, Batch, jax.Array], jax.Array]
  loss: Callable[[Any, jax.Array, Batch], Sums]
  embed_keys: tuple[str, ...]


class Objective(NamedTuple):
  """What a run minimises.

  Attributes:
    loss: Maps (params, a batch) to the weighted sum of the losses and the sum
      of the weights, float32 scalars: the whole model, in training.
    evaluate: Maps the same, without dropout, to the same two sums of a language
      model and, where that is asked for, the weighted sum of its right guesses;
      or to the outputs ``[B, C]`` of a classifier.
    pieces: `loss`, layer by layer.
  """

  loss: LossFn
  evaluate: Callable[[Any, Batch], Any]
  pieces: Pieces


def language_model(
  model: Any,
  chunk_tokens: int,
  *,
  dropout: bool = False,
  accuracy: bool = False,
) -> Objective:
  """The cross-entropy of a language model, causal or masked.

  Args:
    model: The model.
    chunk_tokens: As in `losses.chunked_cross_entropy`.
    dropout: Whether training drops features; the batch then needs seeds.
    accuracy: Whether evaluations count right guesses too.

  Returns:
    The objective. The head is computed without dropout.
  """
  sums = functools.partial(_sums_of, chunk_tokens=chunk_tokens)
  logits_of = functools.partial(functools.partial, model.logits)

  def hidden_sums(
    params: Any, batch: Batch, key: jax.Array | None, loss: Callable[..., Any]
  ) -> Any:
    x_BTD = model.hidden(params, batch['inputs'], key, batch.get('segments'))
    logits_fn = (model.head_of or logits_of)(params)
    return sums(loss, logits_fn, x_BTD, batch)

  def loss_after_blocks(params: Any, x_BTD: jax.Array, batch: Batch) -> Sums:
    head = functools.partial(model.layer_fns.head, params)
    return sums(losses.chunked_cross_entropy, head, x_BTD, batch)

  key_of = dropout_key if dropout else _no_key
  return Objective(
    loss=lambda params, batch: hidden_sums(
      params, batch, key_of(batch), losses.chunked_cross_entropy
    ),
    evaluate=lambda params, batch: hidden_sums(
      *(params, batch, None),
      losses.chunked_guesses if accuracy else losses.chunked_cross_entropy,
    ),
    pieces=_pieces(model.layer_fns, key_of, loss_after_blocks),
  )


def classifier(model: Any, is_regression: bool) -> Objective:
  """The cross-entropy of a classifier, or the squared error of a regression.

  Args:
    model: The model; its outputs are ``[B, C]``.
    is_regression: Whether labels are numbers.

  Returns:
    The objective. Training always drops features as the model says, by the
    seeds of the batch.
  """
  loss_of = losses.squared_error if is_regression else losses.cross_entropy

  def loss(params: Any, batch: Batch) -> Sums:
    outputs_BC = model.apply(params, batch['inputs'], key=dropout_key(batch))
    return loss_of(outputs_BC, batch['labels'], batch['weights'])

  def loss_after_blocks(params: Any, x_BTD: jax.Array, batch: Batch) -> Sums:
    head = model.layer_fns.head
    outputs_BC = head(params, x_BTD, key=dropout_key(batch))
    return loss_of(outputs_BC, batch['labels'], batch['weights'])

  return Objective(
    loss=loss,
    evaluate=lambda params, batch: model.apply(params, batch['inputs']),
    pieces=_pieces(model.layer_fns, dropout_key, loss_after_blocks),
  )


def _no_key(batch: Batch) -> None:
  del batch


def layer_key(key: jax.Array | None, number: jax.Array) -> jax.Array | None:
  """The dropout key of a layer, from that of the batch.

  Args:
    key: The batch's, or None.
    number: The layer's, an int32 scalar.

  Returns:
    A key, or None.
  """
  return None if key is None else jax.random.fold_in(key, number)


def _pieces(
  layer_fns: Any,
  key_of: Callable[[Batch], jax.Array | None],
  loss: Callable[[Any, jax.Array, Batch], Sums],
) -> Pieces:
  """The layer functions of a model as functions of a batch."""

  def embed(params: Any, batch: Batch) -> jax.Array:
    return layer_fns.embed(params, batch['inputs'], key=key_of(batch))

  def block(
    layer: Any, x_BTD: jax.Array, batch: Batch, number: jax.Array
  ) -> jax.Array:
    context = layer_fns.context(batch['inputs'], batch.get('segments'))
    key = layer_key(key_of(batch), number)
    return layer_fns.block(layer, x_BTD, context, number, key=key)

  return Pieces(embed, block, loss, embed_keys=('embed',))


def _sums_of(
  loss: Callable[..., Any],
  logits_fn: Callable[[jax.Array], jax.Array],
  x_BTD: jax.Array,
  batch: Batch,
  *,
  chunk_tokens: int,
) -> Any:
  """What `loss` adds up over all positions, or those that the batch names."""
  if 'positions' in batch:
    x_BTD = jnp.take_along_axis(x_BTD, batch['positions'][:, :, None], axis=1)
  return loss(
    logits_fn,
    x_BTD,
    batch['targets'],
    batch['weights'],
    chunk_tokens=chunk_tokens,
  )
