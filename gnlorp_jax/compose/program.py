"""What a run computes: its compiled steps, and how its state begins."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax import models, optim
from gnlorp_jax.compose import (
  adaptation,
  layer_sampling,
  optimizer,
  parameters,
  restarts,
  stepping,
)
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  LayerSamplingOptions,
  MeshConfig,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import adapters, layers
from gnlorp_jax.models.interface import Model
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.training import forward, sharding, state, step
from gnlorp_jax.training.hardware import PEAK_FLOPS
from gnlorp_jax.training.layer_sampling import (
  LayerSampling,
  SampledState,
  on_devices,
)
from gnlorp_jax.training.layer_sampling import metrics as sampling_metrics
from gnlorp_jax.training.monitor import Instruments
from gnlorp_jax.training.objectives import Objective
from gnlorp_jax.training.parameters import LAYERS, Parameters, outer
from gnlorp_jax.training.restarts import Restarts

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Program(NamedTuple):
  """What a run computes, before there is data or any array.

  Attributes:
    mesh: The devices.
    model: The model; its functions take parameters as they are stored, frozen
      and trained ones joined.
    objective: What is minimised and evaluated.
    parameters: How the weights are held.
    adapter: The configuration of the adapters among them, if there are any.
    tx: The optimizer of what trains.
    rules: The label rules it was built with.
    sampling: How layers are drawn; None trains all.
    restarts: When adapters restart, if they do. Then the state holds all
      weights, and there are none beside it.
    abstract_state: Shapes and shardings of the training state.
    init_optimizer: Compiled: (params, numbers, random key) -> the optimizer's
      state; the params are those of the state, also below.
    train_step: Compiled: (state, batch, frozen) -> (state, metrics).
    eval_step: Compiled: (params, batch, frozen) -> `Objective.evaluate`.
    stats: Compiled: the optimizer's state -> scalars by name.
  """

  mesh: Mesh
  model: Model
  objective: Objective
  parameters: Parameters
  adapter: adapters.AdapterConfig | None
  tx: optax.GradientTransformation
  rules: optimizer.LabelRules
  sampling: LayerSampling | None
  restarts: Restarts | None
  abstract_state: state.TrainState
  init_optimizer: Callable[[Any, dict[str, jax.Array], jax.Array], Any]
  train_step: Callable[..., tuple[state.TrainState, dict[str, jax.Array]]]
  eval_step: Callable[[Any, Any, Any], Any]
  stats: Callable[[Any], dict[str, jax.Array]]

  def start(
    self, key: jax.Array, numbers: dict[str, jax.Array]
  ) -> tuple[state.TrainState, Any]:
    """The state at step 0 and the frozen weights, in their shardings.

    Args:
      key: Draws the weights that are not read from a folder.
      numbers: What decides the learning rates, from `optimizer.numbers`.
    """
    params, frozen = self.parameters.start(key)
    opt_state = self.init_optimizer(params, numbers, key)
    zero, skipped = (
      jax.device_put(
        jnp.zeros((), jnp.int32), self.abstract_state.step.sharding
      )
      for _ in range(2)
    )
    return state.TrainState(zero, skipped, params, opt_state), frozen

  def renew(
    self, state: state.TrainState, numbers: dict[str, jax.Array]
  ) -> state.TrainState:
    """A state that was read, with other learning rates.

    Args:
      state: The state of a checkpoint.
      numbers: As of `start`.
    """
    abstract = self.abstract_state.opt_state.hyperparams
    numbers = jax.device_put(
      numbers, jax.tree.map(lambda leaf: leaf.sharding, abstract)
    )
    return state._replace(opt_state=optimizer.start(state.opt_state, numbers))

  @property
  def state_bytes(self) -> int:
    """Bytes of the optimizer's state on the devices."""
    return optim.inspect.tree_bytes(on_devices(self.abstract_state.opt_state))

  @property
  def fixed(self) -> dict[str, Any]:
    """What cannot change in a run that resumes, beside its settings."""
    if self.sampling is None or self.sampling.weights is None:
      return {}
    return {'scores of layers': list(self.sampling.weights)}

  def apply(self, trained: Any, frozen: Any, tokens_BT: jax.Array) -> jax.Array:
    """The model's outputs for parameters as a run holds them."""
    return self.model.apply(self.parameters.join(trained, frozen), tokens_BT)

  def instruments(
    self,
    config: OptimConfig,
    steps: int,
    *,
    tokens_per_step: int | None = None,
    flops_per_token: float | None = None,
  ) -> Instruments:
    """What rows of metrics say of a run of this program."""
    peak = PEAK_FLOPS.get(jax.local_devices()[0].device_kind)
    return Instruments(
      schedule=optimizer.schedule(config, steps),
      stats=self.stats,
      state_bytes=self.state_bytes,
      tokens_per_step=tokens_per_step,
      flops_per_token=flops_per_token,
      peak_flops=None if peak is None else peak * self.mesh.size,
    )


