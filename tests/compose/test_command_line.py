"""The command line: options, earlier names, and what users get wrong."""

import dataclasses
import errno
import logging
import os

import jax
import pytest

from gnlorp_jax.compose import command_line, foreign_names
from gnlorp_jax.recipes.glue.settings import GlueConfig
from gnlorp_jax.recipes.pretrain.settings import TrainConfig
from gnlorp_jax.recipes.sft.settings import SftConfig
from gnlorp_jax.training import distributed


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.1
  """A rate."""
  remat: bool = False
  """A switch that is off."""
  spread: bool = True
  """A switch that is on."""


@dataclasses.dataclass(frozen=True)
class Outer:
  final_rate: float = 0.5
  """Another rate."""
  title: str = 'none'
  """A word."""
  inner: Inner = Inner()
  """A group."""


ALIASES = {
  'old_rate': ('inner.rate',),
  'both_rates': ('inner.rate', 'final_rate'),
  'name': ('title',),
  'remat': ('inner.remat',),
  'spread': ('inner.spread',),
}


def override(*args):
  return command_line.override(Outer(), list(args), 'description', ALIASES)


@pytest.mark.parametrize(
  ('args', 'expected', 'line'),
  [
    (
      ['--old-rate', '0.3'],
      Outer(inner=Inner(rate=0.3)),
      '--old-rate means --inner.rate.',
    ),
    (
      ['--old-rate=0.3'],
      Outer(inner=Inner(rate=0.3)),
      '--old-rate means --inner.rate.',
    ),
    (
      ['--old_rate=-3e-1', '--title', 'x'],
      Outer(inner=Inner(rate=-0.3), title='x'),
      '--old_rate means --inner.rate.',
    ),
    (
      ['--both-rates', '2'],
      Outer(final_rate=2.0, inner=Inner(rate=2.0)),
      '--both-rates means --inner.rate and --final-rate.',
    ),
    (
      ['--both-rates=2'],
      Outer(final_rate=2.0, inner=Inner(rate=2.0)),
      '--both-rates means --inner.rate and --final-rate.',
    ),
    (
      ['--name=a=b'],  # The first sign alone parts option and value.
      Outer(title='a=b'),
      '--name means --title.',
    ),
    (
      ['--remat', '--title', 'x'],  # A switch takes no word.
      Outer(title='x', inner=Inner(remat=True)),
      '--remat means --inner.remat.',
    ),
    (
      ['--no-remat'],
      Outer(),
      '--no-remat means --inner.no-remat.',
    ),
    (
      ['--no-spread', '--title', 'x'],
      Outer(title='x', inner=Inner(spread=False)),
      '--no-spread means --inner.no-spread.',
    ),
    (
      ['--spread'],
      Outer(),
      '--spread means --inner.spread.',
    ),
  ],
)
def test_earlier_name_sets_the_field_and_says_so(args, expected, line, caplog):
  with caplog.at_level(logging.INFO, logger='gnlorp_jax.compose.command_line'):
    assert override(*args) == expected
  assert [record.getMessage() for record in caplog.records] == [line]


def test_names_of_today_are_not_told(caplog):
  with caplog.at_level(logging.INFO, logger='gnlorp_jax.compose.command_line'):
    found = override('--inner.rate=2', '--inner.no-spread', '--title', 'name')
  assert found == Outer(title='name', inner=Inner(rate=2.0, spread=False))
  assert not caplog.records


def test_later_words_win_under_either_name():
  assert override('--old-rate', '1', '--inner.rate', '2').inner.rate == 2
  assert override('--inner.rate', '2', '--old-rate', '1').inner.rate == 1


@pytest.mark.parametrize('option', ['--name', '--old-rate'])
def test_earlier_name_without_its_value_is_an_error(option, capsys):
  with pytest.raises(SystemExit) as stop:
    override(option)
  assert stop.value.code == 2
  new = {'--name': '--title', '--old-rate': '--inner.rate'}[option]
  assert new in capsys.readouterr().err


