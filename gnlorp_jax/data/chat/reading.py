"""Files of conversations: which ones, and what is in them.

A set of sources is named by one string, ``[NAME=]PATH[@WEIGHT]`` joined by
commas. A path is a file, a folder or a glob; a source may hold many files. Read
are JSON lists, JSON lines (either also compressed, `.gz`) and Parquet. Every
file holds records of one format (`formats`).

What becomes of a record that is not as it should be:

* Refused, with file and line: a file whose first readable record is of no
  known format, or whose records are of several; a JSON list that breaks off.
* Bad, skipped with a warning and counted, and refused where more than 10 and
  more than 1 % of a source are: a line that is no JSON, a field of another
  type, speakers in the wrong order.
* Skipped and counted, however many: no answer, and empty answers.
* Cut: what follows the last answer.

A conversation that is read well, but whose answers cannot be found in what the
template makes of it, ends the program: `Template.encode` raises a ValueError.
The fault is not in the record but between the template and the settings, so it
usually concerns every conversation of several turns. Skipping them would train
on a part of the data that nobody chose, and the error names the settings that
keep them all.
"""

import collections
import dataclasses
import glob
import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from gnlorp_jax.data import sources
from gnlorp_jax.data.chat import conversations, formats
from gnlorp_jax.data.chat.conversations import Conversation
from gnlorp_jax.data.files import (
  check_file,
  check_suffix,
  inner_suffix,
  nearest_file,
  table_rows,
)

SUFFIXES = ('.json', '.jsonl', '.parquet')
BAD = 'bad record'
# What people have such data in, and would be told of as broken JSON.
_OTHER_SUFFIXES = ('.arrow', '.csv', '.md', '.tsv', '.txt', '.yaml', '.yml')

_SPEC = re.compile(
  r'(?:(?P<name>[\w.-]+)=)?(?P<path>.+?)(?:@(?P<weight>[^@/]*))?'
)


@dataclasses.dataclass(frozen=True)
class Source:
  """The conversations of some files.

  Attributes:
    name: What reports call it.
    weight: How often an epoch has each of them; 0.5 is a half of them.
    conversations: The conversations, in the order of the files.
    skipped: How many records were left out, by reason.
  """

  name: str
  weight: float
  conversations: tuple[Conversation, ...]
  skipped: dict[str, int]


def read(source: str) -> tuple[Source, ...]:
  """Reads conversations.

  Args:
    source: ``[NAME=]PATH[@WEIGHT]``, joined by commas, such as
      ``chat.jsonl,maths=data/gsm8k/*.json@0.5``. A name is by default that of
      the file, a weight 1.

  Returns:
    A source for each.

  Raises:
    ValueError: If a name, a path or a weight is wrong, a file is unreadable or
      holds what is no conversation (see the head of this module), or a source
      holds none.
  """
  found = [_resolve(spec.strip()) for spec in source.split(',')]
  names = collections.Counter(name for name, _, _ in found)
  twice = [name for name, count in names.items() if count > 1]
  if twice:
    raise ValueError(
      f'Several sources of {source!r} are called {twice[0]!r}, and reports '
      'count by name. Name them: NAME=PATH.'
    )
  return tuple(_read(*parts) for parts in found)


def _resolve(spec: str) -> tuple[str, list[pathlib.Path], float]:
  parts = _SPEC.fullmatch(spec)
  if parts is None:
    raise ValueError(
      f'Chat source {spec!r} names no file; expected [NAME=]PATH[@WEIGHT], '
      'joined by single commas.'
    )
  path = pathlib.Path(parts['path']).expanduser()
  try:
    weight = float(parts['weight'] or 1)
  except ValueError:
    weight = -1.0
  if not 0 < weight < 1000:
    raise ValueError(
      f'Chat source {spec!r} has the weight {parts["weight"]!r}; expected a '
      'number above 0 and below 1000 behind the last @.'
    )
  files = [path]
  if path.is_dir():
    files = _in_folder(path)
  elif not os.path.lexists(path):
    matches = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
    files = [
      file
      for match in matches
      for file in (_in_folder(match) if match.is_dir() else [match])
    ]
  if not files:
    rule = f'no file ending in one of {SUFFIXES} or these plus .gz in it'
    raise ValueError(
      f'Conversations {spec!r}: '
      f'{rule if path.is_dir() else "no such file, folder or glob"}. Expected '
      f'[NAME=]PATH[@WEIGHT], joined by commas.{nearest_file(path)}'
    )
  for file in files:
    check_suffix(file)
    check_file(file)
    if inner_suffix(file) in _OTHER_SUFFIXES:
      raise ValueError(
        f'{file} is no file of conversations: {", ".join(SUFFIXES)} are read, '
        'each of them one JSON object per line or row. Write it as JSON lines, '
        'such as {"prompt": "...", "completion": "..."}.'
      )
  name = parts['name'] or path.name.removesuffix('.gz').rpartition('.')[0]
  return name or path.name, files, weight


