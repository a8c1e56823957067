"""The command `python -m gnlorp_jax.layer_scores`."""

import json
import logging

import pytest

from gnlorp_jax import layer_scores
from gnlorp_jax.compose.layer_scores import read_scores
from tests.compose import small_lm


def test_layers_are_scored_from_the_command_line(tmp_path, capsys, caplog):
  folder = small_lm.write(tmp_path / 'small')
  text, output = tmp_path / 'words.txt', tmp_path / 'scores.json'
  text.write_text('Words that the model reads, one after another.')
  caplog.set_level(logging.INFO, 'matplotlib')
  layer_scores.main(
    [
      folder,
      *('--data', str(text), '--cache-dir', str(tmp_path / 'cache')),
      *('--sequences', '2', '--length', '16', '--batch-size', '2'),
      *('--threshold', '2.5', '--output', str(output)),
    ]
  )
  found = json.loads(output.read_text())
  assert list(found)[:6] == [
    *('model', 'data', 'kind', 'threshold', 'scores', 'all')
  ]
  assert list(found['all']) == [
    *('outliers', 'weight_norm', 'gradient_norm', 'hill')
  ]
  scores = read_scores(output, small_lm.CONFIG.num_layers)
  assert list(scores) == found['all']['outliers']['2.5']
  row = ['0', *(f'{x[0]:.3g}' for x in found['all']['outliers'].values())]
  rows = [
    line.split()[: len(row)] for line in capsys.readouterr().out.split('\n')
  ]
  assert row in rows
  assert (tmp_path / 'scores.png').stat().st_size > 10_000
  assert not caplog.messages  # No font was missing.


def test_mistakes_end_with_one_message(tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    layer_scores.main([str(tmp_path), '--data', 'x.txt'])
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {tmp_path} is no Hugging Face folder')


def test_help_explains_every_option(capsys):
  with pytest.raises(SystemExit) as stop:
    layer_scores.main(['--help'])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  for word in ('--threshold', '--gradient-batches', 'OwLore', '--output'):
    assert word in shown
