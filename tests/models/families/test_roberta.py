import re

import jax
import jax.numpy as jnp
import pytest

from gnlorp_jax.models import roberta
from tests.models.small_roberta import (
  MASKED_LM,
  SMALL,
  build,
  paths,
  sequences,
)

# Configuration.


@pytest.mark.parametrize(
  'change, text',
  [
    ({'num_layers': 0}, 'num_layers=0 must be positive.'),
    ({'layer_norm_eps': -1.0}, 'layer_norm_eps=-1.0 must be positive.'),
    ({'num_types': 0}, 'num_types=0 must be positive.'),
    ({'hidden_size': 30}, 'hidden_size=30 must be a multiple of num_heads=4.'),
    ({'pad_id': 61}, 'pad_id=61 must be in [0, vocab_size=61).'),
    ({'pad_id': -1}, 'pad_id=-1 must be in [0, vocab_size=61).'),
    ({'hidden_dropout': 1.0}, 'hidden_dropout=1.0 must be in [0, 1).'),
    ({'attention_dropout': -0.1}, 'attention_dropout=-0.1 must be in [0, 1).'),
    ({'classifier_dropout': 2.0}, 'classifier_dropout=2.0 must be in [0, 1).'),
    (
      {'param_dtype': 'float16'},
      "Unknown param_dtype 'float16'; expected one of ('bfloat16', 'float32').",
    ),
    (
      {'compute_dtype': 'int8'},
      "Unknown compute_dtype 'int8'; expected one of ('bfloat16', 'float32').",
    ),
  ],
)
def test_config_refuses_impossible_values(change, text):
  with pytest.raises(ValueError) as error:
    roberta.RobertaConfig(**{**SMALL, **change})
  assert str(error.value) == text


# Of the published `roberta-base` and `roberta-large`.
@pytest.mark.parametrize(
  'name, count', [('base', 124_697_433), ('large', 355_412_057)]
)
def test_preset_has_published_size(name, count):
  assert roberta.num_params(roberta.preset(name)) == count


@pytest.mark.parametrize('name', roberta.PRESETS)
def test_num_params_equals_that_of_transformers(name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = roberta.preset(name)
  with torch.device('meta'):
    oracle = transformers.RobertaForMaskedLM(
      transformers.RobertaConfig(**roberta.config_to_hf(config))
    )
  assert roberta.num_params(config) == oracle.num_parameters()


def test_preset_overrides_fields():
  config = roberta.preset('base', remat=True, num_types=2)
  assert (config.remat, config.num_types, config.hidden_size) == (True, 2, 768)
  assert (config.max_seq_len, config.num_positions) == (512, 514)


def test_preset_names_choices_and_nearest():
  with pytest.raises(ValueError) as error:
    roberta.preset('Bse')
  assert str(error.value) == (
    "Unknown model 'Bse'; expected one of ('tiny', 'mini', 'small', 'base', "
    "'large'). Did you mean 'base'?"
  )


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_label_rules_project_the_matrices_of_the_blocks(head):
  labels = {
    path: next(
      label for rule, label in roberta.LABEL_RULES if re.search(rule, path)
    )
    for path in paths(build(head)[1])
  }
  low_rank = {path for path, label in labels.items() if label == 'low_rank'}
  assert low_rank == {
    *(f'layers/attn/{x}_proj/kernel' for x in 'qkvo'),
    *(f'layers/mlp/{x}_proj/kernel' for x in ('up', 'down')),
  }
  assert set(labels.values()) == {'low_rank', 'full'}


@pytest.mark.parametrize('predicted', [1.0, 0.25])
def test_flops_per_token_equal_those_of_the_traced_step(
  matmul_flops, predicted
):
  model, params = build()
  tokens = sequences((8, 8), 8)

  def loss(params):
    x_BTD = model.hidden(params, tokens)
    picked = x_BTD[:, : int(8 * predicted)]
    return jnp.square(model.logits(params, picked)).sum()

  counted = matmul_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
  # Attention's two products are computed a second time, which is not counted.
  again = 2 * 2 * model.config.num_layers * 8 * model.config.hidden_size
  per_token = roberta.flops_per_token(model.config, 8, predicted) + again
  assert counted == 2 * 8 * per_token


# Configurations of Hugging Face.


@pytest.mark.parametrize('name', roberta.PRESETS)
def test_config_survives_the_way_there_and_back(name):
  config = roberta.preset(
    name,
    param_dtype='bfloat16',
    pad_id=7,
    num_types=2,
    hidden_dropout=0.2,
    attention_dropout=0.3,
    classifier_dropout=0.4,
    layer_norm_eps=1e-3,
    initializer_std=0.5,
  )
  for each in (config, roberta.preset(name)):
    assert roberta.config_from_hf(roberta.config_to_hf(each)) == each


def test_config_names_the_special_tokens():
  config = roberta.config_to_hf(
    roberta.preset('base'), bos_token_id=0, eos_token_id=2, pad_token_id=1
  )
  special = [config[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')]
  assert special == [0, 2, 1]
  assert config['max_position_embeddings'] == 514


def test_pad_token_of_another_id_is_refused():
  with pytest.raises(ValueError) as error:
    roberta.config_to_hf(roberta.preset('base'), pad_token_id=0)
  assert str(error.value) == (
    'pad_token_id=0 differs from the pad_id=1 that the model was built with. '
    'Give the model the pad_id of its tokenizer.'
  )


HF_CONFIG = {
  'model_type': 'roberta',
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 18,
}


def test_absent_fields_mean_the_defaults_of_transformers():
  transformers = pytest.importorskip('transformers')
  oracle = transformers.RobertaConfig(**HF_CONFIG)
  got = roberta.config_from_hf(HF_CONFIG)
  assert got == roberta.config_from_hf(oracle.to_dict())
  assert got.layer_norm_eps == oracle.layer_norm_eps == 1e-12
  assert got.num_types == oracle.type_vocab_size == 2
  assert (got.pad_id, got.max_seq_len) == (oracle.pad_token_id, 16)


@pytest.mark.parametrize(
  'change, wrong',
  [
    ({'model_type': 'bert'}, "model_type='bert' (supported: 'roberta')"),
    (
      {'hidden_act': 'gelu_new', 'is_decoder': True},
      "hidden_act='gelu_new' (supported: 'gelu'), is_decoder=True "
      '(supported: False)',
    ),
    (
      {'position_embedding_type': 'relative_key'},
      "position_embedding_type='relative_key' (supported: 'absolute')",
    ),
    (
      {'tie_word_embeddings': False},
      'tie_word_embeddings=False (supported: True)',
    ),
    (
      {'quantization_config': {'bits': 4}},
      "quantization_config={'bits': 4} (supported: None)",
    ),
  ],
)
def test_unsupported_fields_are_named(change, wrong):
  with pytest.raises(ValueError) as error:
    roberta.config_from_hf({**HF_CONFIG, **change})
  assert str(error.value) == f'Unsupported RoBERTa configuration: {wrong}.'


def test_missing_fields_are_named():
  config = dict(HF_CONFIG)
  del config['vocab_size'], config['max_position_embeddings']
  with pytest.raises(ValueError) as error:
    roberta.config_from_hf(config)
  assert str(error.value) == (
    "RoBERTa configuration lacks the fields ['vocab_size', "
    "'max_position_embeddings']."
  )
