"""Many runs: which learning rate is best, which runs are made, what they leave.

The runs here are stand-ins whose loop returns at once.
"""

import json
import math
import signal
import types

import pytest

from gnlorp_jax.recipes import grid
from gnlorp_jax.training import loop, monitor
from gnlorp_jax.training.compatibility import Since
from gnlorp_jax.training.interrupt import Interrupted


def result(seed, value, *, rate=1e-3, **others):
  return {
    'seed': seed,
    'learning_rate': rate,
    'main_metric': 'accuracy',
    'best': {'step': 5, 'accuracy': value},
    **others,
  }


# The best learning rate.


@pytest.mark.parametrize('worst', [None, math.nan])
def test_no_number_is_worse_than_any_number(worst):
  results = [result(0, worst, rate=1e-3), result(0, -0.9, rate=1e-4)]
  assert grid.best_learning_rate(results) == 1e-4
  assert grid.best_learning_rate(results[::-1]) == 1e-4


@pytest.mark.parametrize('worst', [None, math.nan])
def test_no_number_is_worse_than_any_loss(worst):
  results = [
    result(0, worst, rate=1e-3, higher_is_better=False),
    result(0, 99.0, rate=1e-4, higher_is_better=False),
  ]
  assert grid.best_learning_rate(results) == 1e-4
  assert grid.best_learning_rate(results[::-1]) == 1e-4


def test_equally_good_rates_give_the_lowest():
  results = [result(0, 0.5, rate=r) for r in (3e-4, 1e-4, 1e-3)]
  assert grid.best_learning_rate(results) == 1e-4


def test_learning_rate_is_chosen_on_the_seeds_that_ran_with_all():
  results = [
    result(0, 0.7, rate=1e-4),
    result(0, 0.8, rate=1e-3),
    # A bad second seed of the chosen rate must not unchoose it.
    result(1, 0.2, rate=1e-3),
  ]
  assert grid.best_learning_rate(results) == 1e-3


def test_the_lowest_loss_is_the_best():
  results = [
    result(0, loss, rate=rate, higher_is_better=False)
    for rate, loss in ((1e-4, 0.7), (1e-3, 0.2), (1e-2, 0.9))
  ]
  assert grid.best_learning_rate(results) == 1e-3


def test_no_results_are_an_error():
  with pytest.raises(ValueError, match='^There are no results to choose'):
    grid.best_learning_rate([])


# The search.


def test_search_takes_the_best_rate_for_the_other_seeds(caplog):
  values = {0.01: 0.2, 0.02: 0.6, 0.03: None}
  ran = []

  def run(rate, seed):
    ran.append((rate, seed))
    return result(seed, values[rate], rate=rate, group='rte lora')

  with caplog.at_level('INFO'):
    found = grid.search((0.01, 0.02, 0.03), (5, 6, 7), run)
  expected = [(0.01, 5), (0.02, 5), (0.03, 5), (0.02, 6), (0.02, 7)]
  assert ran == expected
  assert [(r['learning_rate'], r['seed']) for r in found] == expected
  assert caplog.messages == [
    'rte lora: learning rate 0.02 has the best accuracy with seed 5 '
    '(0.01: 0.2000, 0.02: 0.6000, 0.03: no number).'
  ]


def test_without_rates_every_seed_runs_with_that_of_the_settings(caplog):
  ran = []

  def run(rate, seed):
    ran.append((rate, seed))
    return result(seed, 0.5)

  with caplog.at_level('INFO'):
    grid.search(None, (3, 1), run)
  assert ran == [(None, 3), (None, 1)]
  assert not caplog.messages


# One run.


@pytest.fixture
def member(tmp_path):
  """A run without a loop, and what its `finish` was called with."""
  run = types.SimpleNamespace(
    name='demo',
    folder=tmp_path,
    metadata={'optim.rank': 2, 'rules': ('a',)},
    accepted=(),
    since=Since(),
  )
  finished = []
  made = grid.Member(
    run,
    finish=finished.append,
    describe=lambda: {'group': '', 'learning_rate': 0.1, 'seed': 0},
    metric='accuracy',
    higher_is_better=True,
  )
  for kind in ('checkpoints', 'best'):
    for number in (3, 6):
      (tmp_path / kind / str(number)).mkdir(parents=True)
  return types.SimpleNamespace(
    member=made, folder=tmp_path, finished=finished, trained=0
  )


