"""The passes through a model whose layers are stacked, one layer at a time.

They know nothing of optimizers: the backward pass shows each layer's gradients
to a visitor, and what that does with them is not their concern.

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

from gnlorp_jax.training.layerwise.slices import Cut, Path
from gnlorp_jax.training.objectives import Pieces
from gnlorp_jax.training.parameters import LAYERS, Parameters, outer
from gnlorp_jax.training.step import Batch


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


def _each(fn: Callable[..., Any], *xs_K: Any) -> Any:
  """``fn`` of every micro-batch, one after the other."""
  if len(jax.tree.leaves(xs_K)[0]) == 1:
    y = fn(*drop_axis(xs_K))
    return jax.tree.map(lambda x: x[None], y)
  return jax.lax.map(lambda xs: fn(*xs), xs_K)


def _sum_each(fn: Callable[..., tuple[Any, Any]], *xs_K: Any) -> Any:
  """``fn(*xs) -> (summand, y)``: the float32 sum, and all y ``[K, ...]``."""
  first = drop_axis(xs_K)
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


class Kept(NamedTuple):
  """What the forward pass leaves to those that follow."""

  frozen: Any  # as stored
  batch_K: Batch
  inputs_LKBTD: jax.Array  # of all blocks
  output_KBTD: jax.Array  # of the last block


class HeadPass(NamedTuple):
  """What the head and the loss give."""

  loss_sum: jax.Array  # float32 []
  weight_sum: jax.Array  # float32 []
  grads: Any  # of the outer parameters that train
  dx_KBTD: jax.Array


class Drawn(NamedTuple):
  """The layers whose gradients a backward pass computes."""

  layers_S: jax.Array  # int32, ascending
  to_bottom: bool  # whether the gradient of the first block's input is needed


class Passes(NamedTuple):
  """A model, and the passes through it."""

  pieces: Pieces
  parameters: Parameters
  num_layers: int
  offload: bool  # whether the inputs of the blocks are kept by the host

  def forward(self, params: Any, frozen: Any, batch_K: Batch) -> Kept:
    """Through all blocks; `params` are what trains, as stored."""
    decode, join = self.parameters.decode, self.parameters.join

    def body(x_KBTD: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
      number, trained, base = xs
      layer = join(decode(trained), decode(base))
      y_KBTD = _each(
        lambda x_BTD, batch: self.pieces.block(layer, x_BTD, batch, number),
        x_KBTD,
        batch_K,
      )
      if self.offload:
        x_KBTD = jax.device_put(x_KBTD, jax.memory.Space.Host)
      return y_KBTD, x_KBTD

    weights = join(decode(outer(params)), decode(outer(frozen)))
    x_KBTD = _each(lambda batch: self.pieces.embed(weights, batch), batch_K)
    numbers = jnp.arange(self.num_layers, dtype=jnp.int32)
    layers = numbers, params.get(LAYERS, {}), frozen.get(LAYERS, {})
    output_KBTD, inputs_LKBTD = jax.lax.scan(body, x_KBTD, layers)
    return Kept(frozen, batch_K, inputs_LKBTD, output_KBTD)

  def head(self, params: Any, kept: Kept) -> HeadPass:
    """Sums of losses and weights, and gradients; not yet divided."""
    decode, join = self.parameters.decode, self.parameters.join
    trained, base = decode(outer(params)), decode(outer(kept.frozen))
    grad_fn = jax.value_and_grad(
      lambda trained, *args: self.pieces.loss(join(trained, base), *args),
      argnums=(0, 1),
      has_aux=True,
    )

    def one(x_BTD: jax.Array, batch: Batch) -> tuple[Any, jax.Array]:
      sums, (grads, dx_BTD) = grad_fn(trained, x_BTD, batch)
      return (*sums, grads), dx_BTD

    sums, dx_KBTD = _sum_each(one, kept.output_KBTD, kept.batch_K)
    loss_sum, weight_sum, grads = sums
    return HeadPass(loss_sum, weight_sum, self.parameters.split(grads), dx_KBTD)

  def embedding(self, params: Any, kept: Kept, dx_KBTD: jax.Array) -> Any:
    """Gradients of what trains of all that the embedding reads."""
    decode, join = self.parameters.decode, self.parameters.join

    def read(tree: Any) -> Any:
      keys = [key for key in self.pieces.embed_keys if key in tree]
      return decode({key: tree[key] for key in keys})

    trained, base = read(params), read(kept.frozen)
    if not trained:
      return {}

    def one(dx_BTD: jax.Array, batch: Batch) -> tuple[Any, None]:
      _, pull_back = jax.vjp(
        lambda trained: self.pieces.embed(join(trained, base), batch), trained
      )
      (grads,) = pull_back(dx_BTD)
      return grads, None

    grads, _ = _sum_each(one, dx_KBTD, kept.batch_K)
    return self.parameters.split(grads)

  def backward(
    self,
    visit: Callable[[jax.Array, dict[Path, jax.Array], Any], Any],
    carry: Any,
    kept: Kept,
    dx_KBTD: jax.Array,
    divisor: jax.Array,
    drawn: Drawn | None = None,
  ) -> tuple[Any, jax.Array]:
    """Shows layers' gradients to ``visit(layer, grads, carry)``.

    Args:
      visit: Returns the next carry.
      carry: A NamedTuple whose ``params`` are what trains, as stored.
      kept: Of the forward pass.
      dx_KBTD: Gradient of the last block's output.
      divisor: What gradients are divided by.
      drawn: Which layers are visited; None: all are.

    Returns:
      The last carry, and the gradient of the input of the lowest block that
      was worked through.
    """

    def visited(layer: jax.Array, carry: Any, dy_KBTD: jax.Array) -> Any:
      trained = carry.params.get(LAYERS, {})
      grads, dx_KBTD = self._block(trained, kept, layer, dy_KBTD, divisor)
      flat = traverse_util.flatten_dict({LAYERS: grads})
      return visit(layer, flat, carry), dx_KBTD

    if drawn is None:
      last = self.num_layers - 1
      return jax.lax.fori_loop(
        0,
        self.num_layers,
        lambda i, loop: visited(last - i, *loop),
        (carry, dx_KBTD),
      )
    # Upwards, with the layer above all at the end. No branches: XLA copies
    # stacks that a branch reads and returns.
    ends_S = jnp.append(drawn.layers_S, self.num_layers)
    count = len(drawn.layers_S)

    def body(i: jax.Array, loop: tuple[Any, jax.Array]) -> Any:
      carry, dy_KBTD = loop
      place = count - 1 - i
      layer, above = ends_S[place], ends_S[place + 1]
      dy_KBTD = self._through(carry.params, kept, above, layer, dy_KBTD)
      return visited(layer, carry, dy_KBTD)

    carry, dx_KBTD = jax.lax.fori_loop(0, count, body, (carry, dx_KBTD))
    if drawn.to_bottom:
      dx_KBTD = self._through(carry.params, kept, ends_S[0], -1, dx_KBTD)
    return carry, dx_KBTD

  def _block(
    self,
    layers: Any,
    kept: Kept,
    number: jax.Array,
    dy_KBTD: jax.Array,
    divisor: jax.Array,
  ) -> tuple[Any, jax.Array]:
    """Gradients of a slice of one layer, divided, and that of its input."""
    trained, base, x_KBTD = self._at(layers, kept, number)

    def one(
      x_BTD: jax.Array, dy_BTD: jax.Array, batch: Batch
    ) -> tuple[Any, jax.Array]:
      def block(trained: Any, x_BTD: jax.Array) -> jax.Array:
        layer = self.parameters.join(trained, base)
        return self.pieces.block(layer, x_BTD, batch, number)

      _, pull_back = jax.vjp(block, trained, x_BTD)
      return pull_back(dy_BTD)

    sums, dx_KBTD = _sum_each(one, x_KBTD, dy_KBTD, kept.batch_K)
    grads = divide(self.parameters.split(sums), divisor, trained)
    return jax.tree.map(lambda g: g[None], grads), dx_KBTD

  def _through(
    self,
    params: Any,
    kept: Kept,
    above: jax.Array,
    below: jax.Array | int,
    dy_KBTD: jax.Array,
  ) -> jax.Array:
    """From the input of layer `above` to the output of layer `below`."""
    layers = params.get(LAYERS, {})

    def body(i: jax.Array, dy_KBTD: jax.Array) -> jax.Array:
      number = above - 1 - i
      trained, base, x_KBTD = self._at(layers, kept, number)
      layer = self.parameters.join(trained, base)

      def one(x_BTD: jax.Array, dy_BTD: jax.Array, batch: Batch) -> jax.Array:
        _, pull_back = jax.vjp(
          lambda x_BTD: self.pieces.block(layer, x_BTD, batch, number), x_BTD
        )
        (dx_BTD,) = pull_back(dy_BTD)
        return dx_BTD

      return _each(one, x_KBTD, dy_KBTD, kept.batch_K)

    return jax.lax.fori_loop(0, above - 1 - below, body, dy_KBTD)

  def _at(
    self, layers: Any, kept: Kept, number: jax.Array
  ) -> tuple[Any, Any, jax.Array]:
    """What trains of a layer, what is frozen of it, decoded, and its input."""
    decode, cut = self.parameters.decode, Cut(number, self.num_layers)
    x_KBTD = drop_axis(cut.at(kept.inputs_LKBTD))
    if self.offload:
      x_KBTD = jax.device_put(x_KBTD, jax.memory.Space.Device)
    trained = drop_axis(decode(cut.at(layers)))
    base = drop_axis(decode(cut.at(kept.frozen.get(LAYERS, {}))))
    return trained, base, x_KBTD
