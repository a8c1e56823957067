"""Adapters in folders of PEFT, which is the oracle on both ways.

Shape suffixes in this file: B sequences, T positions, V vocabulary.
"""

import contextlib
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from gnlorp_jax.models import adapters, hf, peft
from gnlorp_jax.models.families import llama, phi3, qwen2

L, R = 2, 3  # Layers, rank.
SIZES = {
  'vocab_size': 40,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_layers': L,
  'num_heads': 4,
  'num_kv_heads': 2,
  'max_seq_len': 16,
}
CONFIGS = {
  llama: llama.LlamaConfig(**SIZES),
  qwen2: qwen2.Qwen2Config(**SIZES),
  phi3: phi3.Phi3Config(**SIZES),
}
TOKENS_BT = np.random.default_rng(1).integers(0, 40, (2, 12))


def config_of(kind, **fields):
  return adapters.AdapterConfig(
    **{'kind': kind, 'rank': R, 'alpha': 6.0, 'rules': ('kernel',), **fields}
  )


@functools.cache
def model_of(family):
  """A model and its parameters, away from their start."""
  model = family.make(CONFIGS[family])
  return model, drawn(jax.eval_shape(model.init, jax.random.key(0)))


def drawn(shapes, seed=0):
  """Random numbers; kernels' columns have lengths around 1."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    mean = float(path[-1].key in ('magnitude', 'scale'))
    return rng.normal(mean, 0.2, leaf.shape).astype(np.float32)

  return jax.tree.map_with_path(draw, shapes)


def adapters_of(config, family=llama):
  _, params = model_of(family)
  init = functools.partial(adapters.init, config)
  return drawn(jax.eval_shape(init, params, jax.random.key(0)), seed=2)


def logits_of(config, arrays, family=llama):
  model, params = model_of(family)
  apply = jax.jit(adapters.adapted(config, model.apply))
  return apply(adapters.combine(params, arrays), TOKENS_BT)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """Folders of the models, and what reads one into transformers anew."""
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('peft')
  root = tmp_path_factory.mktemp('base')
  for family, config in CONFIGS.items():
    hf.export(
      root / config.model_type,
      model_of(family)[1],
      family.HF_TENSORS,
      family.config_to_hf(config),
    )

  def load(family):
    folder = root / CONFIGS[family].model_type
    return transformers.AutoModelForCausalLM.from_pretrained(folder)

  return types.SimpleNamespace(root=root, load=load)


def their_logits(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model.eval()(torch.from_numpy(TOKENS_BT)).logits.numpy()


def assert_same(found, expected):
  found, expected = map(traverse_util.flatten_dict, (found, expected))
  assert found.keys() == expected.keys()
  for path in expected:
    np.testing.assert_array_equal(found[path], expected[path], str(path))


@pytest.mark.parametrize(
  ('family', 'kind'),
  [(llama, 'dora'), (qwen2, 'lora'), (phi3, 'lora')],
  ids=lambda x: x if isinstance(x, str) else x.__name__.split('.')[-1],
)
def test_peft_reads_an_export_and_gives_the_same_logits(
  base, tmp_path, family, kind
):
  theirs = pytest.importorskip('peft')
  # The head of LLaMA is adapted, too.
  rules = ('kernel',) if family is llama else ('layers/.*/kernel',)
  config = config_of(
    kind, rules=rules, dropout=0.25, rank_stabilized=family is qwen2
  )
  arrays = adapters_of(config, family)
  folder = tmp_path / 'adapter'
  peft.export(folder, config, arrays, family.HF_TENSORS, base=str(base.root))
  loaded = theirs.PeftModel.from_pretrained(base.load(family), folder)
  # Had a name been wrong, PEFT would have warned: warnings are errors here.
  np.testing.assert_allclose(
    their_logits(loaded), logits_of(config, arrays, family), atol=1e-5
  )
  fields = loaded.peft_config['default']
  assert (fields.r, fields.lora_alpha, fields.lora_dropout) == (R, 6, 0.25)
  assert fields.base_model_name_or_path == str(base.root)
  again, found = peft.read(folder, family.HF_TENSORS)
  assert_same(found, arrays)
  assert (again.kind, again.rank, again.scale) == (kind, R, config.scale)
  assert again.dropout == 0.25
  assert again.rank_stabilized == fields.use_rslora == (family is qwen2)
  # The rules choose the same kernels.
  assert_same(adapters_of(again, family), arrays)
  assert peft.read_config(folder, family.HF_TENSORS) == again


def test_what_peft_saves_is_read(base, tmp_path):
  theirs = pytest.importorskip('peft')
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  model = theirs.get_peft_model(
    base.load(llama),
    theirs.LoraConfig(
      r=R,
      lora_alpha=5,
      use_dora=True,
      use_rslora=True,
      target_modules='all-linear',
      init_lora_weights=False,
      task_type='CAUSAL_LM',
    ),
  )
  model.save_pretrained(tmp_path / 'adapter')
  config, arrays = peft.read(tmp_path / 'adapter', llama.HF_TENSORS)
  assert (config.kind, config.alpha, len(config.rules)) == ('dora', 5, 7)
  assert config.rank_stabilized
  expected = their_logits(model)
  np.testing.assert_allclose(logits_of(config, arrays), expected, atol=1e-5)
  with model.disable_adapter():
    assert np.abs(their_logits(model) - expected).max() > 0.1


# Refusals.


def message(call, *args, **options):
  with pytest.raises(ValueError) as error:
    call(*args, **options)
  return str(error.value)


def test_what_has_no_form_in_peft_is_not_exported(tmp_path):
  export = functools.partial(message, peft.export, tmp_path / 'out')
  config = config_of('gradnormlorp')
  text = export(config, adapters_of(config), llama.HF_TENSORS)
  assert text == (
    "Adapters of kind='gradnormlorp' have no form in peft, which trains "
    'through the norm for none. Export the merged model instead.'
  )
  config = config_of('lora')
  assert export(config, {}, llama.HF_TENSORS).startswith(
    'Nothing can be exported as adapters:'
  )
  arrays = {'classifier': adapters_of(config)['lm_head']}
  assert export(config, arrays, llama.HF_TENSORS) == (
    "['classifier'] can be exported as adapters: they must stand beside "
    "kernels with a Hugging Face name, such as ['layers/attn/k_proj', "
    "'layers/attn/o_proj', 'layers/attn/q_proj']."
  )
  arrays = adapters_of(config_of('dora'))
  assert 'Use the configuration that they were made with.' in export(
    config, arrays, llama.HF_TENSORS
  )
  assert not (tmp_path / 'out').exists()
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine').touch()
  assert 'it exists, and an export overwrites nothing.' in export(
    config, adapters_of(config), llama.HF_TENSORS
  )


@pytest.fixture
def folder(tmp_path):
  config = config_of('lora', rules=('q_proj/kernel', 'lm_head'))
  folder = tmp_path / 'adapter'
  peft.export(folder, config, adapters_of(config), llama.HF_TENSORS)
  return folder


def change(folder, **fields):
  path = folder / peft.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


MERGE = (
  'Merge the adapter in peft (merge_and_unload), save the model and start from '
  'that folder.'
)


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    (
      {'peft_type': 'LOHA'},
      "says peft_type='LOHA'; only 'LORA' is read, which is that of DoRA too.",
    ),
    (
      {'rank_pattern': {'q_proj': 4}, 'bias': 'all', 'modules_to_save': ['x']},
      "asks for what is not supported: modules_to_save=['x'], rank_pattern="
      "{'q_proj': 4}, bias='all'.",
    ),
    # Which changes the model's own weights; and a field of times to come.
    (
      {'init_lora_weights': 'pissa', 'use_wonder': True},
      'asks for what is not supported: use_wonder=True, init_lora_weights='
      "'pissa'.",
    ),
  ],
)
def test_configuration_that_is_not_ours_is_refused(folder, fields, text):
  change(folder, **fields)
  expected = f'{folder / peft.CONFIG} {text} {MERGE}'
  assert message(peft.read_config, folder, llama.HF_TENSORS) == expected


def test_fields_without_meaning_and_values_without_sense(folder):
  change(folder, layers_to_transform=[0, 1], lora_alpha=7.5, new=None)
  assert peft.read_config(folder, llama.HF_TENSORS).alpha == 7.5
  change(folder, r='3')
  assert message(peft.read, folder, llama.HF_TENSORS) == (
    f"Cannot read {folder / peft.CONFIG}: rank='3' must be an integer of at "
    'least 1.'
  )


def test_tensors_must_be_those_of_the_configuration(folder):
  path = folder / peft.WEIGHTS
  tensors = safetensors.numpy.load_file(path)
  q = 'base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight'

  def told(changed):
    safetensors.numpy.save_file(changed, path)
    return message(peft.read, folder, llama.HF_TENSORS)

  # One layer alone; or a tensor that is no adapter's.
  rest = {k: v for k, v in tensors.items() if k != q.format(1, 'B')}
  extra = {'base_model.model.lm_head.base_layer.weight': np.ones(1, 'f')}
  assert told(rest | extra) == (
    f"{path} must hold adapters of kind='lora' for all layers of what it "
    f'adapts, and nothing else. Missing: {[q.format(1, "B")]}. Extra: '
    f'{list(extra)}. {MERGE}'
  )
  far = {q.format(10**12, 'A'): np.ones((R, 32), 'f')}
  assert re.search(r'Missing: .*Extra: \[.*000000\.self', told(tensors | far))
  assert told(extra) == (
    f'{path} adapts no kernel of such a model: is it of another family? Its '
    f'tensors: {list(extra)}.'
  )
  other = {q.format(1, 'A'): np.ones((R + 1, 32), 'f')}
  assert told(tensors | other) == (
    f'{q.format(0, "A")} and those of other layers have the shapes '
    f'[(3, 32), (4, 32)] in {path}: they must have the same rank, r=3, in all '
    f'layers. {MERGE}'
  )
  codes = {q.format(1, 'A'): np.ones((R, 32), 'u1')}
  assert 'holds weights of other dtypes' in told(tensors | codes)
  path.write_bytes(b'?')
  assert message(peft.read, folder, llama.HF_TENSORS).startswith(
    f'Cannot read {path}: '
  )
  path.unlink()
  assert str(path) in message(peft.read, folder, llama.HF_TENSORS)


def test_products_are_of_numbers(folder):
  path = folder / peft.WEIGHTS
  change(folder, lora_alpha='16')
  with contextlib.ExitStack() as stack:
    assert "has lora_alpha='16'; expected a finite number." in message(
      peft.open_products, folder, stack
    )
  tensors = safetensors.numpy.load_file(path)
  codes = {name: x.astype(np.int8) for name, x in tensors.items()}
  safetensors.numpy.save_file(codes, path)
  with contextlib.ExitStack() as stack:
    assert 'holds weights of other dtypes' in message(
      peft.open_products, folder, stack
    )


def test_half_precision_is_kept(tmp_path):
  config = config_of('dora', rank=1)
  arrays = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), adapters_of(config)
  )
  peft.export(tmp_path / 'out', config, arrays, llama.HF_TENSORS)
  _, found = peft.read(tmp_path / 'out', llama.HF_TENSORS)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype('bfloat16')}
  assert_same(found, arrays)
