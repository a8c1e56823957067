import numpy as np
import pytest

from gnlorp_jax.compose import pretrained
from tests.compose import small_lm


def test_folder_is_found_before_its_weights_are_read(tmp_path):
  folder = small_lm.write(tmp_path / 'small')
  found = pretrained.find(folder, dtype='bfloat16')
  assert found.model.config.param_dtype == 'bfloat16'
  assert found.tokenizer.vocab_size == small_lm.tokenizer().vocab_size
  _, params = small_lm.model()
  embedding = found.read()['embed']['embedding']
  expected = params['embed']['embedding'].astype('bfloat16')
  np.testing.assert_array_equal(embedding, expected)
  (tmp_path / 'small/model.safetensors').unlink()
  pretrained.find(folder, dtype='float32')
  with pytest.raises(ValueError):
    found.read()
