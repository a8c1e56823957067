"""AdamW; see also test_adam and test_conformance."""

import pytest

from gnlorp_jax.optim import adamw


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'b2': -0.1}, 'b2 must be in [0, 1), got -0.1.'),
    ({'eps': -1.0}, 'eps must be in [0, inf), got -1.0.'),
  ],
)
def test_bad_argument_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    adamw(1e-2, **options)
  assert str(error.value) == text
