"""GLUE fine-tuning: from settings to runs of the training loop.

Examples are read once (`tasks`); what a method computes on a task is built once
(`prepare`) and shared by learning rates and seeds (`make_run`).
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gnlorp_jax.compose import (
  compiled,
  folders,
  identity,
  memory,
  optimizer,
  parameters,
  program,
  run_directory,
)
from gnlorp_jax.compose.report import num_trained
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  LayerSamplingOptions,
  OptimConfig,
  StepConfig,
  fixed_settings,
  since_before,
  words,
)
from gnlorp_jax.data import glue
from gnlorp_jax.models import heads, hf, roberta
from gnlorp_jax.recipes.glue import evaluation, tasks
from gnlorp_jax.recipes.glue.protocol import resolve
from gnlorp_jax.recipes.glue.settings import GlueConfig
from gnlorp_jax.recipes.grid import Member, Result, quality
from gnlorp_jax.training import loop, metrics, objectives, sharding

# Padding up to such batches costs nothing worth a message.
_SMALL_BATCH = 64


class Planned(NamedTuple):
  """What follows from settings alone: no examples, no arrays."""

  config: GlueConfig  # Of one method on one task, nothing in it None.
  program: program.Program
  abstract_batch: dict[str, jax.ShapeDtypeStruct]


class Prepared(NamedTuple):
  """What the runs of a method on a task share."""

  config: GlueConfig  # As in `Planned`.
  method: str
  data: tasks.TaskData
  program: program.Program
  steps: int
  steps_per_epoch: int

  @property
  def eval_every(self) -> int:
    """Steps between two evaluations."""
    return self.config.eval_every or self.steps_per_epoch


def check(config: GlueConfig, found: Sequence[glue.Task]) -> None:
  """Finds what does not fit before the first of many runs; reads no examples.

  Args:
    config: The settings.
    found: The tasks that will run.

  Raises:
    ValueError: If the settings of any task and method do not fit each other or
      the devices.
  """
  architecture = tasks.architecture(config, tasks.load_tokenizer(config))
  for task in found:
    for method in config.method_names:
      planned = plan(
        config, task=task, method=method, architecture=architecture
      )
      memory.check_run(planned.program)


def plan(
  config: GlueConfig,
  devices: Sequence[jax.Device] | int | None = None,
  *,
  task: glue.Task | None = None,
  method: str | None = None,
  architecture: roberta.RobertaConfig | None = None,
) -> Planned:
  """Builds what a method computes on a task; reads no examples.

  Args:
    config: The settings.
    devices: The devices to compile for, real or described; None means all of
      this process. A number is enough for shapes and shardings.
    task: The task; None is the first that the settings name.
    method: The method; None is the first that the settings name.
    architecture: The model's configuration; None is that of settings and
      tokenizer.

  Raises:
    ValueError: If parts of the settings do not fit each other or the devices.
  """
  task = task or tasks.find_tasks(config)[0]
  method = method or config.method_names[0]
  if architecture is None:
    architecture = tasks.architecture(config, tasks.load_tokenizer(config))
  config = resolve(config, task.name, method)
  mesh = program.make_mesh(
    config.mesh, config.batch_size, config.micro_batches, devices
  )
  built = build_program(config, architecture, task, mesh)
  length = min(config.max_length, architecture.max_seq_len)
  return Planned(
    dataclasses.replace(config, model=architecture),
    built,
    abstract_batch(config.batch_size, length, task, mesh),
  )


def abstract_batch(
  batch_size: int, length: int, task: glue.Task, mesh: program.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of the largest batch."""
  label = np.float32 if task.is_regression else np.int32
  shapes = {
    'inputs': ((batch_size, length), np.int32),
    'weights': ((batch_size,), np.float32),
    'seeds': ((batch_size,), np.uint32),
    'labels': ((batch_size,), label),
  }
  return {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in shapes.items()
  }


