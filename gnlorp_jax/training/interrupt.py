"""Turns signals into a request that a loop can honour in peace."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

import jax

from gnlorp_jax.training import distributed

_WILL_STOP = (
  'ends after the running step, batch or compilation, and saves before. A '
  'second one ends it at once.'
)

Batch = TypeVar('Batch')
# From what a process received to what all of its run know of.
Agree = Callable[[signal.Signals | None], signal.Signals | None]


class Interrupted(distributed.SharedExit):
  """A signal asked to stop amid what can be done once more.

  Args:
    received: The signal, which this process or another one of the run got.
  """

  def __init__(self, received: signal.Signals):
    super().__init__(128 + received)
    self.received = received


def _by_itself(received: signal.Signals | None) -> signal.Signals | None:
  """What a process knows that asks no others: if there are any, nothing."""
  return received if jax.process_count() == 1 else None


class StopRequest:
  """Notes a signal instead of dying of it, while used as a context.

  The loop asks `received` after each step, saves, and ends; what goes through
  batches for something else ends between two of them (`until_stopped`). A
  second signal of the same kind has its usual effect at once, for those who
  will not wait.

  SIGHUP comes when a terminal closes; a program under nohup stays deaf to it.

  Attributes:
    received: The signal that this process got, if any.
    agree: Makes it one of all processes, each of which asks at the same places;
      a training loop has the means.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  # Those in use.
  _active: list[Self] = []

  def __init__(self):
    self.received: signal.Signals | None = None
    self.agree: Agree = _by_itself
    self._previous = {}

  def __enter__(self) -> Self:
    for number in self.SIGNALS:
      is_ignored = signal.getsignal(number) == signal.SIG_IGN
      if not (number == signal.SIGHUP and is_ignored):
        self._previous[number] = signal.signal(number, self._note)
    self._active.append(self)
    return self

  def __exit__(self, *exception) -> None:
    self._active.remove(self)
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.received = signal.Signals(number)
    # Neither logged nor printed: what is interrupted here may be doing that.
    with contextlib.suppress(OSError):  # The terminal may be gone.
      os.write(2, f'\n{self.received.name}: {_WILL_STOP}\n'.encode())
    signal.signal(number, self._previous[number])


def until_stopped(batches: Iterable[Batch]) -> Iterator[Batch]:
  """What an evaluation goes through, as long as no signal asks to stop.

  Args:
    batches: Batches, or whatever is worked through one by one.

  Yields:
    Each of them.

  Raises:
    Interrupted: As of `check`, between two.
  """
  for batch in batches:
    check()
    yield batch


def check() -> None:
  """Ends an evaluation after a signal that a `StopRequest` noted.

  All processes of a run come here equally often, and end at the same place.

  Raises:
    Interrupted: If there was one.
  """
  for stop in StopRequest._active:
    if received := stop.agree(stop.received):
      raise Interrupted(received)