RECORD = {
  'best': {'step': 3, 'accuracy': 0.8},
  'last': {'step': 6, 'accuracy': 0.7},
  'seconds_per_step': 0.5,
}


@pytest.fixture
def trains(monkeypatch, member):
  """Puts a loop in place that ends with a record, or an error."""

  def use(ending):
    def train(run, stop):
      member.trained += 1
      if isinstance(ending, BaseException):
        raise ending
      return loop.Outcome({'w': 1}, {}, ending)

    monkeypatch.setattr(loop, 'train', train)

  return use


def run_once(member, *, received=None, keep='best', is_single=False):
  stop = types.SimpleNamespace(received=received)
  return grid.run_once(member.member, stop, keep=keep, is_single=is_single)


def files_of(folder):
  return {
    str(path.relative_to(folder))
    for path in folder.glob('*/*')
    if path.parent.name in ('checkpoints', 'best')
  }


@pytest.mark.parametrize(
  ('keep', 'left'),
  [
    ('best', {'best/3'}),
    ('none', set()),
    ('all', {'best/3', 'best/6', 'checkpoints/3', 'checkpoints/6'}),
  ],
)
def test_finished_run_leaves_its_result_and_what_is_kept(
  member, trains, keep, left
):
  trains(RECORD)
  found = run_once(member, keep=keep)
  assert found == {
    **RECORD,
    'group': '',
    'learning_rate': 0.1,
    'seed': 0,
    'main_metric': 'accuracy',
    'higher_is_better': True,
    'settings': {'optim.rank': 2, 'rules': ('a',)},
  }
  text = (member.folder / 'result.json').read_text()
  assert json.loads(text) == json.loads(json.dumps(found))
  assert files_of(member.folder) == left
  assert [outcome.params for outcome in member.finished] == [{'w': 1}]


def test_finished_run_is_read_and_what_a_kill_left_over_removed(member, trains):
  trains(RECORD)
  first = run_once(member, keep='all')
  again = run_once(member, keep='best')
  assert member.trained == len(member.finished) == 1
  assert again == json.loads(json.dumps(first))
  assert files_of(member.folder) == {'best/3'}


def test_finished_run_of_other_settings_is_refused(member, trains):
  trains(RECORD)
  run_once(member)
  member.member.run.metadata['optim.rank'] = 3
  with pytest.raises(ValueError, match='optim.rank 2 != 3'):
    run_once(member)


def test_finished_run_of_accepted_settings_is_read(member, trains):
  trains(RECORD)
  run_once(member)
  member.member.run.metadata['optim.rank'] = 3
  member.member.run.accepted = ('optim.rank',)
  assert run_once(member)['settings']['optim.rank'] == 2
  assert member.trained == 1


def test_run_without_a_best_evaluation_is_judged_by_its_last(member, trains):
  trains(RECORD | {'best': None})
  assert run_once(member)['best'] == RECORD['last']


def test_diverged_run_of_a_grid_is_a_result_without_a_number(
  member, trains, caplog
):
  trains(monitor.DivergedError('No gradient was finite.'))
  found = run_once(member)
  assert found['best'] == found['last'] == {'step': None, 'accuracy': None}
  assert found['diverged'] == 'No gradient was finite.'
  assert found['seconds_per_step'] is None
  assert 'demo diverged and is given up: No gradient was' in caplog.text
  assert not member.finished
  assert files_of(member.folder) == set()
  # It is not repeated, and loses against any number.
  assert run_once(member) == json.loads(json.dumps(found))
  assert member.trained == 1
  other = result(0, -1.0, rate=9.0)
  assert grid.best_learning_rate([found, other]) == 9.0


def test_diverged_only_run_is_an_error(member, trains):
  trains(monitor.DivergedError('No gradient was finite.'))
  with pytest.raises(monitor.DivergedError, match='No gradient was finite.'):
    run_once(member, is_single=True)
  assert not (member.folder / 'result.json').exists()
  assert len(files_of(member.folder)) == 4


