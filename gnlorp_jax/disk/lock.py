"""One process at a time: locks that end with the process that holds them."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

# What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class HeldError(OSError):
  """Another process, or another part of this one, holds the lock."""


class UnsupportedError(OSError):
  """The file system has no locks."""


@contextlib.contextmanager
def hold(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock as long as the context lasts, or the process lives.

  The operating system keeps it: that of a process which was killed is free,
  on whichever host it ran.

  Args:
    path: The file that is locked, in a folder that is there. It says who holds
      the lock, and is removed behind it.

  Yields:
    When the lock is held.

  Raises:
    HeldError: If it is held already; names the process and its host.
    UnsupportedError: If the file system has no locks.
    OSError: If the file cannot be made.
  """
  file = _lock(path)
  try:
    file.truncate(0)
    json.dump({'pid': os.getpid(), 'host': socket.gethostname()}, file)
    file.flush()
    yield
  finally:
    with file:  # While it is locked: nobody can hold it yet.
      if _is_at(path, file):  # And not another's, who came after its removal.
        path.unlink(missing_ok=True)


def _lock(path: pathlib.Path) -> IO[str]:
  """The file, locked."""
  while True:
    file = path.open('a+', encoding='utf-8')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Who held it may have removed it since it was opened.
      if _is_at(path, file):
        return file
    except BlockingIOError as error:
      with file:
        raise HeldError(f'{path} is held by {_holder(file)}') from error
    except OSError as error:
      file.close()
      if error.errno in _NO_LOCKS:
        raise UnsupportedError(f'{path}: {error.strerror}') from error
      raise
    file.close()


def _is_at(path: pathlib.Path, file: IO[str]) -> bool:
  """Whether an open file is still what a path names."""
  try:
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def _holder(file: IO[str]) -> str:
  """Who a lock's file says that holds it."""
  file.seek(0)
  try:
    found = json.loads(file.read())
    return f'process {found["pid"]} on {found["host"]}'
  except (ValueError, LookupError, TypeError):  # It is being written.
    return 'another process'