def test_value_of_an_earlier_name_is_judged(capsys):
  with pytest.raises(SystemExit) as stop:
    override('--old-rate', 'fast')
  assert stop.value.code == 2
  assert 'fast' in capsys.readouterr().err


def test_without_aliases_an_earlier_name_is_unknown():
  with pytest.raises(ValueError, match='There is no option --old-rate.'):
    command_line.override(Outer(), ['--old-rate', '1'], '')


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (
      ['--optim.rnak', '3'],
      'There is no option --optim.rnak. Did you mean --optim.rank? --help '
      'optim lists all.',
    ),
    (
      ['--steps', '3', '--batchsize=4'],
      'There is no option --batchsize. Did you mean --batch-size? --help lists '
      'all.',
    ),
    (
      ['--rnak', '3'],
      'There is no option --rnak. Did you mean --adapter.rank?',
    ),
    (
      ['--mdoel.num-layers', '3'],
      'There is no option --mdoel.num-layers. Did you mean --model?',
    ),
    (
      ['--learning-rate', '1'],
      'There is no option --learning-rate. Did you mean --optim.learning-rate?',
    ),
    (
      ['--weight-decay', '1'],
      'There is no option --weight-decay. Did you mean --optim.weight-decay?',
    ),
    # As other programs call it.
    (
      ['--lora-r', '8'],
      'There is no option --lora-r. Did you mean --adapter.rank? --help '
      'adapter lists all.',
    ),
    (
      ['--output_dir=runs/a'],
      'There is no option --output_dir. Did you mean --run-dir?',
    ),
  ],
)
def test_unknown_field_names_the_nearest(args, text):
  with pytest.raises(ValueError) as error:
    command_line.override(TrainConfig(), args, 'description')
  assert str(error.value).startswith(text)


def test_foreign_names_are_of_options_that_exist_and_are_no_options():
  configs = [kind() for kind in (TrainConfig, SftConfig, GlueConfig)]
  for name, field in foreign_names.MEANING.items():
    assert any(has(config, field) for config in configs), field
    assert not any(has(config, name) for config in configs), name


def has(config, field):
  for name in field.split('.'):
    if not hasattr(config, name):
      return False
    config = getattr(config, name)
  return True


def fail(error):
  raise error


@pytest.mark.parametrize('error', [ValueError('too few'), OSError('no disk')])
def test_mistake_ends_with_one_message(error, capsys, monkeypatch):
  monkeypatch.delenv('SHOW_TRACEBACK', raising=False)
  with pytest.raises(SystemExit) as stop:
    command_line.run(lambda: fail(error), 'SHOW_TRACEBACK')
  assert stop.value.code == 2
  assert capsys.readouterr().err == f'error: {error}\n'


class JaxRuntimeError(RuntimeError):
  """As JAX calls it."""


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (
      JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory on 9 bytes.\nmore'),
      'RESOURCE_EXHAUSTED: Out of memory on 9 bytes.',
    ),
    (MemoryError('Unable to allocate 9 B'), 'Unable to allocate 9 B'),
    (MemoryError(), 'no more is to be had'),
  ],
)
def test_lack_of_memory_ends_with_what_helps(error, reason, capsys):
  with pytest.raises(SystemExit) as stop:
    command_line.run(lambda: fail(error), 'SHOW_TRACEBACK')
  assert stop.value.code == 2
  assert capsys.readouterr().err == (
    f'error: Out of memory: {reason} Lower batch_size or the length of '
    'sequences, raise micro_batches, or choose a smaller model; python -m '
    'gnlorp_jax.plan says what a run takes.\n'
  )


def test_traceback_is_shown_when_asked_for(monkeypatch):
  monkeypatch.setenv('SHOW_TRACEBACK', '1')
  with pytest.raises(ValueError, match='too few'):
    command_line.run(lambda: fail(ValueError('too few')), 'SHOW_TRACEBACK')


