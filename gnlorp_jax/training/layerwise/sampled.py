"""The step that trains some layers at a time.

The backward pass computes gradients of the drawn layers alone, goes through the
others for the gradient of their input, and ends at the lowest drawn layer where
nothing below it trains.

Shape suffixes in this file:
  L     layers
  S     slots
  K     micro-batches
  B, T  sequences of a micro-batch, positions
  D     features
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.training import layer_sampling
from gnlorp_jax.training.layer_sampling import LayerSampling, SampledState
from gnlorp_jax.training.layerwise import checks
from gnlorp_jax.training.layerwise.at_once import Move, embed_grads
from gnlorp_jax.training.layerwise.engine import (
  Carry,
  Engine,
  Sums,
  clip_factor,
  divisor_of,
  squares,
)
from gnlorp_jax.training.layerwise.passes import (
  Drawn,
  HeadPass,
  Kept,
  Passes,
  divide,
)
from gnlorp_jax.training.layerwise.slices import WHOLE, Cut, Path, StateSlices
from gnlorp_jax.training.objectives import Pieces
from gnlorp_jax.training.parameters import LAYERS, Parameters
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, Metrics, split_rows

# Learning rate after a number of steps, by the numbers of a run: see `rate` of
# `make_sampled_step`.
Rate = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]


class Split(NamedTuple):
  """Makes the two parts of an optimizer's state: a layer's, and the rest's."""

  tx: Any
  parameters: Parameters
  num_layers: int

  @property
  def layer_keys(self) -> frozenset[str]:
    """The top-level key of the layers."""
    return frozenset({LAYERS})

  @property
  def outer_keys(self) -> frozenset[str]:
    """The top-level keys of what is always on."""
    return frozenset(self.parameters.trained) - self.layer_keys

  def layer(
    self, params: Any, number: jax.Array | int, step: jax.Array | int = 0
  ) -> Any:
    """The optimizer's state of a layer that begins after `step` steps."""
    state = self._init(params, number, self.layer_keys)
    return layer_sampling.reseed(state, number, step)

  def always(self, params: Any, step: jax.Array | int = 0) -> Any:
    """The optimizer's state of what is always on, after `step` steps."""
    state = self._init(params, 0, self.outer_keys)
    return layer_sampling.reseed(state, self.num_layers, step)

  def _init(
    self, params: Any, number: jax.Array | int, keys: frozenset[str]
  ) -> Any:
    layer = Cut(number, self.num_layers).at(params[LAYERS])
    # All at once, because labels are rules about all parameters.
    seen = self.parameters.decode_exact({**params, LAYERS: layer})
    slices = StateSlices(frozenset(params))
    return slices.only(self.tx.init(seen), keys)


def init(
  tx: Any,
  parameters: Parameters,
  sampling: LayerSampling,
  params: Any,
  numbers: dict[str, jax.Array],
  key: jax.Array,
) -> SampledState:
  """The optimizer's state of a run whose layers are drawn.

  Args:
    tx: The optimizer, as in `make_sampled_step`.
    parameters: The weights.
    sampling: How layers are drawn.
    params: What trains, as stored.
    numbers: What decides learning rates, float32 scalars by name.
    key: The random key that draws layers.
  """
  split = Split(tx, parameters, sampling.num_layers)
  return layer_sampling.start(
    sampling,
    lambda layer: split.layer(params, layer),
    split.always(params),
    numbers,
    key,
  )


