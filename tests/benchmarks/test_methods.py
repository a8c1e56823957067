"""The table of the optimizers that are compared."""

import pytest

from benchmarks.common import methods


def test_options_that_a_method_lacks():
  with pytest.raises(methods.AbsentError, match='^adamw has no option side$'):
    methods.build('adamw', {'side': 'both'}, learning_rate=1.0)
  methods.build('adamw', {'side': 'short'}, learning_rate=1.0, rank=4)
  with pytest.raises(methods.AbsentError) as error:
    methods.build('galore', {'side': 'up'}, learning_rate=1.0)
  assert str(error.value).startswith(
    "galore refuses {'side': 'up'}: Unknown side 'up'; expected one of"
  )
