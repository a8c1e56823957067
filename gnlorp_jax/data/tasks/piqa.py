"""PIQA: which of two ways to do something works?

Source: Bisk et al., `PIQA`, 2019, arXiv:1911.11641. The prompt is that of
`piqa` in lm_eval.
"""

import pathlib

from gnlorp_jax.data.tasks import options
from gnlorp_jax.data.tasks.questions import Task

FILES = ('piqa.test.json', '*/piqa.test.json', 'piqa.jsonl', '*/piqa.jsonl')
EXAMPLES = ('piqa.train.json', '*/piqa.train.json')


def piqa(
  data: pathlib.Path, *, shots: int | None = None, limit: int | None = None
) -> Task:
  """Reads the task; see `tasks.get`."""
  return options.make(
    'piqa',
    data,
    options.prompted('piqa', 'Question: {}\nAnswer:', num_options=2),
    files=FILES,
    examples=EXAMPLES,
    shots=shots,
    limit=limit,
  )
