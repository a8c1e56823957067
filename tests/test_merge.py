"""The command `python -m gnlorp_jax.merge`."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from gnlorp_jax import merge
from gnlorp_jax.models import hf, llama
from tests.compose import small_lm


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """A base and two models that were tuned from it."""
  folder = tmp_path_factory.mktemp('models')
  small_lm.write(folder / 'base')
  for seed in (1, 2):
    place = folder / f'tuned{seed}'
    small_lm.write(place)
    rng = np.random.default_rng(seed)
    path = place / 'model.safetensors'
    tensors = {
      name: x + np.float32(0.02) * rng.standard_normal(x.shape, np.float32)
      for name, x in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  return folder


def words(models, out, *more):
  return [
    *('--base', str(models / 'base'), '--experts'),
    *(str(models / 'tuned1'), str(models / 'tuned2'), '--out', str(out), *more),
  ]


def test_transformers_loads_what_is_merged(models, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  out = tmp_path / 'out'
  merge.main(words(models, out, '--method', 'doge', '--solver', 'exact'))
  assert 'Method doge: eta auto (scale 0.3) = ' in capsys.readouterr().out
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
    out, output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  tokens_BT = np.arange(24).reshape(2, 12)
  model, _ = small_lm.model()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = hf.load_params(out, llama.HF_TENSORS, shapes)
  with torch.no_grad():
    logits = theirs.eval()(torch.tensor(tokens_BT)).logits.numpy()
  np.testing.assert_allclose(
    model.apply(params, tokens_BT), logits, rtol=1e-3, atol=1e-3
  )
  assert len(transformers.AutoTokenizer.from_pretrained(out)) == 258


def test_a_file_of_settings(models, tmp_path):
  config = tmp_path / 'merge.yaml'
  config.write_text(
    json.dumps(
      {
        'merge_method': 'linear',
        'base_model': str(models / 'base'),
        'models': [{'model': str(models / f'tuned{i}')} for i in (1, 2)],
      }
    )
  )
  merge.main(['--config', str(config), '--out', str(tmp_path / 'out')])
  first, second, merged = (
    safetensors.numpy.load_file(folder / 'model.safetensors')
    for folder in (models / 'tuned1', models / 'tuned2', tmp_path / 'out')
  )
  for name, tensor in merged.items():
    np.testing.assert_allclose(
      tensor, (first[name] + second[name]) / 2, atol=1e-6
    )


def test_mistakes_end_with_one_message(models, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    merge.main(words(models, models / 'base'))
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith(
    f'error: Cannot export to {models / "base"}: it exist'
  )


def test_help_explains_every_option(capsys):
  with pytest.raises(SystemExit) as stop:
    merge.main(['--help'])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  for word in ('--keep', '--solver', 'mergekit', '--dry-run', '--heads'):
    assert word in shown
