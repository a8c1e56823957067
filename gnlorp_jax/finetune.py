"""The composition root of fine-tuning: from settings to the parts of a run.

Examples are read once (`finetune_data`); what a method computes on a task is
built once per learning rate (`program`) and shared by the seeds (`make_run`).
"""

import collections
import dataclasses
import functools
import importlib.metadata
import inspect
import logging
import math
import pathlib
import platform
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlorp_jax import build, finetune_data, methods, optim
from gnlorp_jax.config import OptimConfig
from gnlorp_jax.data import glue
from gnlorp_jax.finetune_config import FinetuneConfig
from gnlorp_jax.glue_table import Result
from gnlorp_jax.models import adapters, roberta
from gnlorp_jax.optim.inspect import ReportRow, tree_bytes
from gnlorp_jax.optim.labels import path_name
from gnlorp_jax.training import losses, sharding, state, step

_logger = logging.getLogger(__name__)

Params = dict[str, Any]


class Compiled(NamedTuple):
  """What programs of one shape share, whatever their task and learning rate."""

  model: roberta.Model
  adapter: adapters.AdapterConfig | None
  mesh: jax.sharding.Mesh
  abstract_state: state.TrainState  # Of the parameters that train.
  abstract_frozen: Params  # The others; empty if all train.
  start: Any  # Compiled: (params, rates) -> state at step 0.
  train_step: Any  # Compiled: (state, batch, frozen) -> (state, metrics).
  predict: Any  # Compiled: (params, batch, frozen) -> outputs [B, C].


class Program(NamedTuple):
  """What a method computes on a task with one learning rate."""

  settings: FinetuneConfig
  data: finetune_data.TaskData
  method: str
  hyper: methods.Hyperparameters
  steps: int
  steps_per_epoch: int
  rates: dict[str, float]  # What decides the learning rate of every step.
  compiled: Compiled

  @property
  def schedule(self) -> optax.Schedule:
    """The learning rate of each step."""
    return functools.partial(learning_rate, **self.rates)


class Run(NamedTuple):
  """One run: a program and a seed."""

  program: Program
  seed: int
  folder: pathlib.Path
  metadata: dict[str, Any]  # What a checkpoint and a result must agree with.

  @property
  def name(self) -> str:
    """What to call the run on a terminal."""
    parts = self.program.data.task.name, self.program.method
    rate = self.program.hyper.learning_rate
    return f'{" ".join(parts)} lr {rate:g} seed {self.seed}'


def check(settings: FinetuneConfig, tasks: Sequence[glue.Task]) -> None:
  """Finds what does not fit before the first of many runs; reads no examples.

  Args:
    settings: The settings.
    tasks: The tasks that will run.

  Raises:
    ValueError: If the settings of any task and method do not fit each other or
      the devices.
  """
  mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
  for task in tasks:
    for method in settings.method_names:
      hyper = settings.hyperparameters(task.name, method)
      sharding.check_batch(hyper.batch_size, settings.micro_batches, mesh)
      _adapter(method, hyper)
      # Its arguments are checked where it is used for the first time.
      tx, _ = _optimizer(method, hyper)
      jax.eval_shape(tx.init, {})


