"""Examples of a task from its files: the official layout, TFDS, one's own.

In fine-tuning sets every row counts: a malformed row is refused, by file and
line, not skipped.
"""

import difflib
import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gnlorp_jax.data import sources
from gnlorp_jax.data.files import check_file, check_suffix
from gnlorp_jax.data.glue.tasks import Task

logger = logging.getLogger(__name__)

_JSON_SUFFIXES = ('.json', '.jsonl')
_INDEX_COLUMNS = ('index', 'id', 'idx')
_FAULTS_SHOWN = 5
_TFDS_SPLITS = {
  'train': 'train',
  'dev': 'validation',
  'dev_matched': 'validation_matched',
  'dev_mismatched': 'validation_mismatched',
  'test': 'test',
  'test_matched': 'test_matched',
  'test_mismatched': 'test_mismatched',
}

_Row = dict[str, Any]


class Examples(NamedTuple):
  """The examples of a split, in the order of its file.

  Attributes:
    texts: N tuples of one or two texts, as the file has them.
    labels: ``[N]``, int32 ids of classes or float32 scores; None for a test
      split without labels.
    ids: N names of examples: the file's own index, or the row's number.
  """

  texts: list[tuple[str, ...]]
  labels: np.ndarray | None
  ids: list[str]


class MissingSplitError(ValueError):
  """The source is there but does not have the split."""


def read(task: Task, source: str, split: str) -> Examples:
  """Reads a split of a task.

  Args:
    task: The task.
    source: A folder in the official layout (one that holds `CoLA`, `MRPC` and
      so on), the task's own folder, or `'tfds'`: the data set `glue/NAME` of
      TensorFlow Datasets, prepared as ArrayRecord under `TFDS_DATA_DIR`. The
      files of a custom task are `train`, `dev` and `test` with the suffix
      `.tsv` or `.jsonl`.
    split: `'train'`, `'dev'` or `'test'`, for MNLI also `'dev_mismatched'` and
      `'test_mismatched'`.

  Returns:
    The examples.

  Raises:
    MissingSplitError: If the source has no such split; a ValueError.
    ValueError: If the source or split is unknown, or rows are malformed; see
      `read_file`.
  """
  needs_labels = not split.startswith('test')
  if source == 'tfds':
    return _read_tfds(task, split, needs_labels)
  return read_file(_find(task, source, split), task, needs_labels=needs_labels)


def has_split(task: Task, source: str, split: str) -> bool:
  """Returns whether `read` finds the split; arguments as there.

  Raises:
    ValueError: If the source or split is unknown.
  """
  try:
    if source == 'tfds':
      _tfds_name(task, split)
    else:
      _find(task, source, split)
  except MissingSplitError:
    return False
  return True


def read_file(
  path: str | pathlib.Path, task: Task, *, needs_labels: bool = False
) -> Examples:
  """Reads one file of examples.

  Args:
    path: Tab-separated values, or JSON lines (`.jsonl`, `.json`). The first
      line of the former names the columns, except in CoLA's train and dev
      files. There is no quoting: quotation marks are text.
    task: Names the columns and classes.
    needs_labels: Whether to refuse a file without labels.

  Returns:
    The examples; `labels` is None if there is no column of labels.

  Raises:
    ValueError: If the file is missing, empty or lacks a column, or if a row has
      another number of columns, an unknown label, a score out of range, an
      empty text or is not UTF-8: the message names the first such rows.

  Note:
    Up to 10 malformed rows of QQP, whose official files are known to hold some,
    are left out with a warning; TFDS leaves such rows out silently. An empty
    text is accepted in a file without labels: the server wants every row
    answered.
  """
  path = pathlib.Path(path).expanduser()
  lines, parse, skipped = _open(path, task.text_columns, task.columns)
  rows = (
    (f'{path}:{number}', functools.partial(parse, line))
    for number, line in enumerate(lines[skipped:], 1 + skipped)
  )
  labelled = _has_column(lines[skipped:], parse, task.label_column)
  if needs_labels and not labelled:
    raise ValueError(
      f'{path} has no labels: there is no column {task.label_column!r}. Add it '
      'or name the right label column.'
    )
  return _collect(rows, task, labelled, str(path))


