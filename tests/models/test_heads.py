"""Which classifiers of folders fit a task."""

import pytest

from gnlorp_jax.data import glue
from gnlorp_jax.models import heads

MNLI = ('entailment', 'neutral', 'contradiction')


def config(*names, task=None):
  named = {'id2label': {str(i): name for i, name in enumerate(names)}}
  return named | ({} if task is None else {'finetuning_task': task})


@pytest.mark.parametrize(
  ('names', 'outputs'),
  [
    (MNLI, (0, 1, 2)),
    (('contradiction', 'neutral', 'entailment'), (2, 1, 0)),
    (('neutral', 'contradiction', 'entailment'), (2, 0, 1)),
    (('CONTRADICTION', 'NEUTRAL', 'ENTAILMENT'), (2, 1, 0)),
  ],
)
@pytest.mark.parametrize('task', [None, 'mnli', 'MNLI'])
def test_classes_are_found_in_any_order_and_spelling(names, outputs, task):
  described = config(*names, task=task)
  assert heads.match(described, MNLI, 'mnli') == heads.Head(outputs, '')


def test_numbers_of_outputs_may_be_numbers():
  described = {'id2label': {1: 'Not-Equivalent', 0: 'equivalent '}}
  labels = glue.get_task('mrpc').labels
  assert heads.match(described, labels, 'mrpc').outputs == (1, 0)


def test_classes_that_differ_in_case_alone_are_told_apart():
  assert heads.match(config('A', 'a'), ('a', 'A'), 'x').outputs == (1, 0)
  found = heads.match(config('A', 'B'), ('a', 'A'), 'x')
  assert found.outputs is None


@pytest.mark.parametrize(
  ('described', 'why'),
  [
    (config('no', 'yes'), "its classes are ('no', 'yes')"),
    (config('a', 'b', 'c'), "its classes are ('a', 'b', 'c')"),
    (config('entailment', 'entailment'), 'its classes are '),
    # As many, of another task.
    (
      config('not_equivalent', 'equivalent', task='mrpc'),
      "it is of the task 'mrpc'",
    ),
    # The same names for other questions.
    (
      config('entailment', 'not_entailment', task='qnli'),
      "it is of the task 'qnli'",
    ),
    (
      config('LABEL_0', 'LABEL_1'),
      'neither a task nor names of classes say of what',
    ),
    (config('0', '1'), 'neither a task nor names of classes say of what'),
    ({}, 'neither a task nor names of classes say of what'),
    (
      {'id2label': ['entailment', 'not_entailment']},
      'neither a task nor names of classes say of what',
    ),
    # Names are asked for even so: their order is not known.
    (
      config('LABEL_0', 'LABEL_1', task='rte'),
      "its classes are ('LABEL_0', 'LABEL_1')",
    ),
  ],
)
def test_other_classifiers_do_not_fit(described, why):
  found = heads.match(described, glue.get_task('rte').labels, 'rte')
  assert found.outputs is None and found.why.startswith(why)


def test_equal_names_fit_where_no_task_is_told():
  described = config('not_entailment', 'entailment')
  labels = glue.get_task('rte').labels
  assert heads.match(described, labels, 'rte').outputs == (1, 0)
  told = described | {'finetuning_task': 'wnli'}
  assert heads.match(told, labels).outputs == (1, 0)


@pytest.mark.parametrize(
  ('described', 'task', 'why'),
  [
    (config('LABEL_0', task='stsb'), 'stsb', None),
    (config('LABEL_0'), None, None),
    (
      config('LABEL_0'),
      'stsb',
      'neither a task nor names of classes say of what',
    ),
    (config('LABEL_0', task='stsb'), 'mine', "it is of the task 'stsb'"),
    (config('a', 'b', task='stsb'), 'stsb', "its classes are ('a', 'b')"),
  ],
)
def test_regression_fits_its_own_task(described, task, why):
  expected = heads.Head((0,), '') if why is None else heads.Head(None, why)
  assert heads.match(described, (), task) == expected


@pytest.mark.parametrize('name', glue.TASKS)
def test_what_is_described_fits_its_own_task_alone(name):
  task = glue.get_task(name)
  described = heads.describe(task.labels, name)
  for other in map(glue.get_task, glue.TASKS):
    found = heads.match(described, other.labels, other.name).outputs
    own = tuple(range(task.num_outputs))
    assert found == (own if other.name == name else None), other.name


def test_names_of_ones_own_task_may_be_numbers():
  described = heads.describe(('0', '1'), 'mine')
  assert heads.match(described, ('1', '0'), 'mine').outputs == (1, 0)
