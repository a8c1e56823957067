"""Whether a run can be held at all: arithmetic on the shapes of its arrays.

Shape suffixes in this file:
  L     layers
  B, T  sequences that go through the model at once, positions
  D     features
  N     heads
"""

import collections
import math
import os
import pathlib
from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax import models
from gnlorp_jax.compose.settings import StepConfig
from gnlorp_jax.models.attention import implementation_for
from gnlorp_jax.optim.inspect import format_bytes
from gnlorp_jax.training import sharding as shardings
from gnlorp_jax.training.parameters import LAYERS

_CGROUP_LIMITS = (
  pathlib.Path('/sys/fs/cgroup/memory.max'),
  pathlib.Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)


class Program(Protocol):
  """What `program.build` makes, as far as it matters here."""

  @property
  def mesh(self) -> Any:
    """The devices."""

  @property
  def sampling(self) -> Any:
    """How layers are drawn, if they are."""

  @property
  def abstract_state(self) -> Any:
    """Shapes and shardings of the training state."""

  @property
  def parameters(self) -> Any:
    """The weights, of which `frozen` are in no state."""


_MODEL_FIX = (
  "Choose a smaller model, or param_dtype='bfloat16', or more devices that "
  'share it (mesh.fsdp).'
)


def check(
  shapes: Any, what: str = 'the parameters', fix: str = _MODEL_FIX
) -> None:
  """Refuses arrays that no device or host of this size can hold.

  What is refused cannot work. What is not may still fail: there is more to a
  step than what is counted.

  Args:
    shapes: Pytree with the shape, the dtype and, if set, the sharding of every
      array. Those without are for the first device.
    what: What to call them.
    fix: What to do about it, a sentence.

  Raises:
    ValueError: If the share of a device exceeds its memory or, on CPUs, which
      share the host's, all shares together do.
  """
  needed: collections.Counter[jax.Device] = collections.Counter()
  on_host = 0
  for leaf in jax.tree.leaves(shapes):
    sharding = getattr(leaf, 'sharding', None)
    shape = leaf.shape
    devices = {jax.local_devices()[0]}
    if sharding is not None:
      shape, devices = sharding.shard_shape(shape), sharding.addressable_devices
    size = math.prod(shape) * leaf.dtype.itemsize
    if getattr(sharding, 'memory_kind', None) == 'pinned_host':
      on_host += size * len(devices)
      continue
    needed.update(dict.fromkeys(devices, size))
  on_host += sum(n for device, n in needed.items() if device.platform == 'cpu')
  _check('The host', what, on_host, _host_memory(), fix)
  for device, size in needed.items():
    if device.platform != 'cpu':
      owner, available = f'Each {device.device_kind}', _device_memory(device)
      _check(owner, what, size, available, fix)


def check_run(built: Program) -> None:
  """Refuses a run whose weights and optimizer state cannot be held.

  It takes no time, and what comes next may: text is read and tokenised.

  Args:
    built: What the run computes.

  Raises:
    ValueError: As `check`.
  """
  check(
    (built.abstract_state, built.parameters.frozen),
    'the weights and the state of the optimizer',
  )


def check_step(
  built: Program,
  model: models.Config,
  batch_size: int,
  length: int,
  step: StepConfig,
  micro_batches: int,
) -> None:
  """Refuses a run of which no step can be held.

  Args:
    built: What the run computes.
    model: The model's configuration.
    batch_size: Sequences per step, over all devices.
    length: Tokens of a sequence, at least.
    step: How a step goes through the model.
    micro_batches: Pieces of a batch.

  Raises:
    ValueError: As `check`.
  """
  held = (built.abstract_state, built.parameters.frozen)
  least = activations(built, model, batch_size, length, step, micro_batches)
  check(
    (held, least),
    f'weights, optimizer and the least that batch_size={batch_size} with '
    f'sequences of {length} tokens and micro_batches={micro_batches} keeps of '
    'a step',
    'Use a smaller batch_size, shorter sequences, or more micro_batches; '
    'python -m gnlorp_jax.plan tells what a run needs.',
  )


def activations(
  built: Program,
  model: models.Config,
  batch_size: int,
  length: int,
  step: StepConfig,
  micro_batches: int,
) -> dict[str, jax.ShapeDtypeStruct]:
  """What a step must hold of its batch at once, whatever the compiler does.

  That is the input of every block, which the backward pass begins from, and,
  where attention is no fused kernel, the scores of one layer. It is a bound
  from below: products, gradients and logits come on top. Where blocks do not
  train, or are drawn, or their inputs rest on the host, one input is counted.

  Args:
    built: As in `check_step`, as are the others.
    model: The model's configuration.
    batch_size: Sequences per step.
    length: Tokens of a sequence.
    step: How a step goes through the model.
    micro_batches: Pieces of a batch.

  Returns:
    Shapes and shardings: ``inputs`` ``[L, B, T, D]``, and ``scores``
    ``[B, N, T, T]``.
  """
  spec = shardings.batch_sharding(built.mesh).spec
  rows = batch_size // micro_batches
  trains = bool(jax.tree.leaves(built.abstract_state.params.get(LAYERS)))
  keeps = trains and built.sampling is None and not step.offload
  # Exact sums, layer by layer, take all micro-batches through a block at once.
  at_once = step.mode == 'layerwise' and step.accumulate == 'gradient'
  found = {
    'inputs': jax.ShapeDtypeStruct(
      (
        model.num_layers if keeps else 1,
        batch_size if keeps and at_once else rows,
        length,
        model.hidden_size,
      ),
      model.compute_dtype,
      sharding=NamedSharding(built.mesh, P(None, *spec)),
    )
  }
  device = built.mesh.devices.flat[0]
  if implementation_for(device, model.compute_dtype, model.head_size) == 'xla':
    found['scores'] = jax.ShapeDtypeStruct(
      (rows, model.num_heads, length, length),
      model.compute_dtype,
      sharding=NamedSharding(built.mesh, spec),
    )
  return found


def _check(
  owner: str, what: str, needed: int, available: int | None, fix: str
) -> None:
  if available is not None and needed > available:
    raise ValueError(
      f'{owner} has {format_bytes(available)} of memory, but {what} alone take '
      f'{format_bytes(needed)} of it. {fix}'
    )


def _host_memory() -> int | None:
  """What there is, or what of it this process may have."""
  found = []
  try:
    found.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
  except (AttributeError, ValueError, OSError):  # Not everywhere.
    pass
  for limit in _CGROUP_LIMITS:  # Of a container, or of a job.
    try:
      found.append(int(limit.read_text()))
    except (ValueError, OSError):  # It has none, which is called max.
      continue
  return min(found, default=None)


def _device_memory(device: jax.Device) -> int | None:
  return (device.memory_stats() or {}).get('bytes_limit')
