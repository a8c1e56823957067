"""The step that is done with a block's gradient at once.

Shape suffixes in this file:
  K     micro-batches
  B, T  sequences of a micro-batch, positions
  D     features
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.training.layerwise.engine import (
  Act,
  Carry,
  Engine,
  clip_factor,
  divisor_of,
  one_by_one,
  scale,
  squares,
)
from gnlorp_jax.training.layerwise.passes import (
  HeadPass,
  Kept,
  Passes,
  add_trees,
  divide,
)
from gnlorp_jax.training.layerwise.slices import Cut, Path, leaf_at, nest
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, Metrics, split_rows


def embed_grads(
  passes: Passes, params: Any, kept: Kept, head: HeadPass, dx_KBTD: jax.Array
) -> Any:
  """Gradients of the embedding, with what the head adds to a tied one."""
  grads = passes.embedding(params, kept, dx_KBTD)
  return add_trees({key: head.grads[key] for key in grads}, grads)


class _Measured(NamedTuple):
  """What the pass before a clipped step carries."""

  params: Any  # only read
  squares: jax.Array  # float32 [], of the layers' gradients


class AtOnce(NamedTuple):
  """A step that updates a block as soon as its gradient is there."""

  engine: Engine
  num_micro_batches: int
  clip: float | None

  def take(
    self, state: TrainState, batch: Batch, frozen: Any
  ) -> tuple[TrainState, Metrics]:
    """Takes the step; see `layerwise.make_train_step`."""
    passes, params = self.engine.passes, state.params
    batch_K = split_rows(batch, self.num_micro_batches)
    kept = passes.forward(params, frozen, batch_K)
    head = passes.head(params, kept)
    divisor = divisor_of(head.weight_sum)
    factor, finite = jnp.float32(1), jnp.isfinite(head.loss_sum)
    if self.clip is not None:
      norm = self._measure(params, kept, head, divisor)
      factor, finite = clip_factor(norm, self.clip), jnp.isfinite(norm)
    move = Move(self.engine, state.step, divisor, factor)
    embed_keys = passes.pieces.embed_keys
    late = [p for p in self.engine.outer_paths if p[0] in embed_keys]
    early = [p for p in self.engine.outer_paths if p not in late]

    carry = self.engine.start(params, state.opt_state, finite)
    carry = move.outer(early, params, head.grads, carry)
    # What the head needs is let go before the layers begin.
    dx_KBTD, carry = jax.lax.optimization_barrier((head.dx_KBTD, carry))
    carry, dx_KBTD = passes.backward(move.layer, carry, kept, dx_KBTD, divisor)
    grads = embed_grads(passes, params, kept, head, dx_KBTD)
    carry = move.outer(late, params, grads, carry)
    return self.engine.finish(state, carry, head.loss_sum, head.weight_sum)

  def _measure(
    self, params: Any, kept: Kept, head: HeadPass, divisor: jax.Array
  ) -> jax.Array:
    """The norm of all gradients, by a backward pass for it alone."""

    def visit(
      layer: jax.Array, grads: dict[Path, Any], carry: _Measured
    ) -> _Measured:
      return carry._replace(squares=carry.squares + squares(grads))

    carry, dx_KBTD = self.engine.passes.backward(
      visit, _Measured(params, jnp.float32(0)), kept, head.dx_KBTD, divisor
    )
    grads = head.grads | embed_grads(
      self.engine.passes, params, kept, head, dx_KBTD
    )
    outer = squares(divide(grads, divisor, grads))
    return jnp.sqrt(carry.squares + outer)


class Move(NamedTuple):
  """Moves parameters by their gradients, times a factor."""

  engine: Engine
  step: jax.Array
  divisor: jax.Array
  factor: jax.Array

  def _see(self, grad: jax.Array, carry: Carry) -> tuple[jax.Array, Carry]:
    """A gradient as the optimizer receives it, after it was counted."""
    size, sums = squares(grad), carry.sums
    sums = sums._replace(
      grad=sums.grad + size, finite=sums.finite & jnp.isfinite(size)
    )
    return scale(grad, self.factor), carry._replace(sums=sums)

  def _act(self, path: Path, grad: jax.Array) -> Act:
    """What moves a parameter, or a part of one, by its gradient."""
    return lambda param_state, param, first: self.engine.tx.update(
      nest(path, grad), param_state, param, first=first
    )

  def outer(
    self, paths: Sequence[Path], params: Any, grad_sums: Any, carry: Carry
  ) -> Carry:
    """Moves outer parameters by their summed gradients."""
    decode = self.engine.passes.parameters.decode
    for path in paths:
      like = decode(leaf_at(params, path))
      grad = divide(leaf_at(grad_sums, path), self.divisor, like)
      grad, carry = self._see(grad, carry)
      act_on = functools.partial(self._act, path)
      carry = self.engine.move_rows(act_on, path, grad, self.step, carry)
    return carry

  def layer(
    self,
    layer: jax.Array,
    grads: dict[Path, Any],
    carry: Carry,
    of_state: Cut | None = None,
  ) -> Carry:
    """Moves the parameters of a layer; `of_state` as in `Engine.move`."""
    cut = self.engine.layer(layer)

    def act(path: Path, grad: jax.Array, carry: Carry) -> Carry:
      grad, carry = self._see(grad, carry)
      return self.engine.move(
        self._act(path, grad), path, cut, self.step, carry, of_state
      )

    return one_by_one(self.engine.layer_paths, grads, carry, act)