def program(
  settings: FinetuneConfig,
  data: finetune_data.TaskData,
  method: str,
  learning_rate: float | None = None,
) -> Program:
  """Builds what a method computes on a task; allocates nothing.

  Args:
    settings: The settings.
    data: The task with its examples.
    method: Name of the method.
    learning_rate: In place of that of settings and table.

  Returns:
    The program. Its steps compile when they are first used.

  Raises:
    ValueError: If parts of the settings do not fit each other or the devices.
  """
  hyper = settings.hyperparameters(data.task.name, method)
  if learning_rate is not None:
    hyper = dataclasses.replace(hyper, learning_rate=learning_rate)
  mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
  sharding.check_batch(hyper.batch_size, settings.micro_batches, mesh)
  per_epoch = glue.num_batches(len(data.train.encoded), hyper.batch_size)
  steps = hyper.epochs * per_epoch
  if settings.max_steps is not None:
    steps = min(steps, settings.max_steps)
  return Program(
    settings=settings,
    data=data,
    method=method,
    hyper=hyper,
    steps=steps,
    steps_per_epoch=per_epoch,
    rates={
      'peak': hyper.learning_rate,
      'warmup': float(round(hyper.warmup_fraction * steps)),
      'steps': float(steps),
    },
    compiled=_compiled(
      data.architecture,
      data.task.num_outputs,
      data.task.is_regression,
      method,
      # These are no part of what is compiled: a search over learning rates, or
      # another task, compiles nothing anew.
      dataclasses.replace(
        hyper,
        learning_rate=1.0,
        warmup_fraction=0.0,
        epochs=1,
        batch_size=1,
        max_length=1,
      ),
      mesh,
      settings.micro_batches,
      settings.clip_global_norm,
    ),
  )


@functools.cache
def _compiled(
  architecture: roberta.RobertaConfig,
  num_outputs: int,
  is_regression: bool,
  method: str,
  hyper: methods.Hyperparameters,
  mesh: jax.sharding.Mesh,
  micro_batches: int,
  clip_global_norm: float | None,
) -> Compiled:
  """The functions of a method; they compile when they are first used."""
  model = roberta.make_classifier(architecture, num_outputs)
  adapter = _adapter(method, hyper)
  tx, _ = _optimizer(method, hyper)
  frozen, trainable = _abstract_parts(model, adapter, mesh)
  abstract = state.abstract(
    lambda key: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), trainable),
    tx,
    jax.random.key(0),
    mesh,
  )
  apply = model.apply
  if adapter is not None:
    apply = adapters.adapted(adapter, model.apply)
  train_step = step.make_train_step(
    functools.partial(classifier_loss, apply, is_regression),
    tx,
    num_micro_batches=micro_batches,
    clip_global_norm=clip_global_norm,
  )

  def start(params, rates):
    zero = jnp.zeros((), jnp.int32)
    opt_state = tx.init(params)._replace(hyperparams=rates)
    return state.TrainState(zero, zero, params, opt_state)

  def predict(params, batch, frozen):
    return apply(adapters.combine(frozen, params), batch['tokens'])

  return Compiled(
    model=model,
    adapter=adapter,
    mesh=mesh,
    abstract_state=abstract,
    abstract_frozen=frozen,
    start=jax.jit(start, out_shardings=state.shardings(abstract)),
    train_step=step.jit_train_step(train_step, abstract, mesh, frozen),
    predict=step.jit_eval_step(predict, abstract.params, mesh, frozen),
  )


