"""A whole model on stored parameters, each layer decoded when it is used.

Shape suffixes in this file:
  B, T  sequences of a batch, positions
  D     features
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gnlorp_jax.training import parameters
from gnlorp_jax.training.objectives import layer_key
from gnlorp_jax.training.parameters import LAYERS


def on_stored(
  model: Any,
  decode: Callable[[Any], Any],
  policy: Callable[..., bool] | None = None,
) -> Any:
  """A model that takes parameters as they are stored.

  The blocks run in one scan. Each decodes its layer for itself, and decodes it
  again in the backward pass: no decoded stack ever exists.

  Args:
    model: A NamedTuple with ``hidden``, ``logits``, ``apply``, ``extend`` and
      ``layer_fns``, as `objectives` describes them.
    decode: As in `parameters.Parameters`.
    policy: What the backward pass need not compute again, as in
      `jax.checkpoint`; None: it keeps the inputs of the blocks alone.

  Returns:
    The model with other ``hidden``, ``logits``, ``head_of``, ``apply`` and
    ``extend``.
    ``hidden`` is x after the last block and ``logits`` all that follows, with a
    final norm if there is one: the two in a row are ``apply``. Layer l drops
    features by ``fold_in(key, l)``, as `objectives.Pieces` does.
  """
  fns = model.layer_fns

  def hidden(
    params: Any,
    tokens_BT: jax.Array,
    key: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
  ) -> jax.Array:
    context = fns.context(tokens_BT, segments_BT)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def block(x_BTD: jax.Array, layer: Any, number: jax.Array) -> jax.Array:
      return fns.block(
        decode(layer), x_BTD, context, number, key=layer_key(key, number)
      )

    def body(x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, None]:
      return block(x_BTD, *xs), None

    x_BTD = fns.embed(outer(params), tokens_BT, key=key)
    return jax.lax.scan(body, x_BTD, numbered(params))[0]

  def extend(
    params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Any
  ) -> tuple[jax.Array, Any]:
    def body(carry: Any, xs: Any) -> tuple[Any, None]:
      x_BTD, cache = carry
      layer, number = xs
      return fns.extend(decode(layer), x_BTD, number, cache), None

    x_BTD = fns.embed(outer(params), tokens_BT)
    carry = x_BTD, cache.open(positions_BT)
    return jax.lax.scan(body, carry, numbered(params))[0]

  def numbered(params: Any) -> tuple[Any, jax.Array]:
    layers = params[LAYERS]
    count = len(jax.tree.leaves(layers)[0])
    return layers, jnp.arange(count, dtype=jnp.int32)

  def outer(params: Any) -> Any:
    return decode(parameters.outer(params))

  def logits(
    params: Any, x: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    return fns.head(outer(params), x, key=key)

  def head_of(params: Any) -> Callable[..., jax.Array]:
    return functools.partial(fns.head, outer(params))

  def apply(
    params: Any,
    tokens_BT: jax.Array,
    key: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
  ) -> jax.Array:
    x_BTD = hidden(params, tokens_BT, key, segments_BT)
    return logits(params, x_BTD, key)

  return model._replace(
    hidden=hidden,
    logits=logits,
    apply=apply,
    head_of=head_of,
    extend=None if fns.extend is None else extend,
  )
