"""Labels: defaults, strict rules, and their errors."""

import re

import jax
import jax.numpy as jnp
import pytest

from gnlorp_jax.optim import galore, report
from gnlorp_jax.optim.parts.labels import assign, default_assignment, labels

PARAMS = {
  'embed': {'embedding': jnp.zeros((10, 4))},
  'layers': {
    'attn': {'q_proj': {'kernel': jnp.zeros((2, 4, 4))}},
    'norm': {'scale': jnp.zeros((2, 4))},
  },
  'lm_head': {'kernel': jnp.zeros((4, 10))},
  'dense': {'kernel': jnp.zeros((4, 6)), 'bias': jnp.zeros(6)},
}


def label_of(path, param_labels=None, params=PARAMS):
  tree = labels(param_labels)(params)
  for key in path.split('/'):
    tree = tree[key]
  return tree


@pytest.mark.parametrize(
  ('path', 'label'),
  [
    ('embed/embedding', 'full'),
    ('layers/attn/q_proj/kernel', 'low_rank'),
    ('layers/norm/scale', 'full'),
    ('lm_head/kernel', 'full'),
    ('dense/kernel', 'low_rank'),
    ('dense/bias', 'full'),
  ],
)
def test_default_projects_kernels_but_not_heads(path, label):
  assert label_of(path) == label


@pytest.mark.parametrize(
  ('name', 'shape', 'label'),
  [
    ('MultiHeadAttention_0/q_proj/kernel', (2, 4, 4), 'low_rank'),
    ('head/kernel', (4, 4), 'full'),
    ('word_embeddings/kernel', (4, 4), 'full'),
    ('LayerNorm_0/kernel', (4, 4), 'full'),
    ('linear/weight', (4, 4), 'low_rank'),  # Equinox's.
    ('conv/weight', (4, 4, 3), 'full'),
    ('embed/weight', (4, 4), 'full'),
    ('wte/weight', (4, 4), 'full'),
    ('linear/w', (4, 4), 'low_rank'),  # Haiku's.
    ('conv/w', (3, 4, 4), 'full'),
    ('attn/query/kernel', (4, 2, 2), 'full'),  # Heads, or a stack?
    ('conv/kernel', (3, 3, 4, 8), 'full'),
    ('Conv_0/kernel', (3, 4, 8), 'full'),
    ('token_emb/weight', (8, 4), 'full'),
    ('kernel', (4, 4), 'low_rank'),
  ],
)
def test_default_reads_whole_names_and_shapes(name, shape, label):
  assert default_assignment(name, shape).label == label


def test_default_gives_reasons():
  found = assign(PARAMS)
  assert found['lm_head']['kernel'].reason == ("default: 'lm_head' in its name")
  assert found['dense']['bias'].reason == (
    "default: its name does not end in 'kernel', 'weight' or 'w'"
  )
  assert found['embed']['embedding'].reason == (
    'default: an embedding, kept out on purpose; see param_labels'
  )
  vector = assign({'kernel': jnp.zeros(3)})['kernel']
  assert vector == ('full', 'default: 1 axis, no matrix')


def test_presets_say_whether_embeddings_and_heads_are_kernels():
  params = {
    **PARAMS,
    'embed': {
      'tokens': {'embedding': jnp.zeros((64, 4))},
      'types': {'embedding': jnp.zeros((2, 4))},
    },
    'wte': {'weight': jnp.zeros((100, 4))},
    'norm': {'weight': jnp.zeros((2, 4))},
  }
  found = assign(params, 'all')
  assert found['embed']['tokens']['embedding'] == (
    'low_rank',
    'preset all: an embedding',
  )
  assert found['embed']['types']['embedding'] == (
    'full',
    'preset all: a table of 2 rows',
  )
  assert found['wte']['weight'].label == 'low_rank'
  assert found['lm_head']['kernel'] == ('low_rank', 'preset all: a head')
  assert found['norm']['weight'].label == 'full'
  assert found['layers'] == assign(params)['layers']
  assert assign(params, 'blocks') == assign(params)
  (row,) = (
    row
    for row in report(params, galore(1e-2, rank=2, param_labels='all'), 'all')
    if row.name == 'embed/tokens/embedding'
  )
  # Two moments of 64 x 2, a basis of 4 x 2, four numbers.
  assert row.state_bytes == 4 * (2 * 64 * 2 + 4 * 2 + 4)


def test_first_matching_rule_decides():
  rules = [('attn', 'frozen'), ('kernel', 'low_rank'), ('.*', 'full')]
  assert label_of('layers/attn/q_proj/kernel', rules) == 'frozen'
  assert label_of('lm_head/kernel', rules) == 'low_rank'
  assert label_of('dense/bias', rules) == 'full'
  assert assign(PARAMS, rules)['dense']['bias'].reason == "rule '.*'"


