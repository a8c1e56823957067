import importlib
import json
import math
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from gnlorp_jax.training import metrics
from gnlorp_jax.training.metrics import MetricsWriter


def read_lines(run_dir):
  """The lines of a run, by a parser that takes nothing but JSON."""

  def reject(constant):
    raise ValueError(f'{constant} is not JSON')

  text = (run_dir / 'metrics.jsonl').read_text()
  return [json.loads(line, parse_constant=reject) for line in text.splitlines()]


def read_events(run_dir):
  """The events of all event files of a run, oldest first."""
  events = []
  for path in sorted(run_dir.glob('events.out.tfevents.*')):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
      content = content[16 + length :]
  return events


def write_steps(run_dir, steps, resume_step=None):
  with MetricsWriter(run_dir, resume_step) as writer:
    for step in steps:
      writer.write(step, {'train/loss': 1 / step})


def test_metrics_are_one_json_object_per_line(tmp_path):
  with MetricsWriter(tmp_path / 'run') as writer:
    writer.write(1, {'train/loss': np.float32(2.5), 'train/tokens': 7})
    writer.write(np.int32(2), {'eval/loss': 2.25})
  assert read_lines(tmp_path / 'run') == [
    {'step': 1, 'train/loss': 2.5, 'train/tokens': 7},
    {'step': 2, 'eval/loss': 2.25},
  ]


def test_line_is_readable_as_soon_as_it_is_written(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'train/loss': 2.5})
    assert read_lines(tmp_path) == [{'step': 1, 'train/loss': 2.5}]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_null(tmp_path, value):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'train/loss': value, 'train/grad_norm': 1.0})
  assert read_lines(tmp_path) == [
    {'step': 1, 'train/loss': None, 'train/grad_norm': 1.0}
  ]


def test_metrics_are_tensorboard_events(tmp_path):
  write_steps(tmp_path, [1, 2])
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in read_events(tmp_path)
    for value in event.summary.value
  ]
  assert scalars == [(1, 'train/loss', 1.0), (2, 'train/loss', 0.5)]


def test_resumed_run_holds_each_step_once(tmp_path):
  write_steps(tmp_path, [1, 2, 3, 4, 5])
  write_steps(tmp_path, [4, 5, 6], resume_step=3)
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
  # TensorBoard drops what came before from this step on.
  starts = [e.step for e in read_events(tmp_path) if e.HasField('session_log')]
  assert starts[-1] == 4


