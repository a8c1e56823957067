"""How large the gradient of each layer is, without an optimizer.

Shape suffixes in this file:
  L  layers
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.training import parameters
from gnlorp_jax.training.layerwise.engine import divisor_of, squares
from gnlorp_jax.training.layerwise.passes import Passes
from gnlorp_jax.training.layerwise.slices import Path
from gnlorp_jax.training.objectives import Pieces
from gnlorp_jax.training.step import Batch


class _Carry(NamedTuple):
  params: Any  # of which the gradients are taken
  squares_L: jax.Array


def squared_norms(
  pieces: Pieces, trained: Any, frozen: Any, batch: Batch
) -> jax.Array:
  """The squared norm of the gradient of each layer.

  The gradients of one block exist at a time, in the dtype of its arrays.

  Args:
    pieces: The loss, layer by layer.
    trained: Arrays ``[L, ...]`` under ``layers``, a nested dict: what the
      gradients are of.
    frozen: All other parameters.
    batch: A batch; the gradient is that of its mean loss.

  Returns:
    ``[L]``, float32.
  """
  layers = jax.tree.leaves(trained[parameters.LAYERS])
  plain = parameters.plain(trained, frozen)
  passes = Passes(pieces, plain, len(layers[0]), offload=False)
  kept = passes.forward(trained, frozen, jax.tree.map(lambda x: x[None], batch))
  head = passes.head(trained, kept)

  def visit(
    layer: jax.Array, grads: dict[Path, jax.Array], carry: _Carry
  ) -> _Carry:
    return carry._replace(
      squares_L=carry.squares_L.at[layer].set(squares(grads))
    )

  carry = _Carry(trained, jnp.zeros(len(layers[0])))
  carry, _ = passes.backward(
    visit, carry, kept, head.dx_KBTD, divisor_of(head.weight_sum)
  )
  return carry.squares_L
