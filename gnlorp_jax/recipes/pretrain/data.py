"""Text to batches, as a pre-training run asks for it."""

import functools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gnlorp_jax import models
from gnlorp_jax.compose import parameters
from gnlorp_jax.compose.parameters import is_folder
from gnlorp_jax.data import batches, masking, mixture, sources, text
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from gnlorp_jax.training import sharding

logger = logging.getLogger(__name__)


class Text(NamedTuple):
  """What a run learns from and is evaluated on."""

  tokenizer: tokenizers.Tokenizer
  training: text.TokenFile | mixture.Mixture
  validation: text.TokenFile | mixture.Mixture

  def held_out(self) -> dict[str, text.TokenFile]:
    """Validation tokens by source; of one without a name it is empty."""
    if isinstance(self.validation, mixture.Mixture):
      return dict(zip(*self.validation, strict=True))
    return {'': self.validation}


def load(config: TrainConfig, model: models.Config) -> Text:
  """Reads or makes the tokenizer and the tokens.

  Args:
    config: The run.
    model: Its architecture.

  Raises:
    ValueError: If the folder to start from has no tokenizer and none is named,
      or the tokenizer does not fit the model.
  """
  # All of them, before any is read: that takes long.
  for source in filter(
    None, (config.data.source, config.data.validation_source)
  ):
    sources.fingerprint(mixture.without_names(source), config.data.text_column)
  tokenizer = load_tokenizer(config, model)
  check_tokenizer(tokenizer, model, masked=config.is_masked)
  if (
    is_folder(config.init_from)
    and tokenizer.adds_bos
    and not (config.is_masked or config.data.add_bos)
  ):
    logger.warning(
      'The tokenizer begins every text with %r, and so, most likely, did the '
      'texts that the model in %s learned from; with data.add_bos=False the '
      'documents of this run do not.',
      tokenizer.backend.id_to_token(tokenizer.bos_id),
      config.init_from,
    )
  return Text(tokenizer, *token_files(config.data, tokenizer))


def load_tokenizer(
  config: TrainConfig, model: models.Config
) -> tokenizers.Tokenizer:
  """The tokenizer; a BPE is trained as large as the model's vocabulary.

  A model that `init_from` loads knows its own tokens: unless another tokenizer
  is named, the folder's is used.

  Raises:
    ValueError: If the folder to start from has no tokenizer and none is named.
  """
  spec = config.data.tokenizer
  if is_folder(config.init_from) and spec == 'bpe':
    spec = parameters.folder(config.init_from, 'tokenizer')
    if not (pathlib.Path(spec) / 'tokenizer.json').is_file():
      raise ValueError(
        f'{config.init_from} has no tokenizer.json, and its weights fit no '
        'other tokens: name the tokenizer as data.tokenizer.'
      )
  return tokenizers.load(
    spec,
    source=mixture.without_names(config.data.source),
    vocab_size=model.vocab_size,
    cache_dir=pathlib.Path(config.data.cache_dir).expanduser(),
    masked=config.is_masked,
    column=config.data.text_column,
  )


def check_tokenizer(
  tokenizer: tokenizers.Tokenizer, model: models.Config, *, masked: bool
) -> None:
  """Checks that the model fits the tokenizer.

  Raises:
    ValueError: If the model lacks an embedding for an id, or takes another id
      for padding.
  """
  text.check_vocab(tokenizer.vocab_size, model.vocab_size)
  if masked and tokenizer.pad_id != model.pad_id:
    raise ValueError(
      f'The tokenizer pads with id {tokenizer.pad_id}, the model with '
      f'model.pad_id={model.pad_id}. Set the latter to the former.'
    )


