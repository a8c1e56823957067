"""How a run steps: its optimizer, how its state begins, and its training step.

Whole steps, layer by layer, some layers at a time, and adapters that restart
are values of one `Stepping`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.settings import (
  LayerSamplingOptions,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.training import layerwise, state, step
from gnlorp_jax.training.layer_sampling import LayerSampling, SampledState
from gnlorp_jax.training.objectives import Objective
from gnlorp_jax.training.parameters import Parameters
from gnlorp_jax.training.restarts import Restarts, with_restarts

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Optimizers that make of a row what depends on the other rows, of parameters
# outside of the blocks too.
_OF_WHOLE_MATRICES = ('galore_adafactor', 'muon', 'scale', 'sinkgd')


class Stepping(NamedTuple):
  """What steps a run takes; nothing is compiled.

  Attributes:
    init_optimizer: (params, numbers, random key) -> the optimizer's state, of
      the params in the training state.
    abstract_state: Shapes and shardings of the training state.
    train_step: (state, batch, frozen) -> (state, metrics).
  """

  init_optimizer: Callable[[Any, dict[str, jax.Array], jax.Array], Any]
  abstract_state: state.TrainState
  train_step: Callable[..., Any]


def make_optimizer(
  config: OptimConfig,
  steps: int,
  rules: optimizer.LabelRules,
  sampling: LayerSamplingOptions,
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run.

  Args:
    config: Its settings.
    steps: Number of steps of a run, as in `optimizer.make`.
    rules: Pairs (regex, label) over the paths of what trains.
    sampling: Whether some layers train at a time: their learning rate does not
      depend on when they were drawn.

  Raises:
    ValueError: If an option is not allowed.
  """
  if not sampling.is_on:
    return optimizer.make(config, steps, rules)
  outer_bits = 8 if sampling.always_on_state == 'int8' else None
  return optimizer.make_at_rate(config, rules, outer_bits)


def make(
  objective: Objective,
  tx: optax.GradientTransformation,
  held: Parameters,
  mesh: Mesh,
  optim_config: OptimConfig,
  step_config: StepConfig,
  micro_batches: int,
  steps: int,
  sampling: LayerSampling | None,
  restarts: Restarts | None,
) -> Stepping:
  """Puts together what steps a run takes.

  Args:
    objective: What is minimised.
    tx: The optimizer, of `make_optimizer`.
    held: The weights as an ordinary step holds them.
    mesh: The devices.
    optim_config: The optimizer's settings.
    step_config: How steps go through the model.
    micro_batches: Pieces of a batch.
    steps: Number of steps of a run.
    sampling: How layers are drawn; None trains all.
    restarts: When adapters restart, if they do.

  Raises:
    ValueError: If parts do not fit each other.
  """

  def init(params: Any, numbers: dict[str, jax.Array], key: jax.Array) -> Any:
    trained = params if restarts is None else restarts.split(params)[0]
    if sampling is not None:
      return layerwise.init_sampled(tx, held, sampling, trained, numbers, key)
    return optimizer.start(tx.init(held.decode_exact(trained)), numbers)

  key = jax.random.key(0)
  # Where rates are searched, each run puts its own into the state.
  numbers = optimizer.numbers(
    dataclasses.replace(optim_config, learning_rate=1.0), steps
  )
  shapes = held.trained if restarts is None else restarts.params
  abstract = state.abstract(
    lambda key: _zeros(shapes),
    optax.GradientTransformation(
      lambda params: init(params, numbers, key), tx.update
    ),
    key,
    mesh,
  )
  if sampling is not None and sampling.on_leave == 'offload':
    abstract = abstract._replace(opt_state=_rest_on_host(abstract.opt_state))
  options: dict[str, Any] = {
    'num_micro_batches': micro_batches,
    'clip_global_norm': optim_config.clip_global_norm,
  }
  if step_config.mode == 'layerwise' or sampling is not None:
    # Split matrices are cut already.
    is_by_rows = optim_config.name not in _OF_WHOLE_MATRICES
    options['row_blocks'] = is_by_rows and mesh.shape['fsdp'] == 1
    options['offload'] = step_config.offload
  if sampling is not None:
    train_step = layerwise.make_sampled_step(
      *(objective.pieces, tx, held, sampling),
      optimizer.rate(optim_config, steps),
      at_once=step_config.mode == 'layerwise',
      **options,
    )
  elif step_config.mode == 'layerwise':
    train_step = layerwise.make_train_step(
      *(objective.pieces, tx, held),
      clipping=step_config.clipping,
      accumulate=step_config.accumulate,
      mesh=mesh,
      **options,
    )
  else:
    train_step = step.make_train_step(
      lambda trained, batch, frozen: objective.loss(
        held.join(trained, frozen), batch
      ),
      tx,
      **options,
    )
  if restarts is not None:
    train_step = with_restarts(train_step, restarts)
  return Stepping(init, abstract, train_step)


def _rest_on_host(opt_state: SampledState) -> SampledState:
  """The shapes and shardings of a state whose resting layers the host holds."""
  resting = jax.tree.map(
    lambda leaf: leaf.update(
      sharding=leaf.sharding.with_memory_kind('pinned_host')
    ),
    opt_state.resting,
  )
  return opt_state._replace(resting=resting)


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
