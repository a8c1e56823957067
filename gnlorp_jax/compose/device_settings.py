"""What is asked of a run's devices: how they are arranged, who drives them.

And how the processes that drive them find each other.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax

from gnlorp_jax.compose.fields import check_at_least_one, check_within, free
from gnlorp_jax.training import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are arranged."""

  data: int = free(-1)
  """Number of copies of the state; -1 takes all devices that `fsdp` leaves."""
  fsdp: int = free(1)
  """Number of pieces each copy is split into."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
  """Several processes that train one model, each with devices of its own.

  What is None is found in the environment, as srun and mpirun set it.
  """

  coordinator_address: str | None = free(None)
  """HOST:PORT at which process 0 can be reached by all."""
  num_processes: int | None = free(None)
  """Number of processes; 1 runs by itself, whatever the environment says."""
  process_id: int | None = free(None)
  """Which of them this is, from 0 on."""
  heartbeat_seconds: int = free(100)
  """A process that is not heard of for so long is lost, and the others end."""

  def __post_init__(self):
    check_at_least_one(self, 'num_processes', 'heartbeat_seconds')
    check_within(self, '[0, inf)', 'process_id')


def join(config: Any) -> None:
  """Joins the processes of a run, and checks that all were asked for the same.

  It must come before anything is computed. Nothing is joined, and nothing
  checked, where there is only this one.

  Args:
    config: A `RunConfig`. What is None in its `processes` is found in the
      environment: in ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
      ``JAX_PROCESS_ID``, or in what Slurm (``srun``) and Open MPI (``mpirun``)
      set.

  Raises:
    ValueError: If only some of it is known, it does not fit, or the settings of
      processes differ.
    LostProcessError: If the others do not come.
  """
  if not jax.distributed.is_initialized():
    found = _find(config.processes)
    if found is None:
      return
    _initialize(*found, config.processes.heartbeat_seconds)
  _mark_logs()
  distributed.check_same(
    'settings', dict(_settings(dataclasses.asdict(config)))
  )


def _initialize(
  address: str | None, count: int | None, index: int | None, heartbeat: int
) -> None:
  # It would take SIGTERM for itself; `distributed.Stop` is how all agree.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      *(address, count, index),
      heartbeat_timeout_seconds=heartbeat,
    )
  except ValueError as error:
    raise ValueError(
      f'coordinator_address={address}, num_processes={count} and process_id='
      f'{index} do not join: {distributed.first_line(error)}. Give all three '
      '(--processes.coordinator-address HOST:PORT --processes.num-processes N '
      '--processes.process-id I), or start the processes with srun or mpirun.'
    ) from None
  except jax.errors.JaxRuntimeError as error:
    raise distributed.LostProcessError(
      f'Process {index} of {count} did not find the others at {address}: '
      f'{distributed.first_line(error)}. Start all processes with the same '
      'address, that of process 0, and see that its port is free and reachable.'
    ) from None
  except RuntimeError as error:
    raise ValueError(
      f'num_processes={count} and process_id={index} cannot join: '
      f'{distributed.first_line(error)}. Start the program in a process of its '
      'own, or leave processes out.'
    ) from None


def _find(
  options: ProcessOptions,
) -> tuple[str | None, int | None, int | None] | None:
  """What is known of the processes; None if there is only this one."""
  count, index = options.num_processes, options.process_id
  if count == 1:
    return None
  env = os.environ
  address = options.coordinator_address or env.get('JAX_COORDINATOR_ADDRESS')
  for of_count, of_index in (
    ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'),
    # Of this step: a shell in an allocation has one task, whatever the job has.
    ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID'),
    ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'),
  ):
    if count is None and index is None and of_count in env:
      count = _number(env, of_count)
      index = _number(env, of_index) if of_index in env else None
  if count == 1 or (address, count, index) == (None, None, None):
    return None
  return address, count, index


def _number(env: Mapping[str, str], name: str) -> int:
  try:
    return int(env[name])
  except ValueError:
    raise ValueError(
      f'{name}={env[name]!r} in the environment must be a whole number.'
    ) from None


def _mark_logs() -> None:
  """Lets process 0 tell what all would; of others only warnings, marked."""
  if distributed.is_first():
    return
  logging.getLogger().setLevel(logging.WARNING)
  mark = f'[process {jax.process_index()}] '

  def marked(record: logging.LogRecord) -> bool:
    # Every handler shows the same record.
    if not str(record.msg).startswith(mark):
      record.msg = f'{mark}{record.msg}'
    return True

  for handler in logging.getLogger().handlers:
    handler.addFilter(marked)


def _settings(tree: dict[str, Any], prefix: str = '') -> Any:
  """Values by dotted names, without what each process may have for itself."""
  for name, value in tree.items():
    if name in ('processes', 'cache_dir'):
      continue
    if isinstance(value, dict):
      yield from _settings(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