def classifier_loss(
  apply: Any,
  is_regression: bool,
  params: Params,
  batch: step.Batch,
  frozen: Params,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of a batch's losses with dropout, and the sum of weights.

  Args:
    apply: Maps all parameters, tokens and a dropout key to outputs.
    is_regression: Whether labels are numbers.
    params: The parameters that train.
    batch: A batch of `glue.batches`; its first seed decides the dropout.
    frozen: The other parameters.

  Returns:
    Two float32 scalars.
  """
  outputs = apply(
    adapters.combine(frozen, params), batch['tokens'], step.dropout_key(batch)
  )
  return _loss(is_regression)(outputs, batch['labels'], batch['weights'])


def _loss(is_regression: bool) -> Any:
  return losses.squared_error if is_regression else losses.cross_entropy


def learning_rate(
  count: jax.Array | int, peak: float, warmup: float, steps: float
) -> jax.Array:
  """Up to the peak if asked for, then linearly down to 0 after the last step.

  Args:
    count: Steps taken before this one.
    peak: The highest learning rate, which the last step of the rise has, and
      the first one after it.
    warmup: Steps of the rise.
    steps: Steps of the whole run.

  Returns:
    The learning rate, a float32 scalar.

  Note:
    The linear schedule of transformers rises from 0, so that with a warm-up its
    first step changes nothing. Without one the two are the same.
  """
  rise = (count + 1) / jnp.maximum(warmup, 1)
  fall = (steps - count) / jnp.maximum(steps - warmup, 1)
  return peak * jnp.clip(jnp.minimum(rise, fall), 0, 1)


def _adapter(
  method: str, hyper: methods.Hyperparameters
) -> adapters.AdapterConfig | None:
  kind = methods.get_method(method).adapter
  if kind is None:
    return None
  return adapters.AdapterConfig(
    kind=kind,
    rank=hyper.rank,
    alpha=hyper.adapter_alpha,
    dropout=hyper.adapter_dropout,
  )


def _optimizer(
  method: str, hyper: methods.Hyperparameters
) -> tuple[optax.GradientTransformation, tuple[tuple[str, str], ...]]:
  """The optimizer of a method, and the label rules it was built with.

  The arguments of its schedule are numbers in its state.
  """
  chosen = methods.get_method(method)
  rules: tuple[tuple[str, str], ...] = (('.*', 'full'),)
  options: dict[str, Any] = {}
  if chosen.is_projected:
    rules = roberta.LABEL_RULES
    options = {
      'rank': hyper.rank,
      'update_proj_gap': hyper.update_proj_gap,
      'scale': hyper.scale,
    }
    if chosen.adapter is not None:
      rules = ((r'/lora_[ab]$', 'low_rank'), ('.*', 'full'))
      options['side'] = 'both'
  accepted = inspect.signature(getattr(optim, chosen.optimizer)).parameters
  config = OptimConfig(
    name=chosen.optimizer,
    weight_decay=hyper.weight_decay,
    **{name: value for name, value in options.items() if name in accepted},
  )

  def make(peak, warmup, steps):
    schedule = functools.partial(
      learning_rate, peak=peak, warmup=warmup, steps=steps
    )
    return build.optimizer(config, schedule, rules)

  inject = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
  return inject(peak=0.0, warmup=0.0, steps=1.0), rules


def _part(
  adapter: adapters.AdapterConfig | None, params: Params, key: jax.Array
) -> tuple[Params, Params]:
  """Parameters as those that stay and those that train, adapters drawn."""
  if adapter is None:
    return {}, params
  frozen, own = adapters.split(params, _is_trained_beside_adapters)
  return frozen, adapters.combine(own, adapters.init(adapter, params, key))


def _is_trained_beside_adapters(path: str) -> bool:
  return path.startswith('classifier/')


def _abstract_parts(
  model: roberta.Model,
  adapter: adapters.AdapterConfig | None,
  mesh: jax.sharding.Mesh,
) -> tuple[Params, Params]:
  """Shapes of what stays and of what trains, in their shardings."""

  def init(key: jax.Array) -> tuple[Params, Params]:
    return _part(adapter, model.init(key), key)

  frozen, trainable = jax.eval_shape(init, jax.random.key(0))
  shardings = sharding.infer_shardings({'params': frozen}, mesh)['params']
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
    frozen,
    shardings,
  ), trainable


def make_run(parts: Program, seed: int) -> Run:
  """A run of a program, and the settings it must not change."""
  settings, hyper = parts.settings, parts.hyper
  model = dataclasses.asdict(parts.data.architecture)
  del model['remat']
  folder = (
    pathlib.Path(settings.run_dir)
    / parts.data.task.name
    / parts.method
    / f'lr{hyper.learning_rate:g}_seed{seed}'
  )
  metadata = {
    'task': parts.data.task.name,
    'method': parts.method,
    'seed': seed,
    **dataclasses.asdict(hyper),
    'max_length': parts.data.max_length,
    'steps': parts.steps,
    'eval_every': eval_every(parts),
    'micro_batches': settings.micro_batches,
    'clip_global_norm': settings.clip_global_norm,
    'model': settings.model,
    **{f'model.{name}': value for name, value in model.items()},
    'examples': parts.data.fingerprint,
    'tokenizer': parts.data.tokenizer.fingerprint,
  }
  return Run(parts, seed, folder, metadata)


def eval_every(parts: Program) -> int:
  """Steps between two evaluations."""
  return parts.settings.eval_every or parts.steps_per_epoch


def new_state(run: Run) -> tuple[state.TrainState, Params]:
  """The state at step 0 and the frozen parameters, in their shardings."""
  parts = run.program
  params = starting_params(run)
  key = jax.random.fold_in(jax.random.key(run.seed), 1)
  frozen, trainable = _part(parts.compiled.adapter, params, key)
  compiled = parts.compiled
  rates = {name: jnp.float32(value) for name, value in parts.rates.items()}
  return (
    compiled.start(_place(trainable, compiled.abstract_state.params), rates),
    _place(frozen, compiled.abstract_frozen),
  )


def frozen_params(run: Run) -> Params:
  """The frozen parameters alone, for a run that goes on."""
  parts = run.program
  if parts.compiled.adapter is None:
    return {}
  frozen, _ = adapters.split(starting_params(run), _is_trained_beside_adapters)
  return _place(frozen, parts.compiled.abstract_frozen)


def starting_params(run: Run) -> Params:
  """All parameters before training: the folder's, or random ones."""
  parts, settings = run.program, run.program.settings
  key = jax.random.key(run.seed)
  if settings.model is None or not pathlib.Path(settings.model).is_dir():
    return jax.jit(parts.compiled.model.init)(key)
  return roberta.load_classifier(
    settings.model,
    parts.data.architecture,
    parts.data.task.num_outputs,
    key,
  )


def _place(tree: Params, like: Params) -> Params:
  return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))


