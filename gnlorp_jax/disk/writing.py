"""Files and folders that are there whole or not at all.

What is written stands under another name, beside its own, until it is complete
and on the disk; a rename then puts it in its place. A program that is killed
leaves drafts behind, which `sweep` removes.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from gnlorp_jax.disk import lock

_DRAFT = '.draft'  # What the name of a file that is being written ends in.
# In the folder around a draft of a folder there is nothing but
_LOCK = 'lock'  # who writes it,
_NEW = 'new'  # the draft,
_OLD = 'old'  # and what it is replacing.
# Beside what `replaced` wrote: which files those are, with their sizes.
MARK = '.gnlorp_jax.json'


def put_in_place(draft: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a draft its name once it is on the disk: power may fail any time.

  Args:
    draft: A file, or a folder. The files in a folder get the mode that new
      files have, whatever those who wrote them gave them.
    path: Its name, in the same file system. A file there is replaced; a folder
      may be empty.

  Raises:
    OSError: If that fails; `path` is as it was.
  """
  if draft.is_dir():
    mode = draft.stat().st_mode & 0o666
    for folder, _, names in os.walk(draft):
      for name in names:
        os.chmod(os.path.join(folder, name), mode)
  sync(draft)
  os.replace(draft, path)
  sync(path.parent, deep=False)


def sync(path: str | os.PathLike, *, deep: bool = True) -> None:
  """Waits until a file or a folder is on the disk.

  Args:
    path: The file or folder.
    deep: Whether all that is in a folder counts too, or its names alone.

  Raises:
    OSError: If it does not get there.
  """
  for folder, _, names in os.walk(path) if deep else ():
    for name in names:
      _sync(os.path.join(folder, name))
    _sync(folder)
  if not (deep and os.path.isdir(path)):
    _sync(path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file, UTF-8, that is there whole or not at all."""
  with written(path) as draft:
    draft.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write, which takes the place of another when it is complete.

  Args:
    path: The file, in a folder that one process writes to.

  Yields:
    Where to write.

  Raises:
    OSError: If that fails; it names the file, which is as it was.
  """
  draft = path.with_name(f'.{path.name}{_DRAFT}')
  try:
    yield draft
    put_in_place(draft, path)
  except OSError as error:
    if error.filename == str(draft):
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  finally:
    # On a disk that cannot be written even what is not there stays.
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)


@contextlib.contextmanager
def drafted(
  folder: pathlib.Path, prefix: str | None = None
) -> Iterator[pathlib.Path]:
  """An empty folder to fill, for `put_in_place`; otherwise it is removed.

  Args:
    folder: What it will be called, in a folder that is made if need be.
    prefix: What the name of the folder around it begins with; None follows
      from `folder`. `sweep` needs to know it.

  Yields:
    The draft, in the same place under another name.
  """
  prefix = prefix_of(folder) if prefix is None else prefix
  folder.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    around = _own_folder(folder.parent, prefix, stack)
    # An inner folder: the one around it is readable by its owner only.
    draft = around / _NEW
    draft.mkdir()
    yield draft


def prefix_of(folder: pathlib.Path) -> str:
  """What the names of drafts of a folder begin with."""
  return f'.{folder.name}.'


@contextlib.contextmanager
def replaced(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to fill, which takes the place of an earlier one when complete.

  Args:
    folder: The folder.

  Yields:
    A folder in the same place under another name.

  Raises:
    ValueError: As of `check_replaceable`.
  """
  folder = folder.absolute()
  check_replaceable(folder)
  with drafted(folder) as draft:
    yield draft
    text = json.dumps({'files': _sizes(draft)}, indent=2)
    (draft / MARK).write_text(text + '\n', encoding='utf-8')
    check_replaceable(folder)  # Hours may have passed.
    sync(draft)  # What takes long comes while the old one is still there.
    old = draft.parent / _OLD
    if folder.exists():
      folder.rename(old)
    try:
      put_in_place(draft, folder)
    finally:
      _put_back(old, folder)


def check_replaceable(folder: pathlib.Path) -> None:
  """Checks that a folder is absent, empty, or what `replaced` left there.

  Args:
    folder: The folder.

  Raises:
    ValueError: If it holds anything else, such as someone's model.
  """
  if not folder.exists():
    return
  found = _sizes(folder) if folder.is_dir() else {'': 0}
  mark = folder / MARK
  written_sizes = {}
  with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
    written_sizes = dict(json.loads(mark.read_text(encoding='utf-8'))['files'])
  other = sorted(
    name for name, size in found.items() if size != written_sizes.get(name)
  )
  if other:
    raise ValueError(
      f'{folder} would be replaced, and it is not what an earlier run wrote '
      f'there: see {", ".join(other[:3])}{", ..." if other[3:] else ""}. '
      'Move it elsewhere, or use another run directory.'
    )


def sweep(folder: pathlib.Path, prefix: str) -> None:
  """Removes drafts of folders that killed programs left, and no others.

  A folder that was moved out of the way of a draft is put back, where there is
  nothing in its place.

  Args:
    folder: Where they are, if it is there.
    prefix: What their names begin with: as of `drafted`. A folder of such a
      name stays if it holds anything that is not of drafts.
  """
  for path in _entries(folder):
    # What cannot be read is another user's, and what cannot be locked is alive.
    with contextlib.suppress(OSError):
      if not (_is_called(prefix, path) and _is_around_draft(path)):
        continue
      with lock.hold(path / _LOCK):
        name = prefix.removeprefix('.').removesuffix('.')
        _put_back(path / _OLD, folder / name)
        shutil.rmtree(path, ignore_errors=True)


def sweep_files(folder: pathlib.Path) -> None:
  """Removes drafts of files in a folder that one process writes to."""
  for path in _entries(folder):
    if path.name.startswith('.') and path.name.endswith(_DRAFT):
      path.unlink(missing_ok=True)


def _own_folder(
  parent: pathlib.Path, prefix: str, stack: contextlib.ExitStack
) -> pathlib.Path:
  """A new folder that is locked, and removed in the end."""
  while True:
    path = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    stack.callback(shutil.rmtree, path, ignore_errors=True)
    try:
      stack.enter_context(lock.hold(path / _LOCK))
      return path
    except lock.UnsupportedError:
      return path  # Nobody will sweep it.
    except (lock.HeldError, FileNotFoundError):
      pass  # Swept as it was made: before it was locked.


def _is_called(prefix: str, path: pathlib.Path) -> bool:
  """Whether a name is one that `tempfile` makes of a prefix."""
  return bool(re.fullmatch(re.escape(prefix) + '[a-z0-9_]{8}', path.name))


def _is_around_draft(folder: pathlib.Path) -> bool:
  """Whether a folder holds nothing that is not of drafts.

  Who fills a draft may write it as a draft in turn, which is beside it then.
  """
  inner = prefix_of(folder / _NEW)
  return all(
    path.name in (_LOCK, _NEW, _OLD) or _is_called(inner, path)
    for path in _entries(folder)
  )


def _put_back(old: pathlib.Path, folder: pathlib.Path) -> None:
  if old.exists() and not folder.exists():
    old.rename(folder)


def _sizes(folder: pathlib.Path) -> dict[str, int]:
  """Size of every file in a folder but the mark, by its path there."""
  return {
    str(path.relative_to(folder)): path.stat().st_size
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path != folder / MARK
  }


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
  return list(folder.iterdir()) if folder.is_dir() else []


def _sync(path: str | os.PathLike) -> None:
  """Waits until a file's content, or a folder's list of names, is on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some file systems keep no such list that could be waited for.
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
      raise
  finally:
    os.close(descriptor)
