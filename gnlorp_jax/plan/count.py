"""Bytes of a run on one device: counted from shapes, or compiled by XLA.

`step_of` is the one place that knows how a run is built. What it returns says
of every array that a training step is given its shape, dtype and sharding; all
else here counts those, or has XLA compile the step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax import optim
from gnlorp_jax.compose import coreset
from gnlorp_jax.plan.accelerators import ACCELERATORS, described_devices
from gnlorp_jax.plan.collectives import Collective, collectives
from gnlorp_jax.plan.settings import Devices, GluePlanConfig, Settings
from gnlorp_jax.training import sharding
from gnlorp_jax.training.layer_sampling import LayerSampling

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Plan(NamedTuple):
  """Bytes of a run on one of its devices; the components add up to the peak.

  Attributes:
    components: Bytes by component, in the order of `report.LABELS`. What is not
      known apart is missing.
    xla: The buffer assignment of the compiled step; None makes the plan a lower
      bound.
    collectives: Communication of a step; None where nothing was compiled.
    mesh: Number of devices along each axis of the mesh.
  """

  components: dict[str, int]
  xla: dict[str, int] | None
  collectives: list[Collective] | None
  mesh: dict[str, int]

  @property
  def peak(self) -> int:
    """Bytes of the step at its largest; a lower bound without `xla`."""
    return sum(self.components.values())

  def fits(self, usable: int) -> bool | None:
    """Whether it fits `usable` bytes; None if a lower bound does not tell."""
    if self.peak > usable:
      return False
    return None if self.xla is None else True


class Step(NamedTuple):
  """A training step before there is any array.

  Attributes:
    settings: The run.
    model: The model's configuration, with the architecture that is really used.
    sampling: How layers are drawn; None trains all.
    mesh: The devices.
    state: Abstract training state, with shardings; its `params` are what
      trains, as stored.
    frozen: Abstract weights that do not train, as stored, with shardings; empty
      where everything trains.
    gradients: Abstract gradients of everything that trains, by the part of the
      model that they belong to; without shardings.
    batch: Abstract batch, with shardings.
    coreset: Bytes on one device of choosing the batch from a pool, by what they
      are for; empty where nothing is chosen.
    lower: Lowers the step for its devices, which must not be a mere number.
  """

  settings: Settings
  model: Any
  sampling: LayerSampling | None
  mesh: Mesh
  state: Any
  frozen: Any
  gradients: dict[str, Any]
  batch: dict[str, Any]
  coreset: dict[str, int]
  lower: Callable[[], jax.stages.Lowered]


def step_of(settings: Settings, devices: Devices) -> Step:
  """Builds the training step of a run; reads no data, allocates nothing.

  Args:
    settings: The run.
    devices: Described devices to compile for; a number is enough to count.

  Returns:
    The step.

  Raises:
    ValueError: If parts of the run do not fit each other or the devices.
  """
  if settings.sampling.on_leave == 'offload':
    # A described device has no host. What rests there is nothing to the device,
    # as if it were dropped, but for a layer's state on its way.
    dropping = dataclasses.replace(settings.sampling, on_leave='drop')
    settings = dataclasses.replace(settings, sampling=dropping)
  planned = settings.build(devices)
  program, parameters = planned.program, planned.program.parameters
  arguments = program.abstract_state, planned.abstract_batch, parameters.frozen
  return Step(
    settings=settings,
    model=planned.config.model,
    sampling=program.sampling,
    mesh=program.mesh,
    state=program.abstract_state,
    frozen=parameters.frozen,
    gradients=jax.eval_shape(parameters.decode, parameters.trained),
    batch=planned.abstract_batch,
    coreset=_choosing(settings, planned),
    lower=functools.partial(program.train_step.lower, *arguments),
  )


def _choosing(settings: Settings, planned: Any) -> dict[str, int]:
  """Bytes of choosing the batch; no recipe but these two has pools."""
  if isinstance(settings, GluePlanConfig):
    return {}
  return coreset.cost(
    settings.coreset,
    planned.program,
    planned.config.model,
    planned.abstract_batch,
    settings.micro_batches,
  )


def lower_bound(settings: Settings) -> Plan:
  """Counts what must exist at once in a step; compiles nothing.

  That is the state, weights that do not train, the batch, the saved inputs of
  the blocks, and gradients of what trains: in a whole step all but the
  embedding's, which is formed last, when the inputs are gone. Micro-batches add
  float32 sums of all gradients. Layer by layer it is the gradient of the
  largest matrix, and where layers are drawn in whole steps those of the layers.
  """
  step = step_of(settings, settings.devices)
  return Plan(
    components={
      **counted(step),
      'saved_activations': block_inputs(step),
      'gradients': gradients(step),
      **_coreset(step),
    },
    xla=None,
    collectives=None,
    mesh=dict(step.mesh.shape),
  )


def compiled(settings: Settings) -> Plan:
  """Compiles the training step with XLA's own compiler for the GPU."""
  devices = described_devices(ACCELERATORS[settings.device], settings.devices)
  step = step_of(settings, devices)
  executable = step.lower().compile(
    # The fastest kernels are found by trying them, for which a GPU is needed.
    compiler_options={'xla_gpu_autotune_level': 0}
  )
  text = executable.as_text()
  xla = _buffer_assignment(executable.memory_analysis())
  components = counted(step)
  if step.model.remat or _recomputes(step):
    components['saved_activations'] = block_inputs(step)
  components['temporaries'] = xla['peak'] - sum(components.values())
  components |= _coreset(step)  # No part of the step that was compiled.
  if '__cudnn$fmha' in text:
    components['attention_workspace'] = _attention_workspace(step)
  return Plan(
    components=components,
    xla=xla,
    collectives=collectives(text),
    mesh=dict(step.mesh.shape),
  )


