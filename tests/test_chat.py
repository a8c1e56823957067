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