def build_program(
  config: GlueConfig,
  architecture: roberta.RobertaConfig,
  task: glue.Task,
  mesh: program.Mesh,
  steps: int = 0,
) -> program.Program:
  """What a method computes; equal ones are built, and compiled, once.

  Args:
    config: What `resolve` returned.
    architecture: The model's configuration.
    task: The task; its number of outputs counts, and its name and classes where
      a folder to start from has a classifier.
    mesh: The devices.
    steps: Number of steps of a run, where the schedule is compiled in.
  """
  head = None
  if parameters.is_folder(config.init_from):
    described = hf.load_config(parameters.folder(config.init_from, 'config'))
    head = heads.match(described, task.labels, task.name)
  return _program(
    architecture,
    task.num_outputs,
    task.is_regression,
    # A search over learning rates, or another task, compiles nothing anew.
    optimizer.without_rates(config.optim),
    config.adapter,
    config.step,
    config.sampling,
    config.micro_batches,
    config.init_from,
    head,
    steps
    if optimizer.depends_on_steps(config.optim) or config.adapter.restart_every
    else 0,
    mesh,
  )


@functools.cache
def _program(
  architecture: roberta.RobertaConfig,
  num_outputs: int,
  is_regression: bool,
  optim: OptimConfig,
  adapter: AdapterOptions,
  step: StepConfig,
  sampling: LayerSamplingOptions,
  micro_batches: int,
  init_from: str | None,
  head: heads.Head | None,
  steps: int,
  mesh: program.Mesh,
) -> program.Program:
  read = None
  if head is not None:

    def read(key: jax.Array, shapes: Any) -> Any:
      folder = parameters.folder(init_from)
      return roberta.load_classifier(
        folder,
        architecture,
        num_outputs,
        key,
        head=head,
        shapes=shapes,
        convert=folders.keeper(folder, step.weight_bits),
      )

  return program.build(
    functools.partial(roberta.make_classifier, num_outputs=num_outputs),
    architecture,
    functools.partial(objectives.classifier, is_regression=is_regression),
    mesh,
    optim_config=optim,
    adapter=adapter,
    step_config=step,
    sampling_options=sampling,
    model_rules=roberta.LABEL_RULES,
    steps=steps,
    micro_batches=micro_batches,
    beside_adapters=('classifier/',),
    read=read,
  )


def prepare(config: GlueConfig, data: tasks.TaskData, method: str) -> Prepared:
  """Builds what the runs of a method on a task share; allocates nothing.

  What was compiled for others is forgotten where it is too much.

  Args:
    config: The settings.
    data: The task with its examples.
    method: Name of the method.

  Returns:
    The parts. Steps compile when they are first used.

  Raises:
    ValueError: If parts of the settings do not fit each other or the devices.
  """
  compiled.bound()
  config = resolve(config, data.task.name, method)
  mesh = program.make_mesh(config.mesh, config.batch_size, config.micro_batches)
  _check_batch(config.batch_size, len(data.train.encoded), data.task.name)
  per_epoch = glue.num_batches(len(data.train.encoded), config.batch_size)
  steps = config.epochs * per_epoch
  if config.steps is not None:
    steps = min(steps, config.steps)
  built = build_program(config, data.architecture, data.task, mesh, steps)
  memory.check_step(
    *(built, data.architecture, config.batch_size),
    glue.least_length(data.train.encoded, data.buckets),
    *(config.step, config.micro_batches),
  )
  return Prepared(
    config=config,
    method=method,
    data=data,
    program=built,
    steps=steps,
    steps_per_epoch=per_epoch,
  )


def _check_batch(batch_size: int, examples: int, task: str) -> None:
  """Raises ValueError for a batch that would be padding for the most part."""
  if batch_size > max(2 * examples, _SMALL_BATCH):
    raise ValueError(
      f'batch_size={batch_size} is more than twice the {examples} training '
      f'examples of {task}: the rest of every batch would be padding, which '
      f'takes memory and time. Use at most {max(2 * examples, _SMALL_BATCH)}.'
    )


