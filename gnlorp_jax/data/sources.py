"""Where text comes from: files, folders, data sets, the standard library.

A source is named by one string, a comma-separated list of

* a text file: one document (`.txt`, `.md`, `.tokens`, `.py`, or anything else);
* a `.jsonl` or `.json` file of JSON lines with a field `text`, as in C4;
* either of these compressed by gzip (`.gz`);
* a `.parquet` file with a column `text`, which needs pyarrow;
* a folder: every file in it with one of these suffixes, sorted by path;
* a glob such as `data/c4-train.*.json.gz`, sorted by path;
* `tfds:NAME` or `tfds:NAME@SPLIT`: a TensorFlow Datasets set that is prepared
  as ArrayRecord, for instance `tfds:lm1b@train[:10%]`;
* `hf:OWNER/NAME:CONFIG:SPLIT@REVISION[:N]`: the first N documents of a data set
  of the Hugging Face hub, for instance `hf:allenai/c4:en[:1000000]`; see `hub`;
* `stdlib`: about 4 MB of the Python files of the running interpreter, which
  every machine has.

The field or column may have another name than `text`.
"""

import dataclasses
import difflib
import glob
import hashlib
import itertools
import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from gnlorp_jax.data import hub
from gnlorp_jax.data.files import (
  COMPRESSED,
  JSON_SUFFIXES,
  TABLE_SUFFIX,
  TEXT_COLUMN,
  TEXT_SUFFIXES,
  TextFile,
  check_file,
  check_suffix,
  check_text,
  inner_suffix,
  nearest_file,
)
from gnlorp_jax.data.files import Tally as Tally
from gnlorp_jax.disk import extras

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


def documents(
  source: str, tally: Tally | None = None, column: str = TEXT_COLUMN
) -> Iterator[str]:
  """Reads the documents of a source, always in the same order.

  A bad line (not UTF-8, not JSON, no string field `column`) is skipped with a
  warning that names file and line. So is the rest of a file that breaks off or
  is damaged. Documents of white space alone are left out.

  Args:
    source: Name of the source; see the head of this module.
    tally: Updated while reading, for progress and for a report.
    column: The field or column of the text.

  Returns:
    An iterator over documents. The name is resolved at once, the text is read
    as the iterator advances, one document in memory at a time.

  Raises:
    ValueError: If the source is unknown or unreadable (at once), holds no text,
      if more than 10 and more than 1 % of its records are bad, by number or by
      bytes, or more than 1 % of its files are damaged.
  """
  parts = _resolve(source, column)
  return _read(source, parts, Tally() if tally is None else tally)


def fingerprint(source: str, column: str = TEXT_COLUMN) -> str:
  """Identifies the content of a source without reading it.

  Args:
    source: Name of the source; see the head of this module.
    column: The field or column of the text.

  Returns:
    A hash of the paths, sizes and modification times of the files, of the
    place, split and length of TFDS data sets, and of the commit, configuration,
    split and number of documents of those of the hub.

  Raises:
    ValueError: If the source is unknown or unreadable.
  """
  identity = json.dumps([part.identity() for part in _resolve(source, column)])
  return hashlib.sha256(identity.encode()).hexdigest()


def _read(source: str, parts: Sequence['_Part'], tally: Tally) -> Iterator[str]:
  empty = True
  for done, part in enumerate(parts):
    for text, fraction in part.texts(tally):
      tally.fraction = (done + fraction) / len(parts)
      if text and not text.isspace():
        empty = False
        yield text
    tally.check(source, len(parts))
  tally.fraction = 1.0
  if empty:
    raise ValueError(
      f'Data source {source!r} holds no text. Bad records: {tally.bad}'
      + (f'; the first is {tally.first_bad}.' if tally.bad else '.')
    )


def _resolve(source: str, column: str = TEXT_COLUMN) -> list['_Part']:
  names = [name.strip() for name in source.split(',')]
  if not all(names):
    raise ValueError(
      f'Data source {source!r} has an empty name; expected names joined by '
      'single commas.'
    )
  return [part for name in names for part in _resolve_one(name, column)]


