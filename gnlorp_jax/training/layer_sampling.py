"""Which layers a step trains, and an optimizer's state of those alone.

Every `every` steps, a *period*, some layers are drawn. Until the next draw they
train, and beside them what is always on: whatever of the embedding, the final
norm and the head trains at all. A layer that trains occupies a *slot*, which
holds its part of the optimizer's state; there are as many slots as layers are
drawn, so that states of all others take no memory of the devices.

Shape suffixes in this file:
  L     layers
  S     slots
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

# Draws have random numbers that nothing else is drawn from.
_KEY = zlib.crc32(b'layers')
OnLeave = Literal['drop', 'keep', 'offload']
Draw = Literal['weighted', 'shuffled']


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSampling:
  """How layers are drawn, and what becomes of their states."""

  num_layers: int
  """L, layers of the model."""
  layers: int
  """Layers that train at a time, in [1, L]."""
  every: int
  """Steps of a period, at least 1."""
  draw: Draw = 'weighted'
  """``weighted``: each period draws anew, without replacement, by `weights`.
  ``shuffled``: the layers take turns, in an order that is drawn anew whenever
  all had theirs; `layers` must divide L."""
  weights: tuple[float, ...] | None = None
  """How likely layers are, in proportion, [L], each at least 0; None: all are
  equally likely."""
  on_leave: OnLeave = 'drop'
  """What becomes of the state of a layer that leaves: ``drop`` forgets it, so
  that the layer begins afresh when it comes back; ``keep`` holds the states of
  all L layers, as published code does, and saves no memory of states;
  ``offload`` takes the steps of ``keep``, and states of layers that rest are in
  the memory of the host."""
  carry: bool = True
  """Whether, with ``drop``, a layer that is drawn twice in a row keeps its
  state."""
  reset_always: bool = False
  """Whether what is always on begins afresh with every period too."""
  warmup_steps: int = 0
  """Steps at the start of a period over which the learning rate of the drawn
  layers rises from zero, less than `every`; 0: it does not."""
  first_period_short: bool = False
  """Whether the first period is a step shorter, as in BAdam's code."""

  def __post_init__(self):
    for name, choices in (('draw', Draw), ('on_leave', OnLeave)):
      value = getattr(self, name)
      if value not in get_args(choices):
        raise ValueError(
          f'{name}={value!r} must be one of {get_args(choices)}.'
        )
    if not 1 <= self.layers <= self.num_layers:
      raise ValueError(
        f'layers={self.layers} cannot be drawn of {self.num_layers}: give a '
        f'number from 1 to {self.num_layers}.'
      )
    if self.every < 1 + self.first_period_short:
      raise ValueError(
        f'every={self.every} is the number of steps of a period: give at least '
        f'{1 + self.first_period_short}.'
      )
    if not 0 <= self.warmup_steps < self.every:
      raise ValueError(
        f'warmup_steps={self.warmup_steps} must be shorter than a period, '
        f'every={self.every}, and not negative.'
      )
    if self.draw == 'shuffled' and self.num_layers % self.layers:
      raise ValueError(
        f'layers={self.layers} does not divide {self.num_layers} layers, which '
        "take turns with draw='shuffled'. Use a divisor, or draw otherwise."
      )
    if self.weights is not None:
      self._check_weights(self.weights)

  def _check_weights(self, weights: tuple[float, ...]) -> None:
    if self.draw == 'shuffled':
      raise ValueError(
        "weights have no effect with draw='shuffled', where every layer has "
        "its turn. Leave them out, or use 'weighted'."
      )
    if len(weights) != self.num_layers:
      raise ValueError(
        f'{len(weights)} weights do not fit {self.num_layers} layers: give one '
        'for each.'
      )
    if not all(0 <= w < float('inf') for w in weights):
      raise ValueError(f'weights={weights} must be finite and not negative.')
    if (drawable := sum(w > 0 for w in weights)) < self.layers:
      raise ValueError(
        f'layers={self.layers} are to be drawn, and {drawable} have a weight '
        '(a score) above 0. Draw fewer, or raise some weights.'
      )

  @property
  def num_slots(self) -> int:
    """S, of how many layers there is a state."""
    return self.num_layers if self.on_leave == 'keep' else self.layers

  def period(self, step: jax.Array) -> jax.Array:
    """The period, from 0, of the step that comes after `step` others."""
    return (step + self.first_period_short) // self.every

  def step_in_period(self, step: jax.Array) -> jax.Array:
    """How many steps of its period were before the step after `step` others."""
    shifted = step + self.first_period_short
    is_first = shifted < self.every
    return shifted % self.every - jnp.where(
      is_first, self.first_period_short, 0
    )


