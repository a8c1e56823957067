"""How likely a language model finds given tokens: ids in, numbers out.

Sequences are sorted by length and padded on the right to one of a few lengths,
so that few programs are compiled; a causal model does not see what comes after
a token. Of the hidden states only those before a scored token go through the
head, a fixed number at a time: logits ``[B, T, V]`` never exist.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  P     scored tokens of one pass through the head
  V     vocabulary
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.models.interface import Model, check_ids
from gnlorp_jax.models.on_host import to_host

Request = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
Progress = Callable[[int, int], None]

PADDED_LENGTHS = tuple(
  length
  for power in range(4, 24)
  for length in (2**power, 3 * 2 ** (power - 1))
)
"""Lengths that sequences are padded to, up to the longest a model accepts."""
FULL_BATCH_LENGTH = 512
"""Length up to which sequences come in full batches."""
TOKENS_PER_PASS = 256
"""Positions of which logits exist at a time."""


class Score(NamedTuple):
  """What a model says of a continuation.

  Attributes:
    log_likelihood: Sum of the natural logarithms of the probabilities of its
      tokens, each after all tokens before it.
    is_greedy: Whether each of them is the likeliest there.
  """

  log_likelihood: float
  is_greedy: bool


def log_likelihoods(
  model: Model,
  params: Any,
  requests: Sequence[Request],
  *,
  batch_size: int = 16,
  max_length: int | None = None,
  progress: Progress = lambda done, total: None,
) -> list[Score]:
  """How likely continuations are after their contexts.

  Requests that differ in their last token alone, such as single-token options
  after one context, share a forward pass. The result depends neither on their
  order nor, up to rounding, on `batch_size`.

  Args:
    model: A causal language model.
    params: Its parameters.
    requests: Pairs (context, continuation) of token ids, both not empty. A
      context loses tokens on its left where both together are too long.
    batch_size: Sequences per forward pass, > 0; of those that are padded to
      more than `FULL_BATCH_LENGTH`, fewer, that have no more tokens together.
    max_length: Most tokens that the model is given at a time; None, and at
      most, is what it accepts.
    progress: Is called with how many requests are done, and are there, now and
      then.

  Returns:
    The scores, in the order of the requests. The softmax is float32, the sum
    float64.

  Raises:
    ValueError: If an argument is outside its interval, a context or a
      continuation is empty or the latter too long, or the model lacks an id.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} must be positive.')
  length = _longest(model, max_length)
  for number, parts in enumerate(requests):
    for ids in map(np.asarray, parts):
      check_ids(f'Request {number}', ids, model.config.vocab_size)
  rows = _rows(requests, length)
  totals = np.zeros(len(requests))
  is_greedy = np.ones(len(requests), bool)
  waiting: collections.deque[tuple[np.ndarray, int, tuple[jax.Array, ...]]]
  waiting = collections.deque()
  done = 0

  def collect() -> None:
    nonlocal done
    owners, finished, results = waiting.popleft()
    log_probs, greedy = (to_host(x)[: owners.size] for x in results)
    np.add.at(totals, owners, log_probs.astype(np.float64))
    np.logical_and.at(is_greedy, owners, greedy)
    done += finished
    progress(done, len(requests))

  progress(0, len(requests))
  for batch, tokens_BT in _batches(rows, batch_size, length):
    x_BTD = _hidden(model.hidden, params, tokens_BT)
    for owners, finished, where in _passes(batch):
      results = _score(model.logits, params, x_BTD, *where)
      waiting.append((owners, finished, results))
      # One pass is computed while the results of another are fetched.
      if len(waiting) > 1:
        collect()
  while waiting:
    collect()
  return [
    Score(float(total), bool(greedy))
    for total, greedy in zip(totals, is_greedy, strict=True)
  ]


def rolling(
  model: Model,
  params: Any,
  text: Sequence[int] | np.ndarray,
  *,
  prefix_id: int,
  stride: int | None = None,
  batch_size: int = 1,
  max_length: int | None = None,
  progress: Progress = lambda done, total: None,
) -> float:
  """How likely a text of any length is: every token once.

  The text is cut into windows as long as the model accepts. Where it does not
  come out even, the last window begins earlier, so that it is full too.

  Args:
    model: A causal language model.
    params: Its parameters.
    text: Token ids, at least one.
    prefix_id: What the first token comes after, such as the token that begins
      or ends a document.
    stride: Tokens that a window scores; the others before them are context. In
      [1, max_length]; None is max_length: windows lie side by side. A smaller
      stride takes as much more time and gives every token more context.
    batch_size: Windows per forward pass, > 0.
    max_length: Tokens of a window; None, and at most, is what the model
      accepts.
    progress: Is called with how many windows are done, and are there, now and
      then.

  Returns:
    The log-likelihood of the text, a natural logarithm.

  Raises:
    ValueError: If an argument is outside its interval.
  """
  windows = rolling_windows(
    text,
    prefix_id=prefix_id,
    stride=stride,
    length=_longest(model, max_length),
  )
  scores = log_likelihoods(
    model,
    params,
    windows,
    batch_size=batch_size,
    max_length=max_length,
    progress=progress,
  )
  return math.fsum(score.log_likelihood for score in scores)


