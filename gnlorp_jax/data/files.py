"""Files of text: which are read, how, and what is lost where they are damaged.

A file of text is a document (`.txt`, `.md`, `.tokens`, `.py`, or anything
else), a file of JSON lines with a field of text (`.jsonl`, `.json`), or a table
with a column of it (`.parquet`). The first two may be compressed by gzip.
"""

import collections
import contextlib
import dataclasses
import difflib
import gzip
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from gnlorp_jax.disk import extras

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = ('.md', '.py', '.tokens', '.txt')
JSON_SUFFIXES = ('.json', '.jsonl')
TABLE_SUFFIX = '.parquet'
TEXT_COLUMN = 'text'

_PROGRAMS = {
  '.bz2': 'bunzip2',
  '.lz4': 'unlz4',
  '.xz': 'unxz',
  '.zst': 'unzstd',
}
COMPRESSED = tuple(_PROGRAMS)
_UNPACK = 'Unpack it and name the folder.'
_CONVERT = 'Write it as JSON lines, Parquet or plain text.'
# What would be read as text, line by line, and is none.
_UNREAD = {
  **{
    suffix: f'Decompress it ({program}), or compress it by gzip.'
    for suffix, program in _PROGRAMS.items()
  },
  **dict.fromkeys(('.7z', '.rar', '.tar', '.tgz', '.zip'), _UNPACK),
  **dict.fromkeys(('.arrow', '.avro', '.bin', '.feather', '.npy'), _CONVERT),
  **dict.fromkeys(('.docx', '.epub', '.odt', '.pdf', '.pkl'), _CONVERT),
}
_POINTER = b'version https://git-lfs.github.com/spec/'
_BAD_SHOWN = 10
_BAD_ALLOWED = 10
_FRACTION_ALLOWED = 0.01


@dataclasses.dataclass
class Tally:
  """What a pass over a source has met so far; kept up to date by the reader.

  Attributes:
    records: Lines (of files) and elements (of data sets) read, bad ones
      included.
    bad: Records skipped because they hold no readable text.
    first_bad: Place and fault of the first of them.
    fraction: Part of the source that has been read, in [0, 1].
    bytes: Bytes of the lines that were read, decompressed.
    bad_bytes: Those of bad lines.
    damaged: Files that broke off, whose rest is lost.
    first_damaged: The first of them, and its fault.
    faults: How often each of the first faults was met.
  """

  records: int = 0
  bad: int = 0
  first_bad: str = ''
  fraction: float = 0.0
  bytes: int = 0
  bad_bytes: int = 0
  damaged: int = 0
  first_damaged: str = ''
  faults: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def too_many(self) -> bool:
    """Whether more than 1 % is bad, and more than 10 records.

    Counted are records and, of lines, bytes: one line may hold most of a file.
    """
    allowed = max(_BAD_ALLOWED, _FRACTION_ALLOWED * self.records)
    return self.bad > allowed or (
      self.bad_bytes * self.records > allowed * self.bytes
    )

  def report(self, place: str, fault: Exception, size: int = 0) -> None:
    """Counts a bad record and warns about the first two of a fault by name.

    Args:
      place: Where it is.
      fault: What is wrong.
      size: Its bytes.
    """
    self.bad += 1
    self.bad_bytes += size
    self.first_bad = self.first_bad or f'{place}: {fault}'
    kind = str(fault)
    if kind not in self.faults and len(self.faults) > _BAD_SHOWN:
      return
    self.faults[kind] += 1
    if self.faults[kind] == 1 and len(self.faults) > _BAD_SHOWN:
      logger.warning('Further faults are counted but not shown.')
    elif self.faults[kind] == 1:
      logger.warning('Skipped %s: %s', place, fault)
    elif self.faults[kind] == 2:
      logger.warning('Skipped %s: the same. More of it is counted.', place)

  def break_off(self, place: str, fault: Exception | str) -> None:
    """Counts a file of which nothing more can be read, and warns."""
    self.damaged += 1
    self.first_damaged = self.first_damaged or f'{place}: {fault}'
    logger.warning('Damaged: %s: %s. The rest of it is lost.', place, fault)

  def check(self, source: str, files: int) -> None:
    """Raises ValueError if too much is lost.

    Args:
      source: What to call the source.
      files: How many files it has.
    """
    if self.damaged > _FRACTION_ALLOWED * files:
      raise ValueError(
        f'Data source {source!r} has {self.damaged} damaged of {files} files; '
        f'at most 1 % may be. The first is {self.first_damaged}. Get them '
        'again, or leave them out.'
      )
    if self.too_many:
      raise ValueError(
        f'Data source {source!r} has {self.bad} bad records among the first '
        f'{self.records}{self._bytes_text()}; at most 1 % may be bad. The '
        f'first is {self.first_bad}. Repair the file or leave it out.'
      )

  def _bytes_text(self) -> str:
    if not self.bad_bytes:
      return ''
    return f' ({self.bad_bytes:,} of {self.bytes:,} bytes)'


def check_file(path: pathlib.Path) -> None:
  """Raises ValueError unless a path is that of a file that can be read.

  A pipe or a device may never end. A pointer of git-lfs is a file of three
  lines that stands for another.
  """
  if path.is_symlink() and not path.exists():
    raise ValueError(
      f'{path} is a link to {os.readlink(path)}, which is not there.'
    )
  if not path.is_file():
    raise ValueError(
      f'{path} is no file, but a pipe, a device or the like. Write what comes '
      'from it to a file first.'
    )
  if not os.access(path, os.R_OK):
    raise ValueError(f'There is no permission to open {path}.')
  with path.open('rb') as file:
    if file.read(len(_POINTER)) == _POINTER:
      raise ValueError(
        f'{path} is a pointer of git-lfs, not the file itself: get that by '
        '`git lfs pull`.'
      )


