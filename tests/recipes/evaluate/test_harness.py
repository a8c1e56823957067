"""Tasks of lm_eval, where it is installed."""

import ast
import contextlib
import importlib.util
import json
import pathlib

import pytest

from gnlorp_jax.compose import scores
from gnlorp_jax.data import tasks
from gnlorp_jax.recipes.evaluate import harness
from tests.compose import small_lm

HAS_LM_EVAL = importlib.util.find_spec('lm_eval') is not None
needs_lm_eval = pytest.mark.skipif(
  not HAS_LM_EVAL, reason='lm_eval, of the extra eval, is not installed'
)
# It warns of much, and of what it imports.
pytestmark = pytest.mark.filterwarnings('default')

QUESTIONS = [
  {'question': 'Predators eat', 'choices': ['lions', 'bunnies'], 'label': 1},
  {'question': 'Fog is found in', 'choices': ['a marsh', 'a box'], 'label': 0},
  {'question': 'Seeds', 'choices': ['grow', 'sleep', 'sing'], 'label': 0},
]
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], do_sample: false, max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Three tasks of one file."""
  path = tmp_path_factory.mktemp('tasks')
  file = path / 'questions.jsonl'
  file.write_text('\n'.join(map(json.dumps, QUESTIONS)) + '\n')
  for number, text in enumerate((CHOICES, TEXTS, ANSWERS)):
    (path / f'{number}.yaml').write_text(text.format(file=file))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HF_DATASETS_CACHE', str(path / 'cache'))
    patch.setenv('HF_DATASETS_OFFLINE', '1')
    yield path


@contextlib.contextmanager
def silent(title):
  yield lambda done, total: None


def evaluate(folder, task, **options):
  records = []
  found = harness.evaluate(
    *small_lm.model(),
    small_lm.tokenizer(),
    task,
    include_path=str(folder),
    progress=silent,
    keep=records.append,
    **options,
  )
  return found['tasks'], records


@needs_lm_eval
def test_options_score_as_our_own_task(folder):
  found, records = evaluate(folder, 'choices', batch_size=2)
  task = tasks.get('openbookqa', folder / 'questions.jsonl')
  ours = []
  wanted = scores.evaluate_tasks(
    *small_lm.model(), small_lm.tokenizer(), [task], keep=ours.append
  )['openbookqa']
  assert found['choices'] == {
    'questions': 3,
    'metrics': wanted['metrics'],
  }
  for theirs, our in zip(records, ours, strict=True):
    assert theirs['task'] == 'lm_eval:choices'
    values = [float(value) for (value, _), *_ in theirs['resps']]
    assert values == pytest.approx(our['log_likelihoods'], rel=1e-5)


@needs_lm_eval
def test_limit_asks_the_first_questions(folder):
  found, records = evaluate(folder, 'choices', limit=2)
  assert found['choices']['questions'] == len(records) == 2


@needs_lm_eval
def test_texts_are_those_of_our_own_perplexity(folder):
  found, _ = evaluate(folder, 'texts')
  totals = [
    scores.text_perplexity(
      *small_lm.model(), small_lm.tokenizer(), row['question']
    )['log_likelihood']
    for row in QUESTIONS
  ]
  size = sum(len(row['question']) for row in QUESTIONS)
  metrics = found['texts']['metrics']
  assert metrics['bits_per_byte']['value'] == pytest.approx(
    -sum(totals) / size / 0.6931471805599453, rel=1e-5
  )
  assert metrics['word_perplexity']['stderr'] is None


@needs_lm_eval
def test_answers_are_generated_until_a_stop_string(folder, monkeypatch):
  tokenizer = small_lm.tokenizer()
  calls = []

  def generate(model, params, prompts, num_tokens, **options):
    calls.append((num_tokens, options['stop']))
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    words = ['grow. So' if text == 'Seeds' else 'lions' for text in texts]
    return [tokenizer.encode_batch([word])[0][:-1] for word in words]

  monkeypatch.setattr(scores.generation, 'generate', generate)
  found, records = evaluate(folder, 'answers')
  assert found['answers']['metrics']['exact_match']['value'] == 2 / 3
  assert [record['resps'][0][0] for record in records] == [
    *('lions', 'lions', 'grow')
  ]
  assert calls == [(12, ('.',))]


@needs_lm_eval
def test_unknown_tasks_are_refused(folder):
  with pytest.raises(ValueError) as error:
    evaluate(folder, 'chess')
  assert str(error.value) == (
    f"{folder} has no task 'chess'. Its tasks: answers, choices, texts."
  )


# Prompts, by the templates of lm_eval's own tasks.

ROW = {
  'question': 'Which is it',
  'choices': {'text': ['one', 'two', 'three', 'four'], 'label': list('ABCD')},
  'answerKey': 'C',
}
ROWS = {
  'arc/arc_easy.yaml': ('arc_easy', ROW),
  'openbookqa/openbookqa.yaml': (
    'openbookqa',
    {**ROW, 'question_stem': ROW['question']},
  ),
  'piqa/piqa.yaml': (
    'piqa',
    {'goal': 'To mend', 'sol1': 'Cut', 'sol2': 'Glue', 'label': 1},
  ),
  'super_glue/boolq/default.yaml': (
    'boolq',
    {'question': 'is it so', 'passage': 'It is.', 'label': 1},
  ),
  'gsm8k/gsm8k.yaml': (
    'gsm8k',
    {'question': 'How many?', 'answer': 'Many.\n#### 3'},
  ),
}


@needs_lm_eval
@pytest.mark.parametrize('file', ROWS)
def test_prompts_are_those_of_lm_eval(tmp_path, file):
  import jinja2
  import lm_eval
  import yaml

  path = pathlib.Path(lm_eval.__file__).parent / 'tasks' / file
  theirs = yaml.safe_load(path.read_text())
  name, row = ROWS[file]
  data = tmp_path / 'row.jsonl'
  data.write_text(json.dumps(row))
  task = tasks.get(name, data, shots=0)
  (question,) = task.questions

  def render(field):
    text = theirs[field]
    return str(row[text]) if text in row else jinja2.Template(text).render(row)

  assert question[0] == render('doc_to_text')
  if task.is_choice:
    options = theirs['doc_to_choice']
    if isinstance(options, str):
      options = ast.literal_eval(render('doc_to_choice'))
    assert list(question.options) == options
    assert question.answer == int(render('doc_to_target'))
    listed = {row['metric'] for row in theirs['metric_list']}
    assert ('acc_norm' in listed) == task.has_acc_norm
  else:
    assert list(task.stop) == theirs['generation_kwargs']['until']


@needs_lm_eval
def test_prompts_of_mmlu_are_those_of_lm_eval(tmp_path):
  import jinja2
  import lm_eval
  import yaml

  folder = pathlib.Path(lm_eval.__file__).parent / 'tasks/mmlu/default'
  theirs = yaml.safe_load((folder / '_default_template_yaml').read_text())
  subject = yaml.safe_load((folder / 'mmlu_anatomy.yaml').read_text())
  row = {'question': ' Which is it? ', 'choices': list('wxyz'), 'answer': 2}
  (tmp_path / 'anatomy_test.csv').write_text(
    f'{row["question"]},{",".join(row["choices"])},C\n'
  )
  (question,) = tasks.get('mmlu', tmp_path, shots=0).questions
  rendered = jinja2.Template(theirs['doc_to_text']).render(row)
  assert question.context == subject['description'] + rendered
  assert list(question.options) == theirs['doc_to_choice']


# What needs no lm_eval.


def test_absence_is_said_with_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError) as error:
    harness.check_installed()
  assert str(error.value) == (
    'Tasks lm_eval:... need the package lm_eval: pip install '
    "'gnlorp_jax[eval]', or in a checkout pip install '.[eval]'"
  )


def test_answers_at_random_are_refused():
  with pytest.raises(ValueError) as error:
    harness._limits({'do_sample': True, 'temperature': 0.7})
  assert str(error.value) == (
    "The task draws its answers at random ({'do_sample': True, 'temperature': "
    '0.7}); only the likeliest are found here. Set do_sample: false in '
    'generation_kwargs.'
  )


def test_ways_of_generating_are_translated():
  assert harness._limits({'until': 'a', 'max_gen_toks': 3}) == {
    'stop': ['a'],
    'max_tokens': 3,
  }
  assert harness._limits({'do_sample': True, 'temperature': 0}) == {
    'stop': [],
    'max_tokens': 256,
  }


def test_requests_are_grouped_by_how_they_are_answered():
  short, long = {'max_gen_toks': 1}, {'max_gen_toks': 9}
  found = harness._alike([('a', short), ('b', long), ('c', short)])
  assert found == [(short, [0, 2]), (long, [1])]