def infer_labels(
  path: str | pathlib.Path, label_column: str
) -> tuple[str, ...]:
  """Returns the sorted distinct labels of a file, for `custom_task`.

  Args:
    path: Training file with a header, or JSON lines; see `read_file`.
    label_column: The column of labels.

  Raises:
    ValueError: If the file is missing or malformed, lacks the column, or has
      fewer than two labels.
  """
  path = pathlib.Path(path).expanduser()
  lines, parse, skipped = _open(path, (label_column,), ())
  labels, faults = set(), []
  for number, line in enumerate(lines[skipped:], 1 + skipped):
    try:
      labels.add(_field(parse(line), label_column))
    except ValueError as fault:
      faults.append(f'{path}:{number}: {fault}')
  if faults:
    raise ValueError(_malformed(faults, len(lines) - skipped, str(path)))
  if len(labels) < 2:
    raise ValueError(
      f'Column {label_column!r} of {path} holds the labels {sorted(labels)}; a '
      'task needs two or more.'
    )
  return tuple(sorted(labels))


def _find(task: Task, source: str, split: str) -> pathlib.Path:
  """Returns the file of a split in a folder."""
  stem = task.file_stem(split)
  root = pathlib.Path(source).expanduser()
  if not root.is_dir():
    raise ValueError(
      f"No folder {source!r}; expected 'tfds', a folder that holds "
      f'{task.folder}, or that folder itself. A single file is read by '
      'read_file, in train_glue.py as data.train.'
    )
  folders = [root / task.folder, root]
  for folder in folders:
    for suffix in ('.tsv', '.jsonl'):
      path = folder / f'{stem}{suffix}'
      if path.is_file():
        return path
  held = next(folder for folder in folders if folder.is_dir())
  raise MissingSplitError(
    f'No split {split!r} of task {task.name!r}: looked for {stem}.tsv in '
    f'{folders[0]} and {folders[1]}; {held} holds '
    f'{sorted(path.name for path in held.iterdir())}.'
  )


def _open(
  path: pathlib.Path, needed: tuple[str, ...], unnamed: tuple[str, ...]
) -> tuple[list[bytes], Callable[[bytes], _Row], int]:
  """Opens a file of rows.

  Args:
    path: The file.
    needed: Columns it must have.
    unnamed: Columns of a file without header, if it may be without.

  Returns:
    Its lines, the function that parses one, and the number of header lines.
  """
  if not path.is_file():
    raise ValueError(f'No file {path}; expected a .tsv or .jsonl file.')
  check_suffix(path)
  check_file(path)
  # Only line feeds end a row: texts may hold what str.splitlines splits at.
  lines = path.read_bytes().removeprefix(b'\xef\xbb\xbf').split(b'\n')
  while lines and not lines[-1].strip():
    lines.pop()
  if not lines:
    raise ValueError(f'{path} is empty: it holds no rows. Give another file.')
  if path.suffix in _JSON_SUFFIXES:
    parse, skipped = _parse_json, 0
  else:
    columns = tuple(lines[0].decode(errors='replace').rstrip('\r').split('\t'))
    skipped = 1
    if unnamed and not set(needed) <= set(columns):
      columns, skipped = unnamed, 0
    for column in needed:
      if column not in columns:
        close = difflib.get_close_matches(column, columns, n=1)
        hint = f' Did you mean {close[0]!r}?' if close else ''
        if len(columns) == 1:
          hint = ' Columns are separated by tabs: are these?'
        raise ValueError(
          f'{path} has no column {column!r}; its first line names the columns '
          f'{columns}.{hint}'
        )
    parse = functools.partial(_parse_tsv, columns=columns)
  if len(lines) <= skipped:
    raise ValueError(f'{path} holds no rows.')
  return lines, parse, skipped


def _parse_tsv(line: bytes, columns: tuple[str, ...]) -> _Row:
  fields = line.decode().rstrip('\r').split('\t')
  if len(fields) != len(columns):
    raise ValueError(f'{len(fields)} columns instead of {len(columns)}')
  return dict(zip(columns, fields, strict=True))


def _parse_json(line: bytes) -> _Row:
  row = json.loads(line.decode())
  if not isinstance(row, dict):
    raise ValueError('expected a JSON object')
  return row


def _has_column(
  lines: list[bytes], parse: Callable[[bytes], _Row], column: str
) -> bool:
  """Returns whether the first readable row has a column."""
  for line in lines:
    try:
      return column in parse(line)
    except ValueError:
      continue
  return True


