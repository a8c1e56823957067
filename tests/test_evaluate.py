"""The command `python -m gnlorp_jax.evaluate`."""

import json

import pytest

from gnlorp_jax import evaluate
from tests.compose import small_lm


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return small_lm.write(tmp_path_factory.mktemp('models') / 'small')


def test_a_model_is_scored_from_the_command_line(folder, tmp_path, capsys):
  text, output = tmp_path / 'words.txt', tmp_path / 'scores.json'
  text.write_text('A few words.')
  evaluate.main(
    [folder, '--tasks', f'perplexity:{text}', '--output', str(output)]
  )
  assert 'bits_per_byte' in capsys.readouterr().out
  results = json.loads(output.read_text())['results']
  assert results[f'perplexity:{text}']['tokens'] == 12


def test_scores_are_shown_before_they_are_written(
  tmp_path, capsys, monkeypatch
):
  found = {'model': 'a model', 'results': {}}
  monkeypatch.setattr(evaluate.recipe, 'evaluate', lambda *args: found)
  config = evaluate.EvaluateConfig(output=str(tmp_path))  # It cannot be.
  with pytest.raises(OSError, match='directory'):
    evaluate.evaluate(config)
  assert 'a model' in capsys.readouterr().out


def test_mistakes_end_with_one_message(folder, capsys):
  with pytest.raises(SystemExit) as stop:
    evaluate.main([folder, '--tasks', 'chess'])
  assert stop.value.code == 2
  assert capsys.readouterr().err.startswith("error: Unknown task 'chess'; ")


def test_help_explains_every_option(capsys):
  with pytest.raises(SystemExit) as stop:
    evaluate.main(['--help'])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  for word in ('--tasks', '--include-path', 'standard error', 'extra eval'):
    assert word in shown