def test_fault_of_the_program_is_no_mistake_of_the_user():
  with pytest.raises(ZeroDivisionError):
    command_line.run(lambda: fail(ZeroDivisionError()), 'SHOW_TRACEBACK')


# Of several processes.


class Left(BaseException):
  """In the place of the end of the process."""


@pytest.fixture
def second(monkeypatch):
  """Makes this the second of two processes, whose end is an exception."""

  def leave(status):
    raise Left(status)

  monkeypatch.setattr(distributed, 'is_joined', lambda: True)
  monkeypatch.setattr(distributed, 'is_first', lambda: False)
  monkeypatch.setattr(distributed, '_exchange', lambda *said: [None, None])
  monkeypatch.setattr(distributed, 'leave', leave)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)


@pytest.mark.parametrize(
  ('error', 'status', 'text'),
  [
    (OSError('disk full'), 2, '[process 1] error: disk full\n'),
    (KeyboardInterrupt(), 130, '[process 1] Interrupted.\n'),
    (
      jax.errors.JaxRuntimeError('Gloo failed: x.'),
      2,
      '[process 1] error: Another process of this run ended or cannot be '
      'reached (Gloo failed: x). Its own output says why. Checkpoints that '
      'were complete are untouched: the same command, in all processes, '
      'continues.\n',
    ),
  ],
)
def test_an_error_of_one_process_ends_it_at_once(
  error, status, text, second, capsys
):
  def main():
    raise error

  with pytest.raises(Left) as left:
    command_line.run(main, 'SOME_TRACEBACK')
  assert left.value.args == (status,)
  assert capsys.readouterr().err == text


def test_a_bug_in_one_process_ends_it_with_its_place(second, capsys):
  def main():
    raise KeyError('bug')

  with pytest.raises(Left) as left:
    command_line.run(main, 'SOME_TRACEBACK')
  assert left.value.args == (1,)
  assert "KeyError: 'bug'" in capsys.readouterr().err


def test_what_all_processes_share_one_tells(second, monkeypatch, capsys):
  def main():
    raise distributed.SharedError('seed differs')

  with pytest.raises(SystemExit) as end:
    command_line.run(main, 'SOME_TRACEBACK')
  assert end.value.code == 2
  assert not capsys.readouterr().err
  monkeypatch.setattr(distributed, 'is_first', lambda: True)
  with pytest.raises(SystemExit) as end:
    command_line.run(main, 'SOME_TRACEBACK')
  assert end.value.code == 2
  assert capsys.readouterr().err == 'error: seed differs\n'

  def stop():
    raise distributed.SharedExit(143)

  with pytest.raises(distributed.SharedExit):
    command_line.run(stop, 'SOME_TRACEBACK')


# Files that commands are asked to write.


def test_a_file_that_cannot_be_finished_leaves_the_old_one(
  tmp_path, monkeypatch
):
  path = tmp_path / 'scores.json'
  command_line.write_at_place(str(path), 'old')

  def refuse(descriptor):  # As a full disk may, at last.
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'fsync', refuse)
  with pytest.raises(OSError, match='No space left'):
    command_line.write_at_place(str(path), 'new')
  assert path.read_text() == 'old'
  assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_links_and_pipes_are_written_into(tmp_path):
  target, link = tmp_path / 'target', tmp_path / 'link'
  target.write_text('old')
  link.symlink_to(target)
  command_line.check_place('output', str(link))
  command_line.write_at_place(str(link), 'new')
  assert link.is_symlink() and target.read_text() == 'new'
  pipe = tmp_path / 'pipe'
  os.mkfifo(pipe)
  descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  try:
    command_line.write_at_place(str(pipe), 'new')
    assert os.read(descriptor, 9) == b'new'
  finally:
    os.close(descriptor)
  assert pipe.is_fifo()
