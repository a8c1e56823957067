"""The passes through a model whose layers are stacked, one layer at a time.

They know nothing of optimizers: the backward pass shows each layer's gradients
to a visitor, and what that does with them is its own affair.

Shape suffixes in this file:
  L     layers
  K     micro-batches
  B, T  sequences of a micro-batch, positions
  D     features
A slice of one layer keeps its first axis, of length 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.training.slices import Cut, Path
from gnlorp_jax.training.step import Batch, LossFn

# The top-level key of the parameters that are stacked [L, ...].
LAYERS = 'layers'


class Pieces(NamedTuple):
  """A model in pieces.

  `embed` and `loss` do without ``params['layers']``.

  Attributes:
    embed: Maps (params, a batch) to x ``[B, T, D]``.
    block: Maps (one layer's slice of ``params['layers']``, x) to x.
    loss: Maps (params, x after the last block, a batch) to the weighted sum of
      the losses and the sum of the weights, float32 scalars.
    embed_keys: The top-level keys of `params` that `embed` reads.
  """

  embed: Callable[[Any, Batch], jax.Array]
  block: Callable[[Any, jax.Array], jax.Array]
  loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]
  embed_keys: tuple[str, ...]


class Storage(NamedTuple):
  """How the parameters of the layers are stored.

  Attributes:
    load: Maps a stored tree to the arrays that blocks compute with.
    load_exact: The same with every digit, to add updates to.
    store: ``store(new, old, step, first)``: stores new values as `old` is, both
      trees of one parameter, or of a part that starts at `first` on the first
      axis; `step` and `first` are for random numbers.
  """

  load: Callable[[Any], Any]
  load_exact: Callable[[Any], Any]
  store: Callable[[Any, Any, jax.Array, jax.Array], Any]


def _as_it_is(tree: Any) -> Any:
  return tree


def _cast_like(new: Any, old: Any, step: jax.Array, first: jax.Array) -> Any:
  del step, first
  return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


PLAIN = Storage(_as_it_is, _as_it_is, _cast_like)


def through_blocks(
  block: Callable[[Any, jax.Array], jax.Array],
  storage: Storage,
  layers: Any,
  x_BTD: jax.Array,
) -> jax.Array:
  """All blocks one after the other, each loaded when its turn comes.

  Args:
    block: As in `Pieces`.
    storage: How the parameters of the layers are stored.
    layers: These parameters, stacked ``[L, ...]``.
    x_BTD: The first block's input.

  Returns:
    The last block's output.
  """

  def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
    return block(storage.load(layer), x_BTD), None

  return jax.lax.scan(body, x_BTD, layers)[0]


def make_loss_fn(pieces: Pieces, storage: Storage = PLAIN) -> LossFn:
  """The loss whose gradient the training step takes, for evaluation.

  Args:
    pieces: The model.
    storage: How the parameters of the layers are stored.

  Returns:
    Maps parameters and a batch to the weighted sum of the losses and the sum of
    the weights.
  """

  def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    around = without_layers(params)
    x_BTD = through_blocks(
      pieces.block, storage, params[LAYERS], pieces.embed(around, batch)
    )
    return pieces.loss(around, x_BTD, batch)

  return loss_fn


def without_layers(tree: dict[str, Any]) -> dict[str, Any]:
  """A dict of parameters without the layers."""
  return {key: node for key, node in tree.items() if key != LAYERS}


def divide(sums: Any, divisor: jax.Array, like: Any) -> Any:
  """Sums of gradients as gradients, in the dtypes of `like`."""
  return jax.tree.map(
    lambda g, p: (g.astype(jnp.float32) / divisor).astype(p.dtype), sums, like
  )


def add_trees(tree: Any, other: Any) -> Any:
  """The sum of two trees, array by array."""
  return jax.tree.map(jnp.add, tree, other)


def drop_axis(tree: Any) -> Any:
  """Slices ``[1, ...]`` without that axis."""
  return jax.tree.map(lambda x: x[0], tree)


def _each(fn: Callable[[Any], Any], xs_K: Any) -> Any:
  """``fn`` of every micro-batch, one after the other."""
  if len(jax.tree.leaves(xs_K)[0]) == 1:
    y = fn(jax.tree.map(lambda x: x[0], xs_K))
    return jax.tree.map(lambda x: x[None], y)
  return jax.lax.map(fn, xs_K)


def _sum_each(fn: Callable[..., tuple[Any, Any]], *xs_K: Any) -> Any:
  """``fn(*xs) -> (summand, y)``: the float32 sum, and all y ``[K, ...]``."""
  first = jax.tree.map(lambda x: x[0], xs_K)
  if len(jax.tree.leaves(xs_K)[0]) == 1:
    total, y = fn(*first)
    return total, jax.tree.map(lambda x: x[None], y)

  def add(total: Any, xs: Any) -> tuple[Any, Any]:
    summand, y = fn(*xs)
    return add_trees(total, summand), y

  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(fn, *first)[0]
  )
  return jax.lax.scan(add, zero, xs_K)


class Passes(NamedTuple):
  """A model, and the passes through it."""

  pieces: Pieces
  storage: Storage
  num_layers: int
  offload: bool  # whether the inputs of the blocks are kept by the host

  def forward(self, params: Any, batch_K: Batch) -> tuple[jax.Array, jax.Array]:
    """Inputs of all blocks ``[L, K, B, T, D]``, and the last one's output."""

    def body(x_KBTD: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
      layer = self.storage.load(layer)
      y_KBTD = _each(lambda x_BTD: self.pieces.block(layer, x_BTD), x_KBTD)
      if self.offload:
        x_KBTD = jax.device_put(x_KBTD, jax.memory.Space.Host)
      return y_KBTD, x_KBTD

    around = without_layers(params)
    x_KBTD = _each(lambda batch: self.pieces.embed(around, batch), batch_K)
    x_KBTD, saved_LKBTD = jax.lax.scan(body, x_KBTD, params[LAYERS])
    return saved_LKBTD, x_KBTD

  def head(
    self, params: Any, x_KBTD: jax.Array, batch_K: Batch
  ) -> tuple[tuple[jax.Array, jax.Array], Any, jax.Array]:
    """Sums of losses and weights, gradients around the layers, that of x."""
    around = without_layers(params)
    grad_fn = jax.value_and_grad(self.pieces.loss, argnums=(0, 1), has_aux=True)

    def one(x_BTD: jax.Array, batch: Batch) -> tuple[Any, jax.Array]:
      sums, (grads, dx_BTD) = grad_fn(around, x_BTD, batch)
      return (sums, grads), dx_BTD

    (sums, grads), dx_KBTD = _sum_each(one, x_KBTD, batch_K)
    return sums, grads, dx_KBTD

  def embedding(self, params: Any, batch_K: Batch, dx_KBTD: jax.Array) -> Any:
    """Gradients of what the embedding reads."""
    used = {key: params[key] for key in self.pieces.embed_keys}

    def one(dx_BTD: jax.Array, batch: Batch) -> tuple[Any, None]:
      _, pull_back = jax.vjp(lambda used: self.pieces.embed(used, batch), used)
      (grads,) = pull_back(dx_BTD)
      return grads, None

    grads, _ = _sum_each(one, dx_KBTD, batch_K)
    return grads

  def block(
    self, layer: Any, x_KBTD: jax.Array, dy_KBTD: jax.Array, divisor: jax.Array
  ) -> tuple[Any, jax.Array]:
    """Gradients of a slice of one layer, divided, and that of its input."""
    loaded = drop_axis(self.storage.load(layer))

    def one(x_BTD: jax.Array, dy_BTD: jax.Array) -> tuple[Any, jax.Array]:
      _, pull_back = jax.vjp(self.pieces.block, loaded, x_BTD)
      return pull_back(dy_BTD)

    sums, dx_KBTD = _sum_each(one, x_KBTD, dy_KBTD)
    grads = divide(sums, divisor, loaded)
    return jax.tree.map(lambda g: g[None], grads), dx_KBTD

  def backward(
    self,
    visit: Callable[[jax.Array, dict[Path, jax.Array], Any], Any],
    carry: Any,
    saved_LKBTD: jax.Array,
    dx_KBTD: jax.Array,
    divisor: jax.Array,
  ) -> tuple[Any, jax.Array]:
    """Shows every layer's gradients to ``visit(layer, grads, carry)``.

    The first element of the carry are the parameters.
    """

    def body(i: jax.Array, loop: tuple[Any, jax.Array]) -> Any:
      carry, dy_KBTD = loop
      layer = self.num_layers - 1 - i
      cut = Cut(layer, self.num_layers)
      x_KBTD = drop_axis(cut.at(saved_LKBTD))
      if self.offload:
        x_KBTD = jax.device_put(x_KBTD, jax.memory.Space.Device)
      grads, dx_KBTD = self.block(
        cut.at(carry[0][LAYERS]), x_KBTD, dy_KBTD, divisor
      )
      flat = traverse_util.flatten_dict({LAYERS: grads})
      return visit(layer, flat, carry), dx_KBTD

    return jax.lax.fori_loop(0, self.num_layers, body, (carry, dx_KBTD))