def _in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    path
    for path in folder.rglob('*')
    if inner_suffix(path) in SUFFIXES
    and not any(p.startswith('.') for p in path.relative_to(folder).parts)
    and path.is_file()
  )


def _read(name: str, files: list[pathlib.Path], weight: float) -> Source:
  tally = sources.Tally()
  skipped: collections.Counter[str] = collections.Counter()
  found: list[Conversation] = []
  for path in files:
    found += _conversations(path, tally, skipped)
  if tally.too_many:
    raise ValueError(
      f'Chat source {name!r} has {tally.bad} bad records among '
      f'{tally.records}; at most 1 % may be bad, or 10. The first is '
      f'{tally.first_bad}. Repair the file or leave it out.'
    )
  if tally.bad:
    skipped[BAD] = tally.bad
  if not found:
    why = f' The first bad one is {tally.first_bad}.' if tally.bad else ''
    raise ValueError(
      f'Chat source {name!r} ({files[0]}) holds no conversation: '
      f'{tally.records} records, skipped {dict(skipped)}.{why}'
    )
  return Source(name, weight, tuple(found), dict(skipped))


def _conversations(
  path: pathlib.Path,
  tally: sources.Tally,
  skipped: collections.Counter[str],
) -> Iterator[Conversation]:
  """Yields those of a file and counts the rest."""
  expected = None
  for number, record in _records(path):
    where = f'{path}:{number}'
    tally.records += 1
    if isinstance(record, Exception):
      tally.report(where, record)
      continue
    try:
      name = formats.name_of(record)
    except ValueError as fault:
      if expected is None:
        raise ValueError(f'{where}: {fault}.') from fault
      tally.report(where, fault)
      continue
    expected = expected or (name, where)
    if name != expected[0]:
      raise ValueError(
        f'{where}: a record of format {name!r} in a file of format '
        f'{expected[0]!r} ({expected[1]}); a file has one format. Put the '
        'records of each into a file of their own.'
      )
    try:
      yield formats.parse(record, where)
    except conversations.SkippedError as skip:
      skipped[skip.reason] += 1
    except ValueError as fault:
      tally.report(where, fault)


def _records(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yields number of the line, or row, and record: or what is wrong with it."""
  if inner_suffix(path) == '.parquet':
    yield from enumerate((row for row, _ in table_rows(path)), 1)
    return
  try:
    raw = path.read_bytes()
    if path.suffix == '.gz':
      if not raw:
        raise EOFError('it is empty')
      raw = gzip.decompress(raw)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error
  raw = raw.removeprefix(b'\xef\xbb\xbf')
  if raw.lstrip().startswith(b'['):
    yield from _listed(path, raw)
    return
  # Not `splitlines`: JSON allows other line ends inside a string.
  for number, line in enumerate(raw.split(b'\n'), 1):
    if not line.strip():
      continue
    try:
      yield number, json.loads(line)
    except (ValueError, RecursionError) as error:
      yield number, ValueError(f'no JSON object on this line ({error})')


def _listed(path: pathlib.Path, raw: bytes) -> Iterator[tuple[int, Any]]:
  """Yields the elements of a JSON list with the lines they begin on."""
  try:
    elements = json.loads(raw)
  except (ValueError, RecursionError) as error:
    line = getattr(error, 'lineno', 1)
    raise ValueError(
      f'{path}:{line}: the JSON list breaks off here ({error}); expected a '
      'list of objects, or one object a line. Repair the file.'
    ) from error
  text = raw.decode()
  decoder, between = json.JSONDecoder(), re.compile(r'[\s,]*')
  position, line, counted = text.index('[') + 1, 1, 0
  for element in elements:
    position = between.match(text, position).end()
    line += text.count('\n', counted, position)
    counted = position
    _, position = decoder.raw_decode(text, position)
    yield line, element
