import warnings

import numpy as np
import pytest

from gnlorp_jax.data import glue

BINARY = glue.custom_task(
  'binary',
  ['text'],
  'label',
  ['no', 'yes'],
  ['accuracy', 'f1', 'matthews_correlation'],
)
TRIPLE = glue.custom_task(
  'triple',
  ['text'],
  'label',
  ['a', 'b', 'c'],
  ['accuracy', 'matthews_correlation'],
)
STSB, MNLI = glue.TASKS['stsb'], glue.TASKS['mnli']


def logits_of(predictions, classes=2):
  return np.eye(classes, dtype=np.float32)[np.asarray(predictions)]


def binary(predictions, labels):
  return glue.scores(BINARY, logits_of(predictions), np.asarray(labels))


def binary_closed_form(predictions, labels):
  """Counts of true and false positives and negatives, in float64."""
  p, y = np.asarray(predictions, bool), np.asarray(labels, bool)
  tp, fp = np.float64(np.sum(p & y)), np.sum(p & ~y)
  tn, fn = np.sum(~p & ~y), np.sum(~p & y)
  product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
  return {
    'accuracy': (tp + tn) / len(y),
    'f1': 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
    'matthews_correlation': (tp * tn - fp * fn) / np.sqrt(product)
    if product
    else 0.0,
  }


def ranks(x):
  """Ranks with ties given their mean: the number below plus half the equal."""
  below = (x[:, None] > x).sum(1)
  equal = (x[:, None] == x).sum(1)
  return below + (equal + 1) / 2


def pearson(x, y):
  x, y = x - x.mean(), y - y.mean()
  return (x @ y) / np.sqrt((x @ x) * (y @ y))


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('positive', [0.5, 0.1])
def test_binary_scores_are_those_of_the_counts(seed, positive):
  rng = np.random.default_rng(seed)
  labels = rng.random(57) < positive
  logits = rng.normal(size=(57, 2)).astype(np.float32)
  result = glue.scores(BINARY, logits, labels.astype(np.int32))
  expected = binary_closed_form(logits[:, 1] > logits[:, 0], labels)
  assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
  ('predictions', 'labels'),
  [
    ([1, 1, 1, 1], [0, 1, 0, 1]),
    ([0, 0, 0, 0], [0, 1, 0, 1]),
    ([0, 1, 0, 1], [1, 1, 1, 1]),
    ([0, 0, 0], [0, 0, 0]),
    ([1, 1, 1], [1, 1, 1]),
    ([1, 1, 1], [0, 0, 0]),
    ([0], [0]),
    ([1], [1]),
    ([1], [0]),
  ],
)
def test_degenerate_binary_scores(predictions, labels):
  result = binary(predictions, labels)
  assert result == pytest.approx(binary_closed_form(predictions, labels))
  assert result['matthews_correlation'] == 0


@pytest.mark.parametrize('seed', range(3))
def test_three_classes(seed):
  rng = np.random.default_rng(seed)
  labels, predictions = rng.integers(0, 3, (2, 80))
  result = glue.scores(TRIPLE, logits_of(predictions, 3), labels)
  # The correlation of one-hot vectors (Gorodkin 2004).
  x, y = np.eye(3)[predictions], np.eye(3)[labels]
  x, y = x - x.mean(0), y - y.mean(0)
  matthews = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
  assert result == pytest.approx(
    {
      'accuracy': np.mean(predictions == labels),
      'matthews_correlation': matthews,
    },
    rel=1e-12,
  )


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('decimals', [7, 0])
def test_correlations_with_and_without_ties(seed, decimals):
  rng = np.random.default_rng(seed)
  labels = np.round(5 * rng.random(61), decimals).astype(np.float32)
  outputs = np.round(labels + 2 * rng.normal(size=61), decimals)
  outputs = outputs.astype(np.float32)
  result = glue.scores(STSB, outputs[:, None], labels)
  x, y = outputs.astype(np.float64), labels.astype(np.float64)
  expected = {
    'pearson': pearson(x, y),
    'spearmanr': pearson(ranks(x), ranks(y)),
  }
  assert result == pytest.approx(expected, rel=1e-10)
  assert glue.scores(STSB, outputs, labels) == result


@pytest.mark.parametrize(
  ('outputs', 'labels'),
  [([2, 2, 2], [0, 1, 5]), ([0, 1, 2], [3, 3, 3]), ([1], [2])],
)
def test_correlations_of_constants_are_not_a_number(outputs, labels):
  result = glue.scores(STSB, np.float32(outputs), np.float32(labels))
  assert list(result) == ['pearson', 'spearmanr']
  assert np.isnan(list(result.values())).all()


def test_correlations_of_two_examples_are_one():
  result = glue.scores(STSB, np.float32([1, 2]), np.float32([0, 5]))
  assert result == pytest.approx({'pearson': 1, 'spearmanr': 1})


def test_near_constants_give_no_warning():
  outputs = np.float32([1, 1, 1]) + np.float64([0, 1e-15, 0])
  result = glue.scores(STSB, outputs, np.float32([0, 5, 1]))
  assert result['spearmanr'] == pytest.approx(np.sqrt(3) / 2)


def test_a_model_that_diverged_has_no_score():
  logits = logits_of([0, 1, 1])
  labels = np.array([0, 1, 1])
  assert binary([0, 1, 1], labels)['accuracy'] == 1
  logits[1, 0] = np.nan
  result = glue.scores(BINARY, logits, labels)
  assert list(result) == list(BINARY.metrics)
  assert np.isnan(list(result.values())).all()
  for value in (np.nan, np.inf, -np.inf):
    result = glue.scores(STSB, np.float32([1, value, 2]), np.float32([1, 2, 3]))
    assert np.isnan(list(result.values())).all()


