"""Whether a run can be held at all: arithmetic on the shapes of its arrays."""

import collections
import math
import os
import pathlib
from typing import Any, Protocol

import jax

from gnlorp_jax.optim.inspect import format_bytes

_CGROUP_LIMITS = (
  pathlib.Path('/sys/fs/cgroup/memory.max'),
  pathlib.Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)


class Program(Protocol):
  """What `program.build` makes, as far as it matters here."""

  @property
  def abstract_state(self) -> Any:
    """Shapes and shardings of the training state."""

  @property
  def parameters(self) -> Any:
    """The weights, of which `frozen` are in no state."""


def check(shapes: Any, what: str = 'the parameters') -> None:
  """Refuses arrays that no device or host of this size can hold.

  What is refused cannot work. What is not may still fail: gradients and
  activations come on top.

  Args:
    shapes: Pytree with the shape, the dtype and, if set, the sharding of every
      array. Those without are for the first device.
    what: What to call them.

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
  _check('The host', what, on_host, _host_memory())
  for device, size in needed.items():
    if device.platform != 'cpu':
      _check(f'Each {device.device_kind}', what, size, _device_memory(device))


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


def _check(owner: str, what: str, needed: int, available: int | None) -> None:
  if available is not None and needed > available:
    raise ValueError(
      f'{owner} has {format_bytes(available)} of memory, but {what} alone take '
      f'{format_bytes(needed)} of it. Choose a smaller model, or '
      "param_dtype='bfloat16', or more devices that share it (mesh.fsdp)."
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
