"""The training loop, on a regression that NumPy can follow in float64.

Shape suffixes in this file: B rows of a batch, D features.
"""

import json
import logging
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training import loop, metrics, monitor, sharding
from gnlorp_jax.training.checkpoint import Checkpointer
from gnlorp_jax.training.compatibility import Since
from gnlorp_jax.training.interrupt import Interrupted
from gnlorp_jax.training.keeper import Keeper
from gnlorp_jax.training.monitor import DivergedError, Instruments
from gnlorp_jax.training.selection.selection import without_memory
from gnlorp_jax.training.state import TrainState

B, D, STEPS = 4, 3, 12
RATE, DECAY = 0.05, 0.5
TARGET_D = np.array([1.0, -2.0, 0.5], np.float32)
OFFSET = {'offset': np.array([0.25, 0.0, -0.5], np.float32)}
ZERO = {'offset': np.zeros(D, np.float32)}


def draw(number, rows=B):
  """The batch of a step, on the host."""
  rng = np.random.default_rng(number)
  inputs_BD = rng.normal(size=(rows, D)).astype(np.float32)
  return {
    'inputs': inputs_BD,
    'targets': inputs_BD @ TARGET_D + 0.1 * rng.normal(size=rows).astype('f'),
  }


class Batches:
  """Batches by number, with a position; may raise or signal at one of them."""

  def __init__(self, rows=B, at=None, do=None):
    self.taken, self._rows, self._at, self._do = 0, rows, at, do

  def __iter__(self):
    return self

  def __next__(self):
    self.taken += 1
    if self.taken == self._at:
      self._do()
    return draw(self.taken, self._rows)

  def get_state(self):
    return {'taken': self.taken}

  def set_state(self, state):
    self.taken = state['taken']


class Stop:
  """Stands for signals."""

  received = None

  def __call__(self):
    self.received = signal.SIGTERM


def step(state, batch, constants):
  """Gradient descent with momentum on a squared error."""
  w_D = state.params['w'] + constants['offset']
  errors_B = batch['inputs'] @ w_D - batch['targets']
  grad_D = 2 * errors_B @ batch['inputs'] / len(errors_B)
  momentum_D = DECAY * state.opt_state['momentum'] + grad_D
  rate = state.opt_state['rate']
  params = {'w': state.params['w'] - rate * momentum_D}
  values = {
    'loss': jnp.mean(errors_B**2),
    'weight_norm': jnp.linalg.norm(params['w']),
    'skipped_steps': state.skipped,
  }
  opt_state = {'momentum': momentum_D, 'rate': rate}
  return TrainState(state.step + 1, state.skipped, params, opt_state), values


def choose(state, candidates):
  """Half of the rows, those with the largest errors."""
  errors_B = candidates['inputs'] @ state.params['w'] - candidates['targets']
  chosen = jnp.argsort(-jnp.abs(errors_B))[: len(errors_B) // 2]
  return jax.tree.map(lambda rows: rows[chosen], candidates)


COMPILED, CHOOSE = jax.jit(step), without_memory(jax.jit(choose))
STATS = jax.jit(lambda opt: {'momentum/size': jnp.sum(opt['momentum'] ** 2)})
MESH = sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def fresh(rate=RATE):
  zero = jnp.zeros((), jnp.int32)
  opt_state = {'momentum': jnp.zeros(D), 'rate': jnp.float32(rate)}
  return jax.device_put(
    TrainState(zero, zero, {'w': jnp.zeros(D)}, opt_state),
    jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec()),
  )


def abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    fresh(),
  )


HELD_OUT = draw(1000, 16)


def evaluate(params, constants):
  w_D = np.float64(params['w']) + constants['offset']
  errors_B = HELD_OUT['inputs'] @ w_D - HELD_OUT['targets']
  return {'loss': float(np.mean(errors_B**2))}


def make_run(folder, **options):
  constants = options.pop('frozen', ZERO)
  usual = {
    'name': 'toy',
    'steps': STEPS,
    'mesh': MESH,
    'abstract_state': abstract(),
    'start': lambda: (fresh(), constants),
    'train_step': COMPILED,
    'batches': Batches(),
    'evaluate': evaluate,
    'instruments': Instruments(lambda count: RATE, STATS, state_bytes=16),
    'metadata': {'features': D},
    'every': loop.Every(log=2, evaluate=4, checkpoint=3),
    'constants': lambda: constants,
  }
  return loop.Run(folder=folder, **usual | options)


