"""Instruction tuning: from settings to runs of the training loop."""

import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gnlorp_jax import models
from gnlorp_jax.compose import (
  coreset,
  identity,
  language_model,
  memory,
  optimizer,
  parameters,
  program,
  scores,
)
from gnlorp_jax.compose.settings import (
  fixed_settings,
  since_before,
  words,
)
from gnlorp_jax.data import chat
from gnlorp_jax.data import tasks as data_tasks
from gnlorp_jax.data.chat import demo
from gnlorp_jax.recipes.sft import data, evaluation, protocol
from gnlorp_jax.recipes.sft.settings import SftConfig
from gnlorp_jax.training import (
  distributed,
  loop,
  metrics,
  objectives,
  positions,
)
from gnlorp_jax.training.selection.selection import Selection

_logger = logging.getLogger(__name__)

_FEW_STEPS, _FEW_HELD_OUT = 20, 5


class Planned(NamedTuple):
  """What follows from settings alone: no examples, no arrays."""

  config: SftConfig  # Nothing in it None that a run needs.
  program: program.Program
  abstract_batch: dict[str, jax.ShapeDtypeStruct]


class Prepared(NamedTuple):
  """What all runs of a command share."""

  config: SftConfig  # As in `Planned`, with the number of steps.
  program: program.Program
  chat: data.Chat
  tasks: tuple[data_tasks.Task, ...]  # Asked at every evaluation.
  steps_per_epoch: int
  # Taken beyond those that batches of this size would have taken: not 0 where
  # a run began with another.
  more_steps: int = 0

  @property
  def evaluates(self) -> bool:
    """Whether there are held-out examples."""
    return bool(self.chat.examples.validation)


def resolve(config: SftConfig) -> SftConfig:
  """The settings with the architecture, and all else that a run needs.

  Raises:
    ValueError: If there is no such model or method, or it is shorter than the
      examples may be.
  """
  overrides = {}
  if config.is_demo:
    overrides['vocab_size'] = demo.tokenizer().vocab_size
  architecture = parameters.architecture(
    config.init_from, config.model, **overrides
  )
  config = dataclasses.replace(
    config, model=architecture, seed=config.seed_numbers[0]
  )
  config = protocol.resolve(config)
  coreset.check(config.coreset, config.batch_size, config.micro_batches)
  if config.data.max_length > architecture.max_seq_len:
    raise ValueError(
      f'data.max_length={config.data.max_length} is more than the model '
      f'accepts: {architecture.max_seq_len} tokens. Lower it.'
    )
  return config


def plan(
  config: SftConfig, devices: Sequence[jax.Device] | int | None = None
) -> Planned:
  """Builds what a run computes; reads no examples, allocates nothing.

  Args:
    config: The settings.
    devices: The devices to compile for, real or described; None means all of
      this process. A number is enough for shapes and shardings.

  Raises:
    ValueError: If parts of the settings do not fit each other or the devices.
  """
  config = resolve(config)
  built = _build(config, config.steps or 0, devices)
  return Planned(config, built, data.abstract_batch(config, built.mesh))


def _build(
  config: SftConfig,
  steps: int,
  devices: Sequence[jax.Device] | int | None = None,
) -> program.Program:
  mesh = program.make_mesh(
    config.mesh, config.batch_size, config.micro_batches, devices
  )
  family = models.family(config.model)
  return program.build(
    functools.partial(family.make, device=program.first_device(mesh)),
    config.model,
    functools.partial(
      objectives.language_model,
      chunk_tokens=config.loss_chunk_tokens,
      dropout=data.has_dropout(config),
      accuracy=True,
    ),
    mesh,
    optim_config=config.optim,
    adapter=config.adapter,
    step_config=config.step,
    sampling_options=config.sampling,
    model_rules=family.LABEL_RULES,
    steps=steps,
    micro_batches=config.micro_batches,
    read=language_model.reader(
      config.init_from, config.model, config.step.weight_bits
    ),
    seed=config.seed,
  )


def prepare(config: SftConfig) -> Prepared:
  """Builds what all runs of a command share; cheap checks come first.

  Args:
    config: The settings.

  Returns:
    The parts. No parameter is allocated yet.

  Raises:
    ValueError: If parts of the settings do not fit each other, the examples or
      the devices.
  """
  tasks = language_model.read_tasks(config.eval)
  config = resolve(config)
  for task in tasks:
    scores.check_room(task, config.model.max_seq_len, None)
  found = distributed.in_turn(lambda: data.load(config))
  # The schedule needs to know how long the run is.
  length = length_of(config, found)
  tell_length(config, found, length)
  built = _build(config, length.steps)
  memory.check_run(built)
  memory.check_step(
    *(built, config.model, config.batch_size, length.least),
    *(config.step, config.micro_batches),
  )
  language_model.tell_start(config.init_from, config.model)
  return Prepared(
    dataclasses.replace(config, steps=length.steps),
    built,
    found,
    tasks,
    length.per_epoch,
    length.more,
  )


class Length(NamedTuple):
  """How long a run is.

  Attributes:
    steps: Of the whole run.
    per_epoch: Steps of an epoch.
    more: Steps taken beyond those that batches of this size would have taken.
    least: Tokens of the shortest row of a batch.
  """

  steps: int
  per_epoch: int
  more: int
  least: int


def length_of(config: SftConfig, found: data.Chat) -> Length:
  """How long a run on these conversations is, with what it took before."""
  batches = data.training_batches(config, found)
  per_epoch = batches.batches_per_epoch
  more = _more_steps(config, batches)
  # Not a step more because 0.55 is a little more than it says.
  steps = max(1, more + math.ceil(round(config.epochs * per_epoch, 6)))
  if config.steps is not None:
    steps = min(steps, config.steps)
  return Length(steps, per_epoch, more, batches.least_length)


