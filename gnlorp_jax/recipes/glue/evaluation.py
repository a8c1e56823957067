"""What a fine-tuned model says: outputs, metrics, predictions, an export."""

import collections
import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np

from gnlorp_jax.compose import folders
from gnlorp_jax.compose.program import Program
from gnlorp_jax.data import glue
from gnlorp_jax.disk import writing
from gnlorp_jax.models import roberta
from gnlorp_jax.recipes.glue.tasks import Split, TaskData
from gnlorp_jax.training import (
  distributed,
  interrupt,
  losses,
  metrics,
  sharding,
)
from gnlorp_jax.training.loop import Outcome

_logger = logging.getLogger(__name__)


def outputs_of(
  program: Program,
  data: TaskData,
  batch_size: int,
  params: Any,
  frozen: Any,
  split: Split,
) -> np.ndarray:
  """What a model says about every example of a split.

  Args:
    program: What the run computes.
    data: The task.
    batch_size: Examples per batch; it is rounded up to a multiple of the
      devices.
    params: The parameters that train.
    frozen: The others.
    split: The examples.

  Returns:
    The outputs, ``[N, C]`` float32.

  Raises:
    Interrupted: After a signal that asks to stop, between two batches.
  """
  size = program.mesh.size * math.ceil(batch_size / program.mesh.size)
  outputs = np.zeros((len(split.encoded), data.task.num_outputs), np.float32)
  waiting: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

  def collect() -> None:
    index_B, values_BC = waiting.popleft()
    is_example = index_B >= 0
    outputs[index_B[is_example]] = np.asarray(values_BC)[is_example]

  index, count = sharding.process_share(program.mesh)
  batches = glue.evaluation_batches(
    split.encoded,
    batch_size=size,
    pad_id=data.architecture.pad_id,
    buckets=data.buckets,
    process_index=index,
    process_count=count,
  )
  for batch in interrupt.until_stopped(batches):
    inputs = {'inputs': batch['inputs']}
    placed = sharding.put_batch(inputs, program.mesh, size)
    waiting.append((batch['index'], program.eval_step(params, placed, frozen)))
    if len(waiting) > 2:  # The device has work while one is fetched.
      collect()
  while waiting:
    collect()
  return outputs


def evaluate(
  program: Program, data: TaskData, batch_size: int, params: Any, frozen: Any
) -> dict[str, float]:
  """Mean loss on the dev set, and all metrics of the task.

  Args:
    program: What the run computes.
    data: The task.
    batch_size: As in `outputs_of`.
    params: The parameters that train.
    frozen: The others.

  Returns:
    ``loss`` and the metrics, those of every evaluated split; NaN where one is
    not defined or the model diverged.
  """
  loss_of = losses.cross_entropy
  if data.task.is_regression:
    loss_of = losses.squared_error
  metrics = {}
  for name, split in data.evaluated.items():
    outputs = outputs_of(program, data, batch_size, params, frozen, split)
    if name == 'dev':
      loss_sum, weight_sum = loss_of(
        outputs, split.labels, np.ones(len(outputs), np.float32)
      )
      metrics['loss'] = float(loss_sum / weight_sum)
    metrics |= glue.scores(data.task, outputs, split.labels, name)
  return metrics


def finish(
  program: Program,
  data: TaskData,
  batch_size: int,
  folder: pathlib.Path,
  outcome: Outcome,
  *,
  exports: bool,
) -> None:
  """Writes predictions of the test splits, plots and perhaps the model.

  Args:
    program: What the run computes.
    data: The task.
    batch_size: As in `outputs_of`.
    folder: That of the run.
    outcome: What the loop left.
    exports: Whether to write the model as a Hugging Face folder.
  """
  if program.sampling is not None:
    rows, png = folder / metrics.METRICS_FILE, folder / 'layers.png'
    distributed.from_first(lambda: metrics.plot_layers(rows, png))
  for name, split in data.predicted.items():
    outputs = outputs_of(
      program,
      data,
      batch_size,
      outcome.params,
      outcome.constants,
      split,
    )
    if not np.isfinite(outputs).all():
      _logger.warning('%s diverged: no predictions of %s.', folder, name)
      continue
    # As GLUE's server takes them.
    if distributed.is_first():
      glue.write_submission(
        data.task, folder / 'predictions', name, split.ids, outputs
      )
  if exports:
    export(program, data, outcome, folder / 'hf')


def export(
  program: Program, data: TaskData, outcome: Outcome, folder: pathlib.Path
) -> None:
  """Writes the model as a Hugging Face folder, adapters merged."""
  params = program.parameters.merge(outcome.params, outcome.constants)
  with distributed.of_first(lambda: writing.replaced(folder), folder) as draft:
    folders.export(
      draft,
      params,
      lambda folder, params: roberta.export_classifier(
        folder,
        data.architecture,
        params,
        data.task.labels,
        data.task.name,
      ),
    )
    if distributed.is_first():
      data.tokenizer.save(draft)
