import pytest

from gnlorp_jax.data import glue


def test_the_nine_tasks_have_the_metrics_of_the_glue_tables():
  metrics = {name: task.metrics for name, task in glue.TASKS.items()}
  assert metrics == {
    'cola': ('matthews_correlation',),
    'sst2': ('accuracy',),
    'mrpc': ('f1', 'accuracy'),
    'stsb': ('pearson', 'spearmanr'),
    'rte': ('accuracy',),
    'wnli': ('accuracy',),
    'qnli': ('accuracy',),
    'qqp': ('f1', 'accuracy'),
    'mnli': ('accuracy', 'accuracy_mm'),
  }
  main = {name: task.main_metric for name, task in glue.TASKS.items()}
  assert main.pop('qqp') == 'accuracy'
  assert main == {k: v[0] for k, v in metrics.items() if k != 'qqp'}


def test_outputs_are_one_per_class_or_one_for_a_score():
  outputs = {name: task.num_outputs for name, task in glue.TASKS.items()}
  assert (outputs.pop('mnli'), outputs.pop('stsb')) == (3, 1)
  assert set(outputs.values()) == {2}
  assert [t.name for t in glue.TASKS.values() if t.is_regression] == ['stsb']
  assert [t.name for t in glue.TASKS.values() if t.columns] == ['cola']


def test_submission_files_have_the_names_the_server_wants():
  assert {t.submission_file('test') for t in glue.TASKS.values()} == {
    *('CoLA.tsv', 'SST-2.tsv', 'MRPC.tsv', 'STS-B.tsv', 'RTE.tsv'),
    *('WNLI.tsv', 'QNLI.tsv', 'QQP.tsv', 'MNLI-m.tsv'),
  }
  mnli = glue.TASKS['mnli']
  assert mnli.submission_file('test_mismatched') == 'MNLI-mm.tsv'
  with pytest.raises(ValueError, match="split 'dev' of task 'mnli' cannot be"):
    mnli.submission_file('dev')


def test_only_mnli_has_mismatched_splits():
  mnli, rte = glue.TASKS['mnli'], glue.TASKS['rte']
  assert mnli.splits == (
    *('train', 'dev', 'dev_mismatched', 'test', 'test_mismatched'),
  )
  assert mnli.file_stem('dev') == 'dev_matched'
  assert rte.splits == ('train', 'dev', 'test')
  with pytest.raises(ValueError, match="Unknown split 'dev_mismatched' of tas"):
    rte.file_stem('dev_mismatched')


def test_unknown_task_error_names_the_nearest():
  assert glue.get_task('mrpc') is glue.TASKS['mrpc']
  with pytest.raises(ValueError, match="'colla'.*Did you mean 'cola'"):
    glue.get_task('colla')
  with pytest.raises(ValueError, match="'SST-2'.*Did you mean 'sst2'"):
    glue.get_task('SST-2')
  with pytest.raises(ValueError, match='of your own is made by custom_task'):
    glue.get_task('zzzz')


def test_tasks_can_be_hashed_and_compared():
  assert hash(glue.TASKS['rte']) == hash(glue.get_task('rte'))


def test_custom_tasks_have_default_metrics():
  task = glue.custom_task('mood', ['text'], 'mood', ['bad', 'good'])
  assert (task.main_metric, task.num_outputs) == ('accuracy', 2)
  assert task.file_labels == task.labels == ('bad', 'good')
  task = glue.custom_task('price', ['text'], 'price', None)
  assert task.metrics == ('pearson', 'spearmanr')
  assert task.is_regression and task.score_range is None


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'text_columns': 'text'}, "text_columns='text' must be a sequence"),
    ({'text_columns': ['a', 'b', 'c']}, 'one or two names'),
    ({'labels': ['a']}, 'must be two or more distinct classes'),
    ({'labels': ['a', 'a']}, 'must be two or more distinct classes'),
    ({'metrics': ['pearson']}, r"metrics=\('pearson',\) of classes must be"),
    ({'metrics': []}, r'metrics=\(\) of classes must be'),
    ({'labels': None, 'metrics': ['f1']}, "of a regression.*'spearmanr'"),
    ({'labels': list('abc'), 'metrics': ['f1']}, 'the task has 3 classes'),
  ],
)
def test_custom_task_that_makes_no_sense_is_an_error(changed, message):
  arguments = {'text_columns': ['text'], 'labels': ['a', 'b']} | changed
  with pytest.raises(ValueError, match=message):
    glue.custom_task('mine', label_column='label', **arguments)
