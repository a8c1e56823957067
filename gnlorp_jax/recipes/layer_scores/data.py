"""What the model reads while its layers are measured.

Shape suffixes in this file:
  B, T  sequences of a batch, positions
  N     sequences
"""

import logging
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gnlorp_jax.data import chat, text
from gnlorp_jax.data.tokenizer import Tokenizer
from gnlorp_jax.recipes.layer_scores.settings import LayerScoresConfig

_logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class Sequences(NamedTuple):
  """Sequences to read.

  Attributes:
    batches: Dicts of ``inputs``, ``targets`` and ``weights`` as losses take
      them, and ``is_token``, bool ``[B, T]``: False in padding, and in rows
      that fill up the last batch. T may differ between batches.
    num_sequences: How many they are.
    num_tokens: How many tokens they have.
  """

  batches: list[Batch]
  num_sequences: int
  num_tokens: int


def load(
  config: LayerScoresConfig, tokenizer: Tokenizer, length: int, vocab_size: int
) -> Sequences:
  """Draws sequences.

  Args:
    config: The settings.
    tokenizer: The model's.
    length: Most tokens of a sequence.
    vocab_size: The model's ids are below it.

  Returns:
    The sequences, fewer than asked for where there are no more.

  Raises:
    ValueError: If a file is missing or damaged, there is no sequence, or one
      has a token that the model has not.
  """
  read = _text if config.format == 'text' else _conversations
  batches = list(read(config, tokenizer, length))
  count = sum(int(batch['is_token'].any(1).sum()) for batch in batches)
  if count < config.sequences:
    _logger.warning(
      'The data has %d sequences of the %d that were asked for: all are read.',
      *(count, config.sequences),
    )
  largest = max(int(batch['inputs'].max()) for batch in batches)
  if largest >= vocab_size:
    raise ValueError(
      f'The data has the token of id {largest}, and the model has those of '
      f'[0, {vocab_size}). Use the tokenizer and the template that the model '
      'was trained with.'
    )
  tokens = sum(int(batch['is_token'].sum()) for batch in batches)
  return Sequences(batches, count, tokens)


def _draw(config: LayerScoresConfig, available: int) -> np.ndarray:
  count = min(config.sequences, available)
  rng = np.random.default_rng(config.seed)
  return np.sort(rng.choice(available, count, replace=False))


def _text(
  config: LayerScoresConfig, tokenizer: Tokenizer, length: int
) -> Iterator[Batch]:
  file = text.prepare(
    config.data,
    tokenizer,
    cache_dir=pathlib.Path(config.cache_dir).expanduser(),
    add_bos=tokenizer.adds_bos,
    column=config.text_column,
  )
  available = file.num_sequences(length)
  if not available:
    raise ValueError(
      f'The data has {file.tokens} tokens; a sequence of length={length} needs '
      f'{length + 1}. Use more text or a smaller --length.'
    )
  items = file.items()
  windows = [
    items[start : start + length + 1]
    for start in _draw(config, available) * length
  ]
  for begin in range(0, len(windows), config.batch_size):
    found_NT = np.stack(windows[begin : begin + config.batch_size])
    missing = config.batch_size - len(found_NT)
    padding = (0, missing), (0, 0)
    window_BT = np.pad(found_NT.astype(np.int32), padding)
    is_token_BT = np.pad(np.ones((len(found_NT), length), bool), padding)
    yield {
      'inputs': window_BT[:, :-1],
      'targets': window_BT[:, 1:],
      'weights': is_token_BT.astype(np.float32),
      'is_token': is_token_BT,
    }


def _conversations(
  config: LayerScoresConfig, tokenizer: Tokenizer, length: int
) -> Iterator[Batch]:
  name = config.template
  if name is None:
    name = 'alpaca' if tokenizer.chat_template is None else 'tokenizer'
  prepared = chat.prepare(
    chat.read(config.data),
    chat.load_template(name, tokenizer),
    max_length=length,
    seed=config.seed,
  )
  examples = [
    prepared.training[number]
    for number in _draw(config, len(prepared.training))
  ]
  # The order that the batches would put them in anyway.
  examples.sort(key=lambda example: -len(example.ids))
  batches = chat.evaluation_batches(
    examples,
    batch_size=config.batch_size,
    max_length=length,
    packing=False,
    pad_id=tokenizer.pad_id,
  )
  sizes_N = np.array([len(example.ids) for example in examples])
  for number, batch in enumerate(batches):
    begin = number * config.batch_size
    sizes_B = sizes_N[begin : begin + config.batch_size]
    sizes_B = np.pad(sizes_B, (0, config.batch_size - len(sizes_B)))
    positions_T = np.arange(batch['inputs'].shape[1])
    is_token_BT = positions_T[None] < sizes_B[:, None]
    yield {**batch, 'is_token': is_token_BT}
