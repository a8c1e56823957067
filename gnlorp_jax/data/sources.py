"""Where text comes from: files, folders, data sets, the standard library.

A source is named by one string, a comma-separated list of

* a text file: one document (`.txt`, `.md`, `.tokens`, `.py`, or anything else);
* a `.jsonl` or `.json` file of JSON lines with a field `text`, as in C4;
* either of these compressed by gzip (`.gz`);
* a folder: every file in it with one of these suffixes, sorted by path;
* a glob such as `data/c4-train.*.json.gz`, sorted by path;
* `tfds:NAME` or `tfds:NAME@SPLIT`: a TensorFlow Datasets set that is prepared
  as ArrayRecord, for instance `tfds:lm1b@train[:10%]`;
* `hf:OWNER/NAME:CONFIG:SPLIT@REVISION[:N]`: the first N documents of a data set
  of the Hugging Face hub, for instance `hf:allenai/c4:en[:1000000]`; see `hub`;
* `stdlib`: about 4 MB of the Python files of the running interpreter, which
  every machine has.
"""

import contextlib
import dataclasses
import difflib
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from gnlorp_jax.data import hub

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = ('.md', '.py', '.tokens', '.txt')
JSON_SUFFIXES = ('.json', '.jsonl')

_STDLIB_BYTES = 4_000_000
_STDLIB_EXCLUDED = frozenset(
  (
    '__pycache__',
    'dist-packages',
    'idle_test',
    'lib2to3',
    'site-packages',
    'test',
    'tests',
  )
)
_BAD_SHOWN = 10
_BAD_ALLOWED = 10
_BAD_FRACTION_ALLOWED = 0.01


@dataclasses.dataclass
class Tally:
  """What a pass over a source has met so far; kept up to date by the reader.

  Attributes:
    records: Lines (of files) and elements (of data sets) read, bad ones
      included.
    bad: Records skipped because they hold no readable text.
    first_bad: Place and fault of the first of them.
    fraction: Part of the source that has been read, in [0, 1].
  """

  records: int = 0
  bad: int = 0
  first_bad: str = ''
  fraction: float = 0.0

  @property
  def too_many(self) -> bool:
    """Whether more than 10 and more than 1 % of the records are bad."""
    return self.bad > max(_BAD_ALLOWED, _BAD_FRACTION_ALLOWED * self.records)

  def report(self, place: str, fault: Exception) -> None:
    """Counts a bad record and warns about the first few by name."""
    self.bad += 1
    self.first_bad = self.first_bad or f'{place}: {fault}'
    if self.bad <= _BAD_SHOWN:
      logger.warning('Skipped %s: %s', place, fault)
    elif self.bad == _BAD_SHOWN + 1:
      logger.warning('Further bad records are counted but not shown.')


def documents(source: str, tally: Tally | None = None) -> Iterator[str]:
  """Reads the documents of a source, always in the same order.

  A bad line (not UTF-8, not JSON, no string field `text`, or where a gzip file
  breaks off) is skipped with a warning that names file and line. Documents of
  white space alone are left out.

  Args:
    source: Name of the source; see the head of this module.
    tally: Updated while reading, for progress and for a report.

  Returns:
    An iterator over documents. The name is resolved at once, the text is read
    as the iterator advances, one document in memory at a time.

  Raises:
    ValueError: If the source is unknown or unreadable (at once), holds no text,
      or if more than 10 and more than 1 % of its records are bad.
  """
  return _read(source, _resolve(source), Tally() if tally is None else tally)


def fingerprint(source: str) -> str:
  """Identifies the content of a source without reading it.

  Args:
    source: Name of the source; see the head of this module.

  Returns:
    A hash of the paths, sizes and modification times of the files, of the
    place, split and length of TFDS data sets, and of the commit, configuration,
    split and number of documents of those of the hub.

  Raises:
    ValueError: If the source is unknown or unreadable.
  """
  identity = json.dumps([part.identity() for part in _resolve(source)])
  return hashlib.sha256(identity.encode()).hexdigest()


