"""What recipes of language models share around their training."""

import pytest

from gnlorp_jax.compose import language_model


@pytest.mark.parametrize(
  ('found', 'best', 'expected'),
  [
    (1.0, 2.0, True),
    (2.0, 1.0, False),
    (1.0, 1.0, False),
    (1.0, None, True),
    (None, 1.0, False),
    (None, None, False),
  ],
)
def test_lower_validation_loss_is_better(found, best, expected):
  assert language_model.is_better({'loss': found}, {'loss': best}) == expected
