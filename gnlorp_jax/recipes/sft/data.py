"""Conversations to batches, as an instruction-tuning run asks for them."""

import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from gnlorp_jax.compose import parameters
from gnlorp_jax.data import chat, text
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.data.chat import demo
from gnlorp_jax.recipes.sft.settings import DEMO, SftConfig
from gnlorp_jax.training import sharding

_logger = logging.getLogger(__name__)


class Chat(NamedTuple):
  """What a run learns from and is evaluated on."""

  tokenizer: tokenizers.Tokenizer
  template: chat.Template
  examples: chat.Prepared


def load_tokenizer(config: SftConfig) -> tokenizers.Tokenizer:
  """The tokenizer of the model, the one that is named, or that of the demo.

  Raises:
    ValueError: If there is none.
  """
  if config.data.tokenizer is not None:
    return tokenizers.load(config.data.tokenizer)
  if config.init_from is None:
    return demo.tokenizer()
  if not parameters.is_folder(config.init_from):
    raise ValueError(
      f'init_from={config.init_from!r} is a preset, which has no tokenizer: '
      'name one as data.tokenizer.'
    )
  folder = parameters.folder(config.init_from, 'tokenizer')
  if not (pathlib.Path(folder) / 'tokenizer.json').is_file():
    raise ValueError(
      f'{config.init_from} has no tokenizer.json, and its weights fit no other '
      'tokens: name the tokenizer as data.tokenizer.'
    )
  return tokenizers.load(folder)


def load(config: SftConfig) -> Chat:
  """Reads the conversations and makes tokens of them.

  Args:
    config: The resolved settings of a run.

  Raises:
    ValueError: If a file is missing or damaged, the tokenizer does not fit the
      model, or nothing is left to train on.
  """
  settings = config.data
  if settings.source is None and not config.is_demo:
    raise ValueError(
      'No conversations are named for the model to learn: add --data FILE '
      '(data.source), or --data demo for generated instructions.'
    )
  tokenizer = load_tokenizer(config)
  text.check_vocab(tokenizer.vocab_size, config.model.vocab_size)
  template = load_template(settings.template, tokenizer)
  if settings.source in (None, DEMO):
    sources, held_out = ([one] for one in demo.sources(config.seed))
  else:
    sources, held_out = chat.read(settings.source), ()
    if settings.validation_source is not None:
      held_out = chat.read(settings.validation_source)
  examples = chat.prepare(
    sources,
    template,
    train_on=settings.train_on,
    max_length=settings.max_length,
    overflow=settings.overflow,
    val_size=0 if held_out else settings.val_size,
    validation=held_out,
    limit=settings.limit,
    seed=config.seed,
  )
  _check_ids(examples, template, config.model.vocab_size)
  text.check_known(
    tokenizer, (x.ids for x in examples.training), settings.source or DEMO
  )
  _tell(examples)
  return Chat(tokenizer, template, examples)


def _check_ids(
  examples: chat.Prepared, template: chat.Template, vocab_size: int
) -> None:
  """Raises ValueError if the model has no embedding of a control token."""
  largest = max(
    [
      *template.stop_ids,
      *(int(x.ids.max()) for x in (*examples.training, *examples.validation)),
    ]
  )
  if largest >= vocab_size:
    raise ValueError(
      f'The chat template writes the token of id {largest}, and the model has '
      f'those of [0, {vocab_size}). Use the tokenizer and the template that '
      'the model was trained with, or another data.template.'
    )


def _tell(examples: chat.Prepared) -> None:
  """Says what became of the records."""
  for name, counts in examples.report.items():
    facts = [f'{counts.read} records']
    if counts.examples:
      facts.append(
        f'{counts.examples} examples to train on ({counts.tokens} tokens, '
        f'{counts.trained_tokens} of them learned)'
      )
    for number, what in (
      (counts.validation, 'held out'),
      (counts.truncated, 'cut off'),
    ):
      if number:
        facts.append(f'{number} {what}')
    facts += [
      f'{number} left out: {reason}'
      for reason, number in (counts.skipped | counts.dropped).items()
    ]
    _logger.info('%s: %s.', name, ', '.join(facts))


def load_template(
  name: str | None, tokenizer: tokenizers.Tokenizer
) -> chat.Template:
  """The template of that name; None is the tokenizer's, or else alpaca's."""
  if name is None:
    name = 'alpaca' if tokenizer.chat_template is None else 'tokenizer'
    if name == 'alpaca':
      _logger.warning(
        'There is no chat template beside the tokenizer: conversations are put '
        "in the words of Alpaca. Name another as data.template: 'none' or a "
        'Jinja file.'
      )
  return chat.load_template(name, tokenizer)


def training_batches(
  config: SftConfig, data: Chat, mesh: Mesh | None = None
) -> chat.TrainingBatches:
  """An endless iterator with a position: get_state() and set_state().

  Args:
    config: The settings.
    data: The examples.
    mesh: Of each batch there are the rows that it gives this process; None:
      all.
  """
  options = _options(config, data, mesh)
  options['batch_size'] = config.coreset.rows_per_step(config.batch_size)
  return chat.TrainingBatches(
    data.examples.training,
    seed=config.seed,
    with_seeds=has_dropout(config),
    origins=data.examples.origins if config.coreset.is_on else None,
    **options,
  )


def evaluation_batches(
  config: SftConfig, data: Chat, mesh: Mesh | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """The validation examples, each once, in batches of a micro-batch.

  The arguments are those of `training_batches`.
  """
  options = _options(config, data, mesh)
  options['batch_size'] //= config.micro_batches
  return chat.evaluation_batches(data.examples.validation, **options)


def _options(
  config: SftConfig, data: Chat, mesh: Mesh | None
) -> dict[str, Any]:
  index, count = (0, 1) if mesh is None else sharding.process_share(mesh)
  return {
    'process_index': index,
    'process_count': count,
    'batch_size': config.batch_size,
    'max_length': config.data.max_length,
    'packing': config.data.packing,
    'pad_id': data.tokenizer.pad_id,
  }


def abstract_batch(
  config: SftConfig, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of the largest batch: all of it is learned."""
  rows = (config.batch_size, config.data.max_length)
  shapes = {'inputs': (rows, np.int32)}
  if has_dropout(config):
    shapes['seeds'] = (rows[:1], np.uint32)
  if config.data.packing:
    shapes['segments'] = (rows, np.int32)
  shapes |= {'targets': (rows, np.int32), 'weights': (rows, np.float32)}
  return {
    name: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in shapes.items()
  }


def has_dropout(config: SftConfig) -> bool:
  """Whether training drops features: an adapter's inputs."""
  return config.adapter.kind is not None and bool(config.adapter.dropout)
