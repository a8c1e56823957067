import math
import re

import jax
import pytest
from flax import traverse_util

from gnlorp_jax.models import llama

SMALL = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_layers': 3,
  'num_heads': 4,
  'num_kv_heads': 2,
  'max_seq_len': 16,
}


def abstract(config):
  return jax.eval_shape(llama.make(config).init, jax.random.key(0))


def paths(params):
  return traverse_util.flatten_dict(params, sep='/')


# Configuration.


@pytest.mark.parametrize(
  'change, text',
  [
    ({'num_layers': 0}, 'num_layers=0 must be positive.'),
    ({'num_kv_heads': -2}, 'num_kv_heads=-2 must be positive.'),
    ({'rms_norm_eps': 0.0}, 'rms_norm_eps=0.0 must be positive.'),
    (
      {'rms_norm_eps': float('inf')},
      'rms_norm_eps=inf must be a finite number.',
    ),
    (
      {'hidden_size': 30},
      'hidden_size=30 must be a multiple of num_heads=4.',
    ),
    (
      {'hidden_size': 36},
      'hidden_size / num_heads = 9 must be even: rotary positions turn pairs '
      'of features. Change hidden_size or num_heads, or give head_dim.',
    ),
    (
      {'num_kv_heads': 3},
      'num_heads=4 must be a multiple of num_kv_heads=3.',
    ),
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
    llama.LlamaConfig(**{**SMALL, **change})
  assert str(error.value) == text


@pytest.mark.parametrize(
  'name, total, projected',
  [
    ('9m', 9.00, 0.80),
    ('20m', 19.55, 3.16),
    ('35m', 35.20, 10.62),
    ('40m', 42.39, 15.76),
    ('60m', 58.07, 25.30),
    ('71m', 70.58, 37.80),
    ('100m', 100.12, 59.01),
    ('130m', 134.11, 84.93),
    ('250m', 247.37, 198.18),
    ('350m', 367.97, 302.38),
    ('1b', 1339.08, 1207.91),
    ('3b', 2685.83, 2521.83),
    ('7b', 6738.42, 6476.01),
  ],
)
def test_preset_has_published_size(name, total, projected):
  config = llama.preset(name)
  low_rank = sum(
    math.prod(leaf.shape)
    for path, leaf in paths(abstract(config)).items()
    if re.search(llama.LABEL_RULES[0][0], path)
  )
  assert round(llama.num_params(config) / 1e6, 2) == total
  assert round(low_rank / 1e6, 2) == projected


def test_presets_are_the_tested_ones():
  assert len(llama.PRESETS) == 14
  assert llama.preset('7b').max_seq_len == 2048
  assert llama.preset('1b').max_seq_len == 1024


def test_preset_overrides_fields():
  config = llama.preset('60m', remat=True, vocab_size=100)
  assert (config.remat, config.vocab_size, config.hidden_size) == (
    True,
    100,
    512,
  )


def test_preset_names_choices_and_nearest():
  with pytest.raises(ValueError) as error:
    llama.preset('60M')
  assert str(error.value) == (
    "Unknown model '60M'; expected one of ('9m', '20m', '35m', '40m', '60m', "
    "'71m', '100m', '130m', '250m', '350m', '1b', '3b', '7b', 'llama-3.1-8b'). "
    "Did you mean '60m'?"
  )


# Parameters and cost.


def test_label_rules_project_the_matrices_of_the_blocks():
  params = abstract(llama.LlamaConfig(**SMALL))
  labels = {
    path: next(
      label for rule, label in llama.LABEL_RULES if re.search(rule, path)
    )
    for path in paths(params)
  }
  low_rank = {path for path, label in labels.items() if label == 'low_rank'}
  assert low_rank == {
    *(f'layers/attn/{x}_proj/kernel' for x in 'qkvo'),
    *(f'layers/mlp/{x}_proj/kernel' for x in ('gate', 'up', 'down')),
  }
  assert set(labels.values()) == {'low_rank', 'full'}


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('num_kv_heads', [1, 4])
def test_flops_per_token_equal_those_of_the_traced_step(
  matmul_flops, tied, num_kv_heads
):
  changes = {'tie_embeddings': tied, 'num_kv_heads': num_kv_heads}
  c = llama.LlamaConfig(**{**SMALL, **changes})
  model = llama.make(c)
  step = jax.grad(lambda params, tokens: model.apply(params, tokens).sum())
  tokens = jax.ShapeDtypeStruct((2, 8), 'int32')
  counted = matmul_flops(jax.make_jaxpr(step)(abstract(c), tokens).jaxpr)
  # The scores are computed again for the gradient, which does not count.
  again = 2 * c.num_layers * c.hidden_size * 8
  assert counted == 2 * 8 * (llama.flops_per_token(c, 8) + again)