def simulate(steps=STEPS, *, select=False, offset=ZERO):
  """The same in float64: the weights after every step."""
  w_D, momentum_D, visited = np.zeros(D), np.zeros(D), [np.zeros(D)]
  for number in range(1, steps + 1):
    batch = draw(number, 2 * B if select else B)
    inputs, targets = (np.float64(batch[k]) for k in ('inputs', 'targets'))
    if select:
      chosen = np.argsort(-np.abs(inputs @ w_D - targets))[:B]
      inputs, targets = inputs[chosen], targets[chosen]
    errors = inputs @ (w_D + offset['offset']) - targets
    grad_D = 2 * errors @ inputs / B
    momentum_D = DECAY * momentum_D + grad_D
    w_D = w_D - RATE * momentum_D
    visited.append(w_D)
  return visited


def read_rows(folder):
  return metrics.read_metrics(folder / 'metrics.jsonl')


def timeless(folder):
  return [
    {k: v for k, v in row.items() if k != 'train/tokens_per_second'}
    for row in read_rows(folder)
  ]


def read_state(folder):
  with Checkpointer(folder / 'checkpoints', read_only=True) as saved:
    state, position, _ = saved.restore_latest(abstract())
  return jax.device_get(state), position


def assert_ends_alike(folder, expected):
  """Same bits in the last checkpoints, same rows apart from measured time."""
  (state, position), (other, other_position) = map(
    read_state, (folder, expected)
  )
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    assert a.tobytes() == b.tobytes()
  assert position['batches'] == other_position['batches']
  for name in ('best', 'last'):
    assert position['record'][name] == other_position['record'][name]
  assert timeless(folder) == timeless(expected)


def lower(found, best):
  return best['loss'] is None or (
    found['loss'] is not None and found['loss'] < best['loss']
  )


class Rows(Batches):
  """Batches of any size of rows that are counted."""

  def __next__(self):
    self.taken += self._rows
    numbers = range(self.taken - self._rows, self.taken)
    drawn = [draw(number, 1) for number in numbers]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *drawn)

  def get_state(self):
    return {'sequences': self.taken}

  def set_state(self, state):
    self.taken = state.get('sequences')
    if self.taken is None:
      self.taken = state['batches'] * state['batch_size']


@pytest.mark.parametrize('is_old', [False, True])
def test_a_run_goes_on_with_another_batch_size(tmp_path, caplog, is_old):
  """Four steps of 4 rows and two of 8 see rows 0 to 31, each once."""
  counted = {'tokens_per_step': 4 * D}
  usual = make_run(tmp_path).instruments
  options = {'steps': 4, 'batches': Rows(4), 'batch_size': 4}
  began = make_run(tmp_path, instruments=usual._replace(**counted), **options)
  loop.train(began, Stop())
  metadata = {'features': D}
  if is_old:
    # Which count batches, and have their size among what could not change.
    kept, position = read_state(tmp_path)
    shutil.rmtree(tmp_path / 'checkpoints')
    old = {'batches': {'batches': 4}, 'record': position['record']}
    with Checkpointer(tmp_path / 'checkpoints') as saved:
      saved.save(4, kept, old, metadata | {'batch_size': 4})
  caplog.set_level(logging.INFO)
  batches = Rows(8)
  counted = {'tokens_per_step': 8 * D}
  outcome = loop.train(
    make_run(
      *(tmp_path,),
      steps=6,
      batches=batches,
      batch_size=8,
      instruments=usual._replace(**counted),
      since=Since(may_change=frozenset({'batch_size'})),
    ),
    Stop(),
  )
  assert (
    'Batches of 8 rows after 4 of 4: training goes on with the row behind the '
    'last that was seen. Steps and the learning rate count updates as before: '
    '4 of 6 are taken.'
  ) in caplog.messages
  assert batches.taken == 32
  rows = [row for row in read_rows(tmp_path) if 'train/tokens' in row]
  tokens = {row['step']: row['train/tokens'] for row in rows}
  assert tokens[4] == 16 * D and tokens[6] == 32 * D
  stream, w_D, momentum_D = Rows(1), np.zeros(D), np.zeros(D)
  for size in (4, 4, 4, 4, 8, 8):
    rows = [next(stream) for _ in range(size)]
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), *rows)
    errors = batch['inputs'] @ w_D - batch['targets']
    momentum_D = DECAY * momentum_D + 2 * errors @ batch['inputs'] / size
    w_D = w_D - RATE * momentum_D
  np.testing.assert_allclose(outcome.params['w'], w_D, rtol=1e-4)


