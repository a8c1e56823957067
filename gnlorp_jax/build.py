"""The composition root: from a configuration to the parts of a run.

The only module that knows optimizers, models, data and training at once.
"""

import dataclasses
import functools
import inspect
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh

from gnlorp_jax import folders, models, optim
from gnlorp_jax.config import (
  DataConfig,
  MeshConfig,
  OptimConfig,
  TrainConfig,
)
from gnlorp_jax.data import batches, masking, text
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.models import hf, llama, roberta
from gnlorp_jax.training import (
  forward,
  layerwise,
  losses,
  objectives,
  parameters,
  sharding,
  state,
  step,
)

_logger = logging.getLogger(__name__)

# Fields of OptimConfig that are no arguments of an optimizer.
_OUTSIDE = {
  'name',
  'learning_rate',
  'warmup_fraction',
  'final_fraction',
  'solver',
  'stochastic_rounding',
  'clip_global_norm',
  'param_labels',
}
# Fields of a model's configuration that a run chooses for itself.
_DROPOUT = {'hidden_dropout', 'attention_dropout', 'classifier_dropout'}
# Fields of OptimConfig that decide what an optimizer's state holds.
_SHAPING = (
  'name',
  'rank',
  'update_proj_gap',
  'spread_refreshes',
  'projection',
  'granularity',
  'side',
  'basis_bits',
  'lazy_refresh',
  'moments_on_refresh',
  'error_bits',
  'weight_norm',
  'norm_state',
  'moment_bits',
  'stochastic_rounding',
)


Model = llama.Model | roberta.Model


class Program(NamedTuple):
  """What a run computes, before there is data or any array."""

  config: TrainConfig  # With the architecture that is really used.
  model: Model
  schedule: optax.Schedule
  tx: optax.GradientTransformation
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  loss_fn: step.LossFn
  abstract_state: state.TrainState
  abstract_batch: step.Batch
  train_step: Any  # Compiled: (state, batch) -> (state, metrics).
  eval_step: Any  # Compiled: (params, batch) -> (loss_sum, weight_sum).


class Run(NamedTuple):
  """Everything a training loop needs, built and checked."""

  config: TrainConfig  # With the architecture that is really used.
  model: Model
  tokenizer: tokenizers.Tokenizer
  schedule: optax.Schedule
  tx: optax.GradientTransformation
  mesh: jax.sharding.Mesh
  loss_fn: step.LossFn
  apply: Callable[[Any, jax.Array], jax.Array]  # Stored parameters to logits.
  train_step: Any  # As in `Program`.
  eval_step: Any
  train_batches: Any  # A grain iterator: next(), get_state(), set_state().
  eval_batches: Callable[[], Iterator[dict[str, np.ndarray]]]
  new_state: Callable[[], state.TrainState]
  abstract_state: state.TrainState
  metadata: dict[str, Any]  # What a checkpoint must agree with.


