"""Pre-training: from settings to runs of the training loop."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

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
from gnlorp_jax.data import tasks as data_tasks
from gnlorp_jax.data.mixture import Mixture
from gnlorp_jax.recipes.pretrain import data
from gnlorp_jax.recipes.pretrain.settings import TrainConfig
from gnlorp_jax.training import distributed, loop, metrics, objectives

_logger = logging.getLogger(__name__)

_RANK = 32


class Planned(NamedTuple):
  """What follows from settings alone: no data, no arrays."""

  config: TrainConfig  # With the architecture that is really used.
  program: program.Program
  abstract_batch: dict[str, jax.ShapeDtypeStruct]


class Prepared(NamedTuple):
  """What all runs of a command share."""

  planned: Planned
  text: data.Text
  tasks: tuple[data_tasks.Task, ...] = ()  # Asked at every evaluation.

  @property
  def config(self) -> TrainConfig:
    """The settings, with the architecture that is really used."""
    return self.planned.config

  @property
  def program(self) -> program.Program:
    """What is computed."""
    return self.planned.program


def with_rank(config: TrainConfig) -> TrainConfig:
  """The configuration with a rank, where none is given and one is needed."""
  optim = config.optim
  if not optimizer.accepts(optim, 'rank'):
    return config
  rank = optimizer.rank_or(optim, _RANK)
  return dataclasses.replace(
    config, optim=dataclasses.replace(optim, rank=rank)
  )


def plan(
  config: TrainConfig, devices: Sequence[jax.Device] | int | None = None
) -> Planned:
  """Builds what a run computes; reads no data, allocates nothing.

  Args:
    config: The configuration.
    devices: The devices to compile for, real or described; None means all of
      this process. A number is enough for shapes and shardings, but such a
      program cannot be compiled.

  Raises:
    ValueError: If parts of the configuration do not fit each other or the
      devices.
  """
  mesh = program.make_mesh(
    config.mesh, config.batch_size, config.micro_batches, devices
  )
  coreset.check(config.coreset, config.batch_size, config.micro_batches)
  architecture = parameters.architecture(config.init_from, config.model)
  if config.data.seq_len > architecture.max_seq_len:
    raise ValueError(
      f'data.seq_len={config.data.seq_len} is longer than the model in '
      f'{config.init_from} accepts: max_seq_len={architecture.max_seq_len}. '
      'Lower it.'
    )
  config = with_rank(config)
  config = dataclasses.replace(
    config,
    model=architecture,
    seed=config.seed_numbers[0],
    optim=optimizer.in_cycles(config.optim, config.adapter),
  )
  family = models.family(architecture)
  built = program.build(
    functools.partial(family.make, device=program.first_device(mesh)),
    architecture,
    functools.partial(
      objectives.language_model,
      chunk_tokens=config.loss_chunk_tokens,
      dropout=config.is_masked or data.has_dropout(config),
    ),
    mesh,
    optim_config=config.optim,
    adapter=config.adapter,
    step_config=config.step,
    sampling_options=config.sampling,
    model_rules=family.LABEL_RULES,
    steps=config.steps,
    micro_batches=config.micro_batches,
    read=language_model.reader(
      config.init_from, config.model, config.step.weight_bits
    ),
    seed=config.seed,
  )
  return Planned(config, built, data.abstract_batch(config, mesh))


def prepare(config: TrainConfig) -> Prepared:
  """Builds what all runs of a command share; cheap checks come first.

  Args:
    config: The configuration.

  Returns:
    The parts. No parameter is allocated yet.

  Raises:
    ValueError: If parts of the configuration do not fit each other, the data
      or the devices.
  """
  asked = language_model.read_tasks(config.eval)
  planned = plan(config)
  memory.check_run(planned.program)
  memory.check_step(
    *(planned.program, planned.config.model),
    *(config.batch_size, config.data.seq_len),
    *(config.step, config.micro_batches),
  )
  for task in asked:
    scores.check_room(task, planned.config.model.max_seq_len, None)
  if parameters.is_folder(config.init_from):
    parameters.folder(config.init_from)  # It arrives before text is read.
  language_model.tell_start(planned.config.init_from, planned.config.model)
  _tell_length(planned.config)
  text = distributed.in_turn(
    lambda: data.load(planned.config, planned.config.model)
  )
  return Prepared(planned, text, asked)


def _tell_length(config: TrainConfig) -> None:
  runs = config.num_runs
  _logger.info(
    '%s%d steps of %d sequences of %d tokens with %s, in %s.',
    *(f'{runs} runs of ' if runs > 1 else '', config.steps),
    *(config.batch_size, config.data.seq_len),
    *(config.optim.name, config.run_dir),
  )


def make_run(prepared: Prepared, config: TrainConfig) -> loop.Run:
  """A run of the training loop.

  Args:
    prepared: What the runs share.
    config: The settings of this one, which differ from those of `prepared` in
      learning rate, seed and folder at most.
  """
  built = prepared.program
  key = jax.random.key(config.seed)
  tokens = config.batch_size * config.data.seq_len
  numbers = optimizer.numbers(config.optim, config.steps)
  sizes = data.rows_by_source(config, prepared.text)
  return loop.Run(
    name='' if prepared.config.is_single else pathlib.Path(config.run_dir).name,
    folder=pathlib.Path(config.run_dir),
    steps=config.steps,
    mesh=built.mesh,
    abstract_state=built.abstract_state,
    start=lambda: built.start(key, numbers),
    train_step=built.train_step,
    batches=data.training_batches(config, prepared.text, built.mesh),
    evaluate=evaluation(prepared, config),
    instruments=built.instruments(
      config.optim,
      config.steps,
      tokens_per_step=tokens,
      flops_per_token=flops_per_token(config),
    ),
    metadata=metadata(prepared, config),
    every=loop.Every(
      log=config.log_every,
      evaluate=config.eval_every,
      checkpoint=config.checkpoint_every,
      evaluate_first=True,
    ),
    keep=config.checkpoint_keep,
    constants=lambda: built.parameters.start_frozen(key),
    better=language_model.is_better if config.keep_best else None,
    patience=config.patience,
    log=metrics.Log(config.log, dataclasses.asdict(config)),
    accepted=words(config.accept or ''),
    since=since_before(config, compared=not prepared.config.is_single),
    select=coreset.make(
      *(config.coreset, built, config.model),
      batch_size=config.batch_size,
      micro_batches=config.micro_batches,
      chunk_tokens=config.loss_chunk_tokens,
      seed=config.seed,
      names=tuple(sizes),
      sizes=tuple(sizes.values()),
    ),
    renew=lambda state: built.renew(state, numbers),
    batch_size=config.coreset.rows_per_step(config.batch_size),
  )


def flops_per_token(config: TrainConfig) -> float:
  """Operations that training needs for a token."""
  family, seq_len = models.family(config.model), config.data.seq_len
  if not config.is_masked:
    return family.flops_per_token(config.model, seq_len)
  predicted = data.masking.num_predictions(config.mask_rate, seq_len) / seq_len
  return family.flops_per_token(config.model, seq_len, predicted)


def evaluation(prepared: Prepared, config: TrainConfig) -> Any:
  """Mean loss over the validation text, each token counted once, and tasks.

  Returns:
    A function of trained and frozen weights, which returns ``loss`` and
    ``perplexity``, of named sources ``loss_NAME`` of each, and of each task
    ``TASK/METRIC`` and ``TASK/METRIC_stderr``.
  """
  built = prepared.program
  makers = {
    name: data.evaluation_batches(config, prepared.text, built.mesh, tokens)
    for name, tokens in prepared.text.held_out().items()
  }
  # As it is exported: a context begins as the documents of the training do.
  tokenizer = prepared.text.tokenizer
  if prepared.tasks:
    tokenizer = tokenizer.beginning(config.data.add_bos)

  def sums_of(make_batches: Any, trained: Any, frozen: Any) -> np.ndarray:
    with contextlib.closing(make_batches()) as batches:
      some = itertools.islice(batches, config.eval_batches)
      return language_model.evaluate(
        built, some, trained, frozen, config.batch_size
      )

  def evaluate(trained: Any, frozen: Any) -> dict[str, float]:
    sums = {n: sums_of(make, trained, frozen) for n, make in makers.items()}
    losses, weights = np.sum(list(sums.values()), axis=0)
    loss = float(losses / max(weights, 1))
    found = {'loss': loss, 'perplexity': float(np.exp(loss))}
    found |= {
      f'loss_{name}': float(total / max(weight, 1))
      for name, (total, weight) in sums.items()
      if name
    }
    return found | language_model.ask(
      built,
      trained,
      frozen,
      tokenizer,
      prepared.tasks,
      config.eval.batch_size,
    )

  return evaluate


def metadata(prepared: Prepared, config: TrainConfig) -> dict[str, Any]:
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
  # Texts are what they hold, not where they lie.
  del found['data.source']
  if 'data.validation_source' in found:
    held_out = prepared.text.held_out()
    found['data.validation_source'] = {
      name: [file.fingerprint, file.start, file.stop]
      for name, file in held_out.items()
    }
  tokens = prepared.text.training
  files = {'': tokens}
  if isinstance(tokens, Mixture):
    files = dict(zip(*tokens, strict=True))
  for name, file in files.items():
    suffix = f' of {name}' if name else ''
    found[f'data.training_part{suffix}'] = [file.start, file.stop]
    found[f'data.tokens{suffix}'] = f'{file.tokens} ({file.fingerprint})'
  return (
    found
    | prepared.program.fixed
    | {
      'tokenizer': prepared.text.tokenizer.fingerprint,
    }
  )