# Every optional part of a run, and what NumPy is told of it. 'all' are all but
# the choice of rows.
CASES = {
  'plain': ({}, {}),
  'select': ({'select': CHOOSE}, {'select': True}),
  'better': ({'better': lower}, {}),
  'all': (
    {'frozen': OFFSET, 'better': lower},
    {'offset': OFFSET},
  ),
}


def options_of(case, **batches):
  options = dict(CASES[case][0])
  rows = 2 * B if 'select' in options else B
  return options | {'batches': Batches(rows, **batches)}


@pytest.mark.parametrize('case', CASES)
def test_run_goes_where_numpy_goes(tmp_path, case):
  outcome = loop.train(make_run(tmp_path, **options_of(case)), Stop())
  expected = simulate(**CASES[case][1])
  rows = [row for row in read_rows(tmp_path) if 'train/weight_norm' in row]
  assert [row['step'] for row in rows] == [1, 2, 4, 6, 8, 10, 12]
  for row in rows:
    norm = np.linalg.norm(expected[row['step']])
    np.testing.assert_allclose(row['train/weight_norm'], norm, rtol=1e-5)
  constants = CASES[case][1].get('offset', ZERO)
  losses = {
    number: evaluate({'w': expected[number]}, constants)['loss']
    for number in (4, 8, 12)
  }
  shown = {
    r['step']: r['eval/loss'] for r in read_rows(tmp_path) if 'eval/loss' in r
  }
  assert shown == pytest.approx(losses, rel=1e-4)
  record = outcome.record
  assert record['last'] == {'step': 12, 'loss': shown[12]}
  number = 12
  if 'better' in CASES[case][0]:
    number = min(shown, key=shown.get)
    assert record['best'] == {'step': number, 'loss': shown[number]}
  else:
    assert record['best'] is None
    assert not (tmp_path / 'best').exists()
  np.testing.assert_allclose(outcome.params['w'], expected[number], rtol=1e-5)
  assert outcome.constants is constants
  assert record['skipped_steps'] == 0
  assert record['peak_device_bytes'] is None  # A CPU does not tell.
  assert record['wall_seconds'] > record['seconds_per_step'] > 0
  state, position = read_state(tmp_path)
  assert int(state.step) == position['batches']['taken'] == 12


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Folders of the runs that were never interrupted, by case."""
  folders = {}

  def of(case):
    if case not in folders:
      folders[case] = tmp_path_factory.mktemp(case)
      loop.train(make_run(folders[case], **options_of(case)), Stop())
    return folders[case]

  return of


def told(caplog):
  """What the loop logged; others talk too where a test before let them."""
  return [
    record.getMessage()
    for record in caplog.records
    if record.name
    in ('gnlorp_jax.training.loop', 'gnlorp_jax.training.monitor')
  ]


# 'all' has everything but the choice of rows, which must be taken again.
@pytest.mark.parametrize('case', ['select', 'all'])
def test_stopped_and_killed_run_ends_as_the_whole_one(
  whole, tmp_path, caplog, case
):
  stop = Stop()
  with caplog.at_level(logging.INFO, logger='gnlorp_jax'):
    with pytest.raises(SystemExit) as ended:
      loop.train(make_run(tmp_path, **options_of(case, at=5, do=stop)), stop)
  assert ended.value.code == 128 + signal.SIGTERM
  assert told(caplog)[-1] == (
    f'SIGTERM: saved step 5 of 12 in {tmp_path}. The same command continues.'
  )
  assert int(read_state(tmp_path)[0].step) == 5
  with pytest.raises(RuntimeError, match='killed'):
    loop.train(make_run(tmp_path, **options_of(case, at=9, do=kill)), Stop())
  caplog.clear()
  with caplog.at_level(logging.INFO, logger='gnlorp_jax'):
    loop.train(make_run(tmp_path, **options_of(case)), Stop())
  assert 'Resuming toy at step ' in caplog.text
  assert_ends_alike(tmp_path, whole(case))


def kill():
  raise RuntimeError('killed')


class EndedOnce:
  """Evaluations, of which a signal ends those after so many, each once."""

  def __init__(self, stop, *numbers):
    self._stop, self._numbers, self._count = stop, numbers, 0

  def __call__(self, params, constants):
    self._count += 1
    if self._count in self._numbers:
      self._stop()
      raise Interrupted(signal.SIGTERM)
    return evaluate(params, constants)


# Evaluations of steps 4, 4 and 8; the kill comes after the one of step 8 was
# taken up, before it is in a checkpoint.
@pytest.mark.parametrize('case', ['plain', 'all'])
def test_evaluation_that_a_signal_ended_is_taken_up(
  whole, tmp_path, caplog, case
):
  stop = Stop()
  evaluates = EndedOnce(stop, 1, 2, 4)
  for number in (4, 4, 8):
    run = make_run(tmp_path, evaluate=evaluates, **options_of(case))
    with pytest.raises(SystemExit) as ended:
      loop.train(run, stop)
    assert ended.value.code == 128 + signal.SIGTERM
    assert told(caplog)[-1] == (
      f'SIGTERM: saved step {number} of 12 in {tmp_path}. The same command '
      'continues.'
    )
    assert int(read_state(tmp_path)[0].step) == number
    stop.received = None
  with pytest.raises(RuntimeError, match='killed'):
    loop.train(make_run(tmp_path, **options_of(case, at=9, do=kill)), Stop())
  loop.train(make_run(tmp_path, **options_of(case)), Stop())
  assert_ends_alike(tmp_path, whole(case))


def test_last_evaluation_that_a_signal_ended_is_taken_up(whole, tmp_path):
  stop = Stop()
  run = make_run(tmp_path, evaluate=EndedOnce(stop, 3), **options_of('better'))
  with pytest.raises(SystemExit):
    loop.train(run, stop)
  _, position = read_state(whole('better'))
  for _ in range(2):  # Who asks again is told the same.
    outcome = loop.train(make_run(tmp_path, **options_of('better')), Stop())
    for name in ('best', 'last'):
      assert outcome.record[name] == position['record'][name]
    assert timeless(tmp_path) == timeless(whole('better'))


def test_first_evaluation_that_a_signal_ended_is_taken_up(tmp_path):
  stop = Stop()
  every = loop.Every(log=2, evaluate=4, checkpoint=3, evaluate_first=True)
  evaluates = EndedOnce(lambda: None, 1)  # The signal is another process's.
  with pytest.raises(SystemExit) as ended:
    loop.train(make_run(tmp_path, every=every, evaluate=evaluates), stop)
  assert ended.value.code == 128 + signal.SIGTERM
  loop.train(make_run(tmp_path, every=every, evaluate=evaluates), stop)
  rows = [row['step'] for row in read_rows(tmp_path) if 'eval/loss' in row]
  assert rows == [0, 4, 8, 12]


def not_finite_after(number):
  """A step of which the weights are NaN from a number on."""

  def train_step(state, batch, constants):
    state, values = COMPILED(state, batch, constants)
    if int(state.step) > number:
      state = state._replace(params={'w': state.params['w'] * jnp.nan})
    return state, values  # That no row tells of.

  return train_step


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
  every = loop.Every(log=100, evaluate=100, checkpoint=1)
  run = make_run(tmp_path, every=every, train_step=not_finite_after(5))
  text = '^The weights are not finite at step 6, .* They are not saved; '
  with pytest.raises(DivergedError, match=text):
    loop.train(run, Stop())
  state, _ = read_state(tmp_path)
  assert int(state.step) == 5 and np.isfinite(state.params['w']).all()


def test_weights_that_are_not_finite_are_not_resumed(tmp_path):
  loop.train(make_run(tmp_path, steps=5), Stop())
  with Checkpointer(tmp_path / 'checkpoints') as saved:
    state, position, metadata = saved.restore_latest(abstract())
    params = {'w': state.params['w'].at[1].set(jnp.inf)}
    state = state._replace(step=state.step + 1, params=params)
    saved.save(6, state, position, metadata)
  text = '^The weights are not finite at step 6, .* delete it, and the one '
  with pytest.raises(DivergedError, match=text):
    loop.train(make_run(tmp_path), Stop())
  shutil.rmtree(tmp_path / 'checkpoints' / '6')
  assert loop.train(make_run(tmp_path), Stop()).record['last']['step'] == 12


def test_signal_during_the_last_step_changes_nothing(whole, tmp_path):
  stop = Stop()
  batches = Batches(at=STEPS, do=stop)
  outcome = loop.train(make_run(tmp_path, batches=batches), stop)
  assert outcome.record['last']['step'] == STEPS
  assert_ends_alike(tmp_path, whole('plain'))


def test_rows_hold_what_a_step_and_the_optimizer_tell(whole):
  rows = read_rows(whole('plain'))
  trained = [row for row in rows if 'train/loss' in row]
  for number, row in enumerate(trained):
    expected = {
      'step', 'train/loss', 'train/weight_norm', 'train/skipped_steps',
      'momentum/size', 'optim/learning_rate', 'optim/state_bytes',
    }  # fmt: skip
    if number:  # The first step compiled.
      expected.add('train/tokens_per_second')
    assert set(row) == expected
    assert row['optim/learning_rate'] == RATE
    assert row['optim/state_bytes'] == 16


# Starting, finishing, resuming.


def test_first_evaluation_may_come_before_the_first_step(tmp_path):
  every = loop.Every(log=2, evaluate=4, checkpoint=3, evaluate_first=True)
  stop = Stop()
  batches = Batches(at=5, do=stop)
  with pytest.raises(SystemExit):
    loop.train(make_run(tmp_path, every=every, batches=batches), stop)
  loop.train(make_run(tmp_path, every=every), Stop())
  rows = [row for row in read_rows(tmp_path) if 'eval/loss' in row]
  assert [row['step'] for row in rows] == [0, 4, 8, 12]
  assert rows[0]['eval/loss'] == evaluate({'w': np.zeros(D)}, ZERO)['loss']


def test_finished_run_is_only_told_anew(whole, tmp_path, caplog):
  loop.train(make_run(tmp_path, **options_of('better')), Stop())
  before = read_rows(tmp_path)
  run = make_run(tmp_path, **options_of('better', at=13, do=kill))
  caplog.clear()
  with caplog.at_level(logging.INFO, logger='gnlorp_jax'):
    outcome = loop.train(run, Stop())
  assert told(caplog) == [
    f'{tmp_path} is finished at step 12: its results are written anew. More '
    'steps, such as --steps 24, go on.'
  ]
  assert read_rows(tmp_path) == before
  best = outcome.record['best']
  expected = simulate()[best['step']]
  np.testing.assert_allclose(outcome.params['w'], expected, rtol=1e-5)


def test_longer_run_goes_on_from_a_finished_one(tmp_path):
  loop.train(make_run(tmp_path, steps=7), Stop())
  outcome = loop.train(make_run(tmp_path), Stop())
  np.testing.assert_allclose(outcome.params['w'], simulate()[-1], rtol=1e-5)


def test_fewer_steps_than_the_run_holds_is_an_error(tmp_path):
  loop.train(make_run(tmp_path), Stop())
  with pytest.raises(ValueError) as error:
    loop.train(make_run(tmp_path, steps=5), Stop())
  assert str(error.value) == (
    f'{tmp_path} holds step 12, beyond steps=5. Raise steps or use another run '
    'directory.'
  )


def test_other_settings_are_an_error(tmp_path):
  loop.train(make_run(tmp_path, steps=1), Stop())
  with pytest.raises(ValueError) as error:
    loop.train(make_run(tmp_path, metadata={'features': 4}), Stop())
  assert str(error.value) == (
    f'Checkpoint in {tmp_path} was made with other settings: features 3 != 4. '
    'Use another run directory or the same settings. To go on all the same, '
    "name what may differ: --accept 'features'."
  )


def test_other_settings_may_be_accepted(tmp_path):
  loop.train(make_run(tmp_path, steps=1), Stop())
  changed = {'metadata': {'features': 4}, 'accepted': ('features',)}
  loop.train(make_run(tmp_path, **changed), Stop())
  # They are the run's own from then on.
  loop.train(make_run(tmp_path, metadata={'features': 4}), Stop())


def test_constants_are_made_once_by_whoever_needs_them(tmp_path):
  made = []

  def constants():
    made.append('resumed')
    return ZERO

  run = make_run(tmp_path, steps=2, constants=constants)
  loop.train(run, Stop())
  assert made == []
  loop.train(run._replace(steps=4, batches=Batches()), Stop())
  assert made == ['resumed']


def test_state_that_was_read_is_renewed(tmp_path):
  """Such as with another learning rate, which otherwise is that it had."""

  def renew(state):
    rate = jax.device_put(jnp.float32(0.0), state.opt_state['rate'].sharding)
    return state._replace(opt_state=state.opt_state | {'rate': rate})

  loop.train(make_run(tmp_path, steps=6, renew=renew), Stop())
  before = read_state(tmp_path)[0]
  np.testing.assert_allclose(before.params['w'], simulate()[6], rtol=1e-5)
  loop.train(make_run(tmp_path, renew=renew), Stop())
  after = read_state(tmp_path)[0]
  np.testing.assert_array_equal(after.params['w'], before.params['w'])
  assert int(after.step) == 12 and after.opt_state['rate'] == 0


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path):
  loop.train(make_run(tmp_path, keep=2), Stop())
  names = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert names == [9, 12]


# The best parameters.


def up_and_down(params, constants):
  """Falls, and rises from the eighth step on."""
  del constants
  size = float(np.linalg.norm(params['w']))
  turn = float(np.linalg.norm(simulate()[8]))
  return {'loss': abs(size - turn)}


def test_best_parameters_are_kept_and_returned(tmp_path):
  run = make_run(tmp_path, better=lower, evaluate=up_and_down)
  outcome = loop.train(run, Stop())
  assert outcome.record['best']['step'] == 8
  assert outcome.record['last']['step'] == 12
  np.testing.assert_allclose(outcome.params['w'], simulate()[8], rtol=1e-5)
  kept = sorted(int(path.name) for path in (tmp_path / 'best').iterdir())
  assert kept == [4, 8]


def test_weights_that_are_not_finite_are_never_the_best(tmp_path):
  """A share of right answers is a number whatever the weights are."""
  record = {'best': {'step': 2, 'loss': 2.0}, 'last': {'step': 2, 'loss': 2.0}}
  params = fresh().params
  options = (tmp_path, lower, None, abstract().params, {})
  with Keeper(*options, record) as keeper:
    with pytest.raises(
      DivergedError, match='^The weights are not finite at st'
    ):
      keeper.note(4, {'loss': 1.0}, {'w': params['w'] * jnp.nan})
    assert keeper.record['best'] == record['best']
    assert not list(tmp_path.glob('[0-9]*'))
    # What is no better is not kept, and not looked at.
    assert not keeper.note(6, {'loss': 3.0}, {'w': params['w'] * jnp.nan})
    assert keeper.note(8, {'loss': 1.0}, params)
  assert [path.name for path in tmp_path.glob('[0-9]*')] == ['8']


def test_equal_evaluations_leave_the_first_the_best(tmp_path):
  run = make_run(
    tmp_path, better=lower, evaluate=lambda params, constants: {'loss': 1.0}
  )
  assert loop.train(run, Stop()).record['best'] == {'step': 4, 'loss': 1.0}


def test_no_number_is_worse_than_any(tmp_path):
  found = iter([np.nan, 3.0, np.inf])
  run = make_run(
    tmp_path,
    better=lower,
    evaluate=lambda params, constants: {'loss': next(found)},
  )
  record = loop.train(run, Stop()).record
  assert record['best'] == {'step': 8, 'loss': 3.0}
  assert record['last'] == {'step': 12, 'loss': None}
  json.dumps(record, allow_nan=False)
  losses = [r['eval/loss'] for r in read_rows(tmp_path) if 'eval/loss' in r]
  assert losses == [None, 3.0, None]


KEEPING_THE_BEST = {
  'better': lower,
  'every': loop.Every(log=2, evaluate=4, checkpoint=3, evaluate_first=True),
}


@pytest.fixture(scope='module')
def with_the_best(tmp_path_factory):
  folder = tmp_path_factory.mktemp('best') / 'whole'
  loop.train(make_run(folder, **KEEPING_THE_BEST), Stop())
  return folder


@pytest.mark.parametrize('number', [0, 8])
def test_best_is_forgotten_of_steps_after_the_checkpoint(
  with_the_best, tmp_path, monkeypatch, number
):
  """A kill between the best parameters and the checkpoint that knows them."""
  options = KEEPING_THE_BEST
  original = Checkpointer.save

  def save(self, step, *args, **kwargs):
    if step == number and self._directory.name == 'checkpoints':
      kill()
    return original(self, step, *args, **kwargs)

  folder = tmp_path / 'killed'
  with monkeypatch.context() as patch:
    patch.setattr(Checkpointer, 'save', save)
    with pytest.raises(RuntimeError, match='killed'):
      loop.train(make_run(folder, **options), Stop())
  assert (folder / 'best' / str(number)).is_dir()
  assert not (folder / 'checkpoints' / str(number)).exists()
  loop.train(make_run(folder, **options), Stop())
  assert_ends_alike(folder, with_the_best)
  for name in (folder, with_the_best):
    assert len(list((name / 'best').iterdir())) == 2


def test_rows_are_on_the_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
  events = []
  sync, save = metrics.MetricsWriter.sync, Checkpointer.save

  def synced(self):
    sync(self)
    steps = [row['step'] for row in read_rows(tmp_path)]
    events.append(('rows', steps[-1]))

  def saved(self, step, *args, **kwargs):
    events.append(('checkpoint', step))
    return save(self, step, *args, **kwargs)

  monkeypatch.setattr(metrics.MetricsWriter, 'sync', synced)
  monkeypatch.setattr(Checkpointer, 'save', saved)
  loop.train(make_run(tmp_path), Stop())
  assert events[:4] == [
    ('rows', 2),
    ('checkpoint', 3),
    ('rows', 6),
    ('checkpoint', 6),
  ]


def test_missing_best_parameters_are_told(tmp_path):
  run = make_run(tmp_path, better=lower, evaluate=up_and_down)
  loop.train(run, Stop())
  for path in (tmp_path / 'best').iterdir():
    path.rename(tmp_path / f'moved_{path.name}')
  evaluated = []
  more = run._replace(
    batches=Batches(),
    steps=STEPS + 4,
    evaluate=lambda *_: evaluated.append(1),
  )
  with pytest.raises(ValueError) as error:
    loop.train(more, Stop())
  assert not evaluated  # It is told at once, not after all steps.
  assert str(error.value) == (
    f'{tmp_path} lacks its best model, that of step 8. Delete the folder to '
    'train it anew.'
  )


def test_run_that_no_longer_keeps_the_best_ends_with_the_last(tmp_path):
  run = make_run(tmp_path, better=lower, evaluate=up_and_down)
  loop.train(run, Stop())
  outcome = loop.train(run._replace(better=None, batches=Batches()), Stop())
  assert outcome.record['best'] is None
  np.testing.assert_allclose(outcome.params['w'], simulate()[-1], rtol=1e-5)


# Patience.

EARLY = {
  'steps': 20,
  'better': lower,
  'evaluate': up_and_down,
  'every': loop.Every(log=3, evaluate=2, checkpoint=5),
  'patience': 2,
}


@pytest.fixture(scope='module')
def ended_early(tmp_path_factory):
  folder = tmp_path_factory.mktemp('early') / 'whole'
  return folder, loop.train(make_run(folder, **EARLY), Stop())


def test_run_ends_when_evaluations_were_no_better(ended_early):
  folder, outcome = ended_early
  assert outcome.record['best']['step'] == 8
  assert outcome.record['last']['step'] == 12
  assert outcome.record['since_best'] == 2
  np.testing.assert_allclose(outcome.params['w'], simulate()[8], rtol=1e-5)
  state, position = read_state(folder)
  assert int(state.step) == position['batches']['taken'] == 12
  assert read_rows(folder)[-1]['step'] == 12


# Stopped at a checkpoint of the signal's; killed, it begins again before that.
@pytest.mark.parametrize('killed', [False, True])
def test_interrupted_run_ends_early_where_the_whole_one_does(
  ended_early, tmp_path, killed
):
  stop = Stop()
  batches = Batches(at=11, do=kill if killed else stop)
  with pytest.raises((SystemExit, RuntimeError)):
    loop.train(make_run(tmp_path, **EARLY, batches=batches), stop)
  state, position = read_state(tmp_path)
  assert int(state.step) == (10 if killed else 11)
  assert position['record']['since_best'] == 1
  loop.train(make_run(tmp_path, **EARLY), Stop())
  assert_ends_alike(tmp_path, ended_early[0])


def test_an_evaluation_that_is_found_once_more_does_not_count(tmp_path):
  """A kill before any checkpoint but that of the first evaluation."""
  every = loop.Every(log=3, evaluate=4, checkpoint=5, evaluate_first=True)
  options = {'better': lower, 'every': every, 'patience': 1}
  with pytest.raises(RuntimeError, match='killed'):
    batches = Batches(at=3, do=kill)
    loop.train(make_run(tmp_path, **options, batches=batches), Stop())
  assert int(read_state(tmp_path)[0].step) == 0
  outcome = loop.train(make_run(tmp_path, **options), Stop())
  assert outcome.record['last']['step'] == 12
  rows = [r['step'] for r in read_rows(tmp_path) if 'eval/loss' in r]
  assert rows == [0, 4, 8, 12]


def test_ended_run_stays_ended_until_patience_is_raised(
  ended_early, tmp_path, caplog
):
  folder = tmp_path / 'copy'
  shutil.copytree(ended_early[0], folder)
  with caplog.at_level(logging.INFO, logger='gnlorp_jax.training'):
    outcome = loop.train(make_run(folder, **EARLY), Stop())
  assert outcome.record['last'] == ended_early[1].record['last']
  np.testing.assert_array_equal(outcome.params['w'], ended_early[1].params['w'])
  assert told(caplog)[-1] == (
    'toy ends at step 12 of 20: no evaluation was better than that of step 8 '
    'for patience=2 of them. Raise patience to go on.'
  )
  outcome = loop.train(make_run(folder, **EARLY | {'patience': 3}), Stop())
  assert outcome.record['last']['step'] == 14


def test_patience_needs_the_best(tmp_path):
  with pytest.raises(ValueError) as error:
    loop.train(make_run(tmp_path, patience=2), Stop())
  assert str(error.value) == (
    'patience=2 counts evaluations since the best one, and this run keeps no '
    'best. Keep it, or leave patience out.'
  )


# What is watched.


def test_evaluations_and_stops_are_logged_with_the_runs_name(tmp_path, caplog):
  with caplog.at_level(logging.INFO, logger='gnlorp_jax.training'):
    loop.train(make_run(tmp_path / 'a', steps=4), Stop())
    loop.train(make_run(tmp_path / 'b', steps=4, name=''), Stop())
  loss = read_rows(tmp_path / 'a')[-1]['eval/loss']
  found = [line for line in told(caplog) if 'tokens/s' not in line]
  said = f'evaluated at step 4: loss {loss:.4f}'
  assert found == [f'toy: {said}', said]


def test_weights_that_are_not_finite_end_the_run(tmp_path):
  def broken(state, batch, constants):
    state, values = COMPILED(state, batch, constants)
    return state, values | {'weight_norm': jnp.float32(np.nan)}

  with pytest.raises(DivergedError, match='not finite at step 1, and no step'):
    loop.train(make_run(tmp_path, train_step=broken), Stop())
  assert read_rows(tmp_path)[-1]['train/weight_norm'] is None


def test_gradients_that_are_never_finite_end_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(monitor.Health, 'LIMIT', 6)

  def skipping(state, batch, constants):
    state, values = COMPILED(state, batch, constants)
    state = state._replace(skipped=state.skipped + (state.step > 4))
    return state, values | {'skipped_steps': state.skipped}

  with pytest.raises(DivergedError, match='No gradient was finite in the last'):
    loop.train(make_run(tmp_path, train_step=skipping), Stop())
  # Four good steps, and no good one from the row of step 4 to that of step 10.
  assert read_rows(tmp_path)[-1]['step'] == 10
  rates = [r.get('optim/learning_rate') for r in read_rows(tmp_path)]
  assert rates[-1] == RATE


def test_skipped_steps_are_counted_across_processes(tmp_path):
  def skipping(state, batch, constants):
    state, values = COMPILED(state, batch, constants)
    state = state._replace(skipped=state.skipped + (state.step % 4 == 3))
    return state, values | {'skipped_steps': state.skipped}

  run = make_run(tmp_path, train_step=skipping)
  loop.train(run._replace(steps=6), Stop())
  outcome = loop.train(run._replace(batches=Batches()), Stop())
  assert outcome.record['skipped_steps'] == 3


# The bare loop.


def test_loop_is_one_step_ahead_of_the_device(monkeypatch):
  events = []

  def train_step(state, batch, *constants):
    number = state + 1
    events.append(f'dispatch {number}')
    return number, {'loss': f'loss {number}'}

  monkeypatch.setattr(
    jax, 'block_until_ready', lambda x: x and events.append(f'wait for {x}')
  )
  batches = iter([draw(1)] * 5)
  for taken in loop.steps(train_step, 0, batches, MESH, range(1, 4)):
    events.append(f'yield {taken.number}')
  assert events == [
    *('dispatch 1', 'yield 1'),
    *('dispatch 2', 'wait for loss 1', 'yield 2'),
    *('dispatch 3', 'wait for loss 2', 'yield 3'),
  ]
  assert len(list(batches)) == 2  # No batch is taken in advance.


def test_bare_loop_hands_on_what_it_is_given():
  seen = []

  def train_step(state, batch, *rest):
    seen.append((state, batch['inputs'].shape, *rest))
    return state + 1, {'loss': None}

  taken = list(
    loop.steps(
      *(train_step, 10, [draw(1), draw(2)], MESH, range(5, 7), 'a', 'b'),
      select=without_memory(
        lambda state, batch: jax.tree.map(lambda x: x[:2], batch)
      ),
    )
  )
  assert seen == [
    (10, (2, D), 'a', 'b'),
    (11, (2, D), 'a', 'b'),
  ]
  assert [(t.number, t.state) for t in taken] == [(5, 11), (6, 12)]
  np.testing.assert_array_equal(taken[0].batch['inputs'], draw(1)['inputs'][:2])


def test_bare_loop_puts_batches_on_all_devices():
  mesh = sharding.make_mesh(2, 2, devices=jax.devices()[:4])
  (taken,) = loop.steps(
    lambda state, batch: (state, {'loss': None}),
    *(None, Batches(), mesh, range(1, 2)),
  )
  assert taken.batch['inputs'].sharding.num_devices == 4
