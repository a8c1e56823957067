"""The steps that keep projected gradients until all of them are there.

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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

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
  add_trees,
  divide,
  drop_axis,
)
from gnlorp_jax.training.layerwise.slices import (
  WHOLE,
  Cut,
  Path,
  leaf_at,
  nest,
  only_changed,
  same_arrays,
)
from gnlorp_jax.training.parameters import outer
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, Metrics, split_rows


class Waiting(NamedTuple):
  """What the first half of a step leaves for the second."""

  projected: dict[Path, Any]  # gradients; a layer's are [L, 1, ...]
  opt: Any  # the optimizer's state, with the bases of this step
  loss_sum: jax.Array  # float32 []
  weight_sum: jax.Array  # float32 []
  squares: jax.Array  # float32 [], of the gradients before projecting


class _Projecting(NamedTuple):
  """What changes while gradients are projected one after the other."""

  params: Any  # only read
  opt: Any
  projected: dict[Path, Any]
  squares: jax.Array


def _nothing(engine: Engine, params: Any, opt: Any, dtype: Any) -> Waiting:
  """Zeros to add to; a dtype of None is that of what is added."""

  def projected(path: Path) -> Any:
    is_layer = path in engine.layer_paths
    cut = engine.layer(0) if is_layer else WHOLE
    decoded = engine.passes.parameters.decode(cut.at(leaf_at(params, path)))
    grad = nest(path, decoded)
    param_state = engine.slices.take(opt, path, cut)
    return engine.tx.project(grad, param_state, grad)[0]

  def zeros(path: Path) -> Any:
    stack = (engine.passes.num_layers,) if path in engine.layer_paths else ()
    return jax.tree.map(
      lambda x: jnp.zeros((*stack, *x.shape), dtype or x.dtype),
      jax.eval_shape(lambda: projected(path)),
    )

  zero = jnp.zeros((), jnp.float32)
  paths = (*engine.layer_paths, *engine.outer_paths)
  return Waiting({path: zeros(path) for path in paths}, opt, zero, zero, zero)


class _Weights(NamedTuple):
  """What trains and what is frozen, as stored."""

  params: Any
  frozen: Any


def _project(
  engine: Engine,
  weights: _Weights,
  waiting: Waiting,
  batch_K: Batch,
  divisor: Callable[[jax.Array], jax.Array],
  **refresh: Any,
) -> Waiting:
  """Adds the projected gradients of a batch to those that wait.

  `divisor` maps the sum of the batch's weights to what gradients are divided
  by; `refresh` says how bases are refitted, to ``tx.project``.
  """
  params, passes = weights.params, engine.passes
  kept = passes.forward(params, weights.frozen, batch_K)
  head = passes.head(params, kept)
  divide_by = divisor(head.weight_sum)

  def project(
    path: Path, grad: jax.Array, carry: _Projecting, cut: Cut
  ) -> _Projecting:
    start = passes.parameters.decode_exact(cut.at(leaf_at(carry.params, path)))
    old = engine.slices.take(carry.opt, path, cut)
    new, new_state = engine.tx.project(
      nest(path, grad), old, nest(path, start), **refresh
    )
    waits = cut.at(carry.projected[path])
    if path in engine.layer_paths:
      new = jax.tree.map(lambda x: x[None], new)
    total = jax.tree.map(lambda t, x: t + x.astype(t.dtype), waits, new)
    summed = cut.put(carry.projected[path], total)
    written = only_changed(new_state, same_arrays(new_state, old))
    return carry._replace(
      projected={**carry.projected, path: summed},
      opt=engine.slices.put(carry.opt, path, written, cut),
      squares=carry.squares + squares(grad),
    )

  def visit(
    layer: jax.Array, grads: dict[Path, Any], carry: _Projecting
  ) -> _Projecting:
    cut = engine.layer(layer)
    return one_by_one(
      engine.layer_paths,
      grads,
      carry,
      lambda path, grad, carry: project(path, grad, carry, cut),
    )

  carry = _Projecting(params, waiting.opt, waiting.projected, waiting.squares)
  carry, dx_KBTD = passes.backward(visit, carry, kept, head.dx_KBTD, divide_by)
  read = passes.embedding(params, kept, dx_KBTD)
  tied = add_trees({key: head.grads[key] for key in read}, read)
  like = passes.parameters.decode(outer(params))
  grads = divide({**head.grads, **tied}, divide_by, like)
  for path in engine.outer_paths:
    carry = project(path, leaf_at(grads, path), carry, WHOLE)
  return Waiting(
    projected=carry.projected,
    opt=carry.opt,
    loss_sum=waiting.loss_sum + head.loss_sum,
    weight_sum=waiting.weight_sum + head.weight_sum,
    squares=carry.squares,
  )


def _apply(
  engine: Engine,
  state: TrainState,
  waiting: Waiting,
  norm: jax.Array,
  factor: jax.Array,
) -> tuple[TrainState, Metrics]:
  """The second half: acts on what has waited, times a factor."""

  def apply(projected: Any) -> Act:
    """What moves a parameter, or a part of one, by what has waited."""
    return lambda param_state, param, first: engine.tx.apply(
      scale(projected, factor), param_state, param, first=first
    )

  def body(layer: jax.Array, carry: Carry) -> Carry:
    cut = engine.layer(layer)
    for path in engine.layer_paths:
      act = apply(drop_axis(cut.at(waiting.projected[path])))
      carry = engine.move(act, path, cut, state.step, carry)
    return carry

  carry = engine.start(state.params, waiting.opt, jnp.isfinite(norm))
  carry = carry._replace(sums=carry.sums._replace(grad=jnp.square(norm)))
  carry = jax.lax.fori_loop(0, engine.passes.num_layers, body, carry)
  for path in engine.outer_paths:
    carry = engine.move_rows(
      apply, path, waiting.projected[path], state.step, carry
    )
  return engine.finish(state, carry, waiting.loss_sum, waiting.weight_sum)


class ForNorm(NamedTuple):
  """A step whose projected gradients wait for the norm of all gradients."""

  engine: Engine
  num_micro_batches: int
  clip: float | None

  def take(
    self, state: TrainState, batch: Batch, frozen: Any
  ) -> tuple[TrainState, Metrics]:
    """Takes the step; see `layerwise.make_train_step`."""
    batch_K = split_rows(batch, self.num_micro_batches)
    weights = _Weights(state.params, frozen)
    waiting = _nothing(self.engine, state.params, state.opt_state, dtype=None)
    waiting = _project(self.engine, weights, waiting, batch_K, divisor_of)
    norm = jnp.sqrt(waiting.squares)
    factor = clip_factor(norm, self.clip)
    return _apply(self.engine, state, waiting, norm, factor)


class Summed(NamedTuple):
  """A step that sums projected gradients over micro-batches and devices."""

  engine: Engine
  num_micro_batches: int
  clip: float | None
  mesh: Mesh | None

  def take(
    self, state: TrainState, batch: Batch, frozen: Any
  ) -> tuple[TrainState, Metrics]:
    """Takes the step; see `layerwise.make_train_step`."""
    weights = _Weights(state.params, frozen)
    waiting = self._on_devices(weights, state.opt_state, batch)
    divisor = divisor_of(waiting.weight_sum)
    norm = jnp.sqrt(squares(waiting.projected)) / divisor
    factor = clip_factor(norm, self.clip) / divisor
    return _apply(self.engine, state, waiting, norm, factor)

  def _on_devices(self, weights: _Weights, opt: Any, batch: Batch) -> Waiting:
    if self.mesh is None or self.mesh.shape['data'] == 1:
      return self._accumulate(weights, opt, batch, lambda x: x)
    return jax.shard_map(
      lambda *args: self._accumulate(*args, lambda x: jax.lax.psum(x, 'data')),
      mesh=self.mesh,
      in_specs=(P(), P(), P('data')),
      out_specs=P(),
      # Kernels of attention are fast where no axis is left to the compiler.
      axis_names={'data'} if self.mesh.shape['fsdp'] > 1 else {'data', 'fsdp'},
      # Bases are equal on all devices because they are fitted to a sum; the
      # check cannot know.
      check_vma=False,
    )(weights, opt, batch)

  def _accumulate(
    self,
    weights: _Weights,
    opt: Any,
    batch: Batch,
    total: Callable[[Any], Any],
  ) -> Waiting:
    """One micro-batch after the other; `total` sums over devices."""
    batch_K = split_rows(batch, self.num_micro_batches)

    def add(waiting: Waiting, xs: Any) -> tuple[Waiting, None]:
      number, micro_batch = xs
      waiting = _project(
        self.engine,
        weights,
        waiting,
        jax.tree.map(lambda x: x[None], micro_batch),
        lambda weight_sum: jnp.float32(1),
        due=number == 0,
        total=total,
      )
      return waiting, None

    waiting = _nothing(self.engine, weights.params, opt, dtype=jnp.float32)
    numbers = jnp.arange(self.num_micro_batches)
    waiting, _ = jax.lax.scan(add, waiting, (numbers, batch_K))
    return waiting._replace(
      projected=total(waiting.projected),
      loss_sum=total(waiting.loss_sum),
      weight_sum=total(waiting.weight_sum),
    )
