"""What GLUE fine-tuning learns from: tasks, examples, tokenizer and model.

Shapes only: of the model there is its configuration.
"""

import functools
import hashlib
import logging
from typing import Any, NamedTuple

import numpy as np

from gnlorp_jax.compose import parameters
from gnlorp_jax.data import glue, text
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.data.glue.batching import BUCKETS
from gnlorp_jax.models import roberta
from gnlorp_jax.recipes.glue.protocol import resolve
from gnlorp_jax.recipes.glue.settings import DEMO, GlueConfig

_logger = logging.getLogger(__name__)


class Split(NamedTuple):
  """Examples as token ids."""

  encoded: list[np.ndarray]
  labels: np.ndarray | None
  ids: list[str]


class TaskData(NamedTuple):
  """A task with its examples, tokenized for a model."""

  task: glue.Task
  tokenizer: tokenizers.Tokenizer
  architecture: roberta.RobertaConfig
  max_length: int
  train: Split
  evaluated: dict[str, Split]  # 'dev', and for MNLI 'dev_mismatched'.
  predicted: dict[str, Split]  # 'test' splits, where there are any.
  fingerprint: str  # Of all that is trained and evaluated on.

  @property
  def buckets(self) -> tuple[int, ...]:
    """The lengths of batches: few, as each is compiled."""
    shorter = (length for length in BUCKETS if length < self.max_length)
    return (*shorter, self.max_length)


def find_tasks(settings: GlueConfig) -> list[glue.Task]:
  """The tasks that were asked for and whose examples are there.

  Args:
    settings: The settings.

  Returns:
    The tasks. Of 'all', those without training or dev examples are left out,
    and named in a warning.

  Raises:
    ValueError: If a task is unknown, one that was named has no examples, or no
      task is left.
  """
  data = settings.data
  if settings.is_custom:
    labels = None
    if not data.regression:
      labels = glue.infer_labels(data.train, data.label_column)
    columns = tuple(word.strip() for word in data.text_columns.split(','))
    name = 'custom' if settings.task == DEMO else settings.task
    return [glue.custom_task(name, columns, data.label_column, labels)]
  if settings.task == DEMO:
    return [_demo()[0]]
  is_all = settings.task == 'all'
  names = glue.TASKS if is_all else settings.task_names
  tasks, absent = [], {}
  for task in map(glue.get_task, names):
    missing = [
      split
      for split in ('train', 'dev')
      if not glue.has_split(task, data.source, split)
    ]
    if missing:
      absent[task.name] = ' and '.join(missing)
    else:
      tasks.append(task)
  found = [task.name for task in tasks]
  reasons = ', '.join(f'{name} (no {split})' for name, split in absent.items())
  if absent and (not is_all or not tasks):
    fix = f'Name only {found}, or give' if found else 'Give'
    raise ValueError(
      f'{data.source} lacks examples of {reasons}. {fix} another data.source.'
    )
  if absent:
    _logger.warning(
      'Left out, as %s lacks their examples: %s. Tasks: %s.',
      *(data.source, reasons, ', '.join(found)),
    )
  return tasks


@functools.cache
def _demo() -> tuple[glue.Task, dict[str, glue.Examples]]:
  return glue.generated_task(0)


def load_tokenizer(settings: GlueConfig) -> tokenizers.Tokenizer:
  """The tokenizer: the one that is named, the model's, or the demo's.

  Raises:
    ValueError: If there is none.
  """
  if settings.tokenizer is not None:
    return tokenizers.load(settings.tokenizer)
  if settings.init_from is None:
    return tokenizers.Tokenizer(glue.generated_tokenizer())
  if not parameters.is_folder(settings.init_from):
    # A name that is no preset either is told first.
    parameters.architecture(settings.init_from, settings.model)
    raise ValueError(
      f'init_from={settings.init_from!r} is no folder that brings a '
      'tokenizer: name one as tokenizer, a tokenizer.json or a folder with one.'
    )
  return tokenizers.load(parameters.folder(settings.init_from, 'tokenizer'))


