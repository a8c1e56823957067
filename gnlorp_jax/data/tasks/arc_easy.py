"""ARC-Easy: grade-school science, the easier questions.

Source: Clark et al., `Think you have solved question answering? Try ARC`, 2018,
arXiv:1803.05457. The prompt is that of `arc_easy` in lm_eval.
"""

import pathlib

from gnlorp_jax.data.tasks import options
from gnlorp_jax.data.tasks.questions import Task

_NAMES = ('ARC-Easy.{}.json', '*/ARC-Easy.{}.json')
_PUBLISHED = ('ARC-Easy-{}.jsonl', '*/ARC-Easy-{}.jsonl')
FILES = [name.format('test') for name in _NAMES]
FILES += [name.format('Test') for name in _PUBLISHED]
EXAMPLES = [name.format('train') for name in _NAMES]
EXAMPLES += [name.format('Train') for name in _PUBLISHED]


def arc_easy(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`."""
  return options.make(
    'arc_easy',
    data,
    options.prompted('arc_easy', 'Question: {}\nAnswer:'),
    files=FILES,
    examples=EXAMPLES,
    shots=shots,
    limit=limit,
  )
