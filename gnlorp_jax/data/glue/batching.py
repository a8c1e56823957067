"""Texts to token ids, and token ids to batches of a few shapes.

Shape suffixes: N examples, B rows of a batch, T positions.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from gnlorp_jax.data import ordering
from gnlorp_jax.data.glue.files import Examples

BUCKETS = (16, 32, 64, 128, 256, 512)


def encode(
  examples: Examples, backend: tokenizers.Tokenizer, max_length: int
) -> list[np.ndarray]:
  """Turns texts into ids, with the tokenizer's own special tokens.

  A pair that is too long loses tokens of its longer text first.

  Args:
    examples: Single texts or pairs.
    backend: The tokenizer; left as it is.
    max_length: Most tokens of a row, special tokens included.

  Returns:
    N int32 arrays ``[length]``.

  Raises:
    ValueError: If the tokenizer adds no special tokens or they leave no room.

  Note:
    Text that spells a special token, such as `</s>`, is encoded as text. The
    tokenizers of transformers make it the special token.
  """
  is_pair = bool(examples.texts) and len(examples.texts[0]) == 2
  added = backend.num_special_tokens_to_add(is_pair)
  if not added:
    raise ValueError(
      'The tokenizer adds no special tokens, so a model could not tell where '
      'texts start and end: it has no post-processor for a '
      f'{"pair" if is_pair else "text"}. Use one of an encoder such as '
      'roberta-base, or set its post_processor.'
    )
  if max_length <= added:
    raise ValueError(
      f'max_length={max_length} leaves no room for text: the tokenizer adds '
      f'{added} special tokens. Use at least {added + 1}.'
    )
  # A copy: the settings below are not for other users of the tokenizer.
  backend = tokenizers.Tokenizer.from_str(backend.to_str())
  backend.encode_special_tokens = True
  backend.no_padding()
  backend.enable_truncation(max_length, strategy='longest_first')
  inputs = [text if is_pair else text[0] for text in examples.texts]
  return [
    np.asarray(encoding.ids, np.int32)
    for encoding in backend.encode_batch_fast(inputs)
  ]


def num_batches(num_examples: int, batch_size: int) -> int:
  """Returns the number of batches of an epoch."""
  return math.ceil(num_examples / batch_size)


def least_length(encoded: Sequence[np.ndarray], buckets: Sequence[int]) -> int:
  """T of a batch at least: that of the shortest row."""
  shortest = min(map(len, encoded))
  return next(bucket for bucket in buckets if bucket >= shortest)


def evaluation_batches(
  encoded: Sequence[np.ndarray],
  *,
  batch_size: int,
  pad_id: int,
  buckets: tuple[int, ...] = BUCKETS,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches that hold every example once, the longest first.

  Each is a dict with

  * `inputs`: int32 ``[B, T]``, ids, T being the smallest bucket that holds the
    longest row; of several processes each makes its rows alone;
  * `index`: int32 ``[B]``, the example's place in `encoded`, where its output
    belongs, and -1 for a row that only fills up the last batch; of all
    processes.

  Args:
    encoded: N arrays of ids.
    batch_size: B.
    pad_id: Id that fills up short rows.
    buckets: Lengths T, ascending; each is one more shape to compile.
    process_index: Which process this is.
    process_count: Number of processes.

  Returns:
    The iterator.

  Raises:
    ValueError: If an argument is out of range, there are no examples, or a row
      is longer than the last bucket.
  """
  lengths_N = _checked_lengths(encoded, batch_size, buckets)
  own = ordering.own_rows(batch_size, process_index, process_count)
  order_N = np.argsort(-lengths_N, kind='stable')
  plan = np.split(order_N, range(batch_size, len(order_N), batch_size))
  return (
    {
      'inputs': _padded(encoded, index, own, pad_id, buckets),
      'index': _filled(index, batch_size, -1).astype(np.int32),
    }
    for index in plan
  )


