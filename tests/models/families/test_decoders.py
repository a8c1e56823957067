"""All families of decoders against transformers, which computes by PyTorch."""

import copy
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax import models
from gnlorp_jax.models import hf

# Odd sizes, grouped heads, more positions than the original context.
SIZES = {
  'vocab_size': 53,
  'hidden_size': 36,
  'intermediate_size': 50,
  'num_hidden_layers': 5,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
  'initializer_range': 0.3,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 1000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 500.0,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 200.0, 'factor': 3.0}
LONGROPE = {
  'rope_type': 'longrope',
  'rope_theta': 500.0,
  'partial_rotary_factor': 0.7,
  'short_factor': [1.0, 1.5],
  'long_factor': [2.0, 7.0],
}
CASES = {
  'llama': ('LlamaConfig', {}),
  'llama-3.1': ('LlamaConfig', {'rope_parameters': LLAMA3}),
  'llama, linear, biases, tied': (
    'LlamaConfig',
    {
      'rope_parameters': LINEAR,
      'attention_bias': True,
      'mlp_bias': True,
      'tie_word_embeddings': True,
    },
  ),
  'llama, yarn, free heads': (
    'LlamaConfig',
    {'rope_parameters': YARN, 'head_dim': 10},
  ),
  'mistral': ('MistralConfig', {'sliding_window': 7}),
  'mistral, nemo': ('MistralConfig', {'sliding_window': None, 'head_dim': 8}),
  'qwen2': ('Qwen2Config', {'tie_word_embeddings': True}),
  'qwen2, yarn, some windows': (
    'Qwen2Config',
    {
      'rope_parameters': YARN,
      'use_sliding_window': True,
      'sliding_window': 6,
      'max_window_layers': 2,
    },
  ),
  'qwen3': ('Qwen3Config', {'head_dim': 14}),
  'smollm3': ('SmolLM3Config', {'rope_parameters': YARN}),
  'smollm3, windows': (
    'SmolLM3Config',
    {
      'no_rope_layers': [1, 0, 1, 1, 0],
      'use_sliding_window': True,
      'sliding_window': 9,
      'tie_word_embeddings': False,
    },
  ),
  'phi3': (
    'Phi3Config',
    {
      'rope_parameters': LONGROPE,
      'original_max_position_embeddings': 60,
      'sliding_window': 8,
      'tie_word_embeddings': True,
    },
  ),
  'phi3, long': (
    'Phi3Config',
    {'rope_parameters': LONGROPE, 'original_max_position_embeddings': 16},
  ),
  'gemma2': (
    'Gemma2Config',
    {
      'head_dim': 10,
      'query_pre_attn_scalar': 7,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 3.0,
      'sliding_window': 6,
      'initializer_range': 0.1,
    },
  ),
  'gemma3, caps and scaling': (
    'Gemma3TextConfig',
    {
      'head_dim': 14,
      'query_pre_attn_scalar': 9,
      'final_logit_softcapping': 4.0,
      'sliding_window': 5,
      'sliding_window_pattern': 3,
      'tie_word_embeddings': False,
      'rope_parameters': {
        'full_attention': LINEAR,
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 30.0},
      },
      'initializer_range': 0.1,
    },
  ),
}
TOKENS = np.random.default_rng(0).integers(3, 53, (2, 48))


