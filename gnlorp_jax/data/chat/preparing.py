"""Conversations to the examples of a run, with a report of what became of them.

Shape suffixes: T tokens.
"""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from gnlorp_jax.data.chat.conversations import Conversation, SkippedError
from gnlorp_jax.data.chat.reading import Source
from gnlorp_jax.data.chat.templates import Example, Template, TrainOn

logger = logging.getLogger(__name__)

Overflow = Literal['truncate', 'drop', 'raise']

TOO_LONG, NOTHING = 'too long', 'nothing trained'


@dataclasses.dataclass
class Counts:
  """What became of the records of a source.

  Attributes:
    read: Records of its files.
    skipped: Left out while reading, by reason.
    dropped: Conversations left out when encoded, by reason.
    truncated: Examples that lost their end.
    validation: Examples held out.
    examples: Examples of an epoch, after its weight.
    tokens: Their tokens.
    trained_tokens: Those of them that count.
  """

  read: int = 0
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  truncated: int = 0
  validation: int = 0
  examples: int = 0
  tokens: int = 0
  trained_tokens: int = 0


class Prepared(NamedTuple):
  """What a run trains on, and what it is tried on.

  Attributes:
    training: Examples of an epoch; one of a source of weight 2 is there twice.
    validation: Examples held out, none of them in `training`.
    validation_conversations: What they were made from, in the same order.
    report: Counts by the names of sources.
    fingerprint: A hash of all examples.
  """

  training: list[Example]
  validation: list[Example]
  validation_conversations: list[Conversation]
  report: dict[str, Counts]
  fingerprint: str


def prepare(
  sources: Sequence[Source],
  template: Template,
  *,
  train_on: TrainOn = 'assistant',
  max_length: int,
  overflow: Overflow = 'truncate',
  val_size: float = 0,
  seed: int = 0,
) -> Prepared:
  """Encodes conversations, holds some out and mixes the rest.

  Args:
    sources: Where they come from; their names differ.
    template: Makes examples of them.
    train_on: Which tokens count; see `Template.encode`.
    max_length: Most tokens of an example.
    overflow: What becomes of longer ones: they lose their end, are left out, or
      are an error. What holds no token that counts is left out in any case.
    val_size: How many to hold out: a share below 1, or a number. They are drawn
      from all sources, before weights apply.
    seed: Decides which are held out, and which half a weight of 0.5 takes.

  Returns:
    The examples and their report.

  Raises:
    ValueError: If an argument is out of range, an example is too long and
      `overflow` is `'raise'`, or nothing is left to train on.
  """
  _check(max_length, overflow, val_size)
  report = {s.name: Counts() for s in sources}
  encoded = []  # Number of the source, conversation, example.
  for number, source in enumerate(sources):
    counts = report[source.name]
    counts.skipped = dict(source.skipped)
    counts.read = len(source.conversations) + sum(source.skipped.values())
    dropped: collections.Counter[str] = collections.Counter()
    for conversation in source.conversations:
      try:
        example = template.encode(conversation, train_on)
        example = _fit(example, conversation, max_length, overflow, counts)
      except SkippedError as skip:
        dropped[skip.reason] += 1
      else:
        encoded.append((number, conversation, example))
    counts.dropped = dict(dropped)
    if dropped:
      logger.warning('Dropped from source %r: %s.', source.name, counts.dropped)
  held_out = _held_out(len(encoded), val_size, seed, report)
  training = _mix(sources, encoded, held_out, seed)
  validation = [encoded[i] for i in sorted(held_out)]
  for number, _, example in training:
    counts = report[sources[number].name]
    counts.examples += 1
    counts.tokens += len(example.ids)
    counts.trained_tokens += int(np.count_nonzero(example.weights))
  for number, _, _ in validation:
    report[sources[number].name].validation += 1
  if not training:
    raise _nothing_left(report)
  examples = [example for _, _, example in training]
  tried = [example for _, _, example in validation]
  return Prepared(
    examples,
    tried,
    [conversation for _, conversation, _ in validation],
    report,
    _fingerprint((examples, tried)),
  )


_Encoded = list[tuple[int, Conversation, Example]]


def _check(max_length: int, overflow: str, val_size: float) -> None:
  if max_length < 2:
    raise ValueError(
      f'max_length={max_length} must be at least 2: a token and one to guess.'
    )
  if overflow not in get_args(Overflow):
    raise ValueError(
      f'Unknown overflow={overflow!r}; expected one of {get_args(Overflow)}.'
    )
  if val_size < 0 or (val_size >= 1 and val_size != int(val_size)):
    raise ValueError(
      f'val_size={val_size} must be a share in [0, 1) or a whole number of '
      'examples.'
    )


def _fit(
  example: Example,
  conversation: Conversation,
  max_length: int,
  overflow: Overflow,
  counts: Counts,
) -> Example:
  """Cuts an example to its longest permitted length."""
  if not example.weights.any():
    raise SkippedError(NOTHING)
  length = len(example.ids)
  if length <= max_length:
    return example
  if overflow == 'raise':
    raise ValueError(
      f'{conversation.where or "A conversation"} has {length} tokens, more '
      f'than max_length={max_length}. Use a larger max_length, or '
      "overflow='truncate' or 'drop'."
    )
  if overflow == 'drop':
    raise SkippedError(TOO_LONG)
  example = Example(example.ids[:max_length], example.weights[:max_length])
  if not example.weights.any():
    raise SkippedError(NOTHING)
  counts.truncated += 1
  return example


def _held_out(
  total: int, val_size: float, seed: int, report: dict[str, Counts]
) -> set[int]:
  if not val_size:
    return set()
  if not total:
    raise _nothing_left(report)
  wanted = max(round(val_size * total), 1) if val_size < 1 else int(val_size)
  if wanted >= total:
    raise ValueError(
      f'val_size={val_size} holds out {wanted} of {total} examples and leaves '
      'none to train on. Use a smaller val_size or more data.'
    )
  order = np.random.default_rng([seed, 0]).permutation(total)
  return set(order[:wanted].tolist())


def _mix(
  sources: Sequence[Source], encoded: _Encoded, held_out: set[int], seed: int
) -> _Encoded:
  """What is not held out, each as often as the weight of its source says."""
  training = []
  for number, source in enumerate(sources):
    mine = [
      i
      for i, (origin, _, _) in enumerate(encoded)
      if origin == number and i not in held_out
    ]
    whole, part = divmod(source.weight, 1)
    rng = np.random.default_rng([seed, 1 + number])
    drawn = rng.permutation(mine)[: round(part * len(mine))]
    chosen = mine * int(whole) + sorted(drawn.tolist())
    training += [encoded[i] for i in chosen]
  return training


def _nothing_left(report: dict[str, Counts]) -> ValueError:
  became = {
    name: {**c.skipped, **c.dropped} or f'{c.read} records'
    for name, c in report.items()
  }
  return ValueError(
    f'No example is left to train on. What became of the records: {became}. '
    'Use other data, another template, a larger max_length or a larger weight.'
  )


def _fingerprint(parts: Iterable[Sequence[Example]]) -> str:
  digest = hashlib.sha256()
  for examples in parts:
    digest.update(f'{len(examples)} '.encode())
    for example in examples:
      digest.update(f'{len(example.ids)} '.encode())
      digest.update(example.ids.astype('<i4').tobytes())
      digest.update(example.weights.astype('<f4').tobytes())
  return digest.hexdigest()