def rolling_windows(
  text: Sequence[int] | np.ndarray,
  *,
  prefix_id: int,
  stride: int | None,
  length: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """The requests that score every token of a text once; see `rolling`.

  Args:
    text: Token ids, at least one.
    prefix_id: What the first token comes after.
    stride: Tokens that a window scores, in [1, length]; None is `length`.
    length: Tokens of a window, without the last one that it scores.

  Returns:
    Pairs (context, continuation). The first window scores `length` tokens.

  Raises:
    ValueError: If the text is empty or the stride outside its interval.
  """
  stride = length if stride is None else stride
  if not 1 <= stride <= length:
    raise ValueError(
      f'stride={stride} must be in [1, {length}], the length of a window.'
    )
  ids = np.concatenate([[prefix_id], np.asarray(text, np.int64).reshape(-1)])
  if ids.size == 1:
    raise ValueError('The text has no tokens, and so no perplexity.')
  windows, start, end = [], 1, min(1 + length, ids.size)
  while start < ids.size:
    windows.append((ids[max(0, end - length - 1) : start], ids[start:end]))
    start, end = end, min(end + stride, ids.size)
  return windows


def _longest(model: Model, max_length: int | None) -> int:
  accepted = model.config.max_seq_len
  if max_length is not None and not 1 <= max_length <= accepted:
    raise ValueError(
      f'max_length={max_length} must be in [1, {accepted}], what the model '
      'accepts.'
    )
  return accepted if max_length is None else max_length


class _Row(NamedTuple):
  """A sequence, and the requests that are scored at its end."""

  tokens: np.ndarray
  scored: list[tuple[int, np.ndarray]]  # Number of a request, its continuation.


def _rows(requests: Sequence[Request], length: int) -> list[_Row]:
  """The different sequences that the model must see, the longest first."""
  rows: dict[bytes, _Row] = {}
  for number, (context, continuation) in enumerate(requests):
    context, continuation = np.asarray(context), np.asarray(continuation)
    if context.size == 0 or continuation.size == 0:
      raise ValueError(
        f'Request {number} has {context.size} tokens of context and '
        f'{continuation.size} to score: neither may be empty. Begin with a '
        'start- or end-of-sequence token.'
      )
    if continuation.size > length:
      raise ValueError(
        f'Request {number} has {continuation.size} tokens to score, more than '
        f'the {length} that the model is given at a time. Use `rolling`.'
      )
    tokens = np.concatenate([context, continuation[:-1]])[-length:]
    tokens = tokens.astype(np.int32)
    row = rows.setdefault(tokens.tobytes(), _Row(tokens, []))
    row.scored.append((number, continuation.astype(np.int32)))
  return sorted(rows.values(), key=lambda row: -row.tokens.size)


def _batches(
  rows: Sequence[_Row], batch_size: int, length: int
) -> Iterator[tuple[Sequence[_Row], np.ndarray]]:
  """Rows of about one length, and their tokens ``[B, T]``, int32."""
  lengths = (*(padded for padded in PADDED_LENGTHS if padded < length), length)
  begin = 0
  while begin < len(rows):
    longest = rows[begin].tokens.size
    padded = next(padded for padded in lengths if padded >= longest)
    count = batch_size * FULL_BATCH_LENGTH // max(padded, FULL_BATCH_LENGTH)
    count = min(max(count, 1), len(rows))
    batch = rows[begin : begin + count]
    tokens_BT = np.zeros((count, padded), np.int32)
    for tokens_T, row in zip(tokens_BT, batch, strict=False):
      tokens_T[: row.tokens.size] = row.tokens
    yield batch, tokens_BT
    begin += count


def _passes(
  batch: Sequence[_Row],
) -> Iterator[tuple[np.ndarray, int, tuple[np.ndarray, ...]]]:
  """The scored tokens of a batch, a fixed number at a time.

  Yields:
    Of each token its request; how many requests are done with the pass; and of
    ``[P]`` tokens, padding at the end, the row, the position whose logits tell
    of it, and its id.
  """
  pieces = [
    (
      np.full(targets.size, owner),
      np.full(targets.size, number),
      np.arange(row.tokens.size - targets.size, row.tokens.size),
      targets,
    )
    for number, row in enumerate(batch)
    for owner, targets in row.scored
  ]
  owners, *where = (
    np.concatenate(piece) for piece in zip(*pieces, strict=True)
  )
  for begin in range(0, owners.size, TOKENS_PER_PASS):
    end = begin + TOKENS_PER_PASS
    finished = len(pieces) if end >= owners.size else 0
    padding = (0, max(0, end - owners.size))
    yield (
      owners[begin:end],
      finished,
      tuple(np.pad(x[begin:end], padding).astype(np.int32) for x in where),
    )


@functools.partial(jax.jit, static_argnums=0)
def _hidden(hidden, params, tokens_BT):
  return hidden(params, tokens_BT)


@functools.partial(jax.jit, static_argnums=0)
def _score(logits, params, x_BTD, rows_P, positions_P, targets_P):
  """Log-probabilities of tokens, and whether they are the likeliest."""
  logits_PV = logits(params, x_BTD[rows_P, positions_P]).astype(jnp.float32)
  chosen_P = jnp.take_along_axis(logits_PV, targets_P[:, None], axis=1)[:, 0]
  log_probs_P = chosen_P - jax.nn.logsumexp(logits_PV, axis=1)
  return log_probs_P, logits_PV.argmax(axis=1) == targets_P
