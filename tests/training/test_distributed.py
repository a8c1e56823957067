"""What processes tell each other: two threads that take themselves for two."""

import contextlib
import signal
import threading

import jax
import pytest

from gnlorp_jax.training import distributed, sharding

HERE = threading.local()


class Service:
  """A coordination service in this process."""

  def __init__(self):
    self.values = {}
    self.changed = threading.Condition()
    self.gone = False

  def key_value_set(self, key, value):
    with self.changed:
      assert key not in self.values
      self.values[key] = value
      self.changed.notify_all()

  def key_value_delete(self, key):
    del self.values[key]

  def blocking_key_value_get(self, key, milliseconds):
    with self.changed:
      there = self.changed.wait_for(
        lambda: key in self.values or self.gone, milliseconds / 1000
      )
      if self.gone:
        raise jax.errors.JaxRuntimeError('UNAVAILABLE: Socket closed')
      if not there:
        raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: late')
      return self.values[key]


class Numbers:
  """Counts in each thread."""

  def __next__(self):
    HERE.number = getattr(HERE, 'number', -1) + 1
    return HERE.number


@pytest.fixture
def two(monkeypatch):
  """Runs a function as two processes; what it returned or raised in each."""
  service = Service()
  state = jax._src.distributed.global_state
  monkeypatch.setattr(state, 'client', service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: HERE.index)
  monkeypatch.setattr(distributed, '_numbers', Numbers())
  monkeypatch.setattr(distributed, '_POLL_MS', 20)
  monkeypatch.setattr(distributed, '_FAREWELL', 0.1)

  def run(function):
    ends = {}

    def of(index):
      HERE.index, HERE.number = index, -1
      try:
        ends[index] = function(index)
      except Exception as error:
        ends[index] = error

    threads = [threading.Thread(target=of, args=(i,)) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(timeout=20)
    service.values.clear()
    return [ends[0], ends[1]]

  run.service = service
  return run


def test_a_process_by_itself_asks_nobody(tmp_path):
  assert distributed.exchange(3) == [3]
  assert distributed.from_first(lambda: (1, 2)) == (1, 2)
  assert distributed.in_turn(lambda: 4) == 4
  assert distributed.is_first() and not distributed.is_joined()
  distributed.check_same('settings', {'seed': 1})
  distributed.check_shared_folder(tmp_path / 'not made')
  assert not (tmp_path / 'not made').exists()
  error = ValueError('mine')
  with pytest.raises(ValueError, match='mine'), distributed.shared_errors():
    raise error
  assert not distributed.is_alone(error)
  assert distributed.explained(error) is error


def test_values_are_exchanged_and_forgotten(two):
  assert (
    two(lambda i: [distributed.exchange(i + n) for n in range(3)])
    == [[[0, 1], [1, 2], [2, 3]]] * 2
  )


def test_what_the_first_makes_all_have(two):
  made = []

  def run(index):
    return distributed.from_first(lambda: made.append(index) or {'a': [1]})

  assert two(run) == [{'a': [1]}] * 2
  assert made == [0]


def test_the_first_comes_before_the_others(two):
  order = []
  assert two(lambda i: distributed.in_turn(lambda: order.append(i) or i)) == [
    0,
    1,
  ]
  assert order == [0, 1]


@pytest.mark.parametrize('failing', [0, 1])
@pytest.mark.parametrize('kind', [ValueError, OSError])
def test_a_mistake_of_one_is_one_of_all(kind, failing, two):
  def make(index):
    if index == failing:
      raise kind('no file')
    return index

  ends = two(lambda i: distributed.in_turn(lambda: make(i)))
  assert [str(end) for end in ends] == [f'Process {failing}: no file'] * 2
  assert {type(end) for end in ends} == {distributed.SharedError}


def test_a_mistake_of_all_is_told_as_it_is(two):
  def run(index):
    with distributed.shared_errors():
      raise ValueError('seed=-1')

  assert [str(end) for end in two(run)] == ['seed=-1'] * 2


def test_who_is_not_heard_fails_by_himself(two):
  def run(index):
    if index == 0:
      return 'busy on a device'
    with distributed.shared_errors():
      raise OSError('disk full')

  busy, error = two(run)
  assert busy == 'busy on a device'
  assert isinstance(error, OSError) and str(error) == 'disk full'


def test_differences_are_named(two):
  def run(index):
    values = {'seed': index, 'optim.rank': 4, 'data': ['a'] * 40 * index}
    if index:
      values['more'] = None
    distributed.check_same('settings', values)

  text = (
    'Processes of one run differ in settings: data [] in process 0, '
    f'{str(["a"] * 40)[:77].replace(chr(39), chr(34))}... in process 1; more '
    '(absent) in process 0, null in process 1; seed 0 in process 0, 1 in '
    'process 1. Start all with the same command, code and data.'
  )
  assert [str(end) for end in two(run)] == [text] * 2
  assert two(lambda i: distributed.check_same('x', {'a': (1, 2)})) == [None] * 2


def test_folders_that_are_not_shared_are_told(two, tmp_path):
  shared = tmp_path / 'shared'
  check = distributed.check_shared_folder
  assert two(lambda i: check(shared)) == [None, None]
  assert not list(shared.iterdir())
  ends = two(lambda i: check(tmp_path / str(i)))
  folder = tmp_path / '1'
  assert [str(end) for end in ends] == [
    f'Process 1: The run directory {folder} is not that of process 0: '
    'checkpoints are written by all processes together, so it must lie on a '
    'disk that all share.'
  ] * 2
  assert not list((tmp_path / '0').iterdir())


def test_a_process_that_is_gone_is_told(two):
  def run(index):
    if index:
      with two.service.changed:
        two.service.gone = True
        two.service.changed.notify_all()
      return None
    return distributed.exchange(1)

  error, _ = two(run)
  assert isinstance(error, distributed.LostProcessError)
  assert str(error) == (
    'Another process of this run ended or cannot be reached (UNAVAILABLE: '
    'Socket closed). Its own output says why. Checkpoints that were complete '
    'are untouched: the same command, in all processes, continues.'
  )


def test_errors_of_collectives_are_explained(two):
  def run(index):
    gloo = jax.errors.JaxRuntimeError('Gloo all-reduce failed: x\ny')
    other = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: memory')
    assert distributed.explained(other) is other
    assert distributed.is_alone(other)
    return distributed.explained(gloo)

  for error in two(run):
    assert isinstance(error, distributed.LostProcessError)
    assert '(Gloo all-reduce failed: x)' in str(error)


def test_a_signal_between_steps_is_one_of_all(two):
  def run(index):
    return distributed.agree_now(signal.SIGTERM if index else None)

  assert two(run) == [signal.SIGTERM] * 2
  assert two(lambda i: distributed.agree_now(None)) == [None] * 2


def test_a_signal_is_agreed_on_a_step_later(monkeypatch):
  stop = distributed.Stop(sharding.make_mesh(2, 2))
  assert stop.agree(signal.SIGINT) == signal.SIGINT  # By itself.
  monkeypatch.setattr(distributed, 'is_joined', lambda: True)
  assert stop.agree(None) is None
  assert stop.agree(signal.SIGTERM) is None
  assert stop.agree(signal.SIGTERM) == signal.SIGTERM


def test_others_open_nothing(monkeypatch):
  opened = []

  @contextlib.contextmanager
  def make():
    opened.append('file')
    yield 'file'
    opened.clear()

  with distributed.of_first(make, 'nothing') as found:
    assert found == 'file'
    assert opened == ['file']
  assert not opened
  monkeypatch.setattr(distributed, 'is_first', lambda: False)
  with distributed.of_first(make, 'nothing') as found:
    assert found == 'nothing'
    assert not opened


@pytest.mark.parametrize('kind', [ValueError, OSError])
def test_what_the_first_cannot_open_is_an_error_of_all(kind, two):
  @contextlib.contextmanager
  def make():
    raise kind('metrics.jsonl:3: no JSON')
    yield

  def run(index):
    with distributed.of_first(make, 'nothing'):
      return 'a step that the first never takes'

  ends = two(run)
  assert [str(end) for end in ends] == [
    'Process 0: metrics.jsonl:3: no JSON'
  ] * 2
  assert {type(end) for end in ends} == {distributed.SharedError}
