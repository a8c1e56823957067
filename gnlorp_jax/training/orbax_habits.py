"""What Orbax does beside saving and restoring, and what is made of it."""

import asyncio
import contextlib
import logging
import pathlib
import sys
import warnings

import orbax.checkpoint as ocp

from gnlorp_jax.disk import writing


class SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """A checkpoint that is on the disk before it gets its name."""

  async def finalize(self, *args, **kwargs):
    """Renames it, once all it holds is on the disk."""
    await asyncio.to_thread(writing.sync, self.get())
    await super().finalize(*args, **kwargs)
    folder = self.get_final().parent
    await asyncio.to_thread(writing.sync, folder, deep=False)


@contextlib.contextmanager
def unheard_complaints():
  """Silences the coroutines that a failed read of Orbax leaves behind.

  They complain when they are collected, so that must happen in here.
  """
  hook = sys.unraisablehook
  sys.unraisablehook = lambda unraisable: None
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'coroutine .* was never awaited')
      yield
  finally:
    sys.unraisablehook = hook


_SLOW_SAVE = 'Waiting for previous save'  # Of runs of short steps: harmless.


def keep_log_record(record):
  """Drops what Orbax tells at each save, and the errors that it also raises."""
  if 'orbax' not in pathlib.Path(record.pathname).parts:
    return True
  is_told = record.levelno == logging.WARNING
  return is_told and not record.getMessage().startswith(_SLOW_SAVE)
