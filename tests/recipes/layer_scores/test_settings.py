import math

import pytest

from gnlorp_jax.compose.layer_scores import KINDS
from gnlorp_jax.recipes.layer_scores import settings
from gnlorp_jax.recipes.layer_scores.settings import LayerScoresConfig

USAGE = 'python -m gnlorp_jax.layer_scores FOLDER --data FILES'


def message(function, *args, **options):
  with pytest.raises(ValueError) as error:
    function(*args, **options)
  return str(error.value)


def test_first_word_is_the_folder():
  config = settings.parse(['hf:a/b', '--data', 'x.txt', '--threshold', '7'], '')
  assert config == LayerScoresConfig(folder='hf:a/b', data='x.txt', threshold=7)


def test_the_kind_of_the_scores_is_measured_in_any_case():
  assert LayerScoresConfig().measured == KINDS
  config = LayerScoresConfig(measure='hill,outliers', kind='weight_norm')
  assert config.measured == ('outliers', 'weight_norm', 'hill')
  assert LayerScoresConfig(measure='').measured == ('outliers',)


def test_the_threshold_joins_those_that_are_always_told():
  assert LayerScoresConfig().thresholds == (3, 5, 7, 10, 13)
  assert LayerScoresConfig(threshold=8.5).thresholds == (3, 5, 7, 8.5, 10, 13)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'sequences': 0},
      'LayerScoresConfig.sequences must be at least 1, got 0.',
    ),
    ({'length': 1}, 'length=1 must be at least 2.'),
    ({'seed': -1}, 'seed=-1 must be a whole number from 0 to 4294967295.'),
    *(
      (
        {'threshold': value},
        f'LayerScoresConfig.threshold must be {rule}, got {value}. 5 is usual.',
      )
      for value, rule in (
        (0.0, 'in (0, inf)'),
        (math.inf, 'a finite number in (0, inf)'),
        (math.nan, 'a finite number in (0, inf)'),
      )
    ),
    (
      {'template': 'alpaca'},
      "template='alpaca' writes conversations down, and with format='text' "
      'there are none. Add --format chat.',
    ),
    (
      {'measure': 'hill,outlier'},
      f"measure names 'outlier'; expected some of {KINDS}, joined by commas. "
      "Did you mean 'outliers'?",
    ),
  ],
)
def test_impossible_settings_are_refused(options, text):
  assert message(LayerScoresConfig, **options) == text


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (
      ['--data', 'x.txt'],
      f'No model is named. Begin with its Hugging Face folder: {USAGE}',
    ),
    (
      ['{folder}', '--data', 'x.txt'],
      '{folder} is no Hugging Face folder: it holds no config.json. Name the '
      'hf/ of a run, what save_pretrained wrote, or hf:OWNER/NAME.',
    ),
    (
      ['hf:a/b'],
      f'No data is named, and the model has nothing to read: {USAGE}',
    ),
    (
      ['hf:a/b', '--data', 'x.txt', '--output', 'nodir/o.json'],
      '--output nodir/o.json: the folder nodir does not exist. Create it, or '
      'name another file.',
    ),
    (
      ['hf:a/b', '--data', 'x.txt', '--output', 'o.png'],
      '--output o.png: the picture is written beside the JSON, as the .png of '
      'the same name. Name the JSON file.',
    ),
  ],
)
def test_impossible_commands_are_refused(tmp_path, args, text):
  args = [word.format(folder=tmp_path) for word in args]
  found = message(settings.parse, args, '')
  assert found == text.format(folder=tmp_path)
