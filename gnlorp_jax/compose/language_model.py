"""What every recipe that trains a language model does around its training.

Weights to start from, tasks asked while it trains, a Hugging Face folder at the
end.
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from gnlorp_jax import models
from gnlorp_jax.compose import coreset, folders, parameters, scores
from gnlorp_jax.compose.program import Program, report
from gnlorp_jax.compose.settings import TaskOptions
from gnlorp_jax.data import tasks as data_tasks
from gnlorp_jax.data.tokenizer import Tokenizer
from gnlorp_jax.disk import writing
from gnlorp_jax.models import hf
from gnlorp_jax.optim import format_report
from gnlorp_jax.training import distributed, interrupt, sharding
from gnlorp_jax.training.keeper import Found
from gnlorp_jax.training.loop import Outcome

_logger = logging.getLogger(__name__)


def reader(
  init_from: str | None, model: models.Config, weight_bits: int | None
) -> Callable[[jax.Array, Any], Any] | None:
  """Reads the weights to start from, as `parameters.plan` takes it.

  Args:
    init_from: A Hugging Face folder, a name of the hub or of a preset, or None.
    model: The architecture.
    weight_bits: Bits of the kernels of the blocks; None keeps them as they are.

  Returns:
    A function of a key and of shapes; None where weights are random.
  """
  if not parameters.is_folder(init_from):
    return None
  family = models.family(model)

  def read(key: jax.Array, shapes: Any) -> Any:
    del key  # Nothing is drawn.
    folder = parameters.folder(init_from)
    return hf.load_params(
      folder,
      family.HF_TENSORS,
      shapes,
      folders.keeper(folder, weight_bits),
      unread=family.HF_UNREAD,
    )

  return read


def tell_start(init_from: str | None, model: models.Config) -> None:
  """Says what a run starts from."""
  size = models.family(model).num_params(model)
  if init_from is not None and not parameters.is_folder(init_from):
    _logger.warning(
      'init_from=%r is a preset: its architecture with random weights. For a '
      'trained model name its folder, or hf:OWNER/NAME.',
      init_from,
    )
  _logger.info(
    'Model: %s, %s parameters in %s; a new run begins with %s.',
    *(model.model_type, f'{size:,}', model.param_dtype),
    'random weights' if init_from is None else f'those of {init_from}',
  )


def dry_run(
  config: Any, built: Program, abstract_batch: dict[str, jax.ShapeDtypeStruct]
) -> str:
  """What would happen to every parameter, and what choosing a batch takes.

  Args:
    config: The settings of a run, with its architecture.
    built: What it computes.
    abstract_batch: Shapes of a batch.
  """
  rows = format_report(report(built))
  choosing = coreset.describe(
    *(config.coreset, built, config.model, abstract_batch),
    config.micro_batches,
  )
  return f'{rows}\n{choosing}'


def read_tasks(config: TaskOptions) -> tuple[data_tasks.Task, ...]:
  """The tasks that a run asks at every evaluation.

  Raises:
    ValueError: If a file is missing or damaged.
  """
  return tuple(
    data_tasks.get(name, config.data, shots=config.shots, limit=config.limit)
    for name in config.names
  )


def evaluate(
  program: Program,
  batches: Iterable[dict[str, np.ndarray]],
  trained: Any,
  frozen: Any,
  batch_size: int | None = None,
) -> np.ndarray:
  """Sums over batches; a signal that asks to stop ends it between two.

  Args:
    program: What the run computes.
    batches: The rows of batches that belong to this process, on the host.
    trained: The parameters that train.
    frozen: The others.
    batch_size: Rows of a batch, of all processes together, if they are to be
      checked.

  Returns:
    The sums of what `Objective.evaluate` returns, float64.

  Raises:
    Interrupted: After a signal.
  """
  found: list[Any] = []
  for batch in interrupt.until_stopped(batches):
    placed = sharding.put_batch(batch, program.mesh, batch_size)
    found.append(program.eval_step(trained, placed, frozen))
    # One is ahead: a signal is honoured soon.
    jax.block_until_ready(found[-2:-1])
  return np.asarray(jax.device_get(found), np.float64).sum(axis=0)


def ask(
  program: Program,
  trained: Any,
  frozen: Any,
  tokenizer: Tokenizer,
  tasks: Sequence[data_tasks.Task],
  batch_size: int,
) -> dict[str, float]:
  """What a model scores in tasks, as an evaluation of a run.

  Args:
    program: What the run computes.
    trained: The parameters that train.
    frozen: The others.
    tokenizer: The tokenizer.
    tasks: The tasks.
    batch_size: Options or answers per forward pass.

  Returns:
    Of each task ``TASK/METRIC`` and ``TASK/METRIC_stderr``.

  Raises:
    Interrupted: After a signal that asks to stop, between two batches.
  """
  scored = scores.evaluate_tasks(
    program.model,
    program.parameters.join(trained, frozen),
    tokenizer,
    tasks,
    batch_size=batch_size,
    progress=lambda done, total: interrupt.check(),
  )
  return {
    f'{task}/{name}{part}': metric[key]
    for task, summary in scored.items()
    for name, metric in summary['metrics'].items()
    for part, key in (('', 'value'), ('_stderr', 'stderr'))
  }


def is_better(found: Found, best: Found) -> bool:
  """Whether the validation loss is lower; no number is worse than any."""
  if found['loss'] is None:
    return False
  return best['loss'] is None or found['loss'] < best['loss']


def chosen_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What batches were chosen of: the last that rows of metrics say of it.

  Args:
    rows: Rows of metrics.

  Returns:
    Counts and means by name; empty where nothing is chosen.
  """
  prefix = 'coreset/'
  for row in reversed(rows):
    found = {n: value for n, value in row.items() if n.startswith(prefix)}
    if found:
      return {name.removeprefix(prefix): v for name, v in found.items()}
  return {}


def export(
  program: Program,
  model: models.Config,
  tokenizer: Tokenizer,
  outcome: Outcome,
  folder: pathlib.Path,
  *,
  add_bos: bool | None,
) -> None:
  """Writes a Hugging Face folder, in place of that of an earlier finish.

  Args:
    program: What the run computed.
    model: The architecture.
    tokenizer: The tokenizer.
    outcome: What the loop left; adapters are merged.
    folder: The folder.
    add_bos: As in `Tokenizer.save`.

  Raises:
    ValueError: If the folder holds what no run wrote.
  """
  family = models.family(model)
  hf_config = family.config_to_hf(
    model,
    bos_token_id=tokenizer.bos_id,
    eos_token_id=tokenizer.eos_id,
    pad_token_id=tokenizer.pad_id,
  )
  params = program.parameters.merge(outcome.params, outcome.constants)
  with distributed.of_first(lambda: writing.replaced(folder), folder) as draft:
    folders.export(
      draft,
      params,
      functools.partial(
        hf.export, table=family.HF_TENSORS, hf_config=hf_config
      ),
    )
    if distributed.is_first():
      tokenizer.save(draft, add_bos=add_bos)
