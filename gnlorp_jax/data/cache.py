"""Folders that are written once and then only read."""

import contextlib
import pathlib
from collections.abc import Callable

from gnlorp_jax.disk import writing

_PREFIX = 'writing-'


def cached_folder(
  folder: pathlib.Path, fill: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Fills a folder unless it is there already.

  The folder is filled under a temporary name and renamed when complete, so an
  interrupted run leaves nothing that a later one could mistake for the result,
  and of several processes at once the first to finish wins. What killed ones
  left is removed.

  Args:
    folder: Where the result lives. Its name must identify its content.
    fill: Writes the content into the empty folder it is given.

  Returns:
    `folder`, which now exists.

  Raises:
    OSError: If it is not there, and nothing can be written beside it.
  """
  writing.sweep(folder.parent, _PREFIX)
  if folder.is_dir():
    return folder
  with contextlib.ExitStack() as stack:
    try:
      draft = stack.enter_context(writing.drafted(folder, _PREFIX))
    except OSError as error:
      raise OSError(
        f'{folder.parent}, where tokens and tokenizers are kept, cannot be '
        f'written: {error.strerror}. Correct its permissions, or name another '
        'folder as data.cache_dir.'
      ) from error
    fill(draft)
    try:
      writing.put_in_place(draft, folder)
    except OSError:
      if not folder.is_dir():
        raise
  return folder
