"""How the processes of a run are found, and told apart."""

import dataclasses
import logging

import jax
import pytest

from gnlorp_jax.compose import device_settings
from gnlorp_jax.compose.settings import ProcessOptions, RunConfig
from gnlorp_jax.training import distributed

SLURM = {
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_PROCID': '3',
  'SLURM_NTASKS': '8',
}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1'}
JAX = {
  'JAX_COORDINATOR_ADDRESS': 'b:2',
  'JAX_NUM_PROCESSES': '3',
  'JAX_PROCESS_ID': '0',
}


@pytest.fixture
def asked(monkeypatch):
  """What JAX is asked to join."""
  calls = []

  def initialize(address, count, index, **options):
    calls.append((address, count, index, options))

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  for name in (*SLURM, *OPEN_MPI, *JAX):
    monkeypatch.delenv(name, raising=False)
  return calls


@pytest.mark.parametrize(
  ('options', 'environment', 'found'),
  [
    ({}, {}, None),
    ({'num_processes': 1}, SLURM, None),
    ({}, SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({}, SLURM, (None, 4, 3)),
    ({}, OPEN_MPI, (None, 2, 1)),
    ({}, JAX | SLURM, ('b:2', 3, 0)),
    (
      {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 0},
      JAX | SLURM,
      ('a:1', 2, 0),
    ),
    ({'coordinator_address': 'a:1'}, OPEN_MPI, ('a:1', 2, 1)),
  ],
)
def test_processes_are_given_or_found(
  options, environment, found, asked, monkeypatch
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  config = RunConfig(processes=ProcessOptions(**options))
  device_settings.join(config)
  wanted = (
    [] if found is None else [(*found, {'heartbeat_timeout_seconds': 100})]
  )
  assert asked == wanted


def test_what_jax_cannot_join_is_told(asked, monkeypatch):
  def refuse(*args, **options):
    raise ValueError('Number of processes must be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  with pytest.raises(ValueError) as error:
    device_settings.join(
      RunConfig(processes=ProcessOptions(coordinator_address='a:1'))
    )
  assert str(error.value) == (
    'coordinator_address=a:1, num_processes=None and process_id=None do not '
    'join: Number of processes must be defined. Give all three (--processes.'
    'coordinator-address HOST:PORT --processes.num-processes N '
    '--processes.process-id I), or start the processes with srun or mpirun.'
  )

  def wait(*args, **options):
    raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: late.\nMore.')

  monkeypatch.setattr(jax.distributed, 'initialize', wait)
  with pytest.raises(distributed.LostProcessError) as error:
    device_settings.join(
      RunConfig(
        processes=ProcessOptions(
          coordinator_address='a:1', num_processes=2, process_id=1
        )
      )
    )
  assert str(error.value) == (
    'Process 1 of 2 did not find the others at a:1: DEADLINE_EXCEEDED: late. '
    'Start all processes with the same address, that of process 0, and see '
    'that its port is free and reachable.'
  )


def test_a_word_for_a_number_is_an_error(asked, monkeypatch):
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  with pytest.raises(
    ValueError, match="^JAX_NUM_PROCESSES='two' in the environment must be"
  ):
    device_settings.join(RunConfig())


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'num_processes': 0}, 'num_processes must be at least 1, got 0'),
    ({'process_id': -1}, r'process_id must be in \[0, inf\), got -1'),
    ({'heartbeat_seconds': 0}, 'heartbeat_seconds must be at least 1, got 0'),
  ],
)
def test_numbers_of_processes_are_checked(options, text):
  with pytest.raises(ValueError, match=f'ProcessOptions.{text}'):
    ProcessOptions(**options)


class Heard(logging.Handler):
  """Keeps messages."""

  def __init__(self):
    super().__init__()
    self.messages = []

  def emit(self, record):
    self.messages.append(record.getMessage())


def test_others_warn_with_their_number(monkeypatch, logging_as_before):
  monkeypatch.setattr(distributed, 'is_first', lambda: False)
  monkeypatch.setattr(jax, 'process_index', lambda: 3)
  handlers = [Heard(), Heard()]
  monkeypatch.setattr(logging.getLogger(), 'handlers', handlers)
  device_settings._mark_logs()
  logging.getLogger('some').info('unheard')
  logging.getLogger('some').warning('%s heard', 'is')
  for handler in handlers:
    assert handler.messages == ['[process 3] is heard']


def test_what_each_process_may_have_for_itself_is_not_compared():
  config = dataclasses.replace(RunConfig(), seed=4)
  found = dict(device_settings._settings(dataclasses.asdict(config)))
  assert found['seed'] == 4
  assert found['optim.rank'] is None
  assert not [name for name in found if name.startswith('processes')]


def test_a_process_that_has_computed_already_cannot_join(asked, monkeypatch):
  def refuse(*args, **options):
    raise RuntimeError('It must be called before any JAX calls.')

  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  with pytest.raises(ValueError) as error:
    device_settings.join(RunConfig(processes=ProcessOptions(process_id=64)))
  assert str(error.value) == (
    'num_processes=None and process_id=64 cannot join: It must be called '
    'before any JAX calls. Start the program in a process of its own, or leave '
    'processes out.'
  )