def _collect(
  rows: Iterable[tuple[str, Callable[[], _Row]]],
  task: Task,
  labelled: bool,
  name: str,
) -> Examples:
  """Makes examples of rows, each given by its place and a way to read it."""
  texts, labels, ids, faults = [], [], [], []
  count = 0
  for place, parse in rows:
    count += 1
    try:
      row = parse()
      text = tuple(_text(row, c, labelled) for c in task.text_columns)
      label = _label(_field(row, task.label_column), task) if labelled else 0
    except ValueError as fault:
      faults.append(f'{place}: {fault}')
      continue
    texts.append(text)
    labels.append(label)
    index = [str(row[c]) for c in _INDEX_COLUMNS if c in row]
    ids.append(index[0] if index else str(count - 1))
  if faults:
    message = _malformed(faults, count, name)
    if len(faults) > (task.faults_allowed if labelled else 0) or not texts:
      raise ValueError(message)
    logger.warning('Left out: %s', message)
  dtype = np.float32 if task.is_regression else np.int32
  return Examples(texts, np.array(labels, dtype) if labelled else None, ids)


def _malformed(faults: list[str], count: int, name: str) -> str:
  shown = ''.join(f'\n  {fault}' for fault in faults[:_FAULTS_SHOWN])
  rest = len(faults) - _FAULTS_SHOWN
  more = f'\n  and {rest} more' if rest > 0 else ''
  return (
    f'{len(faults)} of the {count} rows of {name} are malformed:{shown}{more}\n'
    'Repair or remove them; every row of a fine-tuning set counts.'
  )


def _text(row: _Row, column: str, labelled: bool) -> str:
  text = row.get(column)
  if not isinstance(text, str):
    raise ValueError(f'no text {column!r}')
  text.encode()  # JSON can spell half a surrogate pair, which is not text.
  if labelled and not text.strip():
    raise ValueError(f'empty text {column!r}')
  return text


def _field(row: _Row, column: str) -> str:
  """Returns a label as text; JSON may give a number or a truth value."""
  value = row.get(column)
  if value is None or value == '':
    raise ValueError(f'no label {column!r}')
  return value if isinstance(value, str) else json.dumps(value)


def _label(field: str, task: Task) -> float:
  """Returns the id of a class, or a score."""
  if not task.is_regression:
    if field not in task.file_labels:
      raise ValueError(
        f'unknown label {field!r}; expected one of {task.file_labels}'
      )
    return task.file_labels.index(field)
  try:
    score = float(field)
  except ValueError:
    score = math.nan
  if not math.isfinite(score):
    raise ValueError(f'score {field!r} is not a number')
  if task.score_range is not None:
    low, high = task.score_range
    if not low <= score <= high:
      raise ValueError(f'score {field} is not in [{low:g}, {high:g}]')
  return score


def _tfds_name(task: Task, split: str) -> str:
  """Returns the name of a split in TFDS, which must be prepared."""
  tfds_split = _TFDS_SPLITS[task.file_stem(split)]
  builder, _ = sources.open_prepared(f'tfds:glue/{task.name}')
  if tfds_split not in builder.info.splits:
    raise MissingSplitError(
      f'No split {split!r} of task {task.name!r}: {builder.data_path} holds '
      f'{sorted(builder.info.splits)}, not {tfds_split!r}.'
    )
  return f'tfds:glue/{task.name}@{tfds_split}'


def _read_tfds(task: Task, split: str, labelled: bool) -> Examples:
  name = _tfds_name(task, split)
  builder, elements = sources.open_prepared(name)
  columns = (*task.tfds_columns, 'label')
  absent = [c for c in columns if c not in builder.info.features]
  if absent:
    raise ValueError(
      f'{name!r} lacks the features {absent}; its features are '
      f'{sorted(builder.info.features)}. Prepare the data set of TFDS anew.'
    )

  def rows() -> Iterator[tuple[str, Callable[[], _Row]]]:
    for index in range(len(elements)):
      yield f'{name}:{index}', functools.partial(row, index)

  def row(index: int) -> _Row:
    element = elements[index]
    fields = {
      column: element[tfds_column].decode()
      for column, tfds_column in zip(
        task.text_columns, task.tfds_columns, strict=True
      )
    }
    label = element['label']
    if not task.is_regression and 0 <= label < len(task.labels):
      label = task.file_labels[label]
    return fields | {
      task.label_column: str(label),
      'index': str(element.get('idx', index)),
    }

  return _collect(rows(), task, labelled, name)
