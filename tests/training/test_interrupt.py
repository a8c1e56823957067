"""Signals become requests, once, and handlers are put back."""

import os
import signal

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


def test_second_interrupt_has_its_usual_effect():
  with StopRequest():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      signal.pause()
