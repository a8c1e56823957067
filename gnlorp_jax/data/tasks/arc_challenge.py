"""ARC-Challenge: grade-school science, questions that simple methods miss.

Source: Clark et al., `Think you have solved question answering? Try ARC`, 2018,
arXiv:1803.05457. The prompt is that of `arc_challenge` in lm_eval.
"""

import pathlib

from gnlorp_jax.data.tasks import options
from gnlorp_jax.data.tasks.questions import Task

_NAMES = ('ARC-Challenge.{}.json', '*/ARC-Challenge.{}.json')
_PUBLISHED = ('ARC-Challenge-{}.jsonl', '*/ARC-Challenge-{}.jsonl')
FILES = [name.format('test') for name in _NAMES]
FILES += [name.format('Test') for name in _PUBLISHED]
EXAMPLES = [name.format('train') for name in _NAMES]
EXAMPLES += [name.format('Train') for name in _PUBLISHED]


def arc_challenge(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`."""
  return options.make(
    'arc_challenge',
    data,
    options.prompted('arc_challenge', 'Question: {}\nAnswer:'),
    files=FILES,
    examples=EXAMPLES,
    shots=shots,
    limit=limit,
  )
