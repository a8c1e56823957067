"""How does a command have its run directory to itself?"""

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Sequence

import jax

from gnlorp_jax.data import hub
from gnlorp_jax.disk import lock, writing
from gnlorp_jax.training import checkpoint

_logger = logging.getLogger(__name__)

_LOCK = '.lock'


@contextlib.contextmanager
def opened(
  run_dir: str | pathlib.Path,
  *,
  exports: Sequence[str] = (),
  reads: Sequence[str | None] = (),
) -> Iterator[None]:
  """Has a run directory for one process, cleared of what killed ones left.

  Of processes that JAX has joined the first has it for all.

  Args:
    run_dir: The run directory, which is made.
    exports: Names of the folders in it that the end of the run replaces.
    reads: Folders, files or names that the run reads; what is None, or a name
      of the hub, is in no run directory.

  Yields:
    As long as the directory is held.

  Raises:
    ValueError: If no checkpoint could be read from there, it holds what is no
      file, or an export would replace what no run wrote, or what this one
      reads.
    OSError: If another process has it, or it cannot be written.
  """
  folder = pathlib.Path(run_dir)
  checkpoint.check_path(folder)
  if jax.process_index():
    yield
    return
  _check_files(folder)
  with _held(folder):
    writing.sweep_files(folder)
    for name in exports:
      writing.sweep(folder, writing.prefix_of(folder / name))
      for read in reads:
        _check_apart(folder / name, read)
      writing.check_replaceable(folder / name)
    yield


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
  """Holds a run directory's lock; one that stays empty is removed again."""
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  with contextlib.ExitStack() as stack:
    stack.callback(_remove_empty, made)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      stack.enter_context(lock.hold(folder / _LOCK))
    except lock.UnsupportedError as error:
      _logger.warning(
        'The file system has no locks (%s): see that no other process uses the '
        'run directory %s at the same time.',
        *(error, folder),
      )
    except lock.HeldError as error:
      raise OSError(
        f'The run directory {folder} is in use: {error}. Two at once would '
        'write over each other. Wait for it, end it, or use another run '
        'directory; if its host is gone, delete that file.'
      ) from error
    except OSError as error:
      raise OSError(
        f'The run directory {folder} cannot be written: {error.strerror}. '
        'Choose another or correct its permissions.'
      ) from error
    yield


def _remove_empty(folders: Sequence[pathlib.Path]) -> None:
  """Removes folders, inner ones first, up to one that holds something."""
  with contextlib.suppress(OSError):
    for folder in folders:
      folder.rmdir()


def _check_files(folder: pathlib.Path) -> None:
  """Raises ValueError for what it would take for ever to open."""
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if path.exists() and not (path.is_file() or path.is_dir()):
      raise ValueError(
        f'{path} is neither a file nor a folder, but a pipe, a socket or a '
        'device, which a run would wait for. Remove it, or use another run '
        'directory.'
      )


def _check_apart(export: pathlib.Path, read: str | None) -> None:
  """Raises ValueError if an export would replace what is read."""
  if read is None or hub.is_hub(read):
    return
  path = pathlib.Path(read).resolve()
  if path.exists() and path.is_relative_to(export.resolve()):
    raise ValueError(
      f'The run reads {read}, and its end would replace {export}. Use another '
      'run directory, or move what is read out of it.'
    )