def _resolve_one(name: str, column: str) -> list['_Part']:
  if name == 'stdlib':
    return [TextFile(path) for path in _stdlib_files()]
  if name.startswith('tfds:'):
    return [_open_prepared(name, column)]
  if hub.is_hub(name):
    return [_Streamed(hub.texts(name), column)]
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    files = _folder_files(path)
    if not files:
      raise ValueError(
        f'Data source {name!r} is a folder without text files; expected names '
        f'ending in one of {TEXT_SUFFIXES + JSON_SUFFIXES}, or these plus '
        "'.gz'."
      )
  elif os.path.lexists(path):
    files = [path]
  else:
    files = []
    for match in sorted(glob.glob(str(path), recursive=True)):
      match = pathlib.Path(match)
      files.extend(_folder_files(match) if match.is_dir() else [match])
    if not files:
      raise ValueError(_unknown(name, path))
  for file in files:
    check_suffix(file)
    check_file(file)
  return [TextFile(file, column) for file in files]


def _unknown(name: str, path: pathlib.Path) -> str:
  close = difflib.get_close_matches(name, ('stdlib', 'tfds:'), n=1)
  hint = f' Did you mean {close[0]!r}?' if close else nearest_file(path)
  return (
    f'Unknown data source {name!r}: no such file, folder or glob, and not '
    f"'stdlib', 'tfds:NAME' or 'hf:OWNER/NAME[:N]'.{hint}"
  )


def _folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The text files of a folder, and compressed ones that cannot be read."""
  return sorted(
    path
    for path in folder.rglob('*')
    if _is_text(path)
    and not any(p.startswith('.') for p in path.relative_to(folder).parts)
    and not path.is_dir()
  )


def _is_text(path: pathlib.Path) -> bool:
  known = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
  if path.suffix == TABLE_SUFFIX or inner_suffix(path) in known:
    return True
  # Such as a.jsonl.zst: it is refused, not left out unnoticed.
  return any(suffix in known for suffix in path.suffixes[:-1]) and (
    path.suffix in COMPRESSED
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
class _Prepared:
  """A split of a prepared TFDS data set."""

  name: str
  place: str
  elements: Sequence[dict[str, Any]]
  column: str

  def identity(self) -> list[Any]:
    found = [self.name, self.place, len(self.elements)]
    return found if self.column == TEXT_COLUMN else [*found, self.column]

  def texts(self, tally: Tally) -> Iterator[tuple[str, float]]:
    for index in range(len(self.elements)):
      tally.records += 1
      try:
        text = self.elements[index][self.column].decode()
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
      'set must be prepared as ArrayRecord, which needs TensorFlow: '
      f'{extras.install("tfds")}; then tfds build {dataset} '
      '--file_format=array_record --data_dir=DIR, and set TFDS_DATA_DIR=DIR.'
    ) from error


def _open_prepared(name: str, column: str) -> _Prepared:
  builder, elements = open_prepared(name)
  if column not in builder.info.features:
    raise ValueError(
      f'{name!r} has no feature {column!r}; its features are '
      f'{sorted(builder.info.features)}. Name that of the text, or a data set '
      'of texts.'
    )
  return _Prepared(name, str(builder.data_path), elements, column)


@dataclasses.dataclass(frozen=True)
class _Streamed:
  """Documents of a data set of the hub."""

  data: hub.Texts
  column: str

  def identity(self) -> list[Any]:
    data = self.data
    named = [data.repository, data.config, data.split]
    found = ['hf', *named, data.commit, data.limit]
    return found if self.column == TEXT_COLUMN else [*found, self.column]

  def texts(self, tally: Tally) -> Iterator[tuple[str, float]]:
    """Yields each document and the fraction read, of an unknown whole 0."""
    for number, text in enumerate(self.data.documents(self.column), 1):
      tally.records += 1
      try:
        check_text(text, self.column)
      except ValueError as fault:
        tally.report(f'{self.data.spec}:{number}', fault)
      else:
        yield text, number / self.data.limit if self.data.limit else 0.0


_Part = TextFile | _Prepared | _Streamed
