"""Signals become requests, once, and handlers are put back."""

import os
import signal
import time

import pytest

from gnlorp_jax.training.interrupt import StopRequest


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
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