def _read(source: str, parts: Sequence['_Part'], tally: Tally) -> Iterator[str]:
  empty = True
  for done, part in enumerate(parts):
    for text, fraction in part.texts(tally):
      tally.fraction = (done + fraction) / len(parts)
      if text and not text.isspace():
        empty = False
        yield text
    if tally.too_many:
      raise ValueError(
        f'Data source {source!r} has {tally.bad} bad records among the first '
        f'{tally.records}; at most 1 % may be bad. The first is '
        f'{tally.first_bad}. Repair the file or leave it out.'
      )
  tally.fraction = 1.0
  if empty:
    raise ValueError(
      f'Data source {source!r} holds no text. Bad records: {tally.bad}'
      + (f'; the first is {tally.first_bad}.' if tally.bad else '.')
    )


def _resolve(source: str) -> list['_Part']:
  names = [name.strip() for name in source.split(',')]
  if not all(names):
    raise ValueError(
      f'Data source {source!r} has an empty name; expected names joined by '
      'single commas.'
    )
  return [part for name in names for part in _resolve_one(name)]


def _resolve_one(name: str) -> list['_Part']:
  if name == 'stdlib':
    return [_File(path) for path in _stdlib_files()]
  if name.startswith('tfds:'):
    return [_open_prepared(name)]
  if hub.is_hub(name):
    return [_Streamed(hub.texts(name))]
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    files = [path]
  elif path.is_dir():
    files = _folder_files(path)
    if not files:
      raise ValueError(
        f'Data source {name!r} is a folder without text files; expected names '
        f'ending in one of {TEXT_SUFFIXES + JSON_SUFFIXES}, or these plus '
        "'.gz'."
      )
  else:
    files = []
    for match in sorted(glob.glob(str(path), recursive=True)):
      match = pathlib.Path(match)
      files.extend(_folder_files(match) if match.is_dir() else [match])
    if not files:
      raise ValueError(_unknown(name, path))
  for file in files:
    if not os.access(file, os.R_OK):
      raise ValueError(
        f'Data source {name!r} cannot be read: no permission to open {file}.'
      )
  return [_File(file) for file in files]


def _unknown(name: str, path: pathlib.Path) -> str:
  choices = {'stdlib': 'stdlib', 'tfds:': 'tfds:'}
  if path.parent.is_dir():
    choices |= {p.name: str(p) for p in path.parent.iterdir()}
  close = difflib.get_close_matches(path.name, choices)
  hint = f' Did you mean {choices[close[0]]!r}?' if close else ''
  return (
    f'Unknown data source {name!r}: no such file, folder or glob, and not '
    f"'stdlib', 'tfds:NAME' or 'hf:OWNER/NAME[:N]'.{hint}"
  )


def _inner_suffix(path: pathlib.Path) -> str:
  return pathlib.PurePath(path.name.removesuffix('.gz')).suffix


def _folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    path
    for path in folder.rglob('*')
    if _inner_suffix(path) in TEXT_SUFFIXES + JSON_SUFFIXES
    and not any(p.startswith('.') for p in path.relative_to(folder).parts)
    and path.is_file()
  )


def _stdlib_files() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  files = []
  for folder, subfolders, names in os.walk(root):
    # In place: the walk must not enter what may be a large site-packages.
    subfolders[:] = set(subfolders) - _STDLIB_EXCLUDED
    files += [pathlib.Path(folder, n) for n in names if n.endswith('.py')]
  files.sort()
  if not files:
    raise ValueError(
      f"Data source 'stdlib' is empty: no Python files in {root}. Name a text "
      'file or folder instead.'
    )
  # In an order that mixes the whole library, so that any part of it, such as a
  # held-out end, is a sample of all.
  files.sort(key=lambda p: zlib.crc32(str(p.relative_to(root)).encode()))
  sizes = itertools.accumulate(path.stat().st_size for path in files)
  return [
    path
    for path, size in zip(files, sizes, strict=True)
    if size <= _STDLIB_BYTES
  ]