def test_other_errors_end_a_grid(member, trains):
  trains(ValueError('The data are not there.'))
  with pytest.raises(ValueError, match='not there'):
    run_once(member)
  assert not (member.folder / 'result.json').exists()


def test_signal_while_a_run_is_finished_ends_the_grid_after_it(member, trains):
  trains(RECORD)
  with pytest.raises(SystemExit) as stop:
    run_once(member, received=15)
  assert stop.value.code == 143
  assert (member.folder / 'result.json').is_file()
  assert not list(member.folder.glob('*.tmp'))


def test_signal_while_results_are_made_leaves_them_to_the_next_command(
  member, trains, caplog
):
  trains(Interrupted(signal.SIGTERM))  # Perhaps to another process.
  with pytest.raises(SystemExit) as stop:
    run_once(member)
  assert stop.value.code == 143
  assert not (member.folder / 'result.json').exists()
  assert len(files_of(member.folder)) == 4
  assert caplog.messages == [
    'SIGTERM: demo is trained, and its results are not written yet. The same '
    'command does it.'
  ]


def whole_result(**changes):
  return {
    'learning_rate': 1e-3,
    'seed': 0,
    'best': {'step': 4, 'loss': 3.25},
    'last': {'step': 5, 'loss': 3.5},
    'main_metric': 'loss',
    'seconds_per_step': 0.1,
    'settings': {},
    **changes,
  }


@pytest.mark.parametrize(
  ('text', 'fault'),
  [
    ('', 'Expecting value: line 1 column 1 (char 0)'),
    ('[]', "expected a JSON object, got '[]'"),
    ('{}', "it lacks the fields ['best', 'last', 'learning_rate', 'main_me"),
    ('[' * 100_000, ''),
    (json.dumps(whole_result(best=None)), 'its best=None and settings must be'),
    (json.dumps(whole_result(best={'step': 4})), "its best={'step': 4} and"),
    (json.dumps(whole_result(settings=[])), "its best={'step': 4, 'loss'"),
  ],
)
def test_damaged_result_is_told_with_its_mending(tmp_path, text, fault):
  path = tmp_path / 'x' / 'result.json'
  path.parent.mkdir()
  path.write_text(text)
  with pytest.raises(ValueError) as error:
    grid.read_results(tmp_path, '*')
  assert str(error.value).startswith(f'{path} is no result of a run: {fault}')
  assert str(error.value).endswith(
    'Remove it, and the run goes on from its last checkpoint or anew.'
  )


def test_results_of_a_table_have_more_fields(tmp_path):
  (tmp_path / 'x').mkdir()
  path = tmp_path / 'x' / 'result.json'
  path.write_text(json.dumps(whole_result()))
  with pytest.raises(ValueError, match=r"lacks the fields \['task'\]"):
    grid.read_results(tmp_path, '*', ['task'])


def test_results_are_read_in_the_order_of_their_folders(tmp_path):
  for name in ('b/x', 'a/y', 'a/x'):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    result = whole_result(name=name)
    (folder / 'result.json').write_text(json.dumps(result))
  (tmp_path / 'a/unfinished').mkdir()
  found = grid.read_results(tmp_path, '*/*')
  assert [one['name'] for one in found] == ['a/x', 'a/y', 'b/x']


def test_shown_grid_has_a_row_for_every_run(capsys):
  found = [
    {
      'learning_rate': 3e-4,
      'seed': 0,
      'best': {'step': 4, 'loss': 3.25, 'perplexity': 25.79},
    },
    {'learning_rate': 0.1, 'seed': 0, 'best': {'step': None, 'loss': None}},
  ]
  grid.show('runs/x', found)
  shown = capsys.readouterr().out.replace('│', ' ')
  rows = [line.split() for line in shown.splitlines()]
  assert ['0.0003', '0', '3.2500', '25.7900', '4'] in rows
  assert ['0.1', '0', 'no', 'number', 'no', 'number', 'None'] in rows
  assert 'results.json and the runs are in runs/x.' in shown