def build(config: TrainConfig) -> Run:
  """Builds a run; cheap checks come before slow work.

  Args:
    config: The configuration.

  Returns:
    The parts of the run. No parameter is allocated yet.

  Raises:
    ValueError: If parts of the configuration do not fit each other, the data
      or the devices.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f'This is one of {jax.process_count()} processes: train_lm.py runs in '
      'one, with all its devices.'
    )
  parts = program(config)
  config = parts.config
  tokenizer = load_tokenizer(config)
  check_tokenizer(config, tokenizer)
  train_file, validation_file = token_files(config.data, tokenizer)
  options = {
    'batch_size': config.batch_size,
    'seq_len': config.data.seq_len,
    'seed': config.seed,
    'masking': masking.Masking(tokenizer, config.mask_rate)
    if config.objective == 'masked'
    else None,
  }
  return Run(
    config=config,
    model=parts.model,
    tokenizer=tokenizer,
    schedule=parts.schedule,
    tx=parts.tx,
    mesh=parts.mesh,
    loss_fn=parts.loss_fn,
    apply=stored_apply(config, parts.model),
    train_step=parts.train_step,
    eval_step=parts.eval_step,
    train_batches=batches.batches(train_file, **options),
    eval_batches=lambda: batches.batches(
      validation_file, shuffle=False, repeat=False, **options
    ),
    new_state=functools.partial(new_state, parts),
    abstract_state=parts.abstract_state,
    metadata=_metadata(config, tokenizer, train_file),
  )


def program(
  config: TrainConfig, devices: Sequence[jax.Device] | int | None = None
) -> Program:
  """Builds what a run computes; reads no data, allocates nothing.

  Args:
    config: The configuration.
    devices: The devices to compile for, real or described; None means all of
      this process. A number is enough for shapes and shardings, but such a
      program cannot be compiled.

  Returns:
    The parts of a run that follow from its configuration alone.

  Raises:
    ValueError: If parts of the configuration do not fit each other or the
      devices.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=devices)
  sharding.check_batch(config.batch_size, config.micro_batches, mesh)
  config = dataclasses.replace(config, model=architecture(config))
  model = models.family(config.model).make(config.model, _first_device(mesh))
  schedule = learning_rate_schedule(config.optim, config.steps)
  tx = optimizer(config.optim, schedule, labels_of(config))
  abstract = state.abstract(
    _init_fn(config, model),
    _on_stored(config, tx),
    jax.random.key(config.seed),
    mesh,
  )
  loss_fn, train_step = _steps(config, model, tx, mesh, abstract.params)
  return Program(
    config=config,
    model=model,
    schedule=schedule,
    tx=tx,
    mesh=mesh,
    loss_fn=loss_fn,
    abstract_state=abstract,
    abstract_batch=_abstract_batch(config, mesh),
    train_step=step.jit_train_step(train_step, abstract, mesh),
    eval_step=step.jit_eval_step(
      step.make_eval_step(loss_fn), abstract.params, mesh
    ),
  )


def _steps(
  config: TrainConfig,
  model: Model,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  params: Any,
) -> tuple[step.LossFn, layerwise.TrainStep]:
  """The loss and the training step of the configured mode."""
  options = {
    'num_micro_batches': config.micro_batches,
    'clip_global_norm': config.optim.clip_global_norm,
  }
  if config.step.mode == 'whole':
    loss_fn = functools.partial(
      language_model_loss, model, config.loss_chunk_tokens
    )
    training_loss = loss_fn
    if config.objective == 'masked':
      training_loss = functools.partial(loss_fn, dropout=True)
    return loss_fn, step.make_train_step(training_loss, tx, **options)
  pieces = layer_pieces(model, config.loss_chunk_tokens)
  stored = stored_parameters(config, params)
  train_step = layerwise.make_train_step(
    pieces,
    tx,
    stored,
    clipping=config.step.clipping,
    accumulate=config.step.accumulate,
    mesh=mesh,
    offload=config.step.offload,
    # Adafactor's rows are not independent. Split matrices are cut already.
    row_blocks=config.optim.name != 'galore_adafactor'
    and config.mesh.fsdp == 1,
    **options,
  )
  evaluated = forward.on_stored(with_keys(model), stored.decode)
  objective = objectives.language_model(evaluated, config.loss_chunk_tokens)
  return objective.evaluate, train_step


