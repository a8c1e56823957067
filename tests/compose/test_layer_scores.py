"""Files of scores, and what is wrong with those that are none."""

import json

import pytest

from gnlorp_jax.compose import layer_scores

MAKE = 'Write one by python -m gnlorp_jax.layer_scores MODEL --data FILES'


def test_scores_are_read_from_json(tmp_path):
  file = tmp_path / 'scores.json'
  file.write_text(json.dumps({'kind': 'outliers', 'scores': [0, 0.5, 2]}))
  assert layer_scores.read_scores(file, 3) == (0.0, 0.5, 2.0)
  assert layer_scores.read_scores(str(file), 3) == (0.0, 0.5, 2.0)


def test_scores_are_read_from_lines(tmp_path):
  file = tmp_path / 'ratios.txt'
  file.write_text('0.2615\n1e-2\n\n0\n')
  assert layer_scores.read_scores(file, 3) == (0.2615, 0.01, 0.0)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      '1\n2\n3',
      '{file} has scores of 3 layers, and the model has 2. {make}, of this '
      'model.',
    ),
    (
      '1\nnan',
      '{file} gives layer 1 the score nan; expected a finite number of at '
      'least 0. {make}, or correct it.',
    ),
    (
      '{{"scores": [-0.5, 1]}}',
      '{file} gives layer 0 the score -0.5; expected a finite number of at '
      'least 0. {make}, or correct it.',
    ),
    (
      '{{"scores": [0, 0.0]}}',
      '{file} gives every layer the score 0, so that none can be drawn. {make} '
      'and a smaller --threshold.',
    ),
    (
      '1\nlayer two',
      "{file}:2 is 'layer two'; expected one number in each line, or JSON. "
      '{make}.',
    ),
    *(
      (
        text,
        '{file} holds no scores of layers: expected an object with a list of '
        'numbers under "scores". {make}.',
      )
      for text in (
        '[1, 2]',
        '{{"loss": [1, 2]}}',
        '{{"scores": [1, true]}}',
        '{{"scores": ["1", 2]}}',
      )
    ),
    (
      '{{"scores": [1,',
      '{file} is no JSON that can be read: Expecting value: line 1 column 15 '
      '(char 14). {make}.',
    ),
  ],
)
def test_files_that_are_none_are_refused(tmp_path, text, message):
  file = tmp_path / 'scores.json'
  file.write_text(text.format())
  with pytest.raises(ValueError) as error:
    layer_scores.read_scores(file, 2)
  assert str(error.value) == message.format(file=file, make=MAKE)


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError) as error:
    layer_scores.read_scores(tmp_path / 'none.json', 2)
  assert str(error.value) == (
    'Cannot read scores of layers: [Errno 2] No such file or directory: '
    f"'{tmp_path}/none.json'."
  )


def test_a_heavier_tail_has_a_higher_score():
  assert layer_scores.as_scores('hill', [2.0, 4.0]) == (0.5, 0.25)
  assert layer_scores.as_scores('weight_norm', [2.0, 4.0]) == (2.0, 4.0)
