"""OpenBookQA: elementary science that takes a fact and common knowledge.

Source: Mihaylov et al., `Can a suit of armor conduct electricity?`, 2018,
arXiv:1809.02789. The prompt, the bare question, is that of `openbookqa` in
lm_eval.
"""

import pathlib

from gnlorp_jax.data.tasks import options
from gnlorp_jax.data.tasks.questions import Task

FILES = (
  *('openbookqa.test.json', '*/openbookqa.test.json'),
  *('openbookqa.jsonl', '*/openbookqa.jsonl'),
)
EXAMPLES = ('openbookqa.train.json', '*/openbookqa.train.json')


def openbookqa(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`."""
  return options.make(
    'openbookqa',
    data,
    options.prompted('openbookqa', '{}'),
    files=FILES,
    examples=EXAMPLES,
    shots=shots,
    limit=limit,
  )