def with_keys(model: Model) -> Any:
  """The model with functions that all take a dropout key, and a mask."""
  fns = model.layer_fns
  if hasattr(fns, 'mask'):
    return model

  def without(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(params: Any, x: jax.Array, key: jax.Array | None = None) -> Any:
      return fn(params, x) if key is None else fn(params, x, key)

    return call

  class LayerFns(NamedTuple):
    embed: Any
    block: Any
    head: Any
    mask: Any

  return model._replace(
    hidden=without(model.hidden),
    apply=without(model.apply),
    layer_fns=LayerFns(
      embed=without(fns.embed),
      block=lambda layer, x_BTD, mask_BT, key: fns.block(layer, x_BTD),
      head=without(fns.head),
      mask=lambda tokens_BT: None,
    ),
  )


def layer_pieces(model: Model, chunk_tokens: int) -> objectives.Pieces:
  """The model in the pieces that a step goes through layer by layer."""
  return objectives.language_model(with_keys(model), chunk_tokens).pieces


class Storage(NamedTuple):
  """How the parameters of the blocks are stored, see `Parameters`."""

  load: Callable[[Any], Any]
  load_exact: Callable[[Any], Any]
  store: Callable[[Any, Any, jax.Array, jax.Array | int], Any]


PLAIN = Storage(
  parameters.unchanged, parameters.unchanged, parameters.cast_like
)


def stored_parameters(config: TrainConfig, params: Any) -> Any:
  """The parameters as a layer-wise step takes them; all of them train."""
  storage = weight_storage(config)
  return parameters.plain(params)._replace(
    decode=storage.load, decode_exact=storage.load_exact, store=storage.store
  )


def weight_storage(config: TrainConfig) -> Storage:
  """How the parameters of the blocks are kept between their uses."""
  if config.step.weight_bits is None:
    return PLAIN

  def store(
    new: Any, old: Any, number: jax.Array, first: jax.Array | int
  ) -> Any:
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    key = jax.random.fold_in(key, first)
    return optim.quantized_weights.requantize_weights(new, old, key)

  def load(dtype: Any) -> Callable[[Any], Any]:
    return lambda tree: optim.quantized_weights.dequantize_weights(tree, dtype)

  return Storage(load(config.model.compute_dtype), load('float32'), store)


def stored_apply(
  config: TrainConfig, model: Model
) -> Callable[[Any, jax.Array], jax.Array]:
  """`model.apply` for parameters as they are stored, loaded layer by layer."""
  if config.step.weight_bits is None:
    return model.apply
  load = weight_storage(config).load
  return forward.on_stored(with_keys(model), load).apply


def _init_fn(config: TrainConfig, model: Model) -> Callable[[jax.Array], Any]:
  """Makes the parameters as they are stored, one layer after the other."""
  if config.step.weight_bits is None:
    return model.init
  single = models.family(config.model).make(
    dataclasses.replace(config.model, num_layers=1)
  )

  def layer(key: jax.Array) -> Any:
    stored = optim.quantized_weights.quantize_weights(
      single.init(key)['layers']
    )
    return jax.tree.map(lambda x: x[0], stored)

  def init(key: jax.Array) -> Any:
    keys_L = jax.random.split(
      jax.random.fold_in(key, 1), config.model.num_layers
    )
    # What is around the layers is as in `model.init`. Of the layer that comes
    # with it, nothing is left by the compiler.
    around = single.init(key)
    return {**around, 'layers': jax.lax.map(layer, keys_L)}

  return init


def _on_stored(
  config: TrainConfig, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The optimizer with an `init` that takes parameters as they are stored."""
  storage = weight_storage(config)

  def init(params: Any) -> Any:
    return tx.init({**params, 'layers': storage.load_exact(params['layers'])})

  return optax.GradientTransformation(init, tx.update)


def _first_device(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> jax.Device | None:
  """A device of the mesh, if there are any."""
  return None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]


def _abstract_batch(
  config: TrainConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a batch."""
  batch, seq_len = config.batch_size, config.data.seq_len
  guessed = (batch, seq_len)
  shapes = {'inputs': ((batch, seq_len), np.int32)}
  if config.objective == 'masked':
    guessed = (batch, masking.num_predictions(config.mask_rate, seq_len))
    shapes['positions'] = (guessed, np.int32)
    shapes['seeds'] = ((batch,), np.uint32)
  shapes['targets'] = (guessed, np.int32)
  shapes['weights'] = (guessed, np.float32)
  return {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in shapes.items()
  }


def dry_run(config: TrainConfig) -> list[optim.inspect.ReportRow]:
  """What would happen to every parameter; reads no data, allocates nothing."""
  # What it reports is the same on any number of devices.
  parts = program(dataclasses.replace(config, mesh=MeshConfig(data=1)), 1)
  shapes = jax.eval_shape(parts.model.init, jax.random.key(config.seed))
  return optim.report(shapes, parts.tx, labels_of(config))


def labels_of(config: TrainConfig) -> tuple[tuple[str, str], ...]:
  """The label rules: those of the configuration, or the model's own."""
  own = models.family(config.model).LABEL_RULES
  return config.optim.param_labels or own


def architecture(config: TrainConfig) -> models.Config:
  """The model's configuration: as given, or that of the folder to start from.

  Raises:
    ValueError: If the folder holds no model of that kind, or its sequences are
      too short.
  """
  if config.init_from is None:
    return config.model
  family = models.family(config.model)
  found = family.config_from_hf(hf.load_config(config.init_from))
  if config.data.seq_len > found.max_seq_len:
    raise ValueError(
      f'data.seq_len={config.data.seq_len} is longer than the model in '
      f'{config.init_from} accepts: max_seq_len={found.max_seq_len}. Lower it.'
    )
  kept = {'param_dtype', 'compute_dtype', 'remat'} | _DROPOUT
  kept &= {field.name for field in dataclasses.fields(found)}
  return dataclasses.replace(
    found, **{name: getattr(config.model, name) for name in kept}
  )


def learning_rate_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Linear warm-up, then a cosine down to a share of the peak.

  The first update already has ``peak / warmup`` (a schedule that starts at 0
  would waste a step); the last one has ``final_fraction * peak``.
  """
  warmup = max(round(config.warmup_fraction * steps), 1)
  peak = config.learning_rate
  return optax.join_schedules(
    [
      optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)),
      optax.cosine_decay_schedule(
        peak, max(steps - warmup - 1, 1), config.final_fraction
      ),
    ],
    [warmup],
  )


def optimizer(
  config: OptimConfig,
  schedule: optax.Schedule,
  param_labels: tuple[tuple[str, str], ...],
) -> optax.GradientTransformation:
  """The optimizer by its name; the training step clips for it.

  An option that the optimizer has no use for is named in a warning.
  """
  alias = getattr(optim, config.name)
  accepted = inspect.signature(alias).parameters
  options = _options(config)
  if config.solver is not None:
    own = accepted['projection'].default if 'projection' in accepted else None
    if (config.projection or own) == 'svd':
      options['projection'] = optim.projections.get('svd', solver=config.solver)
    else:
      options['solver'] = config.solver  # Named below: without effect.
  for name in sorted(set(options) - set(accepted)):
    value = options.pop(name)
    # A run's default rank is not the optimizer's: neither was asked for.
    defaults = (getattr(c, name) for c in (OptimConfig(), TrainConfig().optim))
    if value not in defaults:
      _logger.warning(
        'optim.%s=%r has no effect with optim.name=%r.',
        name,
        getattr(config, name),
        config.name,
      )
  # The training step leaves out bad steps itself.
  tx = alias(
    schedule, param_labels=param_labels, skip_nonfinite=False, **options
  )
  if config.stochastic_rounding:
    tx = optim.split.chain(tx, optim.stochastic_rounding())
  return tx


def _options(config: OptimConfig) -> dict[str, Any]:
  """The arguments of an optimizer that a configuration names."""
  options = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _OUTSIDE and getattr(config, field.name) is not None
  }
  if config.lazy_refresh is not None:
    options['lazy_refresh'] = None
    if config.lazy_refresh != 'never':
      options['lazy_refresh'] = optim.LazyRefresh(
        similarity=config.lazy_refresh
      )
  if config.error_bits == 0:
    options['error_bits'] = None
  return options


def load_tokenizer(config: TrainConfig) -> tokenizers.Tokenizer:
  """The tokenizer; a BPE is trained as large as the model's vocabulary.

  A model that `init_from` loads knows its own tokens: unless another tokenizer
  is named, the folder's is used.

  Raises:
    ValueError: If the folder to start from has no tokenizer and none is named.
  """
  spec = config.data.tokenizer
  if config.init_from is not None and spec == 'bpe':
    if not (pathlib.Path(config.init_from) / 'tokenizer.json').is_file():
      raise ValueError(
        f'{config.init_from} has no tokenizer.json, and its weights fit no '
        'other tokens: name the tokenizer as data.tokenizer.'
      )
    spec = config.init_from
  return tokenizers.load(
    spec,
    source=config.data.source,
    vocab_size=config.model.vocab_size,
    cache_dir=pathlib.Path(config.data.cache_dir).expanduser(),
    masked=config.objective == 'masked',
  )


def check_tokenizer(
  config: TrainConfig, tokenizer: tokenizers.Tokenizer
) -> None:
  """Checks that the model fits the tokenizer.

  Raises:
    ValueError: If the model lacks an embedding for an id, or takes another id
      for padding.
  """
  text.check_vocab(tokenizer.vocab_size, config.model.vocab_size)
  if config.objective == 'masked' and tokenizer.pad_id != config.model.pad_id:
    raise ValueError(
      f'The tokenizer pads with id {tokenizer.pad_id}, the model with '
      f'model.pad_id={config.model.pad_id}. Set the latter to the former.'
    )


def token_files(
  config: DataConfig, tokenizer: tokenizers.Tokenizer
) -> tuple[text.TokenFile, text.TokenFile]:
  """Training and validation tokens."""
  prepare = functools.partial(
    text.prepare,
    tokenizer=tokenizer,
    mode=config.mode,
    seq_len=config.seq_len if config.mode == 'padded' else None,
    cache_dir=pathlib.Path(config.cache_dir).expanduser(),
  )
  train_file = prepare(config.source)
  if config.validation_source is None:
    return text.split(train_file, config.validation_fraction)
  return train_file, prepare(config.validation_source)


def language_model_loss(
  model: Model,
  chunk_tokens: int,
  params: Any,
  batch: dict[str, jax.Array],
  *,
  dropout: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the losses of a batch's guesses, and the sum of weights."""
  # A LLaMA takes no key.
  key = (step.dropout_key(batch),) if dropout else ()
  x_BTD = model.hidden(params, batch['inputs'], *key)
  return _cross_entropy(
    functools.partial(model.logits, params), x_BTD, batch, chunk_tokens
  )


def _cross_entropy(
  logits_fn: Callable[[jax.Array], jax.Array],
  x_BTD: jax.Array,
  batch: dict[str, jax.Array],
  chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
  """The loss at all positions, or at those that the batch names."""
  if 'positions' in batch:
    x_BTD = jax.numpy.take_along_axis(
      x_BTD, batch['positions'][:, :, None], axis=1
    )
  return losses.chunked_cross_entropy(
    logits_fn,
    x_BTD,
    batch['targets'],
    batch['weights'],
    chunk_tokens=chunk_tokens,
  )


def new_state(parts: Program) -> state.TrainState:
  """The state at step 0, random or from `init_from`."""
  config, model, tx, mesh = parts.config, parts.model, parts.tx, parts.mesh
  if config.init_from is None:
    key = jax.random.key(config.seed)
    return state.create(
      _init_fn(config, model), _on_stored(config, tx), key, mesh
    )
  params = folders.load(config.init_from, config, mesh)
  return state.from_params(params, _on_stored(config, tx), mesh, copy=False)


def _metadata(
  config: TrainConfig,
  tokenizer: tokenizers.Tokenizer,
  train_file: text.TokenFile,
) -> dict[str, Any]:
  """What cannot change within a run: it decides shapes or the order of data."""
  model = dataclasses.asdict(config.model)
  free = {'compute_dtype', 'remat', 'initializer_std'} | _DROPOUT
  if config.objective == 'causal':  # No table of positions has that length.
    free.add('max_seq_len')
  model = {name: value for name, value in model.items() if name not in free}
  if config.objective == 'masked':
    model['mask_rate'] = config.mask_rate
  return {
    **model,
    **{f'optim.{name}': getattr(config.optim, name) for name in _SHAPING},
    'step.weight_bits': config.step.weight_bits,
    'data.source': config.data.source,
    'data.mode': config.data.mode,
    'data.seq_len': config.data.seq_len,
    'data.training_part': [train_file.start, train_file.stop],
    'data.tokens': train_file.tokens,
    'batch_size': config.batch_size,
    'seed': config.seed,
    'tokenizer': tokenizer.fingerprint,
  }