@pytest.mark.parametrize(
  'given',
  [
    lambda params: jax.tree.map(lambda _: 'full', params),
    {'embed': 'full', 'layers': 'full', 'lm_head': 'full', 'dense': 'full'},
  ],
)
def test_functions_and_prefix_trees_of_labels_work(given):
  assert label_of('layers/attn/q_proj/kernel', given) == 'full'


@pytest.mark.parametrize(
  ('rules', 'text'),
  [
    (
      [('kernel', 'low_rank'), ('embed|scale', 'full')],
      "No label rule matches the parameters ['dense/bias']. Rules: "
      "[('kernel', 'low_rank'), ('embed|scale', 'full')]. Add one for them, or "
      "('.*', 'full') as the last rule.",
    ),
    (
      [('atn', 'low_rank'), ('.*', 'full')],
      "The label rule ('atn', 'low_rank') decides about no parameter: no path "
      'contains it, or earlier rules took all that do. Remove it, move it up, '
      'or correct its regex. Similar paths: ',
    ),
    (
      [('.*', 'full'), ('attn', 'low_rank')],
      "The label rule ('attn', 'low_rank') decides about no parameter",
    ),
    (
      [('.*', 'lowrank')],
      "Unknown label 'lowrank' for parameter 'dense/bias'; expected one of "
      "('low_rank', 'full', 'frozen').",
    ),
  ],
)
def test_rules_that_do_not_fit_are_errors(rules, text):
  with pytest.raises(ValueError) as error:
    assign(PARAMS, rules)
  assert str(error.value).startswith(text)


@pytest.mark.parametrize(
  'make',
  [
    lambda: labels([('*', 'low_rank')]),
    lambda: assign(PARAMS, [('*', 'low_rank')]),
    lambda: galore(1e-2, param_labels=[('*', 'low_rank')]),
    lambda: galore(1e-2, kernel_axes=[('*', 1, 2)]),
    lambda: galore(1e-2, moment_bits=[('*', 8)]),
    lambda: galore(1e-2, moment_bits=[(8, 8)]),
  ],
)
def test_rules_are_regular_expressions(make):
  with pytest.raises(ValueError) as error:
    make()
  message = re.fullmatch(
    r"(param_labels|kernel_axes|moment_bits) rule \(('\*'|8), .*\): not a "
    r'regular expression: (nothing to repeat at position 0|first argument must '
    r'be string or compiled pattern)\. It is searched for anywhere in a path '
    r"such as 'layers/up/kernel': 'up' finds this one and '\.\*' all of them\.",
    str(error.value),
  )
  assert message, str(error.value)


def test_a_name_that_is_no_preset_is_an_error():
  with pytest.raises(ValueError) as error:
    assign(PARAMS, 'kernel')
  assert str(error.value) == (
    "Unknown label 'kernel' for parameter 'dense/bias'; expected one of "
    "('low_rank', 'full', 'frozen'), or param_labels='blocks' or 'all', or "
    'rules [(regex, label), ...].'
  )


def test_pairs_of_labels_are_a_tree_of_them():
  params = [(jnp.ones((4, 4)), jnp.ones(4)), (jnp.ones((4, 4)), jnp.ones(4))]
  found = assign(params, [('low_rank', 'full')] * 2)
  assert [a.label for pair in found for a in pair] == ['low_rank', 'full'] * 2


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'kernel_axes': [('qury', 1, 2)]},
      "The kernel_axes rule for 'qury' decides about no parameter: no path "
      'contains it. Remove it, or correct its regex. Similar paths: '
      "['query/kernel'].",
    ),
    (
      {'moment_bits': [('kernl', 8)]},
      "The moment_bits rule for 'kernl' decides about no parameter: no path "
      'contains it. Remove it, or correct its regex. Similar paths: '
      "['query/kernel'].",
    ),
    (
      {'kernel_axes': [('query', 2)]},
      "kernel_axes rule ('query', 2) must name at least one input and one "
      'output axis, as (regex, num_in, num_out).',
    ),
    (
      {'moment_bits': [8, 4]},
      'moment_bits must be 32, 8 or 4, or rules (regex, bits), got [8, 4].',
    ),
  ],
)
def test_rules_that_decide_nothing_are_errors(options, text):
  with pytest.raises(ValueError) as error:
    galore(1e-2, **options).init({'query': {'kernel': jnp.ones((4, 4))}})
  assert str(error.value) == text
