"""Byte-level BPE, trained on text."""

from collections.abc import Iterable, Iterator, Sequence

import tokenizers

CHARACTERS = 2**25
"""How much of a text is read: more does not change the frequent pieces."""

MOST_ENTRIES = 2**24
"""The library makes room for all of them at once, and aborts without it."""


def train(
  texts: Iterable[str], vocab_size: int, special: Sequence[str]
) -> tokenizers.Tokenizer:
  """Trains a tokenizer, the same one for the same texts.

  Args:
    texts: Documents, of which the first `CHARACTERS` characters are used.
    vocab_size: The most entries it may have.
    special: Its control tokens, which get the first ids.
  """
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(
    _first(texts, CHARACTERS),
    tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      min_frequency=2,
      special_tokens=list(special),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return backend


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
  for text in texts:
    yield text[:characters]
    characters -= len(text)
    if characters <= 0:
      return
