"""The command `python -m gnlorp_jax.chat`."""

import pytest

from gnlorp_jax import chat
from tests.compose import small_lm


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return small_lm.write(tmp_path_factory.mktemp('models') / 'small')


def test_a_model_answers_on_the_command_line(folder, capsys):
  options = ['--template', 'none', '--temperature', '0', '--max-tokens', '9']
  chat.main([folder, '--prompt', 'Hi', *options])
  shown = capsys.readouterr()
  assert 1 < len(shown.out) <= 10 and shown.out.endswith('\n')
  assert not shown.err


def test_mistakes_end_with_one_message(folder, capsys):
  with pytest.raises(SystemExit) as stop:
    chat.main([folder])
  assert stop.value.code == 2
  message = capsys.readouterr().err
  assert message.startswith(f'error: {folder} has no chat template: ')


def test_interrupt_while_a_model_is_read_ends_the_program(folder, monkeypatch):
  def interrupt(config):
    raise KeyboardInterrupt

  monkeypatch.setattr(chat.recipe, 'load', interrupt)
  with pytest.raises(SystemExit) as stop:
    chat.main([folder])
  assert stop.value.code == 130


def test_help_explains_every_option(capsys):
  with pytest.raises(SystemExit) as stop:
    chat.main(['--help'])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  for word in ('--prompt', '--template', '/reset', 'Ctrl-C', 'FILE.jinja'):
    assert word in shown


def test_a_run_and_its_adapters_name_the_command(tmp_path, capsys):
  run = tmp_path / 'run'
  (run / 'hf').mkdir(parents=True)
  (run / 'hf' / 'config.json').write_text('{}')
  assert refused(capsys, str(run)) == (
    f'error: {run} is the directory of a run, whose model is in it: python -m '
    f'gnlorp_jax.chat {run}/hf\n'
  )
  other = tmp_path / 'other'
  (other / 'adapter').mkdir(parents=True)
  file = other / 'adapter' / 'adapter_config.json'
  file.write_text('{"base_model_name_or_path": "models/smol"}')
  for named in (other, other / 'adapter'):
    assert refused(capsys, str(named)) == (
      f'error: {named} holds adapters alone. Name the model that they were '
      'trained beside first: python -m gnlorp_jax.chat models/smol --adapter '
      f'{other}/adapter\n'
    )
  file.write_text('broken')
  assert f'chat FOLDER --adapter {other}/adapter' in refused(capsys, str(other))


def refused(capsys, *args):
  with pytest.raises(SystemExit) as stop:
    chat.main(list(args))
  assert stop.value.code == 2
  return capsys.readouterr().err
