"""Whether parameters can be held at all: arithmetic on their shapes."""

import collections
import math
import os
from typing import Any

import jax

from gnlorp_jax.optim.inspect import format_bytes


def check(shapes: Any) -> None:
  """Refuses parameters that no device or host of this size can hold.

  What is refused cannot work. What is not may still fail: gradients, an
  optimizer's state and activations come on top.

  Args:
    shapes: Nested dict with the shape, the dtype and, if set, the sharding of
      every parameter. Those without are for the first device.

  Raises:
    ValueError: If the share of a device exceeds its memory or, on CPUs, which
      share the host's, all shares together do.
  """
  needed: collections.Counter[jax.Device] = collections.Counter()
  for leaf in jax.tree.leaves(shapes):
    sharding = getattr(leaf, 'sharding', None)
    shape = leaf.shape
    devices = {jax.local_devices()[0]}
    if sharding is not None:
      shape, devices = sharding.shard_shape(shape), sharding.addressable_devices
    size = math.prod(shape) * leaf.dtype.itemsize
    needed.update(dict.fromkeys(devices, size))
  on_host = sum(n for device, n in needed.items() if device.platform == 'cpu')
  _check('The host', on_host, _host_memory())
  for device, size in needed.items():
    if device.platform != 'cpu':
      _check(f'Each {device.device_kind}', size, _device_memory(device))


def _check(owner: str, needed: int, available: int | None) -> None:
  if available is not None and needed > available:
    raise ValueError(
      f'{owner} has {format_bytes(available)} of memory, but the parameters '
      f'alone take {format_bytes(needed)} of it. Choose a smaller model, or '
      "param_dtype='bfloat16', or more devices that share it (mesh.fsdp)."
    )


def _host_memory() -> int | None:
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError, OSError):  # Not everywhere.
    return None


def _device_memory(device: jax.Device) -> int | None:
  return (device.memory_stats() or {}).get('bytes_limit')