def make_run(
  prepared: Prepared, learning_rate: float | None, seed: int
) -> Member:
  """A run of a method on a task.

  Args:
    prepared: What the runs share.
    learning_rate: In place of that of settings and table; None is that.
    seed: Its seed.
  """
  config, data, built = prepared.config, prepared.data, prepared.program
  optim = config.optim
  if learning_rate is not None:
    optim = dataclasses.replace(optim, learning_rate=learning_rate)
  exports = config.is_single if config.export is None else config.export
  config = dataclasses.replace(
    config,
    optim=optim,
    learning_rates=None,
    seed=seed,
    seeds=None,
    steps=prepared.steps,
  )
  key = jax.random.key(seed)
  rate = optim.learning_rate
  folder = (
    pathlib.Path(config.run_dir)
    / data.task.name
    / prepared.method
    / f'lr{rate:g}_seed{seed}'
  )
  metric = data.task.main_metric
  every = prepared.eval_every
  run = loop.Run(
    name=f'{data.task.name} {prepared.method} lr {rate:g} seed {seed}',
    folder=folder,
    steps=prepared.steps,
    mesh=built.mesh,
    abstract_state=built.abstract_state,
    start=lambda: built.start(key, optimizer.numbers(optim, prepared.steps)),
    train_step=built.train_step,
    batches=training_batches(prepared, seed),
    evaluate=functools.partial(
      evaluation.evaluate, built, data, config.eval_batch_size
    ),
    instruments=built.instruments(optim, prepared.steps),
    metadata=metadata(prepared, config),
    every=loop.Every(
      log=config.log_every,
      evaluate=every,
      checkpoint=config.checkpoint_every or every,
    ),
    keep=config.checkpoint_keep,
    constants=lambda: built.parameters.start_frozen(key),
    better=lambda found, best: quality(found[metric]) > quality(best[metric]),
    patience=config.patience,
    log=metrics.Log(config.log, dataclasses.asdict(config)),
    accepted=words(config.accept or ''),
    since=since_before(config, compared=True),
    batch_size=config.batch_size,
  )
  return Member(
    run,
    finish=functools.partial(
      evaluation.finish,
      built,
      data,
      config.eval_batch_size,
      folder,
      exports=exports,
    ),
    describe=functools.partial(describe, prepared, rate, seed),
    metric=metric,
    higher_is_better=True,
    opened=functools.partial(
      run_directory.opened,
      folder,
      exports=('hf',) if exports else (),
      reads=(config.init_from, config.adapter.init_from, config.tokenizer),
    ),
  )


def training_batches(prepared: Prepared, seed: int) -> glue.TrainingBatches:
  """The examples of a run, of each batch the rows of this process."""
  config, data = prepared.config, prepared.data
  index, count = sharding.process_share(prepared.program.mesh)
  return glue.TrainingBatches(
    data.train.encoded,
    data.train.labels,
    batch_size=config.batch_size,
    pad_id=data.architecture.pad_id,
    buckets=data.buckets,
    seed=seed,
    process_index=index,
    process_count=count,
  )


def metadata(prepared: Prepared, config: GlueConfig) -> dict[str, Any]:
  """What a checkpoint and a result must agree with."""
  config = dataclasses.replace(config, model=prepared.data.architecture)
  fixed = identity.of_weights(
    fixed_settings(config, compared=True),
    {
      'init_from': config.init_from,
      'adapter.init_from': config.adapter.init_from,
    },
  )
  fixed |= prepared.program.fixed
  return fixed | {
    'task': prepared.data.task.name,
    'method': prepared.method,
    'max_length': prepared.data.max_length,
    'eval_every': prepared.eval_every,
    'examples': prepared.data.fingerprint,
    'tokenizer': prepared.data.tokenizer.fingerprint,
  }


def describe(prepared: Prepared, learning_rate: float, seed: int) -> Result:
  """What a run's result says besides what came out of it."""
  data, built = prepared.data, prepared.program
  return {
    'group': f'{data.task.name} {prepared.method}',
    'task': data.task.name,
    'method': prepared.method,
    'learning_rate': learning_rate,
    'seed': seed,
    'steps': prepared.steps,
    'epochs': prepared.steps / prepared.steps_per_epoch,
    'train_examples': len(data.train.encoded),
    **describe_sizes(built),
    'device': jax.local_devices()[0].device_kind,
    'num_devices': built.mesh.size,
    'versions': {
      'python': platform.python_version(),
      **{
        name: importlib.metadata.version(name)
        for name in ('jax', 'flax', 'optax', 'numpy')
      },
    },
  }


def describe_sizes(built: program.Program) -> dict[str, int]:
  """Numbers of parameters, and bytes of the optimizer's state."""
  held = built.parameters
  stored = (built.abstract_state.params, held.frozen)
  decoded = jax.eval_shape(held.decode_exact, stored)
  return {
    'trainable_parameters': num_trained(built),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(decoded)),
    'optimizer_state_bytes': built.state_bytes,
  }
