"""How a command starts, and Ctrl-C: one line and status 130, wherever it comes.

Python raises KeyboardInterrupt at whatever is running. Code in C may turn it
into another error, or into none, or crash of it while a library is loaded. So
commands have handlers of their own: `starting` around their imports, where
nothing is lost by an end at once, and `running` around the rest.

This module imports little: it is what a command imports first.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from gnlorp_jax.disk import extras

STATUS = 128 + signal.SIGINT
"""As shells have it."""
_LINE = '\nInterrupted.\n'
_GRACE_SECONDS = 10.0

Handler = Callable[[int, FrameType | None], Any]


@contextlib.contextmanager
def starting() -> Iterator[None]:
  """Where Ctrl-C ends the process at once: around the imports of a command.

  It sets what is read in the environment when libraries are loaded.

  Raises:
    SystemExit: With status 2 and a message, if a package of an extra is absent.
  """
  # Read when jaxlib loads LAPACK, whose threads would fight over the cores with
  # XLA's own: small factorisations took a hundred times as long.
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
  with _handling(_end):
    try:
      yield
    except ImportError as error:
      message = extras.missing(error)
      if message is None:
        raise
      sys.stderr.write(f'error: {message}\n')
      raise SystemExit(2) from None


@contextlib.contextmanager
def running() -> Iterator[None]:
  """Where Ctrl-C ends what is done, which may clean up after itself.

  A second Ctrl-C ends the process at once, and so does the first where nothing
  came of it for 10 seconds. Code that has another handler for a while, such as
  that of a training loop, is not interrupted.

  Raises:
    SystemExit: With `STATUS`, in the place of whatever error the interrupt
      became.
  """
  noted: list[threading.Timer] = []

  def interrupt(number: int, frame: FrameType | None) -> None:
    if noted:
      _end(number, frame)
    timer = threading.Timer(_GRACE_SECONDS, _end, (number, None))
    timer.daemon = True
    noted.append(timer)
    timer.start()
    raise KeyboardInterrupt

  try:
    with _handling(interrupt):
      yield
  except BaseException as error:
    is_ours = bool(noted) and not isinstance(error, SystemExit)
    if not is_ours and not isinstance(error, KeyboardInterrupt):
      raise
    if noted:  # What follows is the end of the process: threads are waited for.
      signal.signal(signal.SIGINT, _end)
    sys.stderr.write(_LINE)
    raise SystemExit(STATUS) from None
  finally:
    for timer in noted:
      timer.cancel()


@contextlib.contextmanager
def raising() -> Iterator[None]:
  """Where Ctrl-C is a KeyboardInterrupt that the code expects, and no more."""
  with _handling(signal.default_int_handler):
    yield


@contextlib.contextmanager
def _handling(handler: Handler) -> Iterator[None]:
  """Has a handler for SIGINT; other threads than the main one cannot.

  A program that a shell put in the background stays deaf to it.
  """
  is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  is_main = threading.current_thread() is threading.main_thread()
  if is_ignored or not is_main:
    yield
    return
  previous = signal.signal(signal.SIGINT, handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


def _end(number: int, frame: FrameType | None) -> None:
  """Ends the process at once: no exception, which code in C might swallow."""
  del number, frame
  os.write(2, _LINE.encode())
  os._exit(STATUS)
