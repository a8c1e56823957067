"""Turns SIGTERM and SIGINT into a request that a loop can honour in peace."""

import signal
from types import FrameType
from typing import Self


class StopRequest:
  """Notes a signal instead of dying of it, while used as a context.

  The loop asks `received` after each step, saves, and ends. A second signal of
  the same kind has its usual effect at once, for those who will not wait.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.received: signal.Signals | None = None
    self._previous = {}

  def __enter__(self) -> Self:
    for number in self.SIGNALS:
      self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.received = signal.Signals(number)
    signal.signal(number, self._previous[number])
