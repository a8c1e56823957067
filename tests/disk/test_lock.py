"""Locks, within a process and between two."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from gnlorp_jax.disk import lock

# As `hold` does it, without what the package imports.
HOLD = """
import fcntl, json, os, sys

file = open(sys.argv[1], 'a+')
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({'pid': os.getpid(), 'host': 'afar'}, file)
file.flush()
print('held', flush=True)
sys.stdin.read()
"""


def test_lock_is_held_once_and_leaves_nothing(tmp_path):
  path = tmp_path / 'lock'
  text = f'{path} is held by process {os.getpid()} on {socket.gethostname()}'
  for _ in range(2):
    with lock.hold(path):
      with pytest.raises(lock.HeldError, match=f'^{re.escape(text)}$'):
        with lock.hold(path):
          pass
    assert not path.exists()


def test_lock_of_a_process_ends_with_it(tmp_path):
  path = tmp_path / 'lock'
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(
      lock.HeldError, match=f'by process {process.pid} on afar$'
    ):
      with lock.hold(path):
        pass
    process.kill()
  assert path.exists()  # It is stale.
  with lock.hold(path):
    assert f'"pid": {os.getpid()}' in path.read_text()
  assert not path.exists()


def test_lock_without_a_readable_holder_is_held_all_the_same(tmp_path):
  path = tmp_path / 'lock'
  for content in ('', '[1]', '{"pid": 3}', 'null'):
    path.write_text(content)
    with path.open() as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      with pytest.raises(lock.HeldError, match='held by another process$'):
        with lock.hold(path):
          pass


def test_file_that_is_removed_as_it_is_locked_is_made_anew(
  tmp_path, monkeypatch
):
  path, flock, count = tmp_path / 'lock', fcntl.flock, []

  def flock_late(file, kind):
    count.append(kind)
    if len(count) == 1:  # Its holder removes it between opening and locking.
      path.unlink()
    flock(file, kind)

  monkeypatch.setattr(fcntl, 'flock', flock_late)
  with lock.hold(path):
    assert len(count) == 2 and path.exists()


def test_file_that_goes_as_it_is_looked_at_is_made_anew(tmp_path, monkeypatch):
  path, stat, count = tmp_path / 'lock', pathlib.Path.stat, []

  def stat_late(found, **options):
    count.append(found)
    if len(count) == 1:
      path.unlink()
    return stat(found, **options)

  monkeypatch.setattr(pathlib.Path, 'stat', stat_late)
  with lock.hold(path):
    assert len(count) == 2
    monkeypatch.undo()
    assert path.exists()


def test_lock_of_who_came_after_its_removal_stays(tmp_path):
  path = tmp_path / 'lock'
  with contextlib.ExitStack() as later:
    with lock.hold(path):
      path.unlink()  # As who deletes a folder that is in use.
      later.enter_context(lock.hold(path))
    with pytest.raises(lock.HeldError):
      with lock.hold(path):
        pass
  assert not path.exists()


@pytest.mark.parametrize(
  ('number', 'error'),
  [(errno.ENOLCK, lock.UnsupportedError), (errno.EIO, OSError)],
)
def test_file_systems_without_locks_are_told_apart(
  tmp_path, monkeypatch, number, error
):
  def refuse(file, kind):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with pytest.raises(error) as found:
    with lock.hold(tmp_path / 'lock'):
      pass
  assert type(found.value) is error
