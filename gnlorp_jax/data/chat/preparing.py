"""Conversations to the examples of a run, with a report of what became of them.

Shape suffixes: T tokens.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from gnlorp_jax.data.chat.conversations import Conversation, SkippedError
from gnlorp_jax.data.chat.reading import Source
from gnlorp_jax.data.chat.templates import Example, Template, TrainOn

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
    examples: Examples of an epoch, after its weight and any limit.
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
    fingerprint: A hash of the examples in `training`.
    names: Names of the sources of `training`.
    origins: Which of them each example of `training` is from.
  """

  training: list[Example]
  validation: list[Example]
  validation_conversations: list[Conversation]
  report: dict[str, Counts]
  fingerprint: str
  names: tuple[str, ...]
  origins: list[int]


def prepare(
  sources: Sequence[Source],
  template: Template,
  *,
  train_on: TrainOn = 'assistant',
  max_length: int,
  overflow: Overflow = 'truncate',
  val_size: float = 0,
  validation: Sequence[Source] = (),
  limit: int | None = None,
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
    validation: Sources of which all is held out besides; weights do not count.
    limit: Train on so many examples at most, counted after weights apply. Each
      source gives its first ones, in proportion to how many it has. Examples
      and tokens of the report are of these alone; validation is not limited.
    seed: Decides which are held out, and which half a weight of 0.5 takes.

  Returns:
    The examples and their report.

  Raises:
    ValueError: If an argument is out of range, an example is too long and
      `overflow` is `'raise'`, or nothing is left to train on or of
      `validation`.
  """
  _check(max_length, overflow, val_size, limit)
  encode = functools.partial(
    _encode,
    template=template,
    train_on=train_on,
    max_length=max_length,
    overflow=overflow,
  )
  report = {s.name: Counts() for s in sources}
  encoded = [
    (number, conversation, example)
    for number, source in enumerate(sources)
    for conversation, example in encode(source, counts=report[source.name])
  ]
  held_out = _held_out(len(encoded), val_size, seed, report)
  training = _first(_mix(sources, encoded, held_out, seed), limit)
  for number, _, example in training:
    counts = report[sources[number].name]
    counts.examples += 1
    counts.tokens += len(example.ids)
    counts.trained_tokens += int(np.count_nonzero(example.weights))
  tried = []
  for number, conversation, example in (encoded[i] for i in sorted(held_out)):
    report[sources[number].name].validation += 1
    tried.append((conversation, example))
  for source in validation:
    counts = report[f'validation {source.name}'] = Counts()
    found = list(encode(source, counts=counts))
    counts.validation = len(found)
    tried += found
  if validation and len(tried) == len(held_out):
    raise ValueError(
      'No example of the validation data is left. What became of the records: '
      f'{_became(report)}. Use other validation data or none, another template '
      'or a larger max_length.'
    )
  if not training:
    raise _nothing_left(report)
  examples = [example for _, _, example in training]
  return Prepared(
    examples,
    [example for _, example in tried],
    [conversation for conversation, _ in tried],
    report,
    _fingerprint(examples),
    tuple(source.name for source in sources),
    [number for number, _, _ in training],
  )


def _encode(
  source: Source,
  *,
  counts: Counts,
  template: Template,
  train_on: TrainOn,
  max_length: int,
  overflow: Overflow,
) -> Iterator[tuple[Conversation, Example]]:
  """Conversations of a source that are left, and the examples made of them."""
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
      yield conversation, example
  counts.dropped = dict(dropped)


_Encoded = list[tuple[int, Conversation, Example]]


def _check(
  max_length: int, overflow: str, val_size: float, limit: int | None
) -> None:
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
  if limit is not None and limit < 1:
    raise ValueError(
      f'limit={limit} must be at least 1, an example to train on; None takes '
      'all.'
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
    remedy = 'a smaller val_size' if total > 1 else 'val_size=0, no validation,'
    raise ValueError(
      f'val_size={val_size} holds out {wanted} of {total} examples and leaves '
      f'none to train on. Use {remedy} or more data.'
    )
  order = np.random.default_rng([seed, 0]).permutation(total)
  return set(order[:wanted].tolist())


def _mix(
  sources: Sequence[Source], encoded: _Encoded, held_out: set[int], seed: int
) -> _Encoded:
  """What is not held out, each as often as the weight of its source says."""
  training = []
  for number, source in enumerate(sources):
    numbers = [
      i
      for i, (origin, _, _) in enumerate(encoded)
      if origin == number and i not in held_out
    ]
    whole, part = divmod(source.weight, 1)
    rng = np.random.default_rng([seed, 1 + number])
    drawn = rng.permutation(numbers)[: round(part * len(numbers))]
    chosen = numbers * int(whole) + sorted(drawn.tolist())
    training += [encoded[i] for i in chosen]
  return training


def _first(training: _Encoded, limit: int | None) -> _Encoded:
  """The first examples of each source, in proportion to how many it has."""
  if limit is None or limit >= len(training):
    return training
  sizes = collections.Counter(number for number, _, _ in training)
  # The largest remainders are rounded up, the first source first among equals.
  shares = {n: divmod(limit * size, len(training)) for n, size in sizes.items()}
  taken = {n: whole for n, (whole, _) in shares.items()}
  order = sorted(shares, key=lambda n: -shares[n][1])
  for n in order[: limit - sum(taken.values())]:
    taken[n] += 1
  kept = []
  for example in training:
    if taken[example[0]]:
      taken[example[0]] -= 1
      kept.append(example)
  return kept


def _became(report: dict[str, Counts]) -> dict[str, dict[str, int] | str]:
  """What became of the records of each source."""
  return {
    name: {**c.skipped, **c.dropped} or f'{c.read} records'
    for name, c in report.items()
  }


def _nothing_left(report: dict[str, Counts]) -> ValueError:
  return ValueError(
    'No example is left to train on. What became of the records: '
    f'{_became(report)}. Use other data, another template, a larger max_length '
    'or a larger weight.'
  )


def _fingerprint(examples: Sequence[Example]) -> str:
  digest = hashlib.sha256(f'{len(examples)} '.encode())
  for example in examples:
    digest.update(f'{len(example.ids)} '.encode())
    digest.update(example.ids.astype('<i4').tobytes())
    digest.update(example.weights.astype('<f4').tobytes())
  return digest.hexdigest()