def train_batches(run: Run, number: int) -> Iterator[dict[str, np.ndarray]]:
  """The batches after the first `number` ones, epoch after epoch."""
  parts = run.program
  epoch, start = divmod(number, parts.steps_per_epoch)
  while True:
    yield from glue.batches(
      parts.data.train.encoded,
      parts.data.train.labels,
      batch_size=parts.hyper.batch_size,
      pad_id=parts.data.architecture.pad_id,
      buckets=parts.data.buckets,
      seed=run.seed,
      epoch=epoch,
      shuffle=True,
      start=start,
    )
    epoch, start = epoch + 1, 0


def outputs_of(
  parts: Program, params: Params, frozen: Params, split: finetune_data.Split
) -> np.ndarray:
  """What a model says about every example of a split, ``[N, C]`` float32."""
  size = parts.compiled.mesh.size * math.ceil(
    parts.settings.eval_batch_size / parts.compiled.mesh.size
  )
  outputs = np.zeros(
    (len(split.encoded), parts.data.task.num_outputs), np.float32
  )
  waiting: collections.deque[tuple[np.ndarray, jax.Array]] = collections.deque()

  def collect() -> None:
    index_B, values_BC = waiting.popleft()
    is_example = index_B >= 0
    outputs[index_B[is_example]] = np.asarray(values_BC)[is_example]

  for batch in glue.batches(
    split.encoded,
    None,
    batch_size=size,
    pad_id=parts.data.architecture.pad_id,
    buckets=parts.data.buckets,
    shuffle=False,
  ):
    placed = sharding.put_batch(
      {'tokens': batch['tokens']}, parts.compiled.mesh
    )
    waiting.append(
      (batch['index'], parts.compiled.predict(params, placed, frozen))
    )
    if len(waiting) > 2:  # The device has work while one is fetched.
      collect()
  while waiting:
    collect()
  return outputs


def evaluate(
  parts: Program, params: Params, frozen: Params
) -> dict[str, float]:
  """Mean loss on the dev set, and all metrics of the task.

  Args:
    parts: The program.
    params: The parameters that train.
    frozen: The others.

  Returns:
    ``loss`` and the metrics, those of every evaluated split; NaN where one is
    not defined or the model diverged.
  """
  task = parts.data.task
  metrics = {}
  for name, split in parts.data.evaluated.items():
    outputs = outputs_of(parts, params, frozen, split)
    if name == 'dev':
      loss_sum, weight_sum = _loss(task.is_regression)(
        outputs, split.labels, np.ones(len(outputs), np.float32)
      )
      metrics['loss'] = float(loss_sum / weight_sum)
    metrics |= glue.scores(task, outputs, split.labels, name)
  return metrics


