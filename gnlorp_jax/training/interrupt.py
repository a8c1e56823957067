"""Turns signals into a request that a loop can honour in peace."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

import jax

Batch = TypeVar('Batch')


class Interrupted(SystemExit):
  """A signal asked to stop amid what can be done once more."""


class StopRequest:
  """Notes a signal instead of dying of it, while used as a context.

  The loop asks `received` after each step, saves, and ends; what goes through
  batches for something else ends between two of them (`until_stopped`). A
  second signal of the same kind has its usual effect at once, for those who
  will not wait.

  SIGHUP comes when a terminal closes; a program under nohup stays deaf to it.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  # Those in use.
  _active: list[Self] = []

  def __init__(self):
    self.received: signal.Signals | None = None
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

  Not where JAX has joined processes: the others would wait for this one.

  Raises:
    Interrupted: With 128 plus the signal's number.
  """
  received = [stop.received for stop in StopRequest._active if stop.received]
  if received and jax.process_count() == 1:
    raise Interrupted(128 + received[0])