def nearest_file(path: pathlib.Path) -> str:
  """What was meant by a path that does not exist, perhaps.

  Args:
    path: The path.

  Returns:
    A sentence with a space before it, or nothing: where a name in the same
    folder is close, that; where there is no such folder, that.
  """
  if path.exists():
    return ''
  if not path.parent.is_dir():
    return f' There is no folder {path.parent}.'
  beside = {p.name: p for p in path.parent.iterdir()}
  near = difflib.get_close_matches(path.name, beside, n=1)
  return f' Did you mean {str(beside[near[0]])!r}?' if near else ''


def check_suffix(path: pathlib.Path) -> None:
  """Raises ValueError if a file's name says that it is no readable text."""
  fix = _UNREAD.get(path.suffix.lower())
  if fix is not None:
    raise ValueError(
      f'{path}: files ending in {path.suffix} are not read. {fix}'
    )


def inner_suffix(path: pathlib.Path) -> str:
  """The suffix of a file's name, of a compressed one without ``.gz``."""
  return pathlib.PurePath(path.name.removesuffix('.gz')).suffix


def table_rows(
  path: pathlib.Path, columns: list[str] | None = None
) -> Iterator[tuple[dict[str, Any], float]]:
  """Reads a Parquet file, a few rows at a time.

  Args:
    path: The file.
    columns: Which columns; None: all.

  Yields:
    Each row, and the fraction of the rows read by then.

  Raises:
    ValueError: If pyarrow is not installed, the file is damaged, or it has no
      such columns.
  """
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError(
      f'{path} is a Parquet file, which needs pyarrow: '
      f'{extras.install("sft")}; or convert it to JSON lines.'
    ) from error
  try:
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      if not set(columns or ()) <= set(names):
        raise ValueError(f'it has the columns {names}, and not {columns}')
      done, total = 0, file.metadata.num_rows
      for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
          done += 1
          yield row, done / total
  except (OSError, ValueError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error


@dataclasses.dataclass(frozen=True)
class TextFile:
  """A file of text.

  Attributes:
    path: Where it is.
    column: The field of JSON lines, or the column of a table, with the text.
  """

  path: pathlib.Path
  column: str = TEXT_COLUMN

  def identity(self) -> list[Any]:
    """What tells another content, as far as it is known without reading."""
    stat = self.path.stat()
    found = [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]
    return found if self.column == TEXT_COLUMN else [*found, self.column]

  def texts(self, tally: Tally) -> Iterator[tuple[str, float]]:
    """Yields each document and the fraction of the file read by then."""
    suffix = inner_suffix(self.path)
    if suffix == TABLE_SUFFIX:
      yield from self._of_table(tally)
      return
    lines = self._lines(tally)
    if suffix not in JSON_SUFFIXES:
      yield ''.join(line for _, line, _ in lines), 1.0
      return
    for number, line, fraction in lines:
      if line.isspace():
        continue
      try:
        text = text_of(json.loads(line), self.column)
      except (ValueError, RecursionError) as fault:
        tally.report(f'{self.path}:{number}', fault, len(line.encode()))
      else:
        yield text, fraction

  def _of_table(self, tally: Tally) -> Iterator[tuple[str, float]]:
    rows = table_rows(self.path, [self.column])
    for number, (row, fraction) in enumerate(rows, 1):
      tally.records += 1
      try:
        text = text_of(row, self.column)
      except ValueError as fault:
        tally.report(f'{self.path}:{number}', fault)
      else:
        tally.bytes += len(text)
        yield text, fraction

  def _lines(self, tally: Tally) -> Iterator[tuple[int, str, float]]:
    """Yields number, text and fraction of the file for each readable line."""
    size = max(self.path.stat().st_size, 1)
    with contextlib.ExitStack() as stack:
      raw = stack.enter_context(open(self.path, 'rb'))
      stream = raw
      if self.path.suffix == '.gz':
        stream = stack.enter_context(gzip.open(raw))
        if not self.path.stat().st_size:
          tally.break_off(str(self.path), 'it is empty')
          return
      number = 0
      while True:
        number += 1
        try:
          line = stream.readline()
        except (EOFError, OSError, zlib.error) as fault:
          tally.break_off(f'{self.path}:{number}', fault)
          return
        if not line:
          return
        tally.records += 1
        tally.bytes += len(line)
        try:
          text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as fault:
          tally.report(f'{self.path}:{number}', fault, len(line))
        else:
          # Position in the file on disk, compressed or not.
          yield number, text, raw.tell() / size


def text_of(record: Any, column: str) -> str:
  """The text of a record.

  Raises:
    ValueError: If it has no such field, or none that is text.
  """
  text = record.get(column) if isinstance(record, dict) else None
  check_text(text, column)
  return text


def check_text(text: Any, column: str = TEXT_COLUMN) -> None:
  """Raises ValueError if a value is no text that can be written as UTF-8."""
  if not isinstance(text, str):
    raise ValueError(f'expected a record with a string field "{column}"')
  text.encode()  # JSON can spell half a surrogate pair, which is not text.
