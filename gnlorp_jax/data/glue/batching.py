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


def num_batches(
  num_examples: int, batch_size: int, *, drop_remainder: bool = False
) -> int:
  """Returns the number of batches of an epoch."""
  if drop_remainder:
    return num_examples // batch_size
  return math.ceil(num_examples / batch_size)


def least_length(encoded: Sequence[np.ndarray], buckets: Sequence[int]) -> int:
  """T of a batch at least: that of the shortest row."""
  shortest = min(map(len, encoded))
  return next(bucket for bucket in buckets if bucket >= shortest)


def batches(
  encoded: Sequence[np.ndarray],
  labels: np.ndarray | None,
  *,
  batch_size: int,
  pad_id: int,
  buckets: tuple[int, ...] = BUCKETS,
  seed: int = 0,
  epoch: int = 0,
  shuffle: bool,
  drop_remainder: bool = False,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over the batches of one epoch.

  Each batch is a dict with

  * `inputs`: int32 ``[B, T]``, ids, T being the smallest bucket that holds its
    longest row;
  * `labels`: of the dtype of `labels`, ``[B]``; absent if `labels` is None;
  * `weights`: float32 ``[B]``, 1, or 0 for a row that only fills up the last
    batch;
  * `seeds`: uint32 ``[B]``, for dropout: a function of seed, epoch and example,
    distinct within an epoch;
  * `index`: int32 ``[B]``, the example's place in `encoded`, -1 for a row that
    fills up.

  Of several processes each makes its rows alone, ``[B / processes, ...]``, but
  for `index`, which is that of all.

  Shuffled, the examples are drawn in random order, sorted by length within
  windows of 50 batches, cut into batches, and the batches shuffled: the rows of
  a batch are of similar length. What does not fill a batch is a random draw and
  comes last. Otherwise examples are sorted by length, the longest first, and
  `index` tells where their outputs belong.

  The order follows from `seed`, `epoch` and the lengths alone, so a run that
  stopped after k batches goes on with `start=k`.

  Args:
    encoded: N arrays of ids.
    labels: ``[N]``, or None.
    batch_size: B.
    pad_id: Id that fills up short rows.
    buckets: Lengths T, ascending; each is one more shape to compile.
    seed: At least 0; with `epoch` decides the order.
    epoch: At least 0.
    shuffle: True for training, False for evaluation.
    drop_remainder: Whether to leave out the examples that do not fill a batch.
    start: Number of batches to skip.
    process_index: Which process this is.
    process_count: Number of processes.

  Returns:
    The iterator.

  Raises:
    ValueError: If an argument is out of range, there are no examples, or a row
      is longer than the last bucket.
  """
  if min(1 + epoch, 1 + start) < 1:
    raise ValueError(f'epoch={epoch} and start={start} must be at least 0.')
  lengths_N = _checked_lengths(
    encoded, labels, batch_size, buckets, seed, process_count
  )
  total = num_batches(len(encoded), batch_size, drop_remainder=drop_remainder)
  if not total:
    raise ValueError(
      f'{len(encoded)} examples give no batch of {batch_size}. Use a smaller '
      'batch_size or drop_remainder=False.'
    )
  if start > total:
    raise ValueError(
      f'start={start} is beyond the {total} batches of an epoch.'
    )
  rng = np.random.default_rng([seed, epoch])
  if shuffle:
    plan = ordering.shuffled(lengths_N, batch_size, rng, drop_remainder)
  else:
    order_N = np.argsort(-lengths_N, kind='stable')
    plan = np.split(order_N, range(batch_size, len(order_N), batch_size))
    plan = plan[:total]
  offset = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
  count = batch_size // process_count
  own = slice(process_index * count, (process_index + 1) * count)
  return (
    _batch(encoded, labels, index, batch_size, pad_id, buckets, offset, own)
    for index in plan[start:]
  )


def _checked_lengths(
  encoded: Sequence[np.ndarray],
  labels: np.ndarray | None,
  batch_size: int,
  buckets: tuple[int, ...],
  seed: int,
  process_count: int,
) -> np.ndarray:
  """Tokens of each example, if there can be batches of them."""
  lengths_N = np.array([len(ids) for ids in encoded], np.int64)
  if min(batch_size, 1 + seed) < 1:
    raise ValueError(
      f'batch_size={batch_size} must be at least 1, and seed={seed} at least 0.'
    )
  if not buckets or min(buckets) < 1 or sorted(set(buckets)) != list(buckets):
    raise ValueError(
      f'buckets={buckets} must be positive lengths in ascending order.'
    )
  if batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size} must be a multiple of process_count='
      f'{process_count}.'
    )
  if not len(encoded):
    raise ValueError(
      f'0 examples give no batch of {batch_size}. Name files that have some.'
    )
  if labels is not None and len(labels) != len(encoded):
    raise ValueError(f'{len(encoded)} examples have {len(labels)} labels.')
  if lengths_N.max() > buckets[-1]:
    raise ValueError(
      f'The longest row has {lengths_N.max()} tokens, the last bucket '
      f'{buckets[-1]}. Encode with max_length={buckets[-1]} or add a bucket.'
    )
  return lengths_N


def _batch(
  encoded: Sequence[np.ndarray],
  labels: np.ndarray | None,
  index: np.ndarray,
  batch_size: int,
  pad_id: int,
  buckets: tuple[int, ...],
  offset: np.uint32,
  own: slice,
) -> dict[str, np.ndarray]:
  longest = max(len(encoded[i]) for i in index)
  length = next(bucket for bucket in buckets if bucket >= longest)
  tokens_BT = np.full((own.stop - own.start, length), pad_id, np.int32)
  for tokens_T, i in zip(tokens_BT, index[own], strict=False):
    tokens_T[: len(encoded[i])] = encoded[i]
  filled = np.arange(batch_size - len(index))
  batch = {
    'inputs': tokens_BT,
    'weights': (np.arange(batch_size) < len(index)).astype(np.float32)[own],
    'seeds': ordering.mix(
      offset, np.concatenate([index, len(encoded) + filled])[own]
    ),
    'index': np.concatenate([index, np.full_like(filled, -1)]).astype(np.int32),
  }
  if labels is not None:
    batch['labels'] = np.zeros(batch_size, labels.dtype)
    batch['labels'][: len(index)] = labels[index]
    batch['labels'] = batch['labels'][own]
  return batch


class TrainingBatches:
  """Batches of shuffled examples, epoch after epoch, from any position.

  What `next` returns are the batches of `batches` without `index`.

  Args:
    encoded: As in `batches`, as are the others.
    labels: Their labels.
    batch_size: B.
    pad_id: Id that fills up short rows.
    buckets: Lengths, ascending.
    seed: Decides the order.
    process_index: Which process this is; it makes only its rows of each batch.
    process_count: Number of processes.
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
    lengths_N = _checked_lengths(
      encoded, labels, batch_size, buckets, seed, process_count
    )
    self._epochs = ordering.Epochs(lengths_N, batch_size, seed)
    count = batch_size // process_count
    own = slice(process_index * count, (process_index + 1) * count)
    self._make = lambda index, offset: _batch(
      encoded, labels, index, batch_size, pad_id, buckets, offset, own
    )

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = self._make(*self._epochs.take())
    return {name: rows for name, rows in batch.items() if name != 'index'}

  def get_state(self) -> dict[str, int]:
    """The position: the number of examples taken."""
    return self._epochs.get_state()

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on behind the position that `get_state` returned.

    The batches before may have had another size (`ordering.Epochs`).
    """
    self._epochs.set_state(state)