def test_evaluation_that_comes_once_more_is_held_once(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in (1, 2):
      writer.write(step, {'train/loss': 1.0})
      writer.write(step, {'eval/loss': 1.0})
  with MetricsWriter(tmp_path, 2, evaluated=1):
    pass
  kept = [(line['step'], *line) for line in read_lines(tmp_path)]
  assert kept == [
    (1, 'step', 'train/loss'),
    (1, 'step', 'eval/loss'),
    (2, 'step', 'train/loss'),
  ]


def test_torn_last_line_is_dropped(tmp_path):
  write_steps(tmp_path, [1, 2])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 3, "train/lo')
  lines = metrics.read_metrics(tmp_path / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [1, 2]
  write_steps(tmp_path, [3], resume_step=2)
  assert [line['step'] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_fresh_run_starts_an_empty_file(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(0, {'eval/loss': 3.0})
  write_steps(tmp_path, [1])
  assert [line['step'] for line in read_lines(tmp_path)] == [1]


# Weights & Biases, by a module that writes down what it is told.

FAKE_WANDB = """
told = []


class Error(Exception):
  pass


def Settings(**settings):
  return settings


def init(**options):
  if options['config'].get('refused'):
    raise Error('no key.')
  told.append(options)
  return Run()


class Run:
  def log(self, values, step):
    told.append((step, values))

  def finish(self, exit_code):
    told.append(exit_code)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  (tmp_path / 'modules').mkdir()
  (tmp_path / 'modules' / 'wandb.py').write_text(FAKE_WANDB)
  monkeypatch.syspath_prepend(tmp_path / 'modules')
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  monkeypatch.delenv('WANDB_PROJECT', raising=False)
  yield importlib.import_module('wandb')
  monkeypatch.delitem(sys.modules, 'wandb')


def test_rows_go_to_weights_and_biases_under_one_id(wandb, tmp_path):
  log = metrics.Log('wandb', {'optim': {'rank': 4}})
  folder = tmp_path / 'run'
  with MetricsWriter(folder, log=log) as writer:
    writer.write(1, {'train/loss': 2.5, 'train/grad_norm': math.nan})
  with pytest.raises(SystemExit):
    with MetricsWriter(folder, 1, name='again', log=log) as writer:
      writer.write(2, {'eval/loss': 2.25})
      raise SystemExit(130)
  start, *first, resumed, second, status = wandb.told
  assert first == [(1, {'train/loss': 2.5}), 0]
  assert (second, status) == ((2, {'eval/loss': 2.25}), 1)
  assert start['id'] == resumed['id'] != ''
  assert (folder / 'wandb_id.txt').read_text() == start['id'] + '\n'
  assert (start['name'], resumed['name']) == ('run', 'again')
  assert start['config'] == log.settings
  assert start['dir'] == str(folder)
  assert len(read_lines(folder)) == 2
  with MetricsWriter(folder, log=log):  # Afresh: another run.
    pass
  assert wandb.told[-2]['id'] != start['id']


def test_refusal_of_weights_and_biases_is_a_message(wandb, tmp_path):
  with pytest.raises(ValueError) as error:
    MetricsWriter(tmp_path, log=metrics.Log('wandb', {'refused': True}))
  assert str(error.value) == (
    'Weights & Biases did not take the run: no key. To keep its rows on this '
    'machine, set WANDB_MODE=offline in the environment; the command wandb '
    'sync sends them later.'
  )


def test_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  (tmp_path / 'wandb').mkdir()  # What it wrote elsewhere is no package.
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  with pytest.raises(ValueError) as error:
    metrics.check_log('wandb')
  assert str(error.value) == (
    "log='wandb' needs the package wandb: pip install 'gnlorp_jax[wandb]', or "
    "in a checkout pip install '.[wandb]'"
  )


def test_other_logs_are_unknown():
  metrics.check_log(None)
  with pytest.raises(ValueError) as error:
    metrics.check_log('mlflow')
  assert str(error.value) == "Unknown log 'mlflow'; expected 'wandb' or None."


def plotted(tmp_path, monkeypatch, lines):
  """Draws the lines of a run; returns the axes and the picture's header."""
  figures = []
  figure_class = metrics.matplotlib.figure.Figure

  def remember(*args, **kwargs):
    figures.append(figure_class(*args, **kwargs))
    return figures[-1]

  monkeypatch.setattr(metrics.matplotlib.figure, 'Figure', remember)
  with MetricsWriter(tmp_path) as writer:
    for step, values in lines:
      writer.write(step, values)
  metrics.plot_losses(tmp_path / 'metrics.jsonl', tmp_path / 'loss.png')
  assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
  return figures[0].axes[0]


def test_plot_shows_both_losses(tmp_path, monkeypatch):
  lines = [(step, {'train/loss': 1 / step, 'lr': 0.1}) for step in (1, 2, 3)]
  lines.append((3, {'eval/loss': 0.5}))
  axes = plotted(tmp_path, monkeypatch, lines)
  curves = {line.get_label(): line.get_xydata() for line in axes.lines}
  assert set(curves) == {'train', 'train, smoothed', 'validation'}
  np.testing.assert_allclose(curves['train'], [[1, 1], [2, 1 / 2], [3, 1 / 3]])
  np.testing.assert_allclose(curves['validation'], [[3, 0.5]])
  assert axes.get_xlabel() == 'step'
  assert axes.get_ylabel() == 'loss (nats per token)'


def test_plot_of_layers_is_there_where_layers_are_drawn(tmp_path):
  png = tmp_path / 'layers.png'
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'train/loss': 1.0})
  assert not metrics.plot_layers(tmp_path / 'metrics.jsonl', png)
  assert not png.exists()
  with MetricsWriter(tmp_path, 1) as writer:
    for step in (2, 4):
      row = {f'layers/rests/{layer:02d}': step * layer for layer in range(3)}
      row |= {f'layers/visits/{layer:02d}': step for layer in range(3)}
      writer.write(step, row)
  assert metrics.plot_layers(tmp_path / 'metrics.jsonl', png)
  assert png.read_bytes().startswith(b'\x89PNG')


def test_plot_leaves_gaps_and_smooths_over_them(tmp_path, monkeypatch):
  losses = np.tile([1.0, 3.0], 100)
  losses[50] = math.nan
  axes = plotted(
    tmp_path,
    monkeypatch,
    [(step, {'train/loss': loss}) for step, loss in enumerate(losses)],
  )
  raw, smoothed = (line.get_ydata() for line in axes.lines)
  np.testing.assert_array_equal(raw, losses)
  # Two per cent of 200 are five values: the one and two to each side.
  expected = [np.nanmean(losses[max(0, i - 2) : i + 3]) for i in range(200)]
  np.testing.assert_allclose(smoothed, expected)


def test_plot_of_a_run_without_losses_is_empty(tmp_path, monkeypatch):
  axes = plotted(tmp_path, monkeypatch, [(1, {'lr': 0.1})])
  assert len(axes.lines) == 0
