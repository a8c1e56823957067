"""What `--help` prints: the options without a group, or those of one."""

import dataclasses

import pytest

from gnlorp_jax.compose import command_help, command_line, command_name


@dataclasses.dataclass(frozen=True)
class Group:
  rate: float = 0.1
  """A rate. It is a number that needs two
  lines to be explained."""


@dataclasses.dataclass(frozen=True)
class Base:
  seed: int = 0
  """Decides what is drawn."""
  group: Group = Group()
  """What moves, and how fast. A second sentence."""


@dataclasses.dataclass(frozen=True)
class Program(Base):
  title: str = 'none'
  """A word."""


@pytest.fixture(autouse=True)
def name(monkeypatch):
  monkeypatch.setattr(command_name, 'called', lambda: 'gnlorp-try')


def shown(capsys, *args, short_names=None):
  with pytest.raises(SystemExit) as stop:
    command_line.override(
      Program(), list(args), 'What it does.', short_names=short_names
    )
  assert stop.value.code == 0
  return capsys.readouterr().out


def test_options_without_a_group_come_first_and_groups_are_named(capsys):
  text = shown(capsys, '--help', short_names={'speed': ('group.rate',)})
  assert text.startswith('usage: gnlorp-try [-h]')
  assert 'What it does.' in text
  # What the program adds stands before what all programs have.
  assert 0 < text.index('--title STR') < text.index('--seed INT')
  assert '--group.rate FLOAT' not in text
  lines = [' '.join(line.split()) for line in text.splitlines()]
  assert '--group.* What moves, and how fast.' in lines
  assert '--speed --group.rate' in lines
  assert (
    '--help GROUP, such as --help group, shows its options; --help all'
    in (text)
  )
  assert lines[-1].startswith('--print-completion bash|zsh prints a script')


def test_a_group_is_shown_by_its_name(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '120')
  text = shown(capsys, '--help', 'group')
  assert '--group.rate FLOAT' in text and '--title' not in text
  assert '--print-completion' not in text
  # tyro alone would keep the line break of the docstring.
  assert 'that needs two lines to be explained. (default: 0.1)' in text


def test_all_is_shown_on_demand_and_other_options_do_not_matter(capsys):
  text = shown(capsys, '--title', 'x', '-h', 'all')
  assert '--group.rate FLOAT' in text and '--title STR' in text


def test_an_unknown_group_is_told_what_there_is():
  with pytest.raises(ValueError) as error:
    command_line.override(Program(), ['--help', 'groop'], '')
  assert str(error.value) == (
    "--help groop: there is no such group of options. Did you mean 'group'? "
    'Groups: group, all.'
  )


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    ([], None),
    (['--seed', '1'], None),
    (['--seed', '1', '--help'], ''),
    (['-h', '--seed', '1'], ''),
    (['--help', 'optim'], 'optim'),
  ],
)
def test_topic(args, expected):
  assert command_help.topic(args) == expected