def _more_steps(config: SftConfig, batches: chat.TrainingBatches) -> int:
  """Steps taken beyond those that batches of this size would have taken.

  They are less than 0 if a run began with larger ones.
  """
  if not config.is_single:  # Of a grid all have one size.
    return 0
  rows = config.coreset.rows_per_step(config.batch_size)
  found = positions.newest(pathlib.Path(config.run_dir), rows)
  if found is None:
    return 0
  number, position = found
  if 'drawn_for' not in position:
    return 0  # Of another recipe, as the loop will tell.
  batches.set_state(position)
  return number - batches.batches_behind


def tell_length(config: SftConfig, found: data.Chat, length: Length) -> None:
  """Says how long a run is, and where that may surprise."""
  steps, rows = length.steps, config.coreset.pool or config.batch_size
  rates = config.searched_rates or (config.optim.learning_rate,)
  _logger.info(
    'An epoch is %s of %s of up to %d tokens; %s in all%s, at a learning rate '
    'of %s.',
    *(_counted(length.per_epoch, 'step'), _counted(rows, 'row')),
    *(config.data.max_length, _counted(steps, 'step')),
    f' in each of {config.num_runs} runs' if config.num_runs > 1 else '',
    ' or '.join(f'{rate:g}' for rate in rates),
  )
  held_out = len(found.examples.validation)
  if 0 < held_out < _FEW_HELD_OUT:
    _logger.warning(
      'What is measured rests on %s held out: give --data.val-size a number of '
      'them, such as 6, or --data.validation-source.',
      _counted(held_out, 'example'),
    )
  if config.steps is not None and config.steps > steps:
    _logger.warning(
      'steps=%d, and epochs=%g end after %s: raise epochs for more.',
      *(config.steps, config.epochs, _counted(steps, 'step')),
    )
  elif config.steps is None and steps < _FEW_STEPS:
    _logger.warning(
      '%s change a model little. Raise --epochs, which is %g, or lower '
      '--batch-size, which is %d.',
      *(_counted(steps, 'step'), config.epochs, config.batch_size),
    )


def _counted(number: int, what: str) -> str:
  return f'{number} {what}' if number == 1 else f'{number} {what}s'


def make_run(prepared: Prepared, config: SftConfig) -> loop.Run:
  """A run of the training loop.

  Args:
    prepared: What the runs share.
    config: The settings of this one, which differ from those of `prepared` in
      learning rate, seed and folder at most.
  """
  built = prepared.program
  key = jax.random.key(config.seed)
  numbers = optimizer.numbers(config.optim, config.steps)
  folder = pathlib.Path(config.run_dir)
  every = config.eval_every or prepared.steps_per_epoch
  batches = data.training_batches(config, prepared.chat, built.mesh)
  return loop.Run(
    name='' if prepared.config.is_single else folder.name,
    folder=folder,
    steps=config.steps,
    mesh=built.mesh,
    abstract_state=built.abstract_state,
    start=lambda: built.start(key, numbers),
    train_step=built.train_step,
    batches=batches,
    evaluate=evaluation.evaluator(
      *(built, prepared.chat, prepared.tasks, config),
      # Each step takes a batch.
      lambda: prepared.more_steps + batches.batches_behind,
    ),
    instruments=built.instruments(
      config.optim,
      config.steps,
      flops_per_token=models.family(config.model).flops_per_token(
        config.model, config.data.max_length
      ),
    ),
    metadata=metadata(prepared, config),
    every=loop.Every(
      log=config.log_every,
      evaluate=every,
      checkpoint=config.checkpoint_every
      or min(every, max(config.steps // 10, 1)),
      evaluate_first=True,
    ),
    keep=config.checkpoint_keep,
    constants=lambda: built.parameters.start_frozen(key),
    better=language_model.is_better if _keeps_best(prepared, config) else None,
    patience=config.patience,
    log=metrics.Log(config.log, dataclasses.asdict(config)),
    accepted=words(config.accept or ''),
    since=since_before(config, compared=not prepared.config.is_single),
    select=_selection(prepared, config, batches),
    renew=lambda state: built.renew(state, numbers),
    batch_size=config.coreset.rows_per_step(config.batch_size),
  )


def _selection(
  prepared: Prepared, config: SftConfig, batches: chat.TrainingBatches
) -> Selection | None:
  """How batches are chosen, if they are."""
  if not config.coreset.is_on:
    return None
  names = prepared.chat.examples.names
  return coreset.make(
    *(config.coreset, prepared.program, config.model),
    batch_size=config.batch_size,
    micro_batches=config.micro_batches,
    chunk_tokens=config.loss_chunk_tokens,
    seed=config.seed,
    names=names,
    sizes=batches.rows_by_source(len(names)),
  )


def _keeps_best(prepared: Prepared, config: SftConfig) -> bool:
  return config.keep_best and prepared.evaluates


def metadata(prepared: Prepared, config: SftConfig) -> dict[str, Any]:
  """What cannot change within a run: it decides shapes or the order of data."""
  is_grid = not prepared.config.is_single
  found = fixed_settings(config, compared=is_grid)
  if prepared.program.parameters.frozen:
    # They are in no checkpoint.
    found['init_from'] = config.init_from
  found = identity.of_weights(
    found,
    {
      'init_from': config.init_from,
      'adapter.init_from': config.adapter.init_from,
    },
  )
  return (
    found
    | prepared.program.fixed
    | {
      # What decides them: the files, data.template, train_on and so on.
      'training examples': prepared.chat.examples.fingerprint[:12],
      'tokenizer': prepared.chat.tokenizer.fingerprint,
    }
  )
