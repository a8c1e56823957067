import dataclasses
import json

import jax
import numpy as np
import pytest

from gnlorp_jax.compose import pretrained
from gnlorp_jax.models import adapters, llama, peft
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


def export_adapter(folder):
  """Writes adapters of the small model; returns all arrays."""
  _, params = small_lm.model()
  config = adapters.AdapterConfig(kind='lora', rank=2)
  arrays = adapters.init(config, params, jax.random.key(3))
  arrays = jax.tree.map(lambda x: np.asarray(x) + 0.1, arrays)
  peft.export(folder, config, arrays, llama.HF_TENSORS)
  return adapters.combine(params, arrays)


def test_adapters_are_used(tmp_path):
  folder, beside = small_lm.write(tmp_path / 'small'), tmp_path / 'adapter'
  params = export_adapter(beside)
  found = pretrained.find(folder, dtype='float32', adapter=str(beside))
  read = found.read()
  jax.tree.map(np.testing.assert_array_equal, read, params)
  del read['layers']['mlp']['up_proj']['lora_b']  # The model looks for it.
  with pytest.raises(ValueError, match='has the adapter arrays'):
    jax.eval_shape(found.model.apply, read, np.zeros((1, 1), np.int32))
  other = dataclasses.replace(small_lm.CONFIG, intermediate_size=40)
  fields = llama.config_to_hf(other)
  (tmp_path / 'small/config.json').write_text(json.dumps(fields))
  found = pretrained.find(folder, dtype='float32', adapter=str(beside))
  with pytest.raises(ValueError) as error:
    found.read()
  assert str(error.value).startswith(
    f'The adapters in {beside} are of another model. Shapes there and here: '
  )
