"""How a step moves one parameter, or a part of one, and what it adds up."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.training.layerwise.passes import Passes
from gnlorp_jax.training.layerwise.slices import (
  Cut,
  Path,
  StateSlices,
  leaf_at,
  nest,
  only_changed,
  replace_leaf,
  same_arrays,
)
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Metrics

# ``act(param_state, params, first) -> (updates, param_state)``, all trees of
# one parameter, or of a part that starts at `first` on the first axis.
Act = Callable[[Any, Any, jax.Array | int], tuple[Any, Any]]


def squares(tree: Any) -> jax.Array:
  """Sum of the squares of all entries, float32."""
  return sum(
    (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)),
    jnp.float32(0),
  )


def scale(tree: Any, factor: jax.Array) -> Any:
  """All arrays times a factor, in their dtypes."""
  return jax.tree.map(lambda g: (g * factor).astype(g.dtype), tree)


def divisor_of(weight_sum: jax.Array) -> jax.Array:
  """What sums of losses and gradients are divided by."""
  return jnp.where(weight_sum > 0, weight_sum, 1)


def clip_factor(norm: jax.Array, clip: float | None) -> jax.Array:
  """What gradients are multiplied by so that their norm is `clip` at most."""
  if clip is None:
    return jnp.float32(1)
  return jnp.where(norm < clip, 1, clip / norm)


class Sums(NamedTuple):
  """What a step adds up on its way."""

  grad: jax.Array  # float32 [], squares of the gradients
  update: jax.Array  # float32 [], squares of the updates
  weight: jax.Array  # float32 [], squares of the new parameters
  finite: jax.Array  # bool [], no gradient so far held a NaN or an infinity


class Carry(NamedTuple):
  """What changes while parameters are moved one after the other."""

  params: Any  # what trains, as stored
  opt: Any  # the optimizer's state; of this step but for what is shared
  shared: list[jax.Array]  # the shared state, of this step
  sums: Sums


class Engine(NamedTuple):
  """What every step needs, and how it moves a parameter."""

  passes: Passes
  tx: Any
  slices: StateSlices
  layer_paths: tuple[Path, ...]
  outer_paths: tuple[Path, ...]
  row_blocks: dict[Path, int]  # of parameters that are updated part by part

  def start(self, params: Any, opt: Any, finite: jax.Array) -> Carry:
    """The carry before any parameter is moved."""
    zero = jnp.zeros((), jnp.float32)
    sums = Sums(zero, zero, zero, finite)
    return Carry(params, opt, self.slices.shared(opt, opt), sums)

  def layer(self, number: jax.Array | int) -> Cut:
    """The cut that is one layer of a stack."""
    return Cut(number, self.passes.num_layers)

  def move(
    self,
    act: Act,
    path: Path,
    cut: Cut,
    step: jax.Array,
    carry: Carry,
    of_state: Cut | None = None,
  ) -> Carry:
    """Writes what `act` makes of a parameter, or of a part of one.

    `of_state` is the part of ``carry.opt`` that belongs to it, if it is not
    cut like the parameter.
    """
    of_state = cut if of_state is None else of_state
    stored = leaf_at(carry.params, path)
    old, old_state = cut.at(stored), self.slices.take(carry.opt, path, of_state)
    parameters = self.passes.parameters
    start = parameters.decode_exact(old)
    first = cut.index * (start.shape[0] if start.ndim else 1)
    # Which arrays `act` returns as they were; known when `take` was traced.
    is_same: list[bool] = []

    # In the branches of a condition, because then all that is read is read
    # before anything is written: XLA on CPUs copies a stack where it is not.
    def take() -> Any:
      updates, new_state = act(old_state, nest(path, start), first)
      is_same[:] = same_arrays(new_state, old_state)
      update = leaf_at(updates, path)
      moved = start.astype(jnp.float32) + update
      new = parameters.store(nest(path, moved), nest(path, old), step, first)
      # As leaves: a part of a quantised array is of another type.
      return jax.tree.leaves((new, new_state)), squares(update), squares(moved)

    def leave() -> Any:
      leaves = jax.tree.leaves((old, old_state))
      return leaves, jnp.float32(0), squares(start)

    sums = carry.sums
    leaves, update, weight = jax.lax.cond(sums.finite, take, leave)
    new, new_state = jax.tree.unflatten(
      jax.tree.structure((old, old_state)), leaves
    )
    written = only_changed(new_state, is_same)
    return Carry(
      params=replace_leaf(carry.params, path, cut.put(stored, new)),
      opt=self.slices.put(carry.opt, path, written, of_state),
      shared=self.slices.shared(carry.opt, new_state),
      sums=sums._replace(
        update=sums.update + update, weight=sums.weight + weight
      ),
    )

  def move_rows(
    self,
    act_on: Callable[[Any], Act],
    path: Path,
    grad: Any,
    step: jax.Array,
    carry: Carry,
  ) -> Carry:
    """`move` of an outer parameter, part by part if it is large.

    ``act_on(part)`` makes the `Act` of the same part of `grad`.
    """
    count = self.row_blocks.get(path, 1)

    def body(index: jax.Array | int, carry: Carry) -> Carry:
      cut = Cut(index, count)
      return self.move(act_on(cut.at(grad)), path, cut, step, carry)

    if count == 1:
      return body(0, carry)
    return jax.lax.fori_loop(0, count, body, carry)

  def finish(
    self,
    state: TrainState,
    carry: Carry,
    loss_sum: jax.Array,
    weight_sum: jax.Array,
  ) -> tuple[TrainState, Metrics]:
    """The new state and the metrics."""
    sums = carry.sums
    opt = self.slices.put_shared(carry.opt, carry.shared, sums.finite)
    skipped = state.skipped + jnp.where(sums.finite, 0, 1)
    metrics = {
      'loss': loss_sum / divisor_of(weight_sum),
      'weight_sum': weight_sum,
      'grad_norm': jnp.sqrt(sums.grad),
      'update_norm': jnp.sqrt(sums.update),
      'weight_norm': jnp.sqrt(sums.weight),
      'skipped_steps': skipped,
    }
    return TrainState(state.step + 1, skipped, carry.params, opt), metrics


def one_by_one(
  paths: tuple[Path, ...],
  grads: dict[Path, jax.Array],
  carry: Any,
  act: Callable[[Path, jax.Array, Any], Any],
) -> Any:
  """``carry = act(path, grad, carry)`` for each path, one after the other.

  Each begins when the one before has ended: what they need would exist at the
  same time otherwise.
  """
  for path in paths:
    grad, carry = jax.lax.optimization_barrier((grads[path], carry))
    carry = act(path, grad, carry)
  return carry