class SampledState(NamedTuple):
  """The state of an optimizer that trains some layers at a time."""

  hyperparams: dict[str, jax.Array]  # float32 [], what decides learning rates.
  key: jax.Array  # uint32 [2], data of the random key that draws layers.
  layers: jax.Array  # int32 [S], the layer in each slot; -1 before the first.
  slots: Any  # Of each slot, the optimizer's state of a layer: leaves [S, ...].
  always: Any  # The optimizer's state of what is always on.
  visits: jax.Array  # int32 [L], steps in which each layer was trained.
  rests: jax.Array  # int32 [L], steps since the last of these, or the start.
  # With ``offload`` the states of all layers, in the memory of the host; those
  # of the layers in slots are out of date. Leaves [L, ...].
  resting: Any = None


def on_devices(opt_state: Any) -> Any:
  """An optimizer's state without what the memory of the host holds of it."""
  if isinstance(opt_state, SampledState):
    return opt_state._replace(resting=None)
  return opt_state


def draw(
  sampling: LayerSampling, key: jax.Array, period: jax.Array | int
) -> jax.Array:
  """The layers of a period.

  Args:
    sampling: How they are drawn.
    key: The random key of the run.
    period: The period's number, from 0; layers follow from these two alone.

  Returns:
    int32 ``[layers]``, distinct, in ascending order.

  Note:
    Weighted draws take the largest of the logarithms of the weights plus
    independent Gumbel noise, which is drawing one after the other without
    replacement (Vieira, 2014).
  """
  num_layers, count = sampling.num_layers, sampling.layers
  key = jax.random.fold_in(key, _KEY)
  if sampling.draw == 'shuffled':
    per_round = num_layers // count
    order_L = jax.random.permutation(
      jax.random.fold_in(key, period // per_round), num_layers
    )
    first = period % per_round * count
    found = jax.lax.dynamic_slice_in_dim(order_L, first, count)
  else:
    weights_L = jnp.array(sampling.weights or (1.0,) * num_layers, jnp.float32)
    noise_L = jax.random.gumbel(jax.random.fold_in(key, period), (num_layers,))
    found = jax.lax.top_k(jnp.log(weights_L) + noise_L, count)[1]
  return jnp.sort(found).astype(jnp.int32)


def seat(
  layers_S: jax.Array, drawn_S: jax.Array, num_layers: int
) -> tuple[jax.Array, jax.Array]:
  """Gives the drawn layers slots; those that stay keep theirs.

  Args:
    layers_S: int32 ``[S]``, the layer in each slot so far, or -1.
    drawn_S: int32 ``[S]``, the layers to be there, distinct.
    num_layers: L.

  Returns:
    The layers by slot, and whether each slot's is the one that was there.
  """
  none_L = jnp.zeros(num_layers, bool)
  is_drawn_L = none_L.at[drawn_S].set(True)
  # Out of bounds is nowhere; a negative index would count from the end.
  seated_S = jnp.where(layers_S < 0, num_layers, layers_S)
  was_there_L = none_L.at[seated_S].set(True, mode='drop')
  stays_S = (layers_S >= 0) & is_drawn_L[layers_S]
  count = len(layers_S)
  (enters_S,) = jnp.nonzero(is_drawn_L & ~was_there_L, size=count)
  rank_S = jnp.cumsum(~stays_S) - 1
  entering_S = enters_S[jnp.clip(rank_S, 0)].astype(jnp.int32)
  return jnp.where(stays_S, layers_S, entering_S), stays_S


def slot_of_layer(layers_S: jax.Array, num_layers: int) -> jax.Array:
  """Of each layer its slot, or -1: int32 ``[L]``."""
  slots_S = jnp.arange(len(layers_S), dtype=jnp.int32)
  return jnp.full(num_layers, -1, jnp.int32).at[layers_S].set(slots_S)


def reseed(state: Any, layer: jax.Array | int, step: jax.Array | int) -> Any:
  """An optimizer's state that draws other random numbers.

  A layer's state begins alike whichever layer it is and whenever it comes: by
  itself it would draw the same subspaces and round the same elements up.

  Args:
    state: The state, whose arrays of uint32 are seeds and random keys.
    layer: The number of the layer.
    step: Steps of the run so far.
  """

  def mix(x: jax.Array) -> jax.Array:
    if x.dtype != jnp.uint32:
      return x
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), layer), step)
    return x ^ jax.random.bits(key, x.shape, jnp.uint32)

  return jax.tree.map(mix, state)


def take_slot(slots: Any, slot: jax.Array) -> Any:
  """The state in a slot, without the axis of slots."""
  return jax.tree.map(
    lambda x_S: jax.lax.dynamic_index_in_dim(x_S, slot, keepdims=False), slots
  )


def put_slot(slots: Any, slot: jax.Array, new: Any) -> Any:
  """The slots with another state in one of them."""
  # Leaf by leaf: quantised arrays of a slot are of another type.
  leaves, treedef = jax.tree.flatten(slots)
  return treedef.unflatten(
    jax.lax.dynamic_update_index_in_dim(x_S, x, slot, 0)
    for x_S, x in zip(leaves, jax.tree.leaves(new), strict=True)
  )