@functools.cache
def oracle(case, folder):
  """transformers' model, written into a folder, its logits and gradients."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  name, changes = CASES[case]
  torch.manual_seed(0)
  config = getattr(transformers, name)(
    **{**SIZES, **copy.deepcopy(changes)}, attn_implementation='eager'
  )
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for key, p in model.named_parameters():
      if p.ndim == 1:  # Norms and biases start at ones and zeros.
        p.add_(0.3 * torch.randn_like(p))
      elif 'embed' in key or 'lm_head' in key:
        p.mul_(0.7)
  model.save_pretrained(folder)
  ids = torch.from_numpy(TOKENS)
  found = model(ids, labels=ids)
  found.loss.backward()
  gradients = {key: p.grad.numpy() for key, p in model.named_parameters()}
  return found.logits.detach().numpy(), gradients


@functools.cache
def ours(folder):
  """The model of a folder, and its parameters."""
  config_hf = hf.load_config(folder)
  family = models.family_of(config_hf)
  model = family.make(family.config_from_hf(config_hf))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return model, hf.load_params(folder, family.HF_TENSORS, shapes)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return tmp_path_factory.mktemp('families')


def folder_of(folders, case):
  return folders / case.replace(', ', '_')


def loss_and_logits(model, params):
  logits = model.apply(params, TOKENS)
  log_probs = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)
  return -picked.mean(), logits


def relative_error(got, expected):
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def to_hf_names(family, tree):
  """Arrays by Hugging Face's names, in its layout."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  found = {}
  for path, name, is_transposed in family.HF_TENSORS:
    if path not in flat:
      continue
    # Later rows of a path name copies.
    value = np.asarray(flat.pop(path))
    stacked = value if '{layer}' in name else value[None]
    for layer, x in enumerate(stacked):
      found[name.format(layer=layer)] = x.T if is_transposed else x
  return found


@pytest.mark.parametrize('case', CASES)
def test_logits_gradients_and_export_equal_pytorch(folders, case):
  folder = folder_of(folders, case)
  expected, gradients = oracle(case, folder)
  model, params = ours(folder)
  family = models.family(model.config)
  value_and_grad = jax.jit(
    jax.value_and_grad(functools.partial(loss_and_logits, model), has_aux=True)
  )
  (_, logits), grads = value_and_grad(params)
  assert np.std(expected) > 0.3
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  found = to_hf_names(family, grads)
  assert found.keys() == gradients.keys()
  for name, want in gradients.items():
    assert relative_error(found[name], want) < 1e-4, name

  # Written by us, read by transformers and by us.
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  again = folder.with_name(f'{folder.name}_again')
  hf_config = family.config_to_hf(
    model.config, bos_token_id=1, eos_token_id=2, pad_token_id=0
  )
  hf.export(again, params, family.HF_TENSORS, hf_config)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    again, attn_implementation='eager'
  )
  with torch.no_grad():
    read_back = theirs(torch.from_numpy(TOKENS)).logits.numpy()
  np.testing.assert_array_equal(read_back, expected)
  assert family.config_from_hf(hf.load_config(again)) == model.config


@pytest.mark.parametrize('case', CASES)
def test_packed_documents_are_each_document_alone(folders, case):
  folder = folder_of(folders, case)
  oracle(case, folder)
  model, params = ours(folder)
  lengths = (20, 9, 19)
  segments = np.repeat([1, 2, 3], lengths)[None].repeat(2, axis=0)
  apply = jax.jit(model.apply)
  packed = apply(params, TOKENS, None, segments)
  fns = model.layer_fns

  @jax.jit
  def layerwise(params):
    context = fns.context(TOKENS, jnp.asarray(segments))
    x = fns.embed(params, TOKENS)
    for number in range(model.config.num_layers):
      layer = jax.tree.map(lambda leaf, n=number: leaf[n], params['layers'])
      x = fns.block(layer, x, context, jnp.int32(number))
    return fns.head(params, x)

  np.testing.assert_allclose(layerwise(params), packed, atol=1e-5)
  start = 0
  for length in lengths:
    # One program for all: what follows a document does not change it.
    alone = np.zeros_like(TOKENS)
    alone[:, :length] = TOKENS[:, start : start + length]
    expected = apply(params, alone, None, np.ones_like(segments))[:, :length]
    np.testing.assert_allclose(
      packed[:, start : start + length], expected, atol=1e-5
    )
    start += length


