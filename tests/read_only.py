"""Folders that nobody may write to, root neither."""

import contextlib
import os
import pathlib
import stat
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder read-only: for root, by a mount.

  Raises:
    subprocess.CalledProcessError: If root may not mount, as in a container.
    FileNotFoundError: If there is no mount.
  """
  where = str(folder)
  if os.geteuid():
    mode = folder.stat().st_mode
    folder.chmod(mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
      yield
    finally:
      folder.chmod(mode)
    return
  subprocess.run(['mount', '--bind', where, where], check=True)
  try:
    options = ['-o', 'remount,bind,ro']
    subprocess.run(['mount', *options, where], check=True)
    yield
  finally:
    subprocess.run(['umount', where], check=True)


@contextlib.contextmanager
def read_only_or_skip(folder: pathlib.Path) -> Iterator[None]:
  """As `read_only`; skips the test where that is not allowed."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(read_only(folder))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
      pytest.skip(f'This root may not mount, and may write everywhere: {error}')
    yield
