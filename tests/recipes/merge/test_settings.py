"""What can be asked, on the command line and in a file of mergekit's keys."""

import pytest

from gnlorp_jax.recipes.merge.parsing import parse
from gnlorp_jax.recipes.merge.settings import MergeConfig

WORDS = ['--base', 'F', '--experts', 'a', 'b', '--out', 'o']
YAML = """
merge_method: ties
base_model: F
models:
  - model: F
  - model: a
    parameters: {weight: 0.5, density: 0.2}
  - model: b
    parameters: {weight: 0.5, density: 0.4}
parameters: {lambda: 0.7, normalize: true}
dtype: bfloat16
"""


def asked(*words):
  return parse([*WORDS, *words], 'Merges.')


def from_file(tmp_path, text, *words):
  path = tmp_path / 'merge.yaml'
  path.write_text(text)
  return parse(['--config', str(path), '--out', 'o', *words], 'Merges.')


def test_defaults_are_those_that_were_published():
  options = asked('--method', 'doge').options
  assert (options.weights, options.eta) == ((1.0, 1.0), 'auto')
  assert (options.kept, options.scaled) == ((30.0, 30.0), 0.3)
  ties = asked('--method', 'ties', '--keep', '50').options
  assert (ties.kept, ties.scaled) == ((50.0, 50.0), 1.0)
  assert asked('--method', 'tsv').of_others == 'average'
  assert asked('--method', 'doge').included == r'\.\d+\.'
  assert asked('--method', 'dare').included == ''


def test_experts_may_be_joined_by_commas():
  config = parse(
    ['--base', 'F', '--experts', 'a,b', 'c', '--out', 'o', '--eta', '.07']
    + ['--method', 'doge', '--weights', '1', '2', '.5'],
    'Merges.',
  )
  assert config.folders == ('a', 'b', 'c')
  # One that is named twice is not dropped in silence: it is an error later.
  assert MergeConfig(experts=('a,b,a',)).folders == ('a', 'b', 'a')
  assert config.options.eta == 0.07
  assert config.options.weights == (1.0, 2.0, 0.5)


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    (
      {'weights': (1.0, 2.0, 3.0)},
      'weights=(1.0, 2.0, 3.0) are 3 for 2 experts. Give one of each, or none.',
    ),
    (
      {'method': 'ties', 'keep': (20.0, 20.0, 20.0)},
      'keep=(20.0, 20.0, 20.0) are 3 for 2 experts. Give one of each, or one '
      'for all.',
    ),
    (
      {'method': 'ties', 'keep': (0.3,)},
      'keep=0.3 must be in [1, 100]: it is in percent, so that a share of 0.3 '
      'is keep=30. To merge nothing leave the expert out.',
    ),
    (
      {'method': 'ties', 'eta': 0.07, 'seed': 1},
      "These options have no effect with method='ties': seed=1: nothing is "
      'random; eta=0.07: it is one of doge, not of ties. Leave them out.',
    ),
    (
      {'scale': 0.5},
      "These options have no effect with method='average': scale=0.5: the mean "
      'has no scale. Leave them out.',
    ),
    (
      {'method': 'doge', 'eta': 0.07, 'scale': 0.5},
      "These options have no effect with method='doge': scale=0.5: eta=0.07 is "
      'absolute. Leave them out.',
    ),
    (
      {'method': 'doge', 'eta': -1.0},
      "MergeConfig.eta must be in (0, inf), got -1.0. Or give 'auto'.",
    ),
    ({'shard_gb': 0.0}, 'MergeConfig.shard_gb must be in (0, inf), got 0.0.'),
    (
      {'method': 'doge', 'weights': (1.0, -1.0)},
      'weights=(1.0, -1.0) must be positive in doge, whose coefficients they '
      'multiply. Leave the expert out, or use task_arithmetic.',
    ),
    (
      {'weights': (1.0, -1.0)},
      'weights=(1.0, -1.0) of an average are divided by their sum, which must '
      'be positive. task_arithmetic divides by nothing.',
    ),
    (
      {'method': 'tsv', 'weights': (1.0, -1.0)},
      'weights=(1.0, -1.0) of an average are divided by their sum, which must '
      "be positive. With others='base' nothing is averaged.",
    ),
    (
      {'method': 'doge', 'solver': 'exact', 'rate': 1e-3},
      "These options have no effect with method='doge': rate=0.001: "
      "solver='exact' has none. Leave them out.",
    ),
    (
      {
        **{'method': 'doge', 'solver': 'exact', 'project': 'none'},
        **{'steps': 9, 'subspace': 2},
      },
      "These options have no effect with method='doge': subspace=2: "
      "project='none' has none; steps=9: the solution has a closed form. Leave "
      'them out.',
    ),
    (
      {'include': '('},
      "include='(' is no regex: missing ), unterminated subpattern at position "
      '0.',
    ),
  ],
)
def test_wrong_values_say_what_is_right(fields, text):
  with pytest.raises(ValueError) as error:
    MergeConfig(base='F', experts=('a', 'b'), **fields)
  assert str(error.value) == text


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (['--base', 'F', '--out', 'o'], 'No --experts named: '),
    (['--experts', 'a', '--out', 'o'], 'No --base named: '),
    (['--base', 'F', '--experts', 'a'], 'Name a folder to write by --out'),
    (['--config', 'no.yaml'], '--config no.yaml: there is no such file.'),
    ([*WORDS, '--metod', 'ties'], 'Did you mean --method?'),
  ],
)
def test_what_is_missing_is_said(words, text):
  with pytest.raises(ValueError) as error:
    parse(words, 'Merges.')
  assert text in str(error.value)


