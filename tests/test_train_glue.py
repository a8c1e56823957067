"""Whole runs of train_glue.py: what they leave, how they go on, how they fail.

A tiny run is made once. It is stopped, broken off and repeated in copies, which
must end as it did, bit for bit; test_resume.py kills a search over seeds.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

import train_glue
from gnlorp_jax.models import heads, hf, roberta
from gnlorp_jax.recipes.glue import evaluation, recipe, settings, tasks
from gnlorp_jax.training import loop, metrics
from gnlorp_jax.training.checkpoint import Checkpointer

# What depends on the clock, the machine or the process.
TIMES = ('seconds_per_step', 'wall_seconds', 'peak_device_bytes')

# Dropout of both kinds, so that a step depends on its seeds.
OPTIONS = [
  *('--optim.rank', '2', '--adapter.rank', '2', '--batch-size', '8'),
  *('--eval-batch-size', '8', '--optim.update-proj-gap', '2'),
  *('--epochs', '3', '--log-every', '1', '--mesh.data', '1'),
  *('--dropout', '0.1', '--adapter.dropout', '0.1'),
  *('--data.max-train-examples', '24', '--data.max-dev-examples', '100'),
  *('--keep', 'all'),
]
LORA = [*OPTIONS, '--method', 'lora', '--optim.learning-rate', '0.001']
RUN = 'demo/lora/lr0.001_seed0'


pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('compiled_once', 'logging_as_before'),
]


@pytest.fixture(scope='module')
def whole(tmp_path_factory, compiled_once):
  """A finished run of nine steps, with its checkpoints."""
  folder = tmp_path_factory.mktemp('whole')
  train_glue.main([*LORA, '--run-dir', str(folder)])
  return folder


def loaded(args):
  """Settings and examples of a command line."""
  config = settings.parse(args, '')
  return config, tasks.load_task(config, tasks.find_tasks(config)[0])


def read(folder):
  text = (pathlib.Path(folder) / RUN / 'result.json').read_text()
  assert 'NaN' not in text
  return json.loads(text)


def without_times(result):
  return {name: v for name, v in result.items() if name not in TIMES}


def rows_of(folder):
  """The metrics, apart from measured time."""
  rows = metrics.read_metrics(folder / RUN / 'metrics.jsonl')
  for row in rows:
    row.pop('train/tokens_per_second', None)
  return rows


def arrays_of(folder, kind, like):
  with Checkpointer(folder / RUN / kind, read_only=True) as saved:
    return jax.tree.map(np.asarray, saved.restore_latest(like)[0])


def assert_same_run(found, expected):
  assert without_times(read(found)) == without_times(read(expected))
  assert rows_of(found) == rows_of(expected)
  config, data = loaded([*LORA, '--run-dir', str(expected)])
  like = recipe.prepare(config, data, 'lora').program.abstract_state
  for kind, tree in (('checkpoints', like), ('best', like.params)):
    jax.tree.map(
      np.testing.assert_array_equal,
      *(arrays_of(folder, kind, tree) for folder in (found, expected)),
    )


def test_what_a_run_leaves(whole):
  result = read(whole)
  assert (result['steps'], result['epochs']) == (9, 3)
  steps = [row['step'] for row in rows_of(whole) if 'eval/loss' in row]
  assert steps == [3, 6, 9]  # After every epoch.
  evaluations = {
    row['step']: row['eval/matthews_correlation']
    for row in rows_of(whole)
    if 'eval/loss' in row
  }
  best = max(evaluations, key=evaluations.get)  # The first of equals.
  assert result['best']['step'] == best
  assert result['best']['matthews_correlation'] == evaluations[best]
  assert result['last']['step'] == 9
  assert result['seconds_per_step'] > 0
  rates = [row.get('optim/learning_rate') for row in rows_of(whole)]
  assert rates[0] == pytest.approx(0.001)
  names = {path.name for path in whole.iterdir()}
  assert names == {'demo', 'results.json', 'results.md', 'results.png'}
  lines = (whole / RUN / 'predictions' / 'demo.tsv').read_text().splitlines()
  assert len(lines) == 501 and lines[0] == 'index\tprediction'


def test_checkpoint_holds_what_trains_alone(whole):
  folder = whole / RUN / 'checkpoints' / '9'
  size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  result = read(whole)
  trained = 4 * result['trainable_parameters']
  everything = 3 * 4 * result['parameters']
  assert trained < size < everything / 2


def test_exported_model_says_what_the_predictions_say(whole):
  folder = whole / RUN / 'hf'
  architecture = roberta.config_from_hf(hf.load_config(folder))
  model = roberta.make_classifier(architecture, 2)
  params = roberta.load_classifier(
    folder, architecture, 2, jax.random.key(0), head=heads.Head((0, 1), '')
  )
  words = [*LORA, '--run-dir', str(whole), '--init-from', str(folder)]
  _, data = loaded(words)
  split = data.predicted['test']
  tokens = np.full((len(split.encoded), data.max_length), 1, np.int32)
  for row, ids in zip(tokens, split.encoded, strict=True):
    row[: len(ids)] = ids
  classes = np.argmax(jax.jit(model.apply)(params, tokens), axis=1)
  lines = (whole / RUN / 'predictions' / 'demo.tsv').read_text().splitlines()
  names = [data.task.labels[c] for c in classes]
  assert [line.split('\t')[1] for line in lines[1:]] == names


def test_finished_run_is_not_repeated(whole):
  before = (whole / RUN / 'result.json').stat().st_mtime_ns
  train_glue.main([*LORA, '--run-dir', str(whole)])
  assert (whole / RUN / 'result.json').stat().st_mtime_ns == before


@pytest.mark.parametrize('change', [['--adapter.rank', '3'], ['--epochs', '4']])
def test_other_settings_in_the_same_run_directory_are_refused(
  whole, change, capsys
):
  with pytest.raises(SystemExit) as stop:
    train_glue.main([*LORA, *change, '--run-dir', str(whole)])
  assert stop.value.code == 2
  name, value = change[0][2:], change[1]
  found = capsys.readouterr().err
  assert 'was made with other settings' in found
  before = {'adapter.rank': 2, 'epochs': 3}[name]
  assert f'{name} {before} != {value}' in found


@pytest.mark.parametrize('number', [4, 6, 9])
def test_stopped_run_goes_on_at_its_batch(
  whole, tmp_path, stopped_by_a_signal, number
):
  args = [*LORA, '--run-dir', str(tmp_path)]
  stopped_by_a_signal(train_glue.main, args, number)
  # After the last step, too: what is evaluated then may take long.
  assert not (tmp_path / RUN / 'result.json').is_file()
  train_glue.main(args)
  assert_same_run(tmp_path, whole)


class Killed(BaseException):
  """Stands for a kill: no code of the program catches it."""


@pytest.mark.parametrize('owner', ['best', 'checkpoints', 'finish'])
def test_killed_run_ends_as_the_whole_one(whole, tmp_path, monkeypatch, owner):
  args = [*LORA, '--run-dir', str(tmp_path)]
  save = Checkpointer.save

  def killing(self, step, *rest, **options):
    save(self, step, *rest, **{**options, 'wait': True})
    if step == 6 and self._directory.name == owner:
      raise Killed
    if step == 3 and owner == 'best' and self._directory.name == owner:
      raise Killed  # The first best model has no checkpoint beside it.

  with monkeypatch.context() as patched:
    patched.setattr(Checkpointer, 'save', killing)
    if owner == 'finish':
      patched.setattr(evaluation, 'finish', lambda *_, **__: _raise(Killed))
    with pytest.raises(Killed):
      train_glue.main(args)
  assert not (tmp_path / RUN / 'result.json').exists()
  train_glue.main(args)
  assert_same_run(tmp_path, whole)


def _raise(kind):
  raise kind


def test_search_takes_the_best_rate_for_the_other_seeds(tmp_path, monkeypatch):
  values = {0.01: 0.2, 0.02: 0.6, 0.03: None}
  ran = []

  def fake_train(run, stop):
    rate = float(f'{float(run.instruments.schedule(0)):.3g}')
    ran.append((rate, run.metadata['seed']))
    found = {'step': 1, 'loss': 1.0, 'matthews_correlation': values[rate]}
    run.folder.mkdir(parents=True, exist_ok=True)
    record = {'best': found, 'last': found, 'seconds_per_step': None}
    return loop.Outcome(None, None, record)

  monkeypatch.setattr(loop, 'train', fake_train)
  monkeypatch.setattr(evaluation, 'finish', lambda *_, **__: None)
  args = [*OPTIONS, '--method', 'lora', '--run-dir', str(tmp_path)]
  args += ['--learning-rates', '0.01,0.02,0.03', '--seeds', '5,6,7']
  train_glue.main(args)
  expected = [(0.01, 5), (0.02, 5), (0.03, 5), (0.02, 6), (0.02, 7)]
  assert ran == expected
  results = json.loads((tmp_path / 'results.json').read_text())
  assert sorted((r['learning_rate'], r['seed']) for r in results) == sorted(
    expected
  )
  assert '| lora | 60.00 ± 0.00 |' in (tmp_path / 'results.md').read_text()
  train_glue.main(args)
  assert ran == expected


def test_model_that_diverges_is_worse_than_any(tmp_path, monkeypatch):
  values = iter([float('nan'), -0.5, float('nan')])
  monkeypatch.setattr(
    evaluation,
    'evaluate',
    lambda *args: {'loss': 1.0, 'matthews_correlation': next(values)},
  )
  train_glue.main([*LORA, '--run-dir', str(tmp_path), '--export', 'False'])
  result = read(tmp_path)
  assert result['best'] == {
    'step': 6,
    'loss': 1.0,
    'matthews_correlation': -0.5,
  }
  assert result['last']['matthews_correlation'] is None


def test_diverged_run_of_a_grid_is_a_result_and_the_grid_goes_on(
  tmp_path, capsys
):
  args = [*OPTIONS, '--method', 'lora', '--run-dir', str(tmp_path)]
  args += ['--learning-rates', '1e30,1e-3', '--seeds', '0,1']
  train_glue.main(args)
  said = ' '.join(capsys.readouterr().out.split())
  results = json.loads((tmp_path / 'results.json').read_text())
  found = {(r['learning_rate'], r['seed']): r for r in results}
  # The search goes on, and takes the other rate for the second seed.
  assert set(found) == {(1e30, 0), (0.001, 0), (0.001, 1)}
  diverged = found[1e30, 0]
  assert diverged['best'] == {'step': None, 'matthews_correlation': None}
  assert diverged['last'] == diverged['best']
  assert diverged['diverged'].startswith('The weights are not finite at step')
  assert 'demo lora lr 1e+30 seed 0 diverged and is given up' in said
  assert found[0.001, 1]['best']['matthews_correlation'] is not None
  assert 'no number' not in (tmp_path / 'results.md').read_text()
  # Nor is it tried once more.
  before = {r['learning_rate']: r for r in results}
  train_glue.main(args)
  again = json.loads((tmp_path / 'results.json').read_text())
  assert {r['learning_rate']: r for r in again} == before


def test_diverged_only_run_ends_with_the_message(tmp_path, capsys):
  args = [*OPTIONS, '--method', 'lora', '--run-dir', str(tmp_path)]
  with pytest.raises(SystemExit) as stop:
    train_glue.main([*args, '--optim.learning-rate', '1e30'])
  assert stop.value.code == 2
  found = capsys.readouterr().err
  assert 'error: The weights are not finite at step' in found
  assert 'no step can mend them' in found and 'Traceback' not in found
  assert not list(tmp_path.rglob('result.json'))


def test_earlier_command_goes_on_with_the_run_of_todays(whole):
  before = (whole / RUN / 'result.json').stat().st_mtime_ns
  earlier = [
    *('--rank', '2', '--batch-size', '8', '--eval-batch-size', '8'),
    *('--epochs', '3', '--log-every', '1', '--update-proj-gap', '2'),
    *('--dropout', '0.1', '--adapter-dropout', '0.1', '--mesh.data', '1'),
    *('--data.max-train-examples', '24', '--data.max-dev-examples', '100'),
    *('--keep', 'all', '--method', 'lora', '--learning-rate', '0.001'),
  ]
  train_glue.main([*earlier, '--run-dir', str(whole)])
  assert (whole / RUN / 'result.json').stat().st_mtime_ns == before


def test_rows_hold_what_pre_training_writes_too(whole):
  rows = metrics.read_metrics(whole / RUN / 'metrics.jsonl')
  trained = [row for row in rows if 'train/loss' in row]
  assert [row['step'] for row in trained] == list(range(1, 10))
  for row in trained:
    assert row['optim/state_bytes'] == read(whole)['optimizer_state_bytes']
    assert row['train/skipped_steps'] == 0
    # Lengths differ from batch to batch: a step has no number of tokens.
    assert 'train/tokens' not in row
  assert any('train/tokens_per_second' in row for row in trained)


def test_help_explains_every_field(capsys):
  with pytest.raises(SystemExit) as stop:
    train_glue.main(['--help', 'all'])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for field in ('--task', '--learning-rates', '--data.text-columns', '--keep'):
    assert field in text
  for field in ('--optim.moment-bits', '--adapter.kind', '--step.weight-bits'):
    assert field in text


def test_mistake_ends_with_one_message(capsys):
  with pytest.raises(SystemExit) as stop:
    train_glue.main(
      ['--task', 'mrcp', '--init-from', 'tiny', '--data.source', 'x']
    )
  assert stop.value.code == 2
  assert "Did you mean 'mrpc'?" in capsys.readouterr().err


def test_mistake_of_a_later_method_ends_before_the_first_run(tmp_path, capsys):
  for changes, message in (
    (
      ['--adapter.alpha', '-1'],
      'AdapterOptions.alpha must be in (0, inf), got',
    ),
    (
      ['--optim.weight-decay', '-1'],
      'weight_decay must be in [0, inf), got -1.0',
    ),
    (['--adapter.rules', 'nothing'], 'nothing'),
    (['--micro-batches', '3'], 'batch_size=8 cannot be split over data=1'),
  ):
    args = [*OPTIONS, '--method', 'full,lora', '--run-dir', str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
      train_glue.main([*args, *changes])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
