r"""GSM8K: grade-school mathematics, answered with a worked solution.

Source: Cobbe et al., `Training verifiers to solve math word problems`, 2021,
arXiv:2110.14168. Prompt, stop strings and what counts as the answer are those
of `gsm8k` in lm_eval: ``exact_match`` is its strict-match (the number after
``####``), ``exact_match_flexible`` its flexible-extract (the last number).

Note:
  lm_eval draws the five solved questions at random, anew for every question;
  here they are the first of the training split, the same for all.
"""

import pathlib
import re
from typing import Any

from gnlorp_jax.data.tasks import options, records
from gnlorp_jax.data.tasks.questions import FreeAnswer, Task

SHOTS = 5
FILES = ('gsm8k/test.jsonl', 'test.jsonl', '*/gsm8k/test.jsonl')
EXAMPLES = ('gsm8k/train.jsonl', 'train.jsonl', '*/gsm8k/train.jsonl')
STOP = ('Question:', '</s>', '<|im_end|>')
NO_ANSWER = '[invalid]'
_STRICT = re.compile(r'#### (\-?[0-9\.\,]+)')
_FLEXIBLE = re.compile(r'(-?[$0-9.,]{2,})|(-?[0-9]+)')


def gsm8k(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`."""
  shots = SHOTS if shots is None else shots
  before = ''
  if shots:
    folder = data.parent if data.is_file() else data
    path = records.find('gsm8k', folder, EXAMPLES)
    examples = options.enough(path, _read(path, shots), shots)
    before = ''.join(
      f'{_prompt(example)} {example["answer"]}\n\n' for example in examples
    )
  return Task(
    name='gsm8k',
    questions=[
      FreeAnswer(before + _prompt(record), strict(record['answer']))
      for record in _read(records.find('gsm8k', data, FILES), limit)
    ],
    shots=shots,
    stop=STOP,
    extract={'exact_match': strict, 'exact_match_flexible': flexible},
  )


def strict(text: str) -> str:
  """The number after ``####``, without what does not count in it.

  Examples:
    >>> strict('4 x 300 = 1200. #### 1,200.')
    '1200'
    >>> strict('1200')
    '[invalid]'
  """
  found = _STRICT.search(text)
  return _plain(found[1]) if found else NO_ANSWER


def flexible(text: str) -> str:
  """The last number of a text, without what does not count in it.

  Examples:
    >>> flexible('It costs $1,200. Not $7.')
    '7'
  """
  found = [match[0] for match in _FLEXIBLE.finditer(text)]
  return _plain(found[-1]) if found else NO_ANSWER


def _plain(number: str) -> str:
  return re.sub(r'\.$', '', re.sub(r'[,$]', '', number.strip()))


def _prompt(record: dict[str, Any]) -> str:
  return f'Question: {record["question"]}\nAnswer:'


def _read(path: pathlib.Path, limit: int | None) -> list[dict[str, Any]]:
  return records.with_fields(path, ('question', 'answer'), limit)
