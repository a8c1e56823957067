"""Dynamic masking: which tokens a masked language model has to guess.

Shape suffixes in this file:
  T  positions of a sequence
  P  most positions to be guessed in a sequence
"""

import dataclasses

import numpy as np

from gnlorp_jax.data.tokenizer import Tokenizer

# Of the tokens to be guessed, shares that are replaced by the mask, and by a
# random token; the rest stay as they are.
_MASKED, _RANDOM = 0.8, 0.1


def num_predictions(rate: float, seq_len: int) -> int:
  """P, the most positions to be guessed in a sequence of `seq_len` tokens."""
  return int(rate * (seq_len - 2)) + 1


@dataclasses.dataclass(frozen=True)
class Masking:
  """Turns text into a sequence with gaps, differently every time.

  A sequence is ``bos, text, eos``. A share of `rate` of the text's tokens is to
  be guessed: 80 % of them are replaced by the mask, 10 % by a random token, 10
  % stay. The tokens that end documents are never among them.

  Attributes:
    tokenizer: Gives the ids; it must have a beginning-of-sequence and a mask
      token.
    rate: Share of the tokens to be guessed, in (0, 1).

  Raises:
    ValueError: If the tokenizer lacks a token or `rate` is out of range.

  References:
    Liu et al., `RoBERTa`, 2019, arXiv:1907.11692, section 4.1.

  Note:
    As in the authors' code the number of tokens is rounded up or down at
    random, so that `rate` holds on average, and a random token is any but the
    special ones.
  """

  tokenizer: Tokenizer
  rate: float = 0.15

  def __post_init__(self):
    if not 0 < self.rate < 1:
      raise ValueError(f'rate={self.rate} must lie in (0, 1); try 0.15.')
    if None in (self.tokenizer.bos_id, self.tokenizer.mask_id):
      raise ValueError(
        'A masked language model needs a tokenizer with a beginning-of-sequence'
        f' and a mask token; this one has bos_id={self.tokenizer.bos_id}, '
        f"mask_id={self.tokenizer.mask_id}. Use RoBERTa's, or 'bpe', which is "
        'trained with them.'
      )

  def __call__(
    self, text_T: np.ndarray, rng: np.random.Generator, counts: bool = True
  ) -> dict[str, np.ndarray]:
    """Masks one sequence.

    Args:
      text_T: int32 ``[T - 2]``, ids of text, documents ended by `eos_id`.
      rng: Decides what is masked, and how.
      counts: Whether the sequence counts; one that fills a batch does not.

    Returns:
      A dict of

      * `inputs`: int32 ``[T]``, ids with gaps;
      * `positions`: int32 ``[P]``, ascending, where a token is to be guessed;
      * `targets`: int32 ``[P]``, the tokens that were there;
      * `weights`: float32 ``[P]``, 0 for positions that fill up the row;
      * `seeds`: uint32 scalar, for the dropout.
    """
    tokenizer = self.tokenizer
    inputs_T = np.concatenate(
      [[tokenizer.bos_id], text_T, [tokenizer.eos_id]]
    ).astype(np.int32)
    size = num_predictions(self.rate, len(inputs_T))
    can_be_masked = np.flatnonzero(text_T != tokenizer.eos_id) + 1
    number = int(self.rate * len(can_be_masked) + rng.random()) * counts
    chosen = np.sort(rng.choice(can_be_masked, number, replace=False))
    positions_P = np.zeros(size, np.int32)
    positions_P[:number] = chosen
    targets_P = inputs_T[positions_P]
    kind = rng.random(number)
    inputs_T[chosen[kind < _MASKED]] = tokenizer.mask_id
    random = chosen[(kind >= _MASKED) & (kind < _MASKED + _RANDOM)]
    inputs_T[random] = rng.choice(tokenizer.text_ids, len(random))
    return {
      'inputs': inputs_T,
      'positions': positions_P,
      'targets': targets_P,
      'weights': (np.arange(size) < number).astype(np.float32),
      'seeds': rng.integers(2**32, dtype=np.uint32),
    }
