"""Checkpoints that survive a kill, a full disk and a flipped bit.

Orbax writes them: asynchronously, sharded, and into place by one rename, so
that a killed run leaves either a whole checkpoint or none. What is added here
is the proof that what is read is what was written. Each checkpoint carries a
record with the shape, dtype and checksum of every array; one that fails its
record, or cannot be read, is moved aside, and the one before it is used.
"""

import contextlib
import errno
import gc
import itertools
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import orbax.checkpoint as ocp

from gnlorp_jax.training import distributed, integrity, orbax_habits

_logger = logging.getLogger(__name__)

# These say something about the machine, not about the checkpoint: it may be
# whole, so it must not be moved aside.
_NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_NOT_DAMAGE_NUMBERS = (
  *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
  *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN),  # Of a file server.
)

_OPEN = os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0)

# What has a meaning in patterns of names of files.
_PATTERNS = '*?[\\'


class Checkpointer:
  """Saves and restores the checkpoints of one run directory.

  Use it as a context manager, or call `close`: a checkpoint may still be on
  its way to the disk.

  Args:
    directory: Where the checkpoints are, one folder per step; it is made.
    keep: Number of newest checkpoints to keep, at least 1. With more than 1
      there is one to fall back to.
    read_only: Leaves the directory untouched, as another process may be
      writing to it.

  Raises:
    ValueError: If `keep` is less than 1, or as of `check_path`.
    OSError: If the directory cannot be written.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int = 3,
    read_only: bool = False,
  ):
    if keep < 1:
      raise ValueError(f'keep={keep} must be at least 1.')
    self._directory = pathlib.Path(directory).absolute()
    check_path(self._directory)
    self._keep = keep
    self._read_only = read_only
    self._current_step = None
    logging.getLogger('absl').addFilter(orbax_habits.keep_log_record)
    if not read_only:
      distributed.from_first(lambda: _check_writable(self._directory))
      distributed.from_first(lambda: _sweep(self._directory))
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=(
          ocp.checkpoint_managers.preservation_policy.LatestN(keep)
        ),
        create=not read_only,
        temporary_path_class=orbax_habits.SyncedPath,
        # In the thread that fails: made in another, the writers of the files
        # wait five minutes for a folder that could not be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, error, where):
    if not distributed.is_alone(error):  # Others may never come to the end.
      self.close()

  def save(
    self,
    step: int,
    state: Any,
    data_state: dict[str, Any],
    metadata: dict[str, Any],
    *,
    wait: bool = False,
  ) -> None:
    """Saves a checkpoint, and deletes the oldest ones beyond `keep`.

    Returns when the state has been copied to host memory: it may be donated
    right away. A step that this object saved or restored last is not saved
    again.

    Args:
      step: Number of steps taken.
      state: Pytree of arrays of at most 32 bits per entry.
      data_state: Position in the data, as JSON can hold it.
      metadata: What must be known before the state can be restored, such as
        the architecture; as JSON can hold it.
      wait: Whether to return only when everything is on disk.

    Raises:
      ValueError: If the directory is read-only, or holds a later step.
      OSError: If this checkpoint, or an earlier one still on its way, could
        not be written.
    """
    if self._read_only:
      raise ValueError(
        f'{self._directory} was opened with read_only=True: nothing can be '
        'saved to it.'
      )
    if step != self._current_step:
      self._write(step, state, data_state, metadata)
      self._current_step = step
    if wait:
      with self._explain_failed_write():
        self._manager.wait_until_finished()

  def restore_latest(
    self, abstract_state: Any
  ) -> tuple[Any, dict[str, Any], dict[str, Any]] | None:
    """Restores the newest checkpoint that is whole.

    Damaged ones are reported and, unless read-only, renamed to
    ``<step>.corrupt``, where they block nothing. Whole ones beyond `keep` are
    deleted, as are those whose deletion a kill has ended.

    Args:
      abstract_state: Pytree of `jax.ShapeDtypeStruct` with shardings. The mesh
        may be another one than at the time of saving.

    Returns:
      The state, the data state and the metadata as they were saved, or None
      if there is no checkpoint.

    Raises:
      ValueError: If the state has other arrays than the checkpoint, or if
        there are checkpoints but none is whole.
      OSError: If files of one may not be read.
    """

    def read(step):
      record = self._read_record(step)
      self._check_fits(step, record['arrays'], abstract_state)
      state = self._read_state(step, abstract_state, record['arrays'])
      return state, record['data_state'], record['metadata']

    found = self._newest_whole(read)
    if found is None:
      return None
    self._current_step, restored, damaged_steps = found
    if not self._read_only:
      if damaged_steps:
        self._move_aside(damaged_steps)
      # Only now: the newest are known to be more than names.
      self._delete_oldest()
    return restored

  def latest_metadata(self) -> dict[str, Any] | None:
    """Reads the metadata of the newest checkpoint without its arrays.

    Returns:
      The metadata, or None if there is no checkpoint.

    Raises:
      ValueError: If there are checkpoints but none can be read.
    """
    found = self.latest_position()
    return None if found is None else found[2]

  def latest_position(
    self,
  ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """Reads the newest checkpoint without its arrays.

    Returns:
      Its step, data state and metadata, or None if there is no checkpoint.

    Raises:
      ValueError: If there are checkpoints but none can be read.
    """
    found = self._newest_whole(self._read_record)
    if found is None:
      return None
    step, record, _ = found
    return step, record['data_state'], record['metadata']

  def close(self) -> None:
    """Waits until everything is on disk.

    Raises:
      OSError: If a checkpoint could not be written.
    """
    with self._explain_failed_write():
      self._manager.close()

  def _write(self, step, state, data_state, metadata):
    latest = self._manager.latest_step()
    if latest is not None and step <= latest:
      raise ValueError(
        f'Step {step} cannot be saved: {self._directory} already holds step '
        f'{latest}. Resume from it or use another run directory.'
      )
    record = {
      'data_state': data_state,
      'metadata': metadata,
      'arrays': integrity.describe(state),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      record=ocp.args.JsonSave(integrity.seal(record)),
    )
    with self._explain_failed_write():
      self._manager.save(step, args=args, force=True)

  def _newest_whole(self, read):
    """Tries checkpoints from the newest on.

    Returns:
      The first step that `read` can read, what it returned, and the steps
      that it could not read; None if there is no checkpoint.
    """
    damaged = {}
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in distributed.from_first(lambda: steps):
      with orbax_habits.unheard_complaints():
        try:
          self._check_kinds(step)
          return step, read(step), list(damaged)
        except integrity.DamagedError as error:
          damaged[step] = str(error)
        except OSError as error:
          raise OSError(
            f'The checkpoint of step {step} in {self._directory} cannot be '
            f'read: {error}. It was left as it is. Run the same command again '
            'when its files can be read.'
          ) from error
        gc.collect()
        self._check_readable(step)
      _logger.warning(
        'The checkpoint of step %d in %s is damaged: %s.',
        step,
        self._directory,
        damaged[step],
      )
    if damaged:
      reasons = '; '.join(
        f'step {step}: {why}' for step, why in damaged.items()
      )
      raise ValueError(
        f'No checkpoint in {self._directory} can be restored ({reasons}). '
        'Repair one or use another run directory.'
      )
    return None

  def _read_record(self, step):
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    with integrity.damage_of_all(), _failures_as_damage():
      sealed = self._manager.restore(step, args=args)['record']
      return integrity.unseal(sealed, ('data_state', 'metadata', 'arrays'))

  def _read_state(self, step, abstract_state, arrays):
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    with integrity.damage_of_all(), _failures_as_damage():
      state = self._manager.restore(step, args=args)['state']
    integrity.check_contents(state, arrays)
    return state

  def _check_kinds(self, step):
    """Raises DamagedError for what would be waited for, such as a pipe."""
    for folder, _, names in os.walk(self._directory / str(step)):
      for name in names:
        path = pathlib.Path(folder, name)
        if path.exists() and not path.is_file():
          raise integrity.DamagedError(f'{path} is no file')

  def _check_readable(self, step):
    """Raises OSError if files are there that cannot be opened.

    Whether they are whole is then not known: they may be another user's.
    """

    def refuse(error):
      if isinstance(error, FileNotFoundError):
        return
      raise OSError(
        f'The checkpoint of step {step} in {self._directory} cannot be read: '
        f'{error.strerror}: {error.filename!r}. It was left as it is. Correct '
        'its permissions, or use another run directory.'
      ) from error

    checkpoint = self._directory / str(step)
    for folder, _, names in os.walk(checkpoint, onerror=refuse):
      for name in names:
        try:
          # A pipe is not waited for.
          os.close(os.open(os.path.join(folder, name), _OPEN))
        except OSError as error:
          refuse(error)

  def _check_fits(self, step, arrays, abstract_state):
    try:
      integrity.check_same_types(
        arrays, integrity.describe_types(abstract_state)
      )
    except ValueError as error:
      raise ValueError(
        f'Checkpoint of step {step} in {self._directory} does not fit the '
        f'state. {error} Use another run directory or the same settings.'
      ) from None

  def _move_aside(self, steps):
    def move():
      for step in steps:
        source = self._directory / str(step)
        target = _free_name(self._directory / f'{step}.corrupt')
        source.rename(target)
        _logger.warning('Moved %s to %s.', source, target.name)

    distributed.from_first(move)
    self._manager.reload()

  def _delete_oldest(self):
    def delete():
      oldest = sorted(self._manager.all_steps())[: -self._keep]
      for step in oldest:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)
      return bool(oldest)

    if distributed.from_first(delete):
      self._manager.reload()

  @contextlib.contextmanager
  def _explain_failed_write(self):
    try:
      yield
    except Exception as error:
      raise OSError(
        f'A checkpoint could not be written to {self._directory}: '
        f'{distributed.first_line(error)}. Checkpoints that were complete are '
        'untouched. Check the free space and the permissions.'
      ) from error


def check_path(directory: str | pathlib.Path) -> None:
  """Checks that what is saved in a directory will be found there.

  Orbax looks for the files of a checkpoint by a pattern that begins with their
  directory, so that nothing in the name of one may be a pattern itself.

  Args:
    directory: Where checkpoints are, or a folder that they will be in.

  Raises:
    ValueError: If its absolute path holds a character of patterns.
  """
  path = str(pathlib.Path(directory).absolute())
  found = sorted(set(path) & set(_PATTERNS))
  if found:
    raise ValueError(
      f'The path {path} holds {"".join(found)}, and no checkpoint could be '
      f'read back from it: none of {_PATTERNS} may stand in the name of a '
      'folder with checkpoints, or of one above it. Choose another folder.'
    )


@contextlib.contextmanager
def _failures_as_damage():
  """Turns whatever goes wrong while reading into `integrity.DamagedError`."""
  try:
    yield
  except (integrity.DamagedError, integrity.OtherVersionError, *_NOT_DAMAGE):
    raise
  except Exception as error:
    if getattr(error, 'errno', None) in _NOT_DAMAGE_NUMBERS:
      raise
    raise integrity.DamagedError(
      f'{type(error).__name__}: {distributed.first_line(error)}'
    ) from error


def _free_name(path):
  """The path itself, or with the first number appended that is not taken."""
  numbered = (path.with_name(f'{path.name}{n}') for n in itertools.count(2))
  return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _check_writable(directory):
  """Fails now rather than at the first save, hours into a run."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      pass
  except OSError as error:
    raise OSError(
      f'Checkpoint directory {directory} cannot be written: {error.strerror}. '
      'Choose another directory or correct its permissions.'
    ) from error


def _sweep(directory):
  """Deletes what a killed run left unfinished, which would fill the disk.

  Orbax's own sweep goes on beside the run, and fails the first save if it meets
  a folder that is gone by then.
  """
  for path in directory.iterdir():
    if ocp.utils.TMP_DIR_SUFFIX in path.name:
      shutil.rmtree(path, ignore_errors=True)