def start(
  sampling: LayerSampling,
  init_layer: Callable[[jax.Array | int], Any],
  always: Any,
  numbers: dict[str, jax.Array],
  key: jax.Array,
) -> SampledState:
  """The state before the first step.

  Args:
    sampling: How layers are drawn.
    init_layer: Maps the number of a layer to the optimizer's state of it.
    always: The optimizer's state of what is always on.
    numbers: What decides learning rates.
    key: The random key of the run.
  """
  num_layers = sampling.num_layers
  layers_L = jnp.arange(num_layers, dtype=jnp.int32)
  resting = None
  if sampling.on_leave == 'offload':
    resting = jax.lax.map(lambda layer: _to_host(init_layer(layer)), layers_L)
  if sampling.on_leave == 'keep':
    slots = jax.lax.map(init_layer, layers_L)
  else:  # The first step begins a period, and fills them.
    slots = jax.tree.map(
      lambda x: jnp.zeros((sampling.num_slots, *x.shape), x.dtype),
      jax.eval_shape(init_layer, 0),
    )
  return SampledState(
    hyperparams=numbers,
    key=jax.random.key_data(key),
    layers=jnp.full(sampling.layers, -1, jnp.int32),
    slots=slots,
    always=always,
    visits=jnp.zeros(num_layers, jnp.int32),
    rests=jnp.zeros(num_layers, jnp.int32),
    resting=resting,
  )


def begin_step(
  sampling: LayerSampling,
  state: SampledState,
  step: jax.Array,
  init_layer: Callable[[jax.Array | int], Any],
  init_always: Callable[[], Any],
) -> SampledState:
  """Draws layers and makes room for their states, if a period begins.

  Args:
    sampling: How layers are drawn.
    state: The state before.
    step: Steps before this one.
    init_layer: As in `start`, of the weights as they are now.
    init_always: Makes the state of what is always on anew.
  """
  begins = sampling.step_in_period(step) == 0
  key = jax.random.wrap_key_data(state.key)
  drawn_S = draw(sampling, key, sampling.period(step))
  if sampling.reset_always:
    always = jax.lax.cond(begins, init_always, lambda: state.always)
    state = state._replace(always=always)
  if sampling.on_leave == 'keep':
    layers_S = jnp.where(begins, drawn_S, state.layers)
    return state._replace(layers=layers_S)
  drawn_S, stays_S = seat(state.layers, drawn_S, sampling.num_layers)
  layers_S = jnp.where(begins, drawn_S, state.layers)
  is_offloaded = sampling.on_leave == 'offload'
  is_kept_S = stays_S & (sampling.carry or is_offloaded)
  # Stable: the slots to be filled come first.
  slots_S = jnp.argsort(is_kept_S)

  def fill(place: jax.Array, found: tuple[Any, Any]) -> tuple[Any, Any]:
    slots, resting = found
    slot = slots_S[place]
    leaves, enters = state.layers[slot], layers_S[slot]
    if not is_offloaded:
      return put_slot(slots, slot, init_layer(enters)), resting
    entering = _to_device(take_slot(resting, enters))
    # A slot that was empty so far puts back what it takes.
    was_empty = leaves < 0
    leaving = jax.tree.map(
      lambda new, old: jnp.where(was_empty, new, old),
      *(entering, take_slot(slots, slot)),
    )
    place_of = jnp.where(was_empty, enters, leaves)
    resting = put_slot(resting, place_of, _to_host(leaving))
    return put_slot(slots, slot, entering), resting

  # A loop without a turn where no period begins: what a loop carries stays in
  # its place, which the branches of a condition would copy.
  count = jnp.where(begins, jnp.sum(~is_kept_S), 0)
  slots, resting = jax.lax.fori_loop(
    0, count, fill, (state.slots, state.resting)
  )
  return state._replace(layers=layers_S, slots=slots, resting=resting)


def _to_host(state: Any) -> Any:
  return jax.device_put(state, jax.memory.Space.Host)


def _to_device(state: Any) -> Any:
  return jax.device_put(state, jax.memory.Space.Device)


def count_step(state: SampledState) -> SampledState:
  """The state after a step in which its layers were trained."""
  return state._replace(
    visits=state.visits.at[state.layers].add(1),
    rests=(state.rests + 1).at[state.layers].set(0),
  )


def metrics(state: SampledState) -> dict[str, jax.Array]:
  """What was trained when, as numbers by name.

  Args:
    state: The state after a step.

  Returns:
    The layer in each slot, the steps in which each layer was trained, and the
    steps since the last of them, or since the start.
  """
  found = {
    f'layers/in_slot/{slot:02d}': layer
    for slot, layer in enumerate(state.layers)
  }
  for layer in range(len(state.visits)):
    found[f'layers/visits/{layer:02d}'] = state.visits[layer]
    found[f'layers/rests/{layer:02d}'] = state.rests[layer]
  return found