def architecture(
  settings: GlueConfig, tokenizer: tokenizers.Tokenizer | None
) -> roberta.RobertaConfig:
  """The model's configuration: as given, that of a folder, or of a preset.

  Args:
    settings: The settings.
    tokenizer: The tokenizer, whose vocabulary random weights are for; None
      leaves the vocabulary as it is.

  Raises:
    ValueError: If there is no such folder or preset, or the tokenizer does not
      fit the model.
  """
  overrides: dict[str, Any] = {}
  if tokenizer and not parameters.is_folder(settings.init_from):
    ids = tokenizer.backend.get_vocab(with_added_tokens=True).values()
    overrides = {'vocab_size': max(ids) + 1, 'pad_id': tokenizer.pad_id}
  if settings.dropout is not None:
    names = 'hidden_dropout', 'attention_dropout', 'classifier_dropout'
    overrides |= dict.fromkeys(names, settings.dropout)
  config = parameters.architecture(
    settings.init_from,
    settings.model,
    keep_dropout=settings.init_from is None,
    **overrides,
  )
  if tokenizer is None:
    return config
  text.check_vocab(tokenizer.vocab_size, config.vocab_size)
  if tokenizer.pad_id != config.pad_id:
    raise ValueError(
      f'The tokenizer pads with id {tokenizer.pad_id}, the model with '
      f'{config.pad_id}. Use the tokenizer that the model was trained with.'
    )
  return config


def load_task(settings: GlueConfig, task: glue.Task) -> TaskData:
  """Reads and tokenizes the examples of a task.

  Args:
    settings: The settings.
    task: One of `find_tasks`.

  Returns:
    The task with its examples.

  Raises:
    ValueError: If examples, tokenizer and model do not fit each other.
  """
  tokenizer = load_tokenizer(settings)
  config = architecture(settings, tokenizer)
  # The same for all methods.
  wanted = resolve(settings, task.name, settings.method_names[0]).max_length
  max_length = min(wanted, config.max_seq_len)
  if settings.max_length is not None and max_length < wanted:
    raise ValueError(
      f'max_length={wanted} is longer than the model takes: max_seq_len='
      f'{config.max_seq_len}. Lower it.'
    )

  def split(name: str, limit: int | None = None) -> Split:
    examples = _read(settings, task, name)
    labels = examples.labels
    examples = examples._replace(texts=examples.texts[:limit])
    encoded = glue.encode(examples, tokenizer.backend, max_length)
    text.check_known(tokenizer, encoded, f'the examples of {task.name}')
    # Those that it puts around a text, too.
    largest = max((int(ids.max()) for ids in encoded), default=0)
    text.check_vocab(largest + 1, config.vocab_size)
    labels = labels if labels is None else labels[:limit]
    return Split(encoded, labels, examples.ids[:limit])

  names = [name for name in task.splits if _has(settings, task, name)]
  train = split('train', settings.data.max_train_examples)
  evaluated = {
    name: split(name, settings.data.max_dev_examples)
    for name in names
    if name.startswith('dev')
  }
  return TaskData(
    task=task,
    tokenizer=tokenizer,
    architecture=config,
    max_length=max_length,
    train=train,
    evaluated=evaluated,
    predicted={n: split(n) for n in names if n.startswith('test')},
    fingerprint=_fingerprint(train, *evaluated.values()),
  )


def _read(settings: GlueConfig, task: glue.Task, split: str):
  if settings.is_custom:
    path = getattr(settings.data, split)
    return glue.read_file(path, task, needs_labels=split != 'test')
  if settings.task == DEMO:
    return _demo()[1][split]
  return glue.read(task, settings.data.source, split)


def _has(settings: GlueConfig, task: glue.Task, split: str) -> bool:
  if settings.is_custom:
    return getattr(settings.data, split) is not None
  if settings.task == DEMO:
    return True
  return glue.has_split(task, settings.data.source, split)


def _fingerprint(*splits: Split) -> str:
  digest = hashlib.sha256()
  for encoded, labels, _ in splits:
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    for array in (lengths, np.concatenate(encoded), labels):
      digest.update(array.tobytes())
  return digest.hexdigest()[:16]
