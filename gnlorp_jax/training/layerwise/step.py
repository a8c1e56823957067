"""Builds the step from its options."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import optax
from flax import traverse_util
from jax.sharding import Mesh

from gnlorp_jax.training.layerwise import checks
from gnlorp_jax.training.layerwise.at_once import AtOnce
from gnlorp_jax.training.layerwise.engine import Engine
from gnlorp_jax.training.layerwise.passes import Passes
from gnlorp_jax.training.layerwise.slices import StateSlices
from gnlorp_jax.training.layerwise.waiting import ForNorm, Summed
from gnlorp_jax.training.objectives import Pieces
from gnlorp_jax.training.parameters import LAYERS, Parameters
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, Metrics

Accumulate = Literal['gradient', 'projected']
Clipping = Literal['waiting', 'recompute']
# (state, batch, frozen = {}) -> (state, metrics)
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
  pieces: Pieces,
  tx: optax.GradientTransformation,
  parameters: Parameters,
  *,
  num_micro_batches: int = 1,
  clip_global_norm: float | None = None,
  clipping: Clipping = 'waiting',
  accumulate: Accumulate = 'gradient',
  mesh: Mesh | None = None,
  offload: bool = False,
  row_blocks: bool = False,
) -> TrainStep:
  """Builds the function that takes one optimizer step, layer by layer.

  Parameters, state and trajectory are those of `step.make_train_step` with `tx`
  behind `optax.clip_by_global_norm`. `tx` must treat every matrix of a stack by
  itself, as all optimizers of this package do.

  What is frozen is read, a layer at a time if it must be decoded, and has no
  gradient at any time.

  With ``accumulate='gradient'`` a layer's gradient is summed over the
  micro-batches before the optimizer sees it: they change nothing but the memory
  inside of a block, and the inputs of the blocks are kept for the whole batch.
  The norm that is clipped is that of all gradients. With
  ``clipping='waiting'``, projected gradients wait for that norm; with
  ``recompute``, and where `tx` does not come in two halves (`optim.split`), a
  first backward pass measures it: more time, less memory.

  With ``accumulate='projected'`` one micro-batch after the other goes through
  the whole model, and the projected gradients are summed: over them, and over
  the axis ``data`` of `mesh`, so that nothing else crosses devices but the
  gradients that a basis is refitted to. These are the first micro-batch's,
  summed over the devices; where they are zero the basis stays. The norm that is
  clipped is that of what is summed: projected gradients, those of magnitudes,
  and those of parameters that are not projected.

  A step whose gradients are not finite is left out and counted. Where layers
  are updated at once, what was visited before the first bad gradient has moved
  already, and ``update_norm`` tells by how much; where they wait, refreshes
  that were due have taken place, with all they do to moments and intervals.

  Args:
    pieces: The loss, layer by layer.
    tx: The optimizer, without clipping and without a guard of its own. It is
      shown one parameter at a time, in a dict without the others: labels must
      be given as rules over paths, not as a tree.
    parameters: The weights. Joined, what trains and what is frozen are a dict
      with ``layers``, stacked ``[L, ...]``, and others. ``start``,
      ``start_frozen`` and ``merge`` are not used.
    num_micro_batches: Pieces of the batch; must divide the batch size.
    clip_global_norm: The largest norm; None does not clip.
    clipping: ``waiting`` or ``recompute``, of ``accumulate='gradient'``.
    accumulate: ``gradient`` or ``projected``.
    mesh: The mesh, where ``projected`` should sum over its axis ``data``.
    offload: Keeps the inputs of the blocks in the host's memory.
    row_blocks: Updates large outer matrices some rows at a time, where the
      optimizer's state can be cut and the number of rows has a divisor that
      suits; `tx` must then act on them element by element, as Adam does.

  Returns:
    A pure function ``(state, batch, frozen) -> (state, metrics)``; `frozen`
    may be left out where it is empty. ``state.params`` is the trained tree. The
    metrics are those of `step.make_train_step`, of which ``grad_norm`` is the
    norm that is clipped, and ``weight_norm`` that of the parameters that train
    before they are stored.

  Raises:
    ValueError: If `num_micro_batches` is less than 1, if `parameters` have no
      stacked layers, if ``projected`` meets an optimizer that needs the whole
      gradient, or if the optimizer's state cannot be cut into layers.
  """
  if num_micro_batches < 1:
    raise ValueError(
      f'num_micro_batches={num_micro_batches} must be at least 1.'
    )
  checks.check_choice('accumulate', accumulate, get_args(Accumulate))
  checks.check_choice('clipping', clipping, get_args(Clipping))
  comes_in_halves = hasattr(tx, 'project')
  if accumulate == 'projected' and not comes_in_halves:
    raise ValueError(
      "accumulate='projected' keeps nothing of a gradient but its projection, "
      "and this optimizer needs all of it. Use accumulate='gradient'."
    )
  num_layers = checks.count_layers(parameters)
  paths = traverse_util.flatten_dict(parameters.trained)
  engine = Engine(
    passes=Passes(pieces, parameters, num_layers, offload),
    tx=tx if comes_in_halves else optax.with_extra_args_support(tx),
    slices=StateSlices(frozenset(parameters.trained)),
    layer_paths=tuple(sorted(p for p in paths if p[0] == LAYERS)),
    outer_paths=tuple(p for p in paths if p[0] != LAYERS),
    row_blocks={},
  )
  checks.check_layers(engine)
  if row_blocks:
    engine = engine._replace(row_blocks=checks.count_row_blocks(engine))
  step: AtOnce | ForNorm | Summed
  if accumulate == 'projected':
    step = Summed(engine, num_micro_batches, clip_global_norm, mesh)
  elif gradients_wait(tx, clip_global_norm, clipping, accumulate):
    step = ForNorm(engine, num_micro_batches, clip_global_norm)
  else:
    step = AtOnce(engine, num_micro_batches, clip_global_norm)

  def train_step(
    state: TrainState, batch: Batch, frozen: Any = None
  ) -> tuple[TrainState, Metrics]:
    return step.take(state, batch, frozen or {})

  return train_step


def gradients_wait(
  tx: optax.GradientTransformation,
  clip_global_norm: float | None,
  clipping: Clipping,
  accumulate: Accumulate,
) -> bool:
  """Whether a step keeps the projected gradients of all layers.

  The arguments are those of `make_train_step`.
  """
  clips = clip_global_norm is not None and clipping == 'waiting'
  return accumulate == 'projected' or (clips and hasattr(tx, 'project'))