def export(run: Run, params: Params, frozen: Params) -> None:
  """Writes the model as a Hugging Face folder, adapters merged."""
  parts, folder = run.program, run.folder / 'hf'
  params = adapters.combine(frozen, params)
  if parts.compiled.adapter is not None:
    params = adapters.merge(parts.compiled.adapter, params)
  shutil.rmtree(folder, ignore_errors=True)
  data = parts.data
  roberta.export_classifier(folder, data.architecture, params, data.task.labels)
  data.tokenizer.save(folder)


def write_predictions(run: Run, params: Params, frozen: Params) -> None:
  """Writes the predictions of the test splits, as GLUE's server takes them."""
  parts = run.program
  for name, split in parts.data.predicted.items():
    outputs = outputs_of(parts, params, frozen, split)
    if not np.isfinite(outputs).all():
      _logger.warning('%s diverged: no predictions of %s.', run.name, name)
      continue
    glue.write_submission(
      parts.data.task, run.folder / 'predictions', name, split.ids, outputs
    )


def describe(run: Run) -> Result:
  """What a run's result says besides what came out of it."""
  parts = run.program
  trainable = parts.compiled.abstract_state.params
  return {
    'task': parts.data.task.name,
    'method': parts.method,
    'learning_rate': parts.hyper.learning_rate,
    'seed': run.seed,
    'main_metric': parts.data.task.main_metric,
    'steps': parts.steps,
    'epochs': parts.steps / parts.steps_per_epoch,
    'train_examples': len(parts.data.train.encoded),
    'trainable_parameters': _count(trainable),
    'parameters': _count(trainable) + _count(parts.compiled.abstract_frozen),
    'optimizer_state_bytes': tree_bytes(
      parts.compiled.abstract_state.opt_state
    ),
    'device': jax.devices()[0].device_kind,
    'num_devices': parts.compiled.mesh.size,
    'versions': {
      'python': platform.python_version(),
      **{
        name: importlib.metadata.version(name)
        for name in ('jax', 'flax', 'optax', 'numpy')
      },
    },
    'settings': run.metadata,
  }


def _count(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def dry_run(settings: FinetuneConfig) -> str:
  """What every method would do with every parameter; trains nothing.

  Args:
    settings: The settings.

  Returns:
    A table per task and method.

  Raises:
    ValueError: As `find_tasks` and `architecture`.
  """
  config = finetune_data.architecture(
    settings, finetune_data.load_tokenizer(settings)
  )
  parts = []
  for task in finetune_data.find_tasks(settings):
    model = roberta.make_classifier(config, task.num_outputs)
    for method in settings.method_names:
      hyper = settings.hyperparameters(task.name, method)
      adapter = _adapter(method, hyper)
      tx, rules = _optimizer(method, hyper)
      frozen, trainable = _abstract_parts(
        model, adapter, sharding.make_mesh(1, 1)
      )
      rows = optim.report(trainable, tx, rules)
      rows += [
        ReportRow(
          name=path_name(path),
          shape=leaf.shape,
          label='frozen',
          rank=None,
          side='',
          state_bytes=0,
          adamw_bytes=8 * math.prod(leaf.shape),
          reason='not trained: the adapters are',
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)
      ]
      numbers = ', '.join(
        f'{name} {value}' for name, value in dataclasses.asdict(hyper).items()
      )
      parts.append(
        f'{task.name}, {method}: trains {_count(trainable):,} of '
        f'{_count(trainable) + _count(frozen):,} parameters\n{numbers}\n'
        f'{optim.format_report(rows)}\n'
      )
  return '\n'.join(parts)