def make_sampled_step(
  pieces: Pieces,
  tx: Any,
  parameters: Parameters,
  sampling: LayerSampling,
  rate: Rate,
  *,
  num_micro_batches: int = 1,
  clip_global_norm: float | None = None,
  at_once: bool = True,
  offload: bool = False,
  row_blocks: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Builds the function that takes one step of the drawn layers.

  Args:
    pieces: The loss, layer by layer.
    tx: The optimizer as for `step.make_train_step` of this package, with a
      state that has a field ``hyperparams``, whose ``learning_rate`` it takes:
      that of a layer does not depend on when the layer was drawn.
    parameters: The weights. Of the layers all trained leaves are sampled; what
      else trains is always on.
    sampling: How layers are drawn.
    rate: ``rate(count, numbers)``: the learning rate after `count` steps were
      taken, from the ``hyperparams`` of the state.
    num_micro_batches: Pieces of the batch; must divide the batch size.
    clip_global_norm: The largest norm of the gradients of the drawn layers and
      of what is always on; None does not clip.
    at_once: Whether a layer is updated as soon as its gradient is there; where
      gradients are clipped a backward pass before measures them. Without, the
      gradients of all drawn layers wait.
    offload: Keeps the inputs of the blocks in the host's memory.
    row_blocks: As of `step.make_train_step`.

  Returns:
    A pure function ``(state, batch, frozen) -> (state, metrics)``, of a state
    whose ``opt_state`` is that of `init`. The metrics are those of
    `step.make_train_step`, of what was trained in the step.

  Raises:
    ValueError: If `num_micro_batches` is less than 1, if `parameters` have no
      stacked layers, or another number of them, or none that trains.
  """
  if num_micro_batches < 1:
    raise ValueError(
      f'num_micro_batches={num_micro_batches} must be at least 1.'
    )
  num_layers = checks.count_layers(parameters)
  if LAYERS not in parameters.trained:
    raise ValueError('Nothing in the layers trains: there is nothing to draw.')
  if num_layers != sampling.num_layers:
    raise ValueError(
      f'The model has {num_layers} layers, and {sampling.num_layers} are to be '
      'drawn from. Give its number.'
    )
  split = Split(tx, parameters, num_layers)
  paths = traverse_util.flatten_dict(parameters.trained)
  whole = Engine(
    passes=Passes(pieces, parameters, num_layers, offload),
    tx=tx,
    slices=StateSlices(frozenset(parameters.trained)),
    layer_paths=tuple(sorted(p for p in paths if p[0] == LAYERS)),
    outer_paths=tuple(p for p in paths if p[0] != LAYERS),
    row_blocks={},
  )
  always = whole._replace(
    slices=StateSlices(split.outer_keys),
    layer_paths=(),
    row_blocks=checks.count_row_blocks(whole) if row_blocks else {},
  )
  layers = whole._replace(slices=StateSlices(split.layer_keys), outer_paths=())
  step = _Sampled(
    *(always, layers, split, sampling, rate),
    *(num_micro_batches, clip_global_norm, at_once),
  )

  def train_step(
    state: TrainState, batch: Batch, frozen: Any = None
  ) -> tuple[TrainState, Metrics]:
    return step.take(state, batch, frozen or {})

  return train_step


class _Layers(NamedTuple):
  """What changes while layers are moved one after the other."""

  params: Any  # what trains, as stored
  slots: Any
  sums: Sums


class _Gathered(NamedTuple):
  """What changes while gradients are gathered."""

  params: Any  # only read
  grads: dict[Path, jax.Array]  # [S, 1, ...]
  squares: jax.Array  # float32 []


class _Gradients(NamedTuple):
  """The gradients of a step, as far as they are there before it moves."""

  kept: Kept
  head: HeadPass
  divisor: jax.Array
  drawn: Drawn
  slot_L: jax.Array  # int32, of each layer its slot
  factor: jax.Array  # that clips
  finite: jax.Array


class _Sampled(NamedTuple):
  """The step; see `make_sampled_step`."""

  always: Engine
  layers: Engine
  split: Split
  sampling: LayerSampling
  rate: Rate
  num_micro_batches: int
  clip: float | None
  at_once: bool

  @property
  def passes(self) -> Passes:
    """The passes through the model."""
    return self.layers.passes

  @property
  def embed_paths(self) -> list[Path]:
    """What trains of all that the embedding reads."""
    keys = self.passes.pieces.embed_keys
    return [p for p in self.always.outer_paths if p[0] in keys]

  def take(
    self, state: TrainState, batch: Batch, frozen: Any
  ) -> tuple[TrainState, Metrics]:
    """Takes the step."""
    sampled = self._with_layers(state)
    batch_K = split_rows(batch, self.num_micro_batches)
    kept = self.passes.forward(state.params, frozen, batch_K)
    head = self.passes.head(state.params, kept)
    ready = _Gradients(
      *(kept, head, divisor_of(head.weight_sum)),
      drawn=self._drawn(sampled),
      slot_L=self._slots(sampled),
      factor=jnp.float32(1),
      finite=jnp.isfinite(head.loss_sum),
    )
    move_all = self._at_once if self.at_once else self._gathered
    carry, slots = move_all(state, self._with_rates(state, sampled), ready)
    new, metrics = self.always.finish(
      state, carry, head.loss_sum, head.weight_sum
    )
    sampled = sampled._replace(slots=slots, always=new.opt_state)
    counted = layer_sampling.count_step(sampled)
    sampled = jax.tree.map(
      lambda c, s: c if c is s else jnp.where(carry.sums.finite, c, s),
      *(counted, sampled),
    )
    return new._replace(opt_state=sampled), metrics

  def _with_layers(self, state: TrainState) -> SampledState:
    """The optimizer's state, with the layers of this step in its slots."""
    return layer_sampling.begin_step(
      *(self.sampling, state.opt_state, state.step),
      lambda layer: self.split.layer(state.params, layer, state.step),
      lambda: self.split.always(state.params, state.step),
    )

  def _drawn(self, sampled: SampledState) -> Drawn:
    return Drawn(jnp.sort(sampled.layers), to_bottom=bool(self.embed_paths))

  def _slots(self, sampled: SampledState) -> jax.Array:
    num_layers = self.sampling.num_layers
    if self.sampling.on_leave == 'keep':
      return jnp.arange(num_layers, dtype=jnp.int32)
    return layer_sampling.slot_of_layer(sampled.layers, num_layers)

  def _with_rates(
    self, state: TrainState, sampled: SampledState
  ) -> SampledState:
    """The state with the learning rates of this step in its parts."""
    rate = self.rate(state.step - state.skipped, sampled.hyperparams)
    factor = jnp.float32(1)
    if self.sampling.warmup_steps:
      done = self.sampling.step_in_period(state.step)
      factor = jnp.minimum(1, (done + 1) / self.sampling.warmup_steps)

    def put(opt: Any, rate: jax.Array) -> Any:
      old = opt.hyperparams['learning_rate']
      new = jnp.broadcast_to(rate.astype(old.dtype), old.shape)
      return opt._replace(hyperparams={'learning_rate': new})

    return sampled._replace(
      slots=put(sampled.slots, rate * factor), always=put(sampled.always, rate)
    )

  def _at_once(
    self, state: TrainState, sampled: SampledState, ready: _Gradients
  ) -> tuple[Carry, Any]:
    """Moves each layer when the backward pass has its gradient."""
    kept, dx_KBTD = ready.kept, ready.head.dx_KBTD
    if self.clip is not None:
      gathered, dx0_KBTD = self._backward(
        _Gathered(state.params, {}, jnp.float32(0)), ready
      )
      ready = self._clipped(ready, gathered.squares, dx0_KBTD, state.params)
    move = Move(self.always, state.step, ready.divisor, ready.factor)
    late = self.embed_paths
    early = [p for p in self.always.outer_paths if p not in late]
    carry = self.always.start(state.params, sampled.always, ready.finite)
    carry = move.outer(early, state.params, ready.head.grads, carry)
    # What the head needs is let go before the layers begin.
    dx_KBTD, carry = jax.lax.optimization_barrier((dx_KBTD, carry))
    found, dx_KBTD = self.passes.backward(
      lambda layer, grads, carry: self._move_layer(
        *(state.step, ready, layer, grads, carry)
      ),
      _Layers(carry.params, sampled.slots, carry.sums),
      *(kept, dx_KBTD, ready.divisor, ready.drawn),
    )
    carry = carry._replace(params=found.params, sums=found.sums)
    grads = embed_grads(self.passes, state.params, kept, ready.head, dx_KBTD)
    return move.outer(late, state.params, grads, carry), found.slots

  def _gathered(
    self, state: TrainState, sampled: SampledState, ready: _Gradients
  ) -> tuple[Carry, Any]:
    """Moves all when all gradients are there."""
    params = state.params
    gathered, dx_KBTD = self._backward(
      _Gathered(params, self._no_gradients(params), jnp.float32(0)), ready
    )
    ready = self._clipped(ready, gathered.squares, dx_KBTD, params)
    move = Move(self.always, state.step, ready.divisor, ready.factor)
    grads = ready.head.grads | embed_grads(
      self.passes, params, ready.kept, ready.head, dx_KBTD
    )
    carry = self.always.start(params, sampled.always, ready.finite)
    carry = move.outer(self.always.outer_paths, params, grads, carry)

    def body(place: jax.Array, found: _Layers) -> _Layers:
      at_place = layer_sampling.take_slot(gathered.grads, place)
      layer = ready.drawn.layers_S[place]
      return self._move_layer(state.step, ready, layer, at_place, found)

    found = jax.lax.fori_loop(
      *(0, self.sampling.layers, body),
      _Layers(carry.params, sampled.slots, carry.sums),
    )
    return carry._replace(params=found.params, sums=found.sums), found.slots

  def _no_gradients(self, params: Any) -> dict[Path, jax.Array]:
    """Room for the gradients of the drawn layers."""
    decode = self.passes.parameters.decode
    layer = decode(Cut(0, self.sampling.num_layers).at(params[LAYERS]))
    flat = traverse_util.flatten_dict({LAYERS: layer})
    return {
      path: jnp.zeros((self.sampling.layers, *x.shape), x.dtype)
      for path, x in flat.items()
    }

  def _backward(
    self, carry: _Gathered, ready: _Gradients
  ) -> tuple[_Gathered, jax.Array]:
    """Adds up squares of gradients, and gathers them where there is room."""
    layers_S = ready.drawn.layers_S

    def visit(
      layer: jax.Array, grads: dict[Path, Any], carry: _Gathered
    ) -> _Gathered:
      found = carry.grads
      if found:
        place = jnp.searchsorted(layers_S, layer)
        found = layer_sampling.put_slot(found, place, grads)
      return carry._replace(grads=found, squares=carry.squares + squares(grads))

    return self.passes.backward(
      *(visit, carry, ready.kept, ready.head.dx_KBTD),
      *(ready.divisor, ready.drawn),
    )

  def _clipped(
    self,
    ready: _Gradients,
    of_layers: jax.Array,
    dx_KBTD: jax.Array,
    params: Any,
  ) -> _Gradients:
    """What clips, from the squares of the layers' gradients."""
    grads = ready.head.grads | embed_grads(
      self.passes, params, ready.kept, ready.head, dx_KBTD
    )
    norm = jnp.sqrt(of_layers + squares(divide(grads, ready.divisor, grads)))
    factor = clip_factor(norm, self.clip)
    return ready._replace(factor=factor, finite=jnp.isfinite(norm))

  def _move_layer(
    self,
    step: jax.Array,
    ready: _Gradients,
    layer: jax.Array,
    grads: dict[Path, Any],
    found: _Layers,
  ) -> _Layers:
    """Moves a layer, with the optimizer's state in its slot."""
    slot, slices = ready.slot_L[layer], self.layers.slices
    opt = layer_sampling.take_slot(found.slots, slot)
    move = Move(self.layers, step, ready.divisor, ready.factor)
    carry = Carry(found.params, opt, slices.shared(opt, opt), found.sums)
    carry = move.layer(layer, grads, carry, WHOLE)
    opt = slices.put_shared(carry.opt, carry.shared, carry.sums.finite)
    slots = layer_sampling.put_slot(found.slots, slot, opt)
    return _Layers(carry.params, slots, carry.sums)
