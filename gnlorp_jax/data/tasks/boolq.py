"""BoolQ: yes or no, where there is one from a passage of text.

Source: Clark et al., `BoolQ`, 2019, arXiv:1905.10044. The prompt is that of
`boolq` in lm_eval.

Note:
  The set of LLM-Adapters has the questions without their passages: closed-book,
  which is harder and not comparable with scores of the whole task.
"""

import pathlib
import re
from typing import Any

from gnlorp_jax.data.tasks import options, records
from gnlorp_jax.data.tasks.questions import Choice, Task

FILES = (
  *('boolq.test.json', '*/boolq.test.json'),
  *('boolq.jsonl', '*/boolq.jsonl', 'dev.jsonl'),
)
EXAMPLES = ('boolq.train.json', '*/boolq.train.json', 'train.jsonl')
_FORMATS = (
  'instruction, answer (LLM-Adapters); or question, passage, answer or label'
)
_ASKED = re.compile(r'.*? question: (.*)\n\nAnswer format:.*', re.DOTALL)
_ANSWERS = {'false': 0, '0': 0, 'true': 1, '1': 1}


def boolq(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`."""
  return options.make(
    'boolq',
    data,
    _read,
    files=FILES,
    examples=EXAMPLES,
    shots=shots,
    limit=limit,
    has_acc_norm=False,
  )


def _read(path: pathlib.Path, limit: int | None) -> list[Choice]:
  found = []
  for number, record in enumerate(records.read(path)[:limit]):
    records.check_options(path, number, record, 'boolq', 2)
    try:
      found.append(_choice(record))
    except (KeyError, TypeError) as error:
      raise records.unknown(path, number, record, _FORMATS) from error
  return found


def _choice(record: dict[str, Any]) -> Choice:
  if 'instruction' in record:
    text, answer = _ASKED.fullmatch(record['instruction'])[1], record['answer']
  else:
    text = record['question']
    answer = record['answer'] if 'answer' in record else record['label']
  context = f'Question: {text.strip().removesuffix("?")}?\nAnswer:'
  if record.get('passage'):
    context = f'{record["passage"]}\n{context}'
  return Choice(context, ('no', 'yes'), _ANSWERS[str(answer).lower()])