@pytest.mark.parametrize('case', CASES)
def test_a_cache_changes_no_logit(folders, case):
  folder = folder_of(folders, case)
  expected, _ = oracle(case, folder)
  model, params = ours(folder)
  pad = np.array([3, 0])  # The first row is shorter.
  tokens = np.stack(
    [np.roll(row, p) for row, p in zip(TOKENS, pad, strict=True)]
  )
  positions = np.arange(48) - pad[:, None]

  @functools.partial(jax.jit, static_argnums=1)
  def run(params, cuts):
    cache, found = model.start_cache(2, 50), []
    for start, stop in itertools.pairwise(cuts):
      x, cache = model.extend(
        params, tokens[:, start:stop], positions[:, start:stop], cache
      )
      found.append(model.logits(params, x))
    return jnp.concatenate(found, axis=1)

  got = np.asarray(run(params, (0, 40, 41, 48)))
  np.testing.assert_allclose(got[0, 3:], expected[0, :-3], atol=1e-4)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-4)


def test_layers_that_differ_need_their_number(folders):
  case = 'smollm3'
  oracle(case, folder_of(folders, case))
  model, params = ours(folder_of(folders, case))
  layer = jax.tree.map(lambda leaf: leaf[0], params['layers'])
  with pytest.raises(ValueError, match='^The layers of this model differ, and'):
    model.layer_fns.block(layer, jnp.zeros((1, 4, 36)))


# Configurations.

BASE = {k: v for k, v in SIZES.items() if not k.endswith('token_id')}


def config_of(model_type, **changes):
  hf_config = {**BASE, 'model_type': model_type, **changes}
  return models.family_of(hf_config).config_from_hf(hf_config)


def test_every_reason_is_named_at_once():
  changes = {
    'hidden_act': 'gelu',
    'attention_dropout': 0.1,
    'quantization_config': {'bits': 4},
    'rope_scaling': {'type': 'dynamic', 'factor': 2.0},
    'hidden_size': None,
    'partial_rotary_factor': 0.5,
  }
  with pytest.raises(ValueError) as error:
    config_of('llama', **changes)
  assert str(error.value) == (
    "Unsupported LLaMA configuration: hidden_act='gelu' (supported: 'silu'), "
    'attention_dropout=0.1 (supported: 0.0), '
    "quantization_config={'bits': 4} (supported: None), "
    "the fields ['hidden_size'] are missing, "
    "rope_type='dynamic' (supported: ['default', 'linear', 'llama3', 'yarn', "
    "'longrope']; its frequencies change with the length of a sequence), "
    'partial_rotary_factor=0.5 (supported: 1.0).'
  )


def test_sizes_that_no_model_has_are_refused_by_arithmetic():
  with pytest.raises(ValueError) as error:
    config_of(
      'smollm3', num_hidden_layers=10**9, hidden_size='wide', head_dim=8.0
    )
  assert str(error.value) == (
    "Unsupported SmolLM3 configuration: hidden_size='wide' (supported: whole "
    'numbers from 1 to 2147483647), num_hidden_layers=1000000000 (supported: '
    'whole numbers from 1 to 10000), head_dim=8.0 (supported: whole numbers '
    'from 1 to 2147483647).'
  )


ANY = ['x', [], {}, True, -1, 1.5, ['a'], {'a': 1}, 10**30, float('nan')]


@pytest.mark.parametrize('model_type', models.family_names())
def test_any_value_of_any_field_is_read_or_refused(model_type):
  family = models.family_of({'model_type': model_type})
  (config, *_) = family.PRESETS.values()
  whole = family.config_to_hf(config)
  refused = set()
  for field in (
    *whole,
    *('rope_scaling', 'rope_parameters', 'partial_rotary_factor'),
    *('layer_types', 'sliding_window_pattern', 'no_rope_layers'),
  ):
    for value in ANY:
      try:  # Nothing but a ValueError may come of it.
        family.config_from_hf({**whole, field: copy.deepcopy(value)})
      except ValueError:
        refused.add(field)
  sizes = {'vocab_size', 'hidden_size', 'num_hidden_layers'}
  assert refused >= {*sizes, 'initializer_range', 'max_position_embeddings'}


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'rms_norm_eps': '1e-5'}, "rms_norm_eps='1e-5' (supported: a number)."),
    (
      {'tie_word_embeddings': 'no', 'initializer_range': [1]},
      "tie_word_embeddings='no' (supported: True or False), initializer_range="
      '[1] (supported: a number).',
    ),
    (
      {'rope_scaling': [2], 'rope_parameters': 3},
      'rope_scaling=[2] (supported: an object, or null), rope_parameters=3 '
      '(supported: an object, or null).',
    ),
    ({'rope_theta': '1e6'}, "rope_theta='1e6' (supported: a number)."),
  ],
)
def test_values_of_other_types_are_named_with_theirs(changes, text):
  with pytest.raises(ValueError) as error:
    config_of('llama', **changes)
  assert str(error.value) == f'Unsupported LLaMA configuration: {text}'