def test_a_file_of_mergekits_keys(tmp_path):
  config = from_file(tmp_path, YAML)
  assert config == MergeConfig(
    config=str(tmp_path / 'merge.yaml'),
    base='F',
    experts=('a', 'b'),
    out='o',
    method='ties',
    # Divided by their sum, equal ones are 1.
    weights=(1.0, 1.0),
    keep=(20.0, 40.0),
    scale=0.7,
    dtype='bfloat16',
  )
  # The command line has the last word.
  assert from_file(tmp_path, YAML, '--scale', '1').scale == 1.0


def test_our_methods_and_options_in_such_a_file(tmp_path):
  text = """
    merge_method: doge
    base_model: F
    models: [{model: a}, {model: b}]
    parameters: {weight: 0.5, density: 0.4, eta: 0.07, solver: exact}
  """
  config = from_file(tmp_path, text)
  assert (config.eta, config.solver) == (0.07, 'exact')
  assert config.weights == (0.5, 0.5)
  assert config.keep == (40.0, 40.0)
  assert config.options.scaled == 0.3


@pytest.mark.parametrize(
  ('method', 'fields'),
  [
    ('linear', {'method': 'average'}),
    ('task_arithmetic', {'method': 'task_arithmetic', 'scale': 1.0}),
    ('ties', {'method': 'ties', 'scale': 1.0, 'keep': (100.0,)}),
    ('dare_linear', {'method': 'dare', 'scale': 1.0, 'keep': (100.0,)}),
    ('doge', {'method': 'doge'}),
  ],
)
def test_what_a_file_leaves_out_is_mergekits_default(tmp_path, method, fields):
  text = f"""
    merge_method: {method}
    base_model: F
    models: [{{model: a}}, {{model: b}}]
  """
  config = from_file(tmp_path, text)
  assert config == MergeConfig(
    config=config.config, base='F', experts=('a', 'b'), out='o', **fields
  )


@pytest.mark.parametrize(
  ('option', 'found'),
  [
    ('rate: 1e-4', 1e-4),
    ('rate: fast', "rate='fast' must be a number."),
    ('eta: auto', 'auto'),
    ('eta: true', 'eta=True must be a number.'),
    ('steps: 10.5', 'steps=10.5 must be a whole number.'),
    ('steps: true', 'steps=True must be a whole number.'),
    ('heads: [a]', "heads=['a'] must be a text."),
    ('exclude: null', None),
  ],
)
def test_options_in_such_a_file_are_of_their_kind(tmp_path, option, found):
  text = f"""
    merge_method: doge
    base_model: F
    models: [{{model: a}}, {{model: b}}]
    parameters: {{{option}}}
  """
  name = option.split(':')[0]
  if found in (None, 'auto') or not isinstance(found, str):
    assert getattr(from_file(tmp_path, text), name) == found
    return
  with pytest.raises(ValueError) as error:
    from_file(tmp_path, text)
  assert f'merge.yaml: {found}' in str(error.value)


@pytest.mark.parametrize(
  ('old', 'new', 'text'),
  [
    ('dtype:', 'tokenizer:', "the file has the unknown keys ['tokenizer']"),
    ('lambda', 'lamda', "parameters has the unknown keys ['lamda']"),
    ('density: 0.2', 'depth: 1', "a has the unknown keys ['depth']"),
    ('ties', 'slerp', "merge_method='slerp'; expected one of ('linear', "),
    ('weight: 0.5, ', '', "weight is given of some, not of ['a']"),
    ('density: 0.2', 'density: 20', 'density=20 must be in [0.01, 1]: it is'),
    ('0.5', '[0, 1]', 'weight=[0, 1] must be a number. Gradients over layers'),
    ('bfloat16', 'int8', "unknown dtype 'int8'; expected one of ('base', "),
    (
      *('normalize: true', 'normalize: false'),
      'normalize=False and weights (0.5, 0.5), but ties takes the mean over '
      'the experts that agree of what their weights multiply. Say normalize: '
      'true with equal positive weights, or give --weights on',
    ),
    ('0.5', '2', 'normalize=True and weights (2.0, 0.5), but ties takes'),
    (
      *('merge_method: ties', 'merge_method: dare_linear'),
      'normalize=True, but dare does not touch the weights. Say normalize: '
      'false, and choose the weights.',
    ),
    ('models:', 'models: 1\nx:', "unknown keys ['x']"),
    ('{', '{{', 'Cannot read '),
  ],
)
def test_such_a_file_is_read_whole_or_not_at_all(tmp_path, old, new, text):
  with pytest.raises(ValueError) as error:
    from_file(tmp_path, YAML.replace(old, new, 1))
  assert text in str(error.value)
