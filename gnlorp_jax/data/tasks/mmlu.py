"""MMLU: 57 subjects, four options each, asked for by their letters.

Source: Hendrycks et al., `Measuring massive multitask language understanding`,
2020, arXiv:2009.03300. The prompt is that of `mmlu` in lm_eval, with the first
five of the dev split before each question, as published.

The files are ``test/SUBJECT_test.csv`` and ``dev/SUBJECT_dev.csv``, as
published (no header, answers A to D) or with the header ``question, choice0,
..., choice3, answer`` and answers 0 to 3.
"""

import csv
import pathlib
import reprlib

from gnlorp_jax.data.tasks import options
from gnlorp_jax.data.tasks.questions import Choice, Task, solved

SHOTS = 5
_LETTERS = ('A', 'B', 'C', 'D')
_ANSWERS = dict(zip('ABCD0123', (0, 1, 2, 3) * 2, strict=True))
_TEST = '_test.csv'


def mmlu(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`. A file as `data` is one subject."""
  shots = SHOTS if shots is None else shots
  questions = []
  for path in _subjects(data):
    subject = path.name.removesuffix(_TEST)
    topic = subject.replace('_', ' ')
    before = (
      'The following are multiple choice questions (with answers) about '
      f'{topic}.\n\n'
    )
    if shots:
      examples = _examples(path, subject)
      found = options.enough(examples, _read(examples, subject)[:shots], shots)
      before += solved(found)
    questions += [
      question._replace(context=before + question.context)
      for question in _read(path, subject)[:limit]
    ]
  return Task(name='mmlu', questions=questions, shots=shots, has_acc_norm=False)


def _subjects(data: pathlib.Path) -> list[pathlib.Path]:
  if data.is_file():
    return [data]
  patterns = [f'{folder}*{_TEST}' for folder in ('', 'test/', '*/test/')]
  for pattern in patterns:
    found = sorted(data.glob(pattern))
    if found:
      return found
  raise ValueError(
    f'Task mmlu lacks its files: {data} holds none of {patterns}. Name a '
    'folder with them.'
  )


def _examples(test: pathlib.Path, subject: str) -> pathlib.Path:
  name = f'{subject}_dev.csv'
  places = (test.parent.parent / 'dev' / name, test.with_name(name))
  for path in places:
    if path.is_file():
      return path
  raise ValueError(
    f'Task mmlu lacks the file {places[0]}, whose questions are shown solved '
    f'before those of {test.name}. Add it, or ask with shots=0.'
  )


def _read(path: pathlib.Path, subject: str) -> list[Choice]:
  try:
    with path.open(encoding='utf-8', newline='') as file:
      rows = [row for row in csv.reader(file) if row]
  except (OSError, ValueError, csv.Error) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error
  if rows and rows[0][:1] == ['question']:
    rows = rows[1:]
  found = []
  for number, row in enumerate(rows):
    if len(row) != 6 or row[5].strip() not in _ANSWERS:
      raise ValueError(
        f'Record {number} of {path} must have a question, four options and an '
        f'answer (A to D, or 0 to 3), not {reprlib.repr(row)}.'
      )
    question, *choices, answer = row
    lines = [
      f'{letter}. {choice}'
      for letter, choice in zip(_LETTERS, choices, strict=True)
    ]
    context = '\n'.join([question.strip(), *lines, 'Answer:'])
    found.append(Choice(context, _LETTERS, _ANSWERS[answer.strip()], subject))
  if not found:
    raise ValueError(
      f'{path} holds no questions; expected rows of a question, four options '
      'and an answer. Is it a copy that broke off?'
    )
  return found
