"""GLUE and tasks like it: files to batches, outputs to scores.

A task (`TASKS`, `custom_task`) is read (`read`, `read_file`), turned into token
ids (`encode`) and into batches (`TrainingBatches`, `evaluation_batches`); the
outputs of a model become metrics (`scores`) and files for the GLUE server
(`write_submission`).
`generated_task` is a task that needs no files.
"""

from gnlorp_jax.data.glue.batching import (
  TrainingBatches,
  encode,
  evaluation_batches,
  least_length,
  num_batches,
)
from gnlorp_jax.data.glue.demo import generated_task, generated_tokenizer
from gnlorp_jax.data.glue.files import (
  Examples,
  MissingSplitError,
  has_split,
  infer_labels,
  read,
  read_file,
)
from gnlorp_jax.data.glue.metrics import scores, write_submission
from gnlorp_jax.data.glue.tasks import TASKS, Task, custom_task, get_task

__all__ = [
  'TASKS',
  'Examples',
  'MissingSplitError',
  'Task',
  'TrainingBatches',
  'custom_task',
  'encode',
  'evaluation_batches',
  'generated_task',
  'generated_tokenizer',
  'get_task',
  'has_split',
  'infer_labels',
  'least_length',
  'num_batches',
  'read',
  'read_file',
  'scores',
  'write_submission',
]
