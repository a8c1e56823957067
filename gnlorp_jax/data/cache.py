"""Folders that are written once and then only read."""

import os
import pathlib
import tempfile
from collections.abc import Callable


def cached_folder(
  folder: pathlib.Path, fill: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Fills a folder unless it is there already.

  The folder is filled under a temporary name and renamed when complete, so an
  interrupted run leaves nothing that a later one could mistake for the result,
  and of several processes at once the first to finish wins.

  Args:
    folder: Where the result lives. Its name must identify its content.
    fill: Writes the content into the empty folder it is given.

  Returns:
    `folder`, which now exists.
  """
  if folder.is_dir():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=folder.parent, prefix='writing-'
  ) as temporary:
    # An inner folder: the temporary one is readable by its owner only.
    draft = pathlib.Path(temporary, folder.name)
    draft.mkdir()
    fill(draft)
    try:
      os.rename(draft, folder)
    except OSError:
      if not folder.is_dir():
        raise
  return folder