def make_mesh(
  config: MeshConfig,
  batch_size: int,
  micro_batches: int,
  devices: Sequence[jax.Device] | int | None = None,
) -> Mesh:
  """The devices as a mesh that a batch can be split over.

  Args:
    config: How they are arranged.
    batch_size: Sequences per step.
    micro_batches: Pieces of a batch.
    devices: Those to use, real or described; None means all, of every process.
      A number is enough for shapes and shardings.

  Raises:
    ValueError: If sizes do not fit each other or the devices.
  """
  mesh = sharding.make_mesh(config.data, config.fsdp, devices=devices)
  if devices is None:
    sharding.process_share(mesh)
  sharding.check_batch(batch_size, micro_batches, mesh)
  return mesh


def first_device(mesh: Mesh) -> jax.Device | None:
  """A device of the mesh, if there are any."""
  if isinstance(mesh, jax.sharding.AbstractMesh):
    return None
  return mesh.devices.flat[0]


def build(
  make: Callable[[Any], Model],
  architecture: models.Config,
  make_objective: Callable[[Model], Objective],
  mesh: Mesh,
  *,
  optim_config: OptimConfig,
  adapter: AdapterOptions,
  step_config: StepConfig,
  model_rules: optimizer.LabelRules,
  sampling_options: LayerSamplingOptions,
  steps: int,
  micro_batches: int,
  beside_adapters: tuple[str, ...] = (),
  read: Callable[..., Any] | None = None,
  seed: int = 0,
) -> Program:
  """Puts together what a run computes; compiles nothing yet.

  Args:
    make: Makes the model of an architecture.
    architecture: The architecture.
    make_objective: Makes the objective of a model, whose functions take
      parameters as they are stored.
    mesh: The devices.
    optim_config: The optimizer.
    adapter: Low-rank changes beside frozen kernels, if any.
    step_config: How steps go through the model, and the bits of its kernels.
    model_rules: The label rules of the model's own weights.
    sampling_options: Whether some layers train at a time, and which.
    steps: Number of steps of a run, as in `optimizer.make`.
    micro_batches: Pieces of a batch.
    beside_adapters: As in `parameters.plan`, as are the others.
    read: Reads the weights to start from; None draws them.
    seed: Decides how weights in 8 bits are rounded.

  Returns:
    The program.

  Raises:
    ValueError: If parts do not fit each other.
  """
  adapter_config = adaptation.adapter_config(adapter, architecture)
  if adapter_config is not None:
    optim_config = optimizer.for_adapters(optim_config)
  sampling = layer_sampling.resolve(sampling_options, architecture.num_layers)
  restarts.check(adapter, step_config, steps, is_sampled=sampling is not None)
  beside_adapters += restarts.others(
    make, architecture, adapter, adapter_config
  )
  held, rules = parameters.plan(
    make,
    architecture,
    mesh=mesh,
    adapter=adapter_config,
    step=step_config,
    rules=_label_rules(
      *(make(architecture), optim_config, model_rules),
      *(adapter, beside_adapters, sampling_options),
    ),
    beside_adapters=beside_adapters,
    read=read,
    adapter_from=adapter.init_from,
    seed=seed,
  )
  layer_sampling.check_run(
    sampling_options, sampling, held.trained, steps, adapter
  )
  model = _make_model(make, architecture, adapter_config, held)
  objective = make_objective(model)
  tx = stepping.make_optimizer(optim_config, steps, rules, sampling_options)
  restarting = restarts.plan(
    adapter, adapter_config, held, tx, optim_config, steps, seed
  )
  made = stepping.make(
    *(objective, tx, held, mesh, optim_config, step_config),
    *(micro_batches, steps, sampling, restarting),
  )
  if restarting is not None:
    held = restarting.held
  abstract = made.abstract_state

  def evaluate(trained: Any, batch: Any, frozen: Any) -> Any:
    return objective.evaluate(held.join(trained, frozen), batch)

  return Program(
    mesh=mesh,
    model=model,
    objective=objective,
    parameters=held,
    adapter=adapter_config,
    tx=tx,
    rules=rules,
    sampling=sampling,
    restarts=restarting,
    abstract_state=abstract,
    init_optimizer=jax.jit(
      made.init_optimizer, out_shardings=state.shardings(abstract.opt_state)
    ),
    train_step=step.jit_train_step(
      made.train_step, abstract, mesh, held.frozen
    ),
    eval_step=step.jit_eval_step(evaluate, abstract.params, mesh, held.frozen),
    stats=jax.jit(subspace_stats),
  )


