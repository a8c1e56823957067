"""Steps after which, now and then, adapters start again beside moved kernels.

A restart changes weights that no step trains: it folds adapters into them. So
these stand in the training state, `TrainState.params`, with what trains. The
step itself is the one that there always is: it is shown the two apart, forms no
gradient of the weights that it does not train, and never knows.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.training.layerwise.slices import (
  Cut,
  Path,
  leaf_at,
  replace_leaf,
)
from gnlorp_jax.training.parameters import LAYERS, Parameters, Tree
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Metrics

# Random numbers of restarts are none of those that a run begins with.
_KEY = zlib.crc32(b'restarts')


class Restarts(NamedTuple):
  """When adapters restart, and what that does.

  Attributes:
    every: Updates between two restarts, at least 1.
    steps: Updates of the whole run; there is no restart after the last.
    parameters: What trains, and what only restarts change (`frozen`).
    layers: Paths of the dicts that hold a kernel and its adapter.
    restart: ``restart(layer, key)``: such a dict, its arrays decoded, after a
      restart. Arrays below ``layers`` keep a first axis of length 1.
    prune: ``prune(opt_state, key)``: the optimizer's state after a restart.
    seed: Decides what is drawn.
  """

  every: int
  steps: int
  parameters: Parameters
  layers: tuple[Path, ...]
  restart: Callable[[Tree, jax.Array], Tree]
  prune: Callable[[Any, jax.Array], Any]
  seed: int

  @property
  def held(self) -> Parameters:
    """The weights as a run with restarts holds them: all in the state.

    Of `trained` and `frozen` the first is still what the optimizer moves, and
    the second is empty; `start` returns what the state holds, and nothing.
    """
    return self.parameters._replace(
      frozen={},
      start=lambda key: (self.join(*self.parameters.start(key)), {}),
      start_frozen=lambda key: {},
    )

  @property
  def params(self) -> Tree:
    """Shapes of all weights in the state, as stored."""
    return self.join(self.parameters.trained, self.parameters.frozen)

  def join(self, trained: Tree, base: Tree) -> Tree:
    """What the state holds."""
    return self.parameters.join(trained, base)

  def split(self, params: Tree) -> tuple[Tree, Tree]:
    """What trains, and what only restarts change."""
    trains = traverse_util.flatten_dict(self.parameters.trained).keys()
    parts: tuple[Tree, Tree] = ({}, {})
    for path, leaf in traverse_util.flatten_dict(params).items():
      parts[path not in trains][path] = leaf
    trained, base = map(traverse_util.unflatten_dict, parts)
    return trained, base

  def taken(self, state: TrainState) -> jax.Array:
    """Updates so far, int32; steps that were left out do not count."""
    return state.step - state.skipped

  def count(self, state: TrainState) -> jax.Array:
    """Restarts so far, int32."""
    last = (self.steps - 1) // self.every
    return jnp.minimum(self.taken(state) // self.every, last)


def with_restarts(
  ordinary: Callable[..., tuple[TrainState, Metrics]], restarts: Restarts
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Makes a step after which adapters restart when it is time.

  That is after the update of number n, counted from 1, where n is a multiple of
  `Restarts.every` and not the last. Kernels are folded one after the other,
  layer by layer and in their place; nothing is compiled anew.

  Args:
    ordinary: A training step ``(state, batch, frozen, ...) -> (state,
      metrics)`` over what trains, whole or layer by layer.
    restarts: The restarts.

  Returns:
    A function of the same arguments, whose `frozen` is empty, over a state
    whose `params` are all weights; its `opt_state` is that of what trains. The
    metrics have ``restarts`` as well, the number of them so far, int32.

  References:
    Lialin et al., `ReLoRA`, 2023, arXiv:2307.05695, algorithm 1.

  Note:
    The public code restarts one update later, after one whose learning rate is
    0. Here the update that follows a restart is the first of a cycle of the
    learning rate, whose first rate is not 0. Both count updates, not batches: a
    step that was left out delays restart and learning rate alike.
  """

  def step(
    state: TrainState, batch: Any, frozen: Any = None, *more: Any
  ) -> tuple[TrainState, Metrics]:
    del frozen
    trained, base = restarts.split(state.params)
    new, metrics = ordinary(state._replace(params=trained), batch, base, *more)
    number = restarts.taken(new)
    is_due = (
      (new.skipped == state.skipped)
      & (number % restarts.every == 0)
      & (number < restarts.steps)
    )
    params = restarts.join(new.params, base)
    key = jax.random.fold_in(jax.random.key(restarts.seed), _KEY)
    key = jax.random.fold_in(key, number)
    # Runs of one program differ in their seeds, which the program does not
    # know: a factor that each of them drew does.
    factor = leaf_at(state.params, restarts.layers[0])['lora_a']
    word = factor.reshape(-1)[0].astype(jnp.float32)
    key = jax.random.fold_in(
      key, jax.lax.bitcast_convert_type(word, jnp.uint32)
    )
    for path in restarts.layers:
      layer = _restart_stack(
        restarts, path, leaf_at(params, path), number, key, is_due
      )
      params = replace_leaf(params, path, layer)
    opt_state = jax.lax.cond(
      is_due,
      lambda opt_state: restarts.prune(opt_state, key),
      lambda opt_state: opt_state,
      new.opt_state,
    )
    new = new._replace(params=params, opt_state=opt_state)
    return new, metrics | {'restarts': restarts.count(new)}

  return step


def _restart_stack(
  restarts: Restarts,
  path: Path,
  stored: Tree,
  number: jax.Array,
  key: jax.Array,
  is_due: jax.Array,
) -> Tree:
  """A stack of layers after a restart, if it is due."""
  parameters = restarts.parameters
  count = 1
  if path[0] == LAYERS:
    count = jax.tree.leaves(stored)[0].shape[0]
  key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))

  def body(index: jax.Array, stored: Tree) -> Tree:
    cut = Cut(index, count)
    old = cut.at(stored)
    exact = parameters.decode_exact(old)
    new = restarts.restart(exact, jax.random.fold_in(key, index))
    wrapped = (
      traverse_util.unflatten_dict({path: tree}) for tree in (new, old)
    )
    kept = leaf_at(parameters.store(*wrapped, number, index), path)
    return cut.put(stored, kept)

  # A loop without a turn where none is due: what a loop carries stays in its
  # place, which the branches of a condition would copy.
  return jax.lax.fori_loop(0, jnp.where(is_due, count, 0), body, stored)