def token_files(
  config: DataConfig, tokenizer: tokenizers.Tokenizer
) -> tuple[text.TokenFile | mixture.Mixture, text.TokenFile | mixture.Mixture]:
  """Training and validation tokens, of named sources a mixture.

  Without a `validation_source` the end of every source is held out.
  """
  prepare = functools.partial(
    text.prepare,
    tokenizer=tokenizer,
    mode=config.mode,
    seq_len=config.seq_len if config.mode == 'padded' else None,
    cache_dir=pathlib.Path(config.cache_dir).expanduser(),
    add_bos=config.add_bos,
    column=config.text_column,
  )

  def mixed(source: str) -> text.TokenFile | mixture.Mixture:
    named = mixture.parse(source)
    if not named:
      return prepare(source)
    return mixture.Mixture(tuple(named), tuple(map(prepare, named.values())))

  found = mixed(config.source)
  if config.validation_source is not None:
    return found, mixed(config.validation_source)
  if not isinstance(found, mixture.Mixture):
    return text.split(found, config.validation_fraction)
  parts = [text.split(f, config.validation_fraction) for f in found.files]
  training, validation = zip(*parts, strict=True)
  return found._replace(files=training), found._replace(files=validation)


def training_batches(
  config: TrainConfig, data: Text, mesh: Mesh | None = None
) -> Any:
  """A grain iterator: next(), get_state(), set_state(); it gives pools.

  Args:
    config: The run.
    data: Its text.
    mesh: Of each batch there are the rows that it gives this process; None:
      all.
  """
  options = _options(config, data, mesh)
  options['batch_size'] = config.coreset.rows_per_step(config.batch_size)
  return batches.batches(
    data.training,
    with_seeds=has_dropout(config) and not config.is_masked,
    **options,
  )


def rows_by_source(config: TrainConfig, data: Text) -> dict[str, int]:
  """Training rows of each named source; empty without names."""
  if not isinstance(data.training, mixture.Mixture):
    return {}
  length = config.data.seq_len - 2 * config.is_masked
  sizes = data.training.sizes(length)
  return dict(zip(data.training.names, sizes, strict=True))


def evaluation_batches(
  config: TrainConfig,
  data: Text,
  mesh: Mesh | None = None,
  tokens: text.TokenFile | None = None,
) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
  """Makes an iterator over the validation text, each sequence once.

  Args:
    config: The run.
    data: Its text.
    mesh: As of `training_batches`.
    tokens: One of `Text.held_out`; None: all of it.
  """
  return lambda: batches.batches(
    tokens or data.validation,
    shuffle=False,
    repeat=False,
    **_options(config, data, mesh),
  )


def _options(
  config: TrainConfig, data: Text, mesh: Mesh | None
) -> dict[str, Any]:
  mask = None
  index, count = (0, 1) if mesh is None else sharding.process_share(mesh)
  if config.is_masked:
    mask = masking.Masking(data.tokenizer, config.mask_rate)
  return {
    'batch_size': config.batch_size,
    'seq_len': config.data.seq_len,
    'seed': config.seed,
    'masking': mask,
    'document_mask': config.data.document_mask,
    'process_index': index,
    'process_count': count,
  }


def abstract_batch(
  config: TrainConfig, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a batch."""
  batch, seq_len = config.batch_size, config.data.seq_len
  guessed = (batch, seq_len)
  shapes = {'inputs': ((batch, seq_len), np.int32)}
  if config.is_masked:
    guessed = (batch, masking.num_predictions(config.mask_rate, seq_len))
    shapes['positions'] = (guessed, np.int32)
    shapes['seeds'] = ((batch,), np.uint32)
  elif has_dropout(config):
    shapes['seeds'] = ((batch,), np.uint32)
  if mixture.parse(config.data.source) and not config.coreset.is_on:
    shapes['source'] = ((batch,), np.int32)
  if config.data.document_mask:
    shapes['segments'] = ((batch, seq_len), np.int32)
  shapes['targets'] = (guessed, np.int32)
  shapes['weights'] = (guessed, np.float32)
  return {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in shapes.items()
  }


def has_dropout(config: TrainConfig) -> bool:
  """Whether training drops features of a causal model: an adapter's inputs."""
  return config.adapter.kind is not None and bool(config.adapter.dropout)