@dataclasses.dataclass(frozen=True)
class _File:
  path: pathlib.Path

  def identity(self) -> list[Any]:
    stat = self.path.stat()
    return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]

  def texts(self, tally: Tally) -> Iterator[tuple[str, float]]:
    """Yields each document and the fraction of the file read by then."""
    lines = self._lines(tally)
    if _inner_suffix(self.path) not in JSON_SUFFIXES:
      yield ''.join(line for _, line, _ in lines), 1.0
      return
    for number, line, fraction in lines:
      if line.isspace():
        continue
      try:
        text = _text_field(line)
      except (ValueError, RecursionError) as fault:
        tally.report(f'{self.path}:{number}', fault)
      else:
        yield text, fraction

  def _lines(self, tally: Tally) -> Iterator[tuple[int, str, float]]:
    """Yields number, text and fraction of the file for each readable line."""
    size = max(self.path.stat().st_size, 1)
    with contextlib.ExitStack() as stack:
      raw = stack.enter_context(open(self.path, 'rb'))
      stream = raw
      if self.path.suffix == '.gz':
        stream = stack.enter_context(gzip.open(raw))
      number = 0
      while True:
        number += 1
        try:
          line = stream.readline()
          if not line:
            return
          tally.records += 1
          text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as fault:
          tally.report(f'{self.path}:{number}', fault)
        except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
          tally.records += 1
          tally.report(f'{self.path}:{number}', fault)
          return
        else:
          # Position in the file on disk, compressed or not.
          yield number, text, raw.tell() / size


def _text_field(line: str) -> str:
  record = json.loads(line)
  text = record.get('text') if isinstance(record, dict) else None
  _check_text(text)
  return text


def _check_text(text: Any) -> None:
  if not isinstance(text, str):
    raise ValueError('expected a record with a string field "text"')
  text.encode()  # JSON can spell half a surrogate pair, which is not text.


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A split of a prepared TFDS data set."""

  name: str
  place: str
  elements: Sequence[dict[str, Any]]

  def identity(self) -> list[Any]:
    return [self.name, self.place, len(self.elements)]

  def texts(self, tally: Tally) -> Iterator[tuple[str, float]]:
    for index in range(len(self.elements)):
      tally.records += 1
      try:
        text = self.elements[index]['text'].decode()
      except UnicodeDecodeError as fault:
        tally.report(f'{self.name}:{index}', fault)
      else:
        yield text, (index + 1) / len(self.elements)


def open_prepared(name: str) -> tuple[Any, Sequence[dict[str, Any]]]:
  """Opens a TensorFlow Datasets set prepared as ArrayRecord.

  Args:
    name: `tfds:NAME` or `tfds:NAME@SPLIT`, by default its split `train`, in the
      folder of the environment variable `TFDS_DATA_DIR`.

  Returns:
    The builder, for what it knows of the set, and the elements of the split.

  Raises:
    ValueError: If the set is not there, is in another format or has no such
      split.
  """
  # Imported here: it takes a while and only this kind of source needs it.
  from tensorflow_datasets.core import read_only_builder

  dataset, _, split = name.removeprefix('tfds:').partition('@')
  data_dir = os.environ.get('TFDS_DATA_DIR')
  try:
    # Reads files alone. `tfds.data_source` would first look for the code that
    # made them, and for that needs TensorFlow or the network.
    builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    return builder, builder.as_data_source(split=split or 'train')
  except (ValueError, NotImplementedError) as error:
    reason = str(error).partition('\n')[0].rstrip('.:')
    raise ValueError(
      f'Cannot read {name!r} (TFDS_DATA_DIR={data_dir!r}): {reason}. The data '
      'set must be prepared as ArrayRecord, which needs TensorFlow: pip '
      f"install 'gnlorp_jax[tfds]', then tfds build {dataset} "
      '--file_format=array_record --data_dir=DIR, and set TFDS_DATA_DIR=DIR.'
    ) from error


def _open_prepared(name: str) -> _Prepared:
  builder, elements = open_prepared(name)
  if 'text' not in builder.info.features:
    raise ValueError(
      f"{name!r} has no feature 'text'; its features are "
      f'{sorted(builder.info.features)}. Name a data set of texts.'
    )
  return _Prepared(name, str(builder.data_path), elements)


@dataclasses.dataclass(frozen=True)
class _Streamed:
  """Documents of a data set of the hub."""

  data: hub.Texts

  def identity(self) -> list[Any]:
    data = self.data
    named = [data.repository, data.config, data.split]
    return ['hf', *named, data.commit, data.limit]

  def texts(self, tally: Tally) -> Iterator[tuple[str, float]]:
    """Yields each document and the fraction read, of an unknown whole 0."""
    for number, text in enumerate(self.data.documents(), 1):
      tally.records += 1
      try:
        _check_text(text)
      except ValueError as fault:
        tally.report(f'{self.data.spec}:{number}', fault)
      else:
        yield text, number / self.data.limit if self.data.limit else 0.0


_Part = _File | _Prepared | _Streamed
