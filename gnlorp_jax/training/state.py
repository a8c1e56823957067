"""What a training run carries from one step to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gnlorp_jax.training import sharding


class TrainState(NamedTuple):
  """Everything a step reads and replaces."""

  step: jax.Array  # int32 scalar: the number of batches seen.
  skipped: jax.Array  # int32 scalar: how many of them changed nothing.
  params: Any  # What trains, as stored; with restarts, all weights.
  opt_state: Any  # What the optimizer's `init` returned.


def abstract(
  init_fn: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  key: jax.Array,
  mesh: Mesh,
  rules: sharding.Rules = sharding.DEFAULT_RULES,
) -> TrainState:
  """Shapes, dtypes and shardings of a state, without making any array.

  Args:
    init_fn: Makes the parameters from a key.
    tx: The optimizer.
    key: A PRNG key.
    mesh: The mesh to place the state on.
    rules: Sharding rules over paths such as ``'params/block/kernel'`` and
      ``'opt_state/0/mu/block/kernel'``.

  Returns:
    A `TrainState` of `jax.ShapeDtypeStruct`, as `Checkpointer.restore_latest`
    takes it.
  """
  shapes = jax.eval_shape(_initialiser(init_fn, tx), key)
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
    shapes,
    sharding.infer_shardings(shapes, mesh, rules),
  )


def create(
  init_fn: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  key: jax.Array,
  mesh: Mesh,
  rules: sharding.Rules = sharding.DEFAULT_RULES,
) -> TrainState:
  """Initialises parameters and optimizer state directly in their shardings.

  One compiled function makes both, so that no device ever holds an array that
  the rules split. The arguments are those of `abstract`.

  Returns:
    The state at step 0.
  """
  target = abstract(init_fn, tx, key, mesh, rules)
  initialise = jax.jit(
    _initialiser(init_fn, tx), out_shardings=shardings(target)
  )
  return initialise(key)


def from_params(
  params: Any,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  rules: sharding.Rules = sharding.DEFAULT_RULES,
) -> TrainState:
  """Starts from given parameters, such as pre-trained ones.

  Args:
    params: Pytree of NumPy or JAX arrays. They are copied, so that the caller's
      stay valid when a training step donates the state.
    tx: The optimizer.
    mesh: The mesh to place the state on.
    rules: As in `abstract`.

  Returns:
    The state at step 0.
  """
  start = _initialiser(lambda params: params, tx)
  target = sharding.infer_shardings(jax.eval_shape(start, params), mesh, rules)

  def place(x: Any, place_of: jax.sharding.Sharding) -> jax.Array:
    if isinstance(x, jax.Array):
      # Of an array that goes to several devices `device_put` hands on the
      # buffer of one of them, whatever `may_alias` says.
      return jax.device_put(jnp.copy(x), place_of)
    return jax.device_put(x, place_of, may_alias=False)

  params = jax.tree.map(place, params, target.params)
  opt_state = jax.jit(tx.init, out_shardings=target.opt_state)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), target.step)
  skipped = jax.device_put(jnp.zeros((), jnp.int32), target.skipped)
  return TrainState(step, skipped, params, opt_state)


def shardings(state: Any) -> Any:
  """The sharding of every leaf of a state or another tree, abstract or real."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def _initialiser(init_fn, tx):
  def init(key):
    params = init_fn(key)
    return TrainState(
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.int32),
      params,
      tx.init(params),
    )

  return init
