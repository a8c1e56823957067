"""Signals become requests, once, and handlers are put back."""

import os
import signal
import time

import jax
import pytest

from gnlorp_jax.training import distributed
from gnlorp_jax.training.interrupt import (
  Interrupted,
  StopRequest,
  until_stopped,
)


@pytest.fixture
def heard():
  """The usual handler of SIGHUP, which tests under nohup do not have."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
@pytest.mark.usefixtures('heard')
def test_signal_is_noted_and_handlers_are_restored(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert stop.received is None
    os.kill(os.getpid(), number)
    assert stop.received == number
    # The next one is not caught any more.
    assert signal.getsignal(number) == before
  assert signal.getsignal(number) == before


@pytest.fixture
def usual_interrupt():
  """Python's own handler, which a job in the background does not have."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_second_interrupt_has_its_usual_effect(usual_interrupt):
  with StopRequest():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)  # The signal ends it.


def test_program_under_nohup_stays_deaf():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_signal_ends_what_goes_through_batches_between_two():
  seen = []

  def go_through():
    for number in until_stopped(range(5)):
      seen.append(number)
      if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      seen.append(f'{number} is done')

  with StopRequest():
    with pytest.raises(Interrupted) as ended:
      go_through()
  assert ended.value.code == 128 + signal.SIGTERM
  assert seen[-2:] == [2, '2 is done']
  # A request that is over stops nothing.
  assert list(until_stopped('ab')) == ['a', 'b']


def test_processes_that_others_wait_for_go_through_all_batches(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with StopRequest() as stop:
    stop.received = signal.SIGTERM
    assert list(until_stopped('ab')) == ['a', 'b']


def test_signal_to_another_process_ends_what_all_go_through():
  known = iter([None, None, signal.SIGTERM])
  seen = []
  with StopRequest() as stop:
    stop.agree = lambda received: next(known)
    with pytest.raises(distributed.SharedExit) as ended:
      seen.extend(until_stopped('abc'))
  assert seen == ['a', 'b'] and stop.received is None
  assert ended.value.received == signal.SIGTERM
  assert ended.value.code == 128 + signal.SIGTERM
