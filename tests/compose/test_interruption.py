"""Ctrl-C: one line and status 130, at the start of a command and within it."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from gnlorp_jax.compose import command_line, interruption

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ('train_lm', 'train_sft', 'train_glue')
MODULES = ('chat', 'evaluate', 'layer_scores', 'merge', 'plan')


@pytest.fixture(autouse=True)
def own_handler():
  """Python's, also where tests run in the background, deaf to Ctrl-C."""
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, previous)


def press():
  signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(('given', 'expected'), [(None, '1'), ('4', '4')])
def test_a_command_has_one_thread_of_openblas(monkeypatch, given, expected):
  monkeypatch.delenv('OPENBLAS_NUM_THREADS')
  if given is not None:
    monkeypatch.setenv('OPENBLAS_NUM_THREADS', given)
  with interruption.starting():
    assert os.environ['OPENBLAS_NUM_THREADS'] == expected


# Ctrl-C when a command begins to import what takes its time.
WHILE_STARTING = """
import importlib.abc, runpy, signal, sys

class Press(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name == 'jax':
      signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press())
runpy.run_module(sys.argv[1], run_name='__main__', alter_sys=True)
"""


@pytest.mark.parametrize(
  'name', [*SCRIPTS, *(f'gnlorp_jax.{name}' for name in MODULES)]
)
def test_commands_hear_of_it_before_their_slow_imports(name):
  found = subprocess.run(
    [sys.executable, '-c', WHILE_STARTING, name],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert (found.returncode, found.stderr) == (130, '\nInterrupted.\n')


def interrupted(function, capsys):
  """What a command says that is ended by a signal in a function."""
  with pytest.raises(SystemExit) as stop:
    command_line.run(function, 'SHOW_TRACEBACK')
  assert stop.value.code == 130
  return capsys.readouterr().err


def test_within_a_command_what_is_begun_is_cleaned_up(capsys):
  done = []

  def work():
    try:
      press()
    finally:
      done.append('cleaned')

  assert interrupted(work, capsys) == '\nInterrupted.\n'
  assert done == ['cleaned']


def test_an_error_that_the_interrupt_became_is_none(capsys):
  def work():
    try:
      press()
    except KeyboardInterrupt as error:
      raise ImportError('while initializing the extension') from error

  assert interrupted(work, capsys) == '\nInterrupted.\n'


def test_an_interrupt_without_a_signal_ends_alike(capsys):
  def work():
    raise KeyboardInterrupt

  assert interrupted(work, capsys) == '\nInterrupted.\n'


def test_a_status_of_its_own_stays():
  def work():
    with pytest.raises(KeyboardInterrupt):
      press()
    raise SystemExit(3)

  with pytest.raises(SystemExit) as stop:
    command_line.run(work, 'SHOW_TRACEBACK')
  assert stop.value.code == 3


@pytest.mark.parametrize('presses', [1, 2])
def test_one_that_is_swallowed_ends_the_process_all_the_same(
  presses, monkeypatch
):
  ended = threading.Event()
  monkeypatch.setattr(interruption, '_end', lambda *_: ended.set())
  monkeypatch.setattr(interruption, '_GRACE_SECONDS', 0.01 * (presses == 1))
  with interruption.running():
    for _ in range(presses):
      try:
        press()
      except KeyboardInterrupt:
        continue
    assert ended.wait(10)


def test_another_handler_has_it_for_a_while():
  before = signal.getsignal(signal.SIGINT)
  with interruption.running():
    with interruption.raising():
      for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
          press()
  assert signal.getsignal(signal.SIGINT) is before


def test_a_program_in_the_background_stays_deaf(capsys):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with interruption.starting():
    press()
  with interruption.running():
    press()
  assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_have_no_handlers():
  found = []

  def work():
    with interruption.running(), interruption.starting():
      found.append(signal.getsignal(signal.SIGINT))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [signal.getsignal(signal.SIGINT)]