def _label_rules(
  model: Model,
  optim_config: OptimConfig,
  model_rules: optimizer.LabelRules,
  adapter: AdapterOptions,
  beside_adapters: tuple[str, ...],
  sampling: LayerSamplingOptions,
) -> optimizer.LabelRules:
  """Which parameters are trained how."""
  rules = optimizer.label_rules(
    optim_config,
    model_rules,
    adapted=adapter.kind is not None,
    only_factors=adapter.kind == 'lora' and not beside_adapters,
    restarts=adapter.restart_every is not None,
  )
  if adapter.kind is not None or not sampling.is_on:
    return rules
  return layer_sampling.label_rules(
    *(sampling, rules, _outer(model), beside_adapters),
    has_subspaces=optimizer.has_subspaces(optim_config),
  )


def _make_model(
  make: Callable[[Any], Model],
  architecture: models.Config,
  adapter_config: adapters.AdapterConfig | None,
  held: Parameters,
) -> Model:
  """The model on parameters as they are stored, adapters among them."""
  model = make(architecture)
  if adapter_config is not None:
    model = adapters.adapt(adapter_config, model)
  if not held.is_plain:
    policy = None if architecture.remat else layers.keep_marked
    model = forward.on_stored(model, held.decode, policy)
  return model


def _outer(model: Model) -> dict[str, jax.ShapeDtypeStruct]:
  """A model's parameters outside of its layers, by their paths."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  paths = jax.tree_util.tree_leaves_with_path(outer(shapes))
  return {path_name(path): leaf for path, leaf in paths}


def subspace_stats(opt_state: Any) -> dict[str, jax.Array]:
  """What the optimizer did, per kernel and for all kernels together."""
  opt_state = on_devices(opt_state)
  subspaces = optim.inspect.subspace_stats(opt_state)
  stats = {}
  for field in optim.inspect.SubspaceStats._fields:
    values = {name: getattr(s, field) for name, s in subspaces.items()}
    stats |= {f'{field}/{name}': value for name, value in values.items()}
    if values:
      stats[f'{field}/low_rank'] = sum(values.values()) / len(values)
  if isinstance(opt_state, SampledState):
    stats |= sampling_metrics(opt_state)
  return stats


def report(program: Program) -> list[optim.inspect.ReportRow]:
  """What would happen to every parameter, those that do not train included.

  Args:
    program: The program.

  Returns:
    The rows of `optim.report`, then one for each frozen array.
  """
  held = program.parameters
  exact = jax.eval_shape(held.decode_exact, held.trained)
  if program.sampling is None:
    rows = optim.report(exact, program.tx, program.rules)
  else:
    exact[LAYERS] = _as_many(exact[LAYERS], program.sampling.num_slots)
    rows = [
      _of_all_layers(row, program.sampling)
      if row.name.startswith(f'{LAYERS}/')
      else row
      for row in optim.report(exact, program.tx, program.rules)
    ]
  restarting = program.restarts
  frozen = jax.eval_shape(
    held.decode_exact,
    held.frozen if restarting is None else restarting.parameters.frozen,
  )
  return rows + [
    optim.inspect.ReportRow(
      name=path_name(path),
      shape=leaf.shape,
      label='frozen',
      rank=None,
      side='',
      state_bytes=0,
      adamw_bytes=8 * leaf.size,
      reason='not trained: it has no gradient and no state',
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)
  ]


def _of_all_layers(
  row: optim.inspect.ReportRow, sampling: LayerSampling
) -> optim.inspect.ReportRow:
  """The row of a stack of slots as that of the stack of layers."""
  return row._replace(
    shape=(sampling.num_layers, *row.shape[1:]),
    adamw_bytes=row.adamw_bytes * sampling.num_layers // sampling.num_slots,
    reason=f'{row.reason}; {sampling.layers} layers at a time',
  )


def _as_many(layers: Any, count: int) -> Any:
  """Shapes of so many layers, in place of all."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), layers
  )
