"""Scripts for shells: what the TAB key finds."""

import dataclasses
import shutil
import subprocess
from typing import Literal

import pytest

from gnlorp_jax.compose import command_line, command_name, completion
from gnlorp_jax.recipes.pretrain.settings import TrainConfig


@dataclasses.dataclass(frozen=True)
class Linear:
  factor: float = 2.0


@dataclasses.dataclass(frozen=True)
class Wide:
  factor: float = 3.0


@dataclasses.dataclass(frozen=True)
class Model:
  width: int = 8
  """How wide it is. Which is said
  in two lines."""
  scaling: Linear | Wide | None = None
  """Not to be taken for the first word of a command."""


@dataclasses.dataclass(frozen=True)
class Config:
  folder: str = ''
  """A folder."""
  kind: Literal['small', 'smooth', 'large'] | None = None
  """Isn't it a choice?"""
  model: Model = Model()


@dataclasses.dataclass(frozen=True)
class Other:
  """What another first word takes."""

  speed: int = 1
  """A number."""


OPTIONS = completion.Options(
  Config(), {'model': ('folder',), 'wide': ('model.width',)}, takes_file=True
)
NAME = 'gnlorp-train-lm'
# The script's function, as bash calls it.
PRESS = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(($# - 2))
set -- $(complete -p "$2")
"${@: -2:1}"
printf '%s\\n' "${@:2:4}" "${COMPREPLY[@]}"
"""


@pytest.fixture
def tab(tmp_path, monkeypatch):
  """What bash finds for the last word of a command."""
  bash = shutil.which('bash')
  if bash is None:
    pytest.skip('bash is not on this machine')
  monkeypatch.setattr(command_name, 'called', lambda: NAME)
  (tmp_path / 'notes').mkdir()

  def press(*words, options=OPTIONS, recipes=None):
    script = tmp_path / 'script'
    script.write_text(completion.script('bash', options, recipes))
    found = subprocess.run(
      [bash, '-c', PRESS, bash, script, NAME, *words],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      check=True,
    )
    assert not found.stderr
    # Where the function finds nothing, bash looks for files.
    options, found = found.stdout.split()[:4], found.stdout.split()[4:]
    assert options == ['-o', 'default', '-o', 'filenames']
    return sorted(found)  # Choices come in any order.

  return press


def test_options_and_choices_are_found(tab):
  assert tab('--mod') == ['--model', '--model.width']
  assert tab('--kind', 's') == ['small', 'smooth']
  assert tab('--folder', 'x', '--wid') == ['--wide']
  assert tab('--conf') == ['--config']
  train = completion.Options(TrainConfig())
  assert tab('--optim.na', options=train) == ['--optim.name']


def test_files_are_found_where_they_may_stand(tab):
  assert tab('--model', 'no') == ['notes']
  assert tab('no') == []  # Which bash takes as a word to complete by files.


def test_behind_a_first_word_are_the_options_of_its_recipe(tab):
  recipes = {'some': OPTIONS, 'other': completion.Options(Other())}
  assert tab('o', recipes=recipes) == ['other']
  assert tab('other', '--', recipes=recipes) == ['--help', '--speed']
  assert tab('some', '--wid', recipes=recipes) == ['--wide']
  assert tab('--wid', recipes=recipes) == ['--wide']


def test_it_is_printed_under_the_name_of_the_installed_command(
  monkeypatch, capsys
):
  monkeypatch.setattr(command_name, 'called', lambda: 'train_lm.py')
  with pytest.raises(SystemExit) as stop:
    command_line.override(Config(), ['--print-completion', 'zsh'], '')
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert text.startswith('#compdef gnlorp-train-lm\n')
  assert '--config' not in text
  with pytest.raises(SystemExit):
    command_line.override(
      Config(), ['--print_completion=zsh'], '', takes_file=True
    )
  assert '--config' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('words', 'shell'),
  [(['--print-completion'], ''), (['--print-completion=fish'], 'fish')],
)
def test_a_shell_without_a_script_is_an_error(words, shell):
  with pytest.raises(ValueError) as error:
    command_line.override(Config(), words, '')
  assert str(error.value) == (
    f"--print-completion {shell!r}: expected one of ('bash', 'zsh')."
  )