def test_class_without_a_type_is_no_family_but_a_hint():
  for name, family in (('Mistral', 'mistral'), ('Gemma3', 'gemma3_text')):
    with pytest.raises(ValueError) as error:
      models.family_of({'architectures': [f'{name}ForCausalLM'], **BASE})
    assert str(error.value).endswith(
      f"Its architectures=['{name}ForCausalLM'] are of "
      f'"model_type": "{family}": add it.'
    )
  for other in (['MambaForCausalLM'], 3, [], [3]):
    with pytest.raises(ValueError, match=r"'smollm3'\]\)\.$"):
      models.family_of({'architectures': other})


def test_unknown_families_are_refused_by_name():
  with pytest.raises(ValueError) as error:
    models.family_of({'model_type': 'mamba'})
  assert str(error.value) == (
    "Unsupported model: model_type='mamba' (supported: "
    f'{list(models.family_names())}).'
  )
  with pytest.raises(ValueError) as error:
    models.family_of(
      {'model_type': 'gemma3', 'text_config': {'model_type': 'gemma3_text'}}
    )
  assert str(error.value).endswith(
    "'smollm3']). Its text_config is of model_type='gemma3_text': save that "
    'part by itself with transformers.'
  )


@pytest.mark.parametrize(
  'spelling',
  [
    {'rope_theta': 5.0, 'rope_scaling': {'type': 'linear', 'factor': 2.0}},
    {'rope_theta': 5.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}},
    {
      'rope_theta': None,
      'rope_parameters': {
        'rope_type': 'linear',
        'factor': 2.0,
        'rope_theta': 5.0,
      },
    },
  ],
)
def test_rotary_positions_in_old_and_new_spellings(spelling):
  config = config_of('llama', **spelling)
  assert config.rope_theta == 5.0 and config.rope_scaling.factor == 2.0


@pytest.mark.parametrize(
  'old',
  [
    {
      'rope_theta': 2e5,
      'rope_local_base_freq': 3e3,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
      'sliding_window_pattern': 2,
      'sliding_window': 8,
      'use_bidirectional_attention': None,
    },
    {'rope_parameters': {'full_attention': LINEAR, 'sliding_attention': None}},
    {'layer_types': ['full_attention'] * 5, 'sliding_window': None},
  ],
)
def test_gemma_3_in_old_and_new_spellings(old):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.Gemma3TextConfig(**BASE, **copy.deepcopy(old))
  new = json.loads(theirs.to_json_string())
  family = models.family_of(new)
  found = config_of('gemma3_text', **old)
  assert found == family.config_from_hf(new)
  assert found == family.config_from_hf(family.config_to_hf(found))
  thetas = {kind: r['rope_theta'] for kind, r in new['rope_parameters'].items()}
  ropes = found.ropes
  # One stands for all layers where these are alike.
  ropes *= found.num_layers // len(ropes)
  assert [r.theta for r in ropes] == [thetas[k] for k in new['layer_types']]


