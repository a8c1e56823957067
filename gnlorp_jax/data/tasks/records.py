"""Files of questions: where they lie, and what their records mean.

A question with options is recognised by the names of its fields:

* ``instruction, answer``: the sets of LLM-Adapters, which have the options in
  the instruction (``Answer1: ... Answer2: ...``) and an answer like 'answer2';
* ``question`` (or ``question_stem``, an object ``question.stem``), ``choices``
  and ``answerKey`` or ``label``: ARC and OpenBookQA, as published and as on the
  Hugging Face hub;
* ``goal, sol1, sol2, label``: PIQA.
"""

import csv
import json
import pathlib
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gnlorp_jax.data.files import check_file, check_suffix

_ASKED = ' to the question: '
_FORMATS = (
  'instruction, answer (LLM-Adapters); question, choices, answerKey or label '
  '(ARC, OpenBookQA); or goal, sol1, sol2, label (PIQA)'
)
_OPTION = re.compile(r'(?:^|\s+)(?:Answer|Solution)[1-9]: ?')


class Question(NamedTuple):
  """A question as a file has it.

  Attributes:
    text: The question.
    options: The options.
    answer: Index of the right one.
  """

  text: str
  options: tuple[str, ...]
  answer: int


def find(
  task: str, data: pathlib.Path, patterns: Sequence[str]
) -> pathlib.Path:
  """The file of a task.

  Args:
    task: What to call the task in an error.
    data: A folder; or the file itself.
    patterns: Paths in that folder, or globs; the first that is there is taken.

  Returns:
    The file.

  Raises:
    ValueError: If the folder holds none of them.
  """
  if data.is_file():
    return data
  for pattern in patterns:
    for path in sorted(data.glob(pattern)):
      return path
  raise ValueError(
    f'Task {task} lacks its file: {data} holds none of {list(patterns)}. Name '
    'a folder with one of them.'
  )


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file: a JSON list, lines of JSON, or CSV with a header.

  Args:
    path: The file; '.csv' tells that it is CSV.

  Returns:
    The records, at least one.

  Raises:
    ValueError: If the file is not readable as such, or empty.
  """
  check_suffix(path)
  check_file(path)
  try:
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.csv':
      found = list(csv.DictReader(text.splitlines(keepends=True)))
    elif text.lstrip().startswith('['):
      found = json.loads(text)
    else:
      # Not `splitlines`: JSON allows other line ends inside a string.
      found = [json.loads(line) for line in text.split('\n') if line.strip()]
  except (OSError, ValueError, RecursionError, csv.Error) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error
  if not found or not all(isinstance(record, dict) for record in found):
    raise ValueError(f'{path} holds no records: expected objects with fields.')
  return found


def questions(
  path: pathlib.Path,
  limit: int | None = None,
  *,
  task: str,
  num_options: int | None = None,
) -> list[Question]:
  """The questions with options of a file.

  Args:
    path: The file.
    limit: Take the first ones only; None takes all.
    task: What to call the task in an error.
    num_options: Options that a question of the task has; None: any number.

  Returns:
    The questions.

  Raises:
    ValueError: If the file is not readable, or a record is of no known format
      or has another number of options.
  """
  found = []
  for number, record in enumerate(read(path)[:limit]):
    try:
      question = _question(record)
    except (KeyError, TypeError, ValueError, IndexError) as error:
      raise unknown(path, number, record) from error
    if not 0 <= question.answer < len(question.options):
      raise unknown(path, number, record)
    if num_options is not None:
      check_options(path, number, record, task, num_options)
    found.append(question)
  return found


def check_options(
  path: pathlib.Path,
  number: int,
  record: dict[str, Any],
  task: str,
  num_options: int,
) -> None:
  """Raises ValueError if a record has options, and another number of them."""
  try:
    found = len(_question(record).options)
  except (KeyError, TypeError, ValueError, IndexError):
    return  # It has none.
  if found != num_options:
    raise ValueError(
      f'Record {number} of {path} has {found} options; a question of {task} '
      f'has {num_options}. Is it the file of another task?'
    )


def unknown(
  path: pathlib.Path,
  number: int,
  record: dict[str, Any],
  formats: str = _FORMATS,
) -> ValueError:
  """The error of a record that cannot be understood; `formats` are known."""
  return ValueError(
    f'Record {number} of {path} is of no known format, or its answer is none '
    f'of its options. It has the fields {reprlib.repr(list(record))}; expected '
    f'{formats}.'
  )


def _question(record: dict[str, Any]) -> Question:
  if 'instruction' in record:
    return _of_llm_adapters(record)
  if 'goal' in record:
    options = (record['sol1'].strip(), record['sol2'].strip())
    return Question(record['goal'], options, int(record['label']))
  text = record.get('question_stem', record.get('question'))
  choices = record.get('choices')
  if isinstance(text, dict):  # As ARC was published.
    text, choices = text['stem'], text['choices']
  if isinstance(choices, dict):  # As on the hub.
    labels, options = choices['label'], choices['text']
  elif isinstance(choices[0], dict):
    labels = [choice['label'] for choice in choices]
    options = [choice['text'] for choice in choices]
  else:
    labels, options = [str(i) for i in range(len(choices))], choices
  answer = str(record.get('answerKey', record.get('label'))).strip()
  return Question(str(text), tuple(options), labels.index(answer))


def _of_llm_adapters(record: dict[str, Any]) -> Question:
  """Splits what was put together as an instruction.

  Note:
    Space around an option is lost; two spaces in PIQA's published solutions
    are no part of them either.
  """
  asked = record['instruction'].split(_ASKED, 1)[1]
  asked = asked.rsplit('\n\nAnswer format:', 1)[0]
  text, *options = _OPTION.split(asked)
  answer = re.fullmatch(r'(?:answer|solution)([1-9])', record['answer'])
  return Question(
    text.strip(), tuple(map(str.strip, options)), int(answer[1]) - 1
  )


def with_fields(
  path: pathlib.Path, fields: Iterable[str], limit: int | None = None
) -> list[dict[str, Any]]:
  """Records that must have certain fields.

  Args:
    path: The file.
    fields: The names of the fields.
    limit: Take the first ones only; None takes all.

  Returns:
    The records.

  Raises:
    ValueError: If the file is not readable or a field is missing.
  """
  found = read(path)[:limit]
  for number, record in enumerate(found):
    missing = [field for field in fields if record.get(field) is None]
    if missing:
      raise ValueError(
        f'Record {number} of {path} lacks the fields {missing}. It has the '
        f'fields {list(record)}.'
      )
  return found
