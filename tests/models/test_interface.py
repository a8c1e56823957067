import pytest

from gnlorp_jax.models import interface

CHOICES = {'base': 1, 'large': 2}


def test_finds_by_name():
  assert interface.find_preset('large', CHOICES) == 2


@pytest.mark.parametrize(
  'name, hint', [('Lrge', " Did you mean 'large'?"), ('60m', '')]
)
def test_unknown_name_is_told_the_choices_and_the_nearest(name, hint):
  with pytest.raises(ValueError) as error:
    interface.find_preset(name, CHOICES)
  assert str(error.value) == (
    f"Unknown model {name!r}; expected one of ('base', 'large').{hint}"
  )