@pytest.mark.parametrize('max_seq_len', [64, 40])
def test_phi_3_in_old_and_new_spellings(max_seq_len):
  transformers = pytest.importorskip('transformers')
  factors = {'short_factor': [1.0, 1.5], 'long_factor': [2.0, 7.0]}
  old = {
    'rope_scaling': {'type': 'longrope', **factors},
    'rope_theta': 300.0,
    'partial_rotary_factor': 0.7,
    'original_max_position_embeddings': 16,
  }
  theirs = transformers.Phi3Config(**BASE, **copy.deepcopy(old))
  new = json.loads(theirs.to_json_string())
  family = models.family_of(new)
  found = config_of('phi3', **old)
  assert found == family.config_from_hf(new)
  older = old | {'rope_scaling': {'type': 'su', **factors}}
  assert found == config_of('phi3', **older)
  assert found.rope_scaling.factor == 4 and found.rotary_width == 4
  # What its scaling was made for stays, however long its sequences are.
  found = dataclasses.replace(found, max_seq_len=max_seq_len)
  written = family.config_to_hf(found)
  assert family.config_from_hf(written) == found
  # transformers 4 takes three fields, and infers from them what is the same.
  assert (len(written['rope_scaling']) == 3) == (max_seq_len == 64)
  again = json.loads(transformers.Phi3Config(**written).to_json_string())
  assert family.config_from_hf(again) == found


def test_gemma_2_without_caps():
  config = config_of(
    'gemma2', attn_logit_softcapping=None, final_logit_softcapping=None
  )
  assert config.score_rule == (1 / 16, None) and config.final_softcap is None
  config = config_of('gemma2')
  assert config.score_rule == (1 / 16, 50.0) and config.final_softcap == 30.0


def test_what_is_absent_means_what_it_means_to_transformers():
  transformers = pytest.importorskip('transformers')
  for name, model_type in (
    ('LlamaConfig', 'llama'),
    ('MistralConfig', 'mistral'),
    ('Qwen2Config', 'qwen2'),
    ('Qwen3Config', 'qwen3'),
    ('SmolLM3Config', 'smollm3'),
    ('Phi3Config', 'phi3'),
    ('Gemma2Config', 'gemma2'),
    ('Gemma3TextConfig', 'gemma3_text'),
  ):
    least = {
      k: BASE[k]
      for k in (
        'vocab_size',
        'hidden_size',
        'intermediate_size',
        'num_hidden_layers',
        'max_position_embeddings',
      )
    } | {'num_attention_heads': 32, 'hidden_size': 64}
    theirs = json.loads(getattr(transformers, name)(**least).to_json_string())
    family = models.family_of(theirs)
    found = family.config_from_hf({'model_type': model_type, **least})
    expected = family.config_from_hf(theirs)
    found = dataclasses.replace(found, num_kv_heads=found.kv_heads)
    assert found == expected, name


def test_of_two_scalings_the_one_that_transformers_reads_counts():
  transformers = pytest.importorskip('transformers')
  both = {
    'rope_theta': 5.0,
    'rope_scaling': {'type': 'linear', 'factor': 2.0},
    'rope_parameters': {'rope_type': 'linear', 'factor': 4.0},
  }
  theirs = transformers.LlamaConfig.from_dict({**BASE, **copy.deepcopy(both)})
  found = config_of('llama', **both)
  assert found.rope_scaling.factor == theirs.rope_parameters['factor'] == 2.0
  assert found.rope_theta == theirs.rope_parameters['rope_theta'] == 5.0


@pytest.mark.parametrize('model_type', ['qwen2', 'qwen3', 'smollm3'])
def test_key_value_heads_of_null_are_as_many_as_queries(model_type):
  transformers = pytest.importorskip('transformers')
  kind = transformers.CONFIG_MAPPING[model_type]
  theirs = kind.from_dict({**BASE, 'num_key_value_heads': None})
  found = config_of(model_type, num_key_value_heads=None)
  assert found.kv_heads == theirs.num_key_value_heads == 6


def test_rope_theta_of_null_is_the_default():
  assert config_of('llama', rope_theta=None).rope_theta == 10000.0
  assert config_of('smollm3', rope_theta=None).rope_theta == 2e6


