"""Values of configurations against the types of their fields."""

import pytest

from gnlorp_jax.compose import settings
from gnlorp_jax.models.field_types import WrongTypeError, check_types


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('learning_rate', True),
    ('rank', 8.0),
    ('spread_refreshes', 1),
    ('basis_bits', True),
    ('side', 'shorter'),
    ('projection', 3),
    ('param_labels', (('a',),)),
  ],
)
def test_value_of_another_type_is_refused(field, value):
  config = settings.OptimConfig()
  object.__setattr__(config, field, value)
  with pytest.raises(WrongTypeError) as error:
    check_types(config, 'optim.')
  assert error.value.field == f'optim.{field}'
  assert str(error.value).startswith(f'OptimConfig.{field}={value!r} must be ')
