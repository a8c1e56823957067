import hypothesis
import pytest
from hypothesis import strategies as st

from gnlorp_jax.data import chat
from tests.data.chat import small_chat

LENGTHS = st.lists(st.integers(1, 20), max_size=40)


@small_chat.FEW
@hypothesis.given(LENGTHS)
def test_every_document_has_its_place(lengths):
  rows = chat.pack(lengths, 20)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
  assert chat.pack(lengths, 20) == rows


@small_chat.FEW
@hypothesis.given(LENGTHS)
def test_it_is_best_fit_decreasing(lengths):
  """Against the definition, which looks at every row."""
  rows, left = [], []
  for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    fitting = [r for r in range(len(rows)) if left[r] >= lengths[i]]
    if fitting:
      best = min(fitting, key=lambda r: left[r])
    else:
      best = len(rows)
      rows.append([])
      left.append(20)
    rows[best].append(i)
    left[best] -= lengths[i]
  assert chat.pack(lengths, 20) == rows


def test_document_that_fits_no_row_is_refused():
  for lengths, length in (([3, 9], 9), ([0, 3], 0)):
    with pytest.raises(ValueError) as error:
      chat.pack(lengths, 8)
    assert str(error.value) == (
      f'A document of {length} tokens cannot be packed into rows of 8; lengths '
      'must be in [1, 8].'
    )