@pytest.mark.parametrize(
  'model_type, changes, text',
  [
    (
      'mistral',
      {'sliding_window': 4, 'layer_types': ['sliding_attention'] * 4},
      'Unsupported Mistral configuration: layer_types=',
    ),
    (
      'smollm3',
      {'no_rope_layers': [1], 'use_sliding_window': True, 'sliding_window': 4},
      'Unsupported SmolLM3 configuration: no_rope_layers=[1] (supported: 5 '
      'values).',
    ),
    (
      'smollm3',
      {'no_rope_layer_interval': 0},
      'Unsupported SmolLM3 configuration: no_rope_layer_interval=0 (supported: '
      'a number > 0).',
    ),
    (
      'gemma2',
      {'layer_types': 5},
      "Unsupported Gemma 2 configuration: layer_types=5 (supported: 'sliding_",
    ),
    (
      'llama',
      {'rope_parameters': {'full_attention': LINEAR}},
      "Unsupported LLaMA configuration: rope_parameters={'full_attention': "
      f'{LINEAR}}} (supported: the same for all layers).',
    ),
    (
      'gemma2',
      {
        'attention_bias': True,
        'hidden_activation': 'gelu',
        'use_bidirectional_attention': True,
        'sliding_window': None,
      },
      "Unsupported Gemma 2 configuration: hidden_activation='gelu' (supported: "
      "'gelu_pytorch_tanh'), attention_bias=True (supported: False), "
      'use_bidirectional_attention=True (supported: False), '
      'sliding_window=None (supported: a number, as layers slide).',
    ),
    (
      'gemma3_text',
      {
        'attn_logit_softcapping': 50.0,
        'rope_parameters': {'sliding_attention': LINEAR, 'rope_theta': 1.0},
      },
      'Unsupported Gemma 3 configuration: attn_logit_softcapping=50.0 '
      "(supported: None), rope_parameters={'rope_theta': 1.0} (supported: "
      "those of 'full_attention' and of 'sliding_attention'), "
      "rope_type='linear' of 'sliding_attention' (supported: 'default').",
    ),
    (
      'gemma3_text',
      {'sliding_window_pattern': 0},
      'Unsupported Gemma 3 configuration: sliding_window_pattern=0 (supported: '
      'a number > 0).',
    ),
    (
      'phi3',
      {'rope_scaling': LINEAR, 'resid_pdrop': 0.1},
      'Unsupported Phi 3 configuration: resid_pdrop=0.1 (supported: 0.0), '
      "rope_type='linear' (supported: 'default', 'longrope').",
    ),
    (
      'phi3',
      {'partial_rotary_factor': 0.5},
      'partial_rotary_factor=0.5 of 6 features are 3: this must be even',
    ),
    (
      'phi3',
      {'partial_rotary_factor': 1.5},
      'partial_rotary_factor=1.5 must be in (0, 1].',
    ),
    (
      'phi3',
      {'rope_scaling': LONGROPE | {'partial_rotary_factor': None}},
      'short_factor of rope_scaling has 2 factors, and 3 pairs of features',
    ),
    (
      'gemma2',
      {'query_pre_attn_scalar': 0},
      'query_pre_attn_scalar=0 must be positive.',
    ),
    (
      'qwen2',
      {'head_dim': 7},
      'head_dim=7 must be even: rotary positions turn pairs of features.',
    ),
  ],
)
def test_impossible_layers_are_refused(model_type, changes, text):
  with pytest.raises(ValueError) as error:
    config_of(model_type, **changes)
  assert str(error.value).startswith(text)


@pytest.mark.parametrize(
  'name, billions',
  [
    ('llama-3.1-8b', 8.03),
    ('mistral-7b', 7.25),
    ('qwen2.5-0.5b', 0.494),
    ('qwen2.5-1.5b', 1.54),
    ('qwen2.5-7b', 7.62),
    ('qwen3-0.6b', 0.596),
    ('qwen3-8b', 8.19),
    ('smollm3-3b', 3.08),
    ('phi-3-mini-4k', 3.82),
    ('phi-4', 14.66),
    ('gemma-2-2b', 2.61),
    ('gemma-2-9b', 9.24),
    ('gemma-3-270m', 0.268),
    ('gemma-3-1b', 1.0),
  ],
)
def test_presets_of_today_have_their_published_sizes(name, billions):
  config = models.presets()[name]
  count = models.family(config).num_params(config) / 1e9
  assert abs(count / billions - 1) < 0.005
