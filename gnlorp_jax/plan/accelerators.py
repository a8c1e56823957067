"""GPUs as XLA's compiler sees them, so that none need be there to compile for.

The figures are those of the maker's architecture papers and data sheets (NVIDIA
Ampere, Ada, A100, H100 and H200), and ``memory`` is what CUDA reports as the
card's total, which is less than the number on the box. Drivers differ in it: of
an RTX 3060 under Linux users show 11.76 GiB, or with newer drivers 11.63, which
is taken. Its L2 cache is the part of the chip's 3 MiB that CUDA reports.
"""

import difflib
import importlib.util
import math
from typing import NamedTuple

import jax
from jax.experimental import topologies

_GIB = 2**30


class Accelerator(NamedTuple):
  """One GPU."""

  description: str
  memory: int  # Bytes that CUDA reports as the total.
  compute_capability: tuple[int, int]
  cores: int  # Streaming multiprocessors.
  fpus_per_core: int  # float32 units of each.
  threads_per_core: int
  shared_memory_per_core: int  # Bytes; a block may have 1 KiB less.
  l2_cache: int  # Bytes.
  bandwidth: int  # Bytes per second.
  clock_ghz: float  # Boost.

  @property
  def fraction(self) -> float:
    """Share of the memory to give to JAX, two decimals: all but `RESERVED`."""
    return math.floor(100 * (1 - RESERVED / self.memory)) / 100

  @property
  def usable(self) -> int:
    """Bytes for XLA's buffers: that share."""
    return int(self.fraction * self.memory)


RESERVED = int(0.6 * _GIB)
"""Assumed bytes that a process's CUDA context, the kernels it loads and the
handles of cuBLAS, cuDNN and NCCL take from a card that nothing else uses. A
desktop on the same card takes more."""

ACCELERATORS = {
  'rtx4090': Accelerator(
    description='NVIDIA GeForce RTX 4090, 24 GB',
    memory=int(23.65 * _GIB),
    compute_capability=(8, 9),
    cores=128,
    fpus_per_core=128,
    threads_per_core=1536,
    shared_memory_per_core=100 * 1024,
    l2_cache=72 * 2**20,
    bandwidth=1_008_000_000_000,
    clock_ghz=2.52,
  ),
  'rtx4060ti': Accelerator(
    description='NVIDIA GeForce RTX 4060 Ti, 16 GB',
    memory=int(15.60 * _GIB),
    compute_capability=(8, 9),
    cores=34,
    fpus_per_core=128,
    threads_per_core=1536,
    shared_memory_per_core=100 * 1024,
    l2_cache=32 * 2**20,
    bandwidth=288_000_000_000,
    clock_ghz=2.535,
  ),
  'rtx3060': Accelerator(
    description='NVIDIA GeForce RTX 3060, 12 GB',
    memory=int(11.63 * _GIB),
    compute_capability=(8, 6),
    cores=28,
    fpus_per_core=128,
    threads_per_core=1536,
    shared_memory_per_core=100 * 1024,
    l2_cache=2304 * 1024,
    bandwidth=360_000_000_000,
    clock_ghz=1.777,
  ),
  'a100': Accelerator(
    description='NVIDIA A100 SXM, 80 GB',
    memory=int(79.15 * _GIB),
    compute_capability=(8, 0),
    cores=108,
    fpus_per_core=64,
    threads_per_core=2048,
    shared_memory_per_core=164 * 1024,
    l2_cache=40 * 2**20,
    bandwidth=2_039_000_000_000,
    clock_ghz=1.41,
  ),
  'h100': Accelerator(
    description='NVIDIA H100 SXM, 80 GB',
    memory=int(79.10 * _GIB),
    compute_capability=(9, 0),
    cores=132,
    fpus_per_core=128,
    threads_per_core=2048,
    shared_memory_per_core=228 * 1024,
    l2_cache=50 * 2**20,
    bandwidth=3_350_000_000_000,
    clock_ghz=1.98,
  ),
  'h200': Accelerator(
    description='NVIDIA H200 SXM, 141 GB',
    memory=int(139.70 * _GIB),
    compute_capability=(9, 0),
    cores=132,
    fpus_per_core=128,
    threads_per_core=2048,
    shared_memory_per_core=228 * 1024,
    l2_cache=50 * 2**20,
    bandwidth=4_800_000_000_000,
    clock_ghz=1.98,
  ),
}
"""The GPUs that are known, by the names a user gives."""


def check_name(name: str) -> None:
  """Checks that a GPU is known.

  Raises:
    ValueError: If it is not; the text names those that are.
  """
  if name not in ACCELERATORS:
    near = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'Unknown device {name!r}; expected one of {tuple(ACCELERATORS)}.{hint}'
    )


def compiler_is_installed() -> bool:
  """Whether the CUDA wheels, with XLA's GPU compiler, are there."""
  return importlib.util.find_spec('jax_cuda12_plugin') is not None


def described_devices(
  accelerator: Accelerator, count: int, machines: int = 1
) -> list[jax.Device]:
  """Devices to compile for; nothing can run on them.

  JAX must have been told not to look for GPUs (``jax_platforms='cpu'``): its
  plugin otherwise checks for a driver.

  Args:
    accelerator: Their kind.
    count: Their number in all.
    machines: Number of machines that they are in, in equal parts.

  Returns:
    The devices, machine by machine.

  Raises:
    ValueError: If they cannot be divided among the machines.
  """
  if count % machines:
    raise ValueError(
      f'{count} devices cannot be divided among {machines} machines: use a '
      f'multiple of {machines}.'
    )
  return list(
    topologies.get_topology_desc(
      '',
      platform='cuda',
      target_config=target_config(accelerator),
      topology=f'1x{machines}x{count // machines}',
    ).devices
  )


def target_config(accelerator: Accelerator) -> str:
  """The text of the `GpuTargetConfigProto` that XLA compiles for."""
  a = accelerator
  major, minor = a.compute_capability
  # Limits that all of these architectures share stand here as numbers.
  return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {a.cores}
      fpus_per_core: {a.fpus_per_core}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: {a.threads_per_core}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {a.shared_memory_per_core - 1024}
      shared_memory_per_core: {a.shared_memory_per_core}
      l2_cache_size: {a.l2_cache}
      memory_bandwidth: {a.bandwidth}
      clock_rate_ghz: {a.clock_ghz}
      device_memory_size: {a.memory}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 }}
    device_description_str: "{a.description}"
  """