def test_infinite_logits_still_choose_a_class():
  logits = np.float32([[-np.inf, 0], [0, -np.inf], [np.inf, 0]])
  assert glue.scores(BINARY, logits, np.array([1, 0, 0]))['accuracy'] == 1


def test_mismatched_accuracy_has_its_own_name():
  logits, labels = logits_of([0, 1, 2, 2], 3), np.array([0, 1, 2, 0])
  assert glue.scores(MNLI, logits, labels) == {'accuracy': 0.75}
  assert glue.scores(MNLI, logits, labels, 'dev_mismatched') == {
    'accuracy_mm': 0.75
  }


def test_scores_carry_nothing_over():
  calls = [
    (BINARY, logits_of([0, 1, 1]), np.array([0, 1, 0])),
    (STSB, np.float32([1, 2, 4]), np.float32([0, 5, 3])),
    (TRIPLE, logits_of([0, 1, 2], 3), np.array([0, 1, 0])),
    (BINARY, logits_of([0, 1, 0]), np.array([0, 1, 0])),
  ]
  arguments = [(logits.copy(), labels.copy()) for _, logits, labels in calls]
  alone = [glue.scores(*call) for call in calls]
  again = [glue.scores(*call) for call in reversed(calls)][::-1]
  assert again == alone
  assert alone[0] != alone[3]
  for call, copies in zip(calls, arguments, strict=True):
    np.testing.assert_array_equal(call[1], copies[0])
    np.testing.assert_array_equal(call[2], copies[1])


def test_settings_of_warnings_are_left_alone():
  before = list(warnings.filters)
  binary([1, 1], [0, 0])
  assert list(warnings.filters) == before


def test_shapes_that_do_not_fit_are_errors():
  with pytest.raises(ValueError, match=r"\(3, 3\) do not fit task 'binary'; "):
    glue.scores(BINARY, logits_of([0, 1, 2], 3), np.zeros(3))
  with pytest.raises(ValueError, match=r'expected \[N, 1\]'):
    glue.scores(STSB, np.zeros((3, 2)), np.zeros(3))
  with pytest.raises(ValueError, match='outputs of 2 examples and labels of s'):
    glue.scores(BINARY, logits_of([0, 1]), np.zeros(3))
  with pytest.raises(ValueError, match='outputs of 2 examples and labels of s'):
    glue.scores(BINARY, logits_of([0, 1]), np.zeros((2, 1)))
  with pytest.raises(ValueError, match='at least one'):
    glue.scores(BINARY, np.zeros((0, 2)), np.zeros(0))


@pytest.mark.parametrize(
  ('name', 'split', 'file', 'written'),
  [
    ('cola', 'test', 'CoLA.tsv', '0 1'),
    ('sst2', 'test', 'SST-2.tsv', '0 1'),
    ('mrpc', 'test', 'MRPC.tsv', '0 1'),
    ('qqp', 'test', 'QQP.tsv', '0 1'),
    ('wnli', 'test', 'WNLI.tsv', '0 1'),
    ('rte', 'test', 'RTE.tsv', 'entailment not_entailment'),
    ('qnli', 'test', 'QNLI.tsv', 'entailment not_entailment'),
    ('mnli', 'test', 'MNLI-m.tsv', 'entailment neutral'),
    ('mnli', 'test_mismatched', 'MNLI-mm.tsv', 'entailment neutral'),
  ],
)
def test_submission_of_classes(tmp_path, name, split, file, written):
  task = glue.TASKS[name]
  path = glue.write_submission(
    task,
    tmp_path / 'new',
    split,
    ['0', '1'],
    logits_of([0, 1], task.num_outputs),
  )
  assert path == tmp_path / 'new' / file
  first, second = written.split()
  assert path.read_bytes().decode() == (
    f'index\tprediction\n0\t{first}\n1\t{second}\n'
  )


def test_submission_of_scores_is_clipped_and_in_order(tmp_path):
  path = glue.write_submission(
    STSB,
    tmp_path,
    'test',
    ['10', '9', '2', '0', '1'],
    np.float32([[5.2], [-0.7], [3.14159], [-0.0001], [4.9996]]),
  )
  assert path.read_text() == (
    'index\tprediction\n0\t0.000\n1\t5.000\n2\t3.142\n9\t0.000\n10\t5.000\n'
  )


def test_submission_of_unbounded_scores_is_not_clipped(tmp_path):
  task = glue.custom_task('price', ['text'], 'price', None)
  path = glue.write_submission(
    task, tmp_path, 'test', ['0', '1'], np.array([-7.25, -0.0001])
  )
  assert path.read_text() == 'index\tprediction\n0\t-7.250\n1\t0.000\n'


def test_submission_of_a_custom_task_keeps_its_ids(tmp_path):
  path = glue.write_submission(
    TRIPLE, tmp_path, 'test', ['x', 'b'], logits_of([2, 0], 3)
  )
  assert path.name == 'triple.tsv'
  assert path.read_text() == 'index\tprediction\nx\tc\nb\ta\n'


def test_what_cannot_be_submitted_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="split 'dev' .* cannot be submitted"):
    glue.write_submission(MNLI, tmp_path, 'dev', ['0'], logits_of([0], 3))
  with pytest.raises(ValueError, match='1 ids have 2 outputs'):
    glue.write_submission(STSB, tmp_path, 'test', ['0'], np.zeros(2))
  with pytest.raises(ValueError, match='STS-B.tsv hold values that are not f'):
    glue.write_submission(STSB, tmp_path, 'test', ['0'], np.array([np.nan]))
  assert not list(tmp_path.iterdir())
