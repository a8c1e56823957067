import pytest

from tests.recipes.merge import small_folders


@pytest.fixture
def trio(tmp_path):
  """A base and three experts."""
  base = small_folders.drawn(0)
  small_folders.write(
    *(tmp_path / 'base', base),
    files=('tokenizer.json', 'generation_config.json'),
  )
  for seed, name in enumerate('abc', start=1):
    tensors = small_folders.drawn(seed, like=base)
    small_folders.write(tmp_path / name, tensors, files=('tokenizer.json',))
  return tmp_path / 'base', [tmp_path / name for name in 'abc']