def counted(step: Step) -> dict[str, int]:
  """Bytes on one device of what a step is given: exact, from the shardings."""
  state = _shards(step.state)
  components = {'weights': optim.inspect.tree_bytes(state.params)}
  if jax.tree.leaves(step.frozen):
    components['frozen_weights'] = optim.inspect.tree_bytes(
      _shards(step.frozen)
    )
  components |= optim.inspect.state_bytes(state.opt_state)
  components['batch'] = optim.inspect.tree_bytes(_shards(step.batch))
  components['other'] += optim.inspect.tree_bytes((state.step, state.skipped))
  return components


def _coreset(step: Step) -> dict[str, int]:
  """Bytes of choosing the batch.

  All of it is counted on top of the step, though most is gone when the step is
  at its largest: of a pool that barely fits, nothing is promised.
  """
  return {'coreset': sum(step.coreset.values())} if step.coreset else {}


def block_inputs(step: Step) -> int:
  """Bytes on one device of the inputs of all blocks, ``[L, B, T, D]``."""
  run = step.settings
  if run.step.offload:
    return 0
  # Layer by layer, exact sums need all micro-batches of a block at once.
  is_whole_batch = _recomputes(step) and run.step.accumulate == 'gradient'
  tokens = _tokens(step, 1 if is_whole_batch else run.micro_batches)
  size = step.model.num_layers * tokens * step.model.hidden_size
  return size * jnp.dtype(step.model.compute_dtype).itemsize // step.mesh.size


def _recomputes(step: Step) -> bool:
  """Whether the step goes layer by layer, from the inputs of the blocks."""
  return step.settings.step.mode == 'layerwise' or step.sampling is not None


def gradients(step: Step) -> int:
  """Bytes on one device of the gradients that exist at once, at least."""
  shards = jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype),
    step.gradients,
    sharding.infer_shardings(step.gradients, step.mesh),
  )
  if step.settings.step.mode == 'layerwise':
    return max(
      optim.inspect.tree_bytes(leaf)
      # Those of the blocks lie one above the other.
      // (step.model.num_layers if part == 'layers' else 1)
      for part, tree in shards.items()
      for leaf in jax.tree.leaves(tree)
    )
  if step.sampling is not None:
    # Those of the drawn layers wait; the others have none.
    layers = optim.inspect.tree_bytes(shards['layers'])
    return layers * step.sampling.layers // step.sampling.num_layers
  sums = 0
  if step.settings.micro_batches > 1:
    sums = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shards))
  shards.pop('embed', None)
  return sums + optim.inspect.tree_bytes(shards)


def _attention_workspace(step: Step) -> int:
  """What cuDNN is likely to ask for at run time, which XLA cannot know here.

  The backward pass of its fused attention adds up the gradient of the queries
  ``[B, T, N, H]`` in float32.
  """
  tokens = _tokens(step, step.settings.micro_batches)
  width = step.model.num_heads * step.model.head_size
  return 4 * tokens * width // step.mesh.size


def _tokens(step: Step, num_micro_batches: int) -> int:
  """Tokens of a micro-batch, over all devices."""
  batch_size, seq_len = step.batch['inputs'].shape
  return batch_size // num_micro_batches * seq_len


def _shards(tree: Any) -> Any:
  """The piece of each abstract array that one device holds."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.sharding.shard_shape(leaf.shape), leaf.dtype
    ),
    tree,
  )


def _buffer_assignment(stats: Any) -> dict[str, int]:
  """XLA's bytes; `peak` is what is allocated, donated arguments only once."""
  xla = {
    name: getattr(stats, f'{name}_size_in_bytes')
    for name in ('argument', 'output', 'temp', 'alias')
  }
  xla['peak'] = xla['argument'] + xla['output'] + xla['temp'] - xla['alias']
  return xla