def _checked_lengths(
  encoded: Sequence[np.ndarray], batch_size: int, buckets: tuple[int, ...]
) -> np.ndarray:
  """Tokens of each example, if there can be batches of them."""
  lengths_N = np.array([len(ids) for ids in encoded], np.int64)
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} must be at least 1.')
  if not buckets or min(buckets) < 1 or sorted(set(buckets)) != list(buckets):
    raise ValueError(
      f'buckets={buckets} must be positive lengths in ascending order.'
    )
  if not len(encoded):
    raise ValueError(
      f'0 examples give no batch of {batch_size}. Name files that have some.'
    )
  if lengths_N.max() > buckets[-1]:
    raise ValueError(
      f'The longest row has {lengths_N.max()} tokens, the last bucket '
      f'{buckets[-1]}. Encode with max_length={buckets[-1]} or add a bucket.'
    )
  return lengths_N


def _padded(
  encoded: Sequence[np.ndarray],
  index: np.ndarray,
  own: slice,
  pad_id: int,
  buckets: tuple[int, ...],
) -> np.ndarray:
  """This process's rows of a batch, as long as the whole batch needs."""
  longest = max(len(encoded[i]) for i in index)
  length = next(bucket for bucket in buckets if bucket >= longest)
  tokens_BT = np.full((own.stop - own.start, length), pad_id, np.int32)
  for tokens_T, i in zip(tokens_BT, index[own], strict=False):
    tokens_T[: len(encoded[i])] = encoded[i]
  return tokens_BT


def _filled(rows: np.ndarray, batch_size: int, value: float) -> np.ndarray:
  """The rows, with others behind them that fill up a batch."""
  return np.pad(rows, (0, batch_size - len(rows)), constant_values=value)


class TrainingBatches:
  """Batches of shuffled examples, epoch after epoch, from any position.

  Each is a dict with

  * `inputs`: int32 ``[B, T]``, ids, T being the smallest bucket that holds the
    longest row;
  * `labels`: of the dtype of `labels`, ``[B]``;
  * `weights`: float32 ``[B]``, 1, or 0 for a row that only fills up the last
    batch of an epoch;
  * `seeds`: uint32 ``[B]``, for dropout: a function of seed, epoch and example,
    distinct within an epoch.

  Of several processes each makes its rows alone, ``[B / processes, ...]``.

  Every epoch has each example once, in the order of `ordering.shuffled`, which
  follows from its number, `seed` and the lengths alone.
  """

  def __init__(
    self,
    encoded: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    batch_size: int,
    pad_id: int,
    buckets: tuple[int, ...] = BUCKETS,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Checks the examples.

    Args:
      encoded: N arrays of ids.
      labels: ``[N]``.
      batch_size: B.
      pad_id: Id that fills up short rows.
      buckets: Lengths T, ascending; each is one more shape to compile.
      seed: At least 0; decides the order.
      process_index: Which process this is.
      process_count: Number of processes.

    Raises:
      ValueError: If an argument is out of range, there are no examples, or a
        row is longer than the last bucket.
    """
    lengths_N = _checked_lengths(encoded, batch_size, buckets)
    if seed < 0:
      raise ValueError(f'seed={seed} must be at least 0.')
    if len(labels) != len(encoded):
      raise ValueError(
        f'{len(encoded)} examples have {len(labels)} labels; give one for each.'
      )
    self._encoded, self._labels = encoded, labels
    self._batch_size, self._pad_id = batch_size, pad_id
    self._buckets = buckets
    self._own = ordering.own_rows(batch_size, process_index, process_count)
    self._epochs = ordering.Epochs(lengths_N, batch_size, seed)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    index, offset = self._epochs.take()
    own, size = self._own, self._batch_size
    others = len(self._encoded) + np.arange(size - len(index))
    return {
      'inputs': _padded(self._encoded, index, own, self._pad_id, self._buckets),
      'labels': _filled(self._labels[index], size, 0)[own],
      'weights': _filled(np.ones(len(index), np.float32), size, 0)[own],
      'seeds': ordering.mix(offset, np.concatenate([index, others])[own]),
    }

  def get_state(self) -> dict[str, int]:
    """The position: the number of examples taken."""
    return self._epochs.get_state()

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on behind the position that `get_state` returned.

    The batches before may have had another size (`ordering.Epochs`).
    """
    self._epochs.set_state(state)
