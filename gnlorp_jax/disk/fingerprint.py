"""What files hold, whatever they are called and wherever they lie."""

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Sequence


def of_file(path: pathlib.Path) -> str:
  """SHA-256 of a file's content, 16 hexadecimal digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()[:16]


def of_files(paths: Sequence[pathlib.Path]) -> str:
  """One of several files, by their names and contents, in any order.

  They are read whole, several at once, at about a gigabyte per second and core.

  Args:
    paths: The files, of different names.

  Returns:
    16 hexadecimal digits.
  """
  paths = sorted(paths, key=lambda path: path.name)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = list(pool.map(of_file, paths))
  lines = (f'{p.name} {one}\n' for p, one in zip(paths, found, strict=True))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]
