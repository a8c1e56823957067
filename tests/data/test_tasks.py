import json

import pytest

from gnlorp_jax.data import tasks
from gnlorp_jax.data.tasks import gsm8k

ADAPTERS = 'commonsense_llm_adapters'


def instruction(text, options, word='Answer', kind='answer'):
  listed = ' '.join(f'{word}{i}: {o}' for i, o in enumerate(options, 1))
  names = '/'.join(f'{kind}{i}' for i in range(1, len(options) + 1))
  return (
    f'Please choose the correct {kind} to the question: {text}\n\n{listed}\n\n'
    f'Answer format: {names}'
  )


def adapters(text, options, right, **kind):
  return {
    'instruction': instruction(text, options, **kind),
    'answer': f'{kind.get("kind", "answer")}{right + 1}',
  }


@pytest.fixture
def write(tmp_path):
  """Writes files of records, JSON lists or lines by their names."""

  def write(name, records):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(records, str):
      path.write_text(records)
    elif path.suffix == '.jsonl':
      path.write_text('\n'.join(map(json.dumps, records)) + '\n')
    else:
      path.write_text(json.dumps(records))
    return path

  write.folder = tmp_path
  return write


def test_tasks_are_found_by_their_modules():
  assert tasks.names() == (
    *('arc_challenge', 'arc_easy', 'boolq', 'gsm8k', 'mmlu', 'openbookqa'),
    'piqa',
  )


@pytest.mark.parametrize(
  'name, count, shots',
  [
    ('arc_challenge', 1172, 0),
    ('arc_easy', 2376, 0),
    ('boolq', 3270, 0),
    ('gsm8k', 1319, 5),
    ('mmlu', 14042, 5),
    ('openbookqa', 500, 0),
    ('piqa', 1838, 0),
  ],
)
def test_public_files_are_read_whole(shared, name, count, shots):
  task = tasks.get(name, shared / 'data/sft')
  assert (task.name, len(task.questions), task.shots) == (name, count, shots)
  few = tasks.get(name, shared / 'data/sft', limit=2, shots=0)
  assert len(few.questions) == (2 * 57 if name == 'mmlu' else 2)


# Prompts, which are those of lm_eval.

SKY = ('Why is the sky blue?', ['Light.', 'Paint.', 'No one knows.'])


@pytest.mark.parametrize(
  'name, file, prompt',
  [
    ('arc_easy', 'ARC-Easy', 'Question: Why is the sky blue?\nAnswer:'),
    (
      'arc_challenge',
      'ARC-Challenge',
      'Question: Why is the sky blue?\nAnswer:',
    ),
    ('openbookqa', 'openbookqa', 'Why is the sky blue?'),
  ],
)
def test_questions_of_llm_adapters(write, name, file, prompt):
  write(f'inner/{file}.test.json', [adapters(*SKY, 2)])
  write(f'inner/{file}.train.json', [adapters('Is it?', ['Yes', 'No'], 1)] * 2)
  task = tasks.get(name, write.folder)
  assert task.questions == [(prompt, tuple(SKY[1]), 2, '')]
  (question,) = tasks.get(name, write.folder, shots=2).questions
  example = f'{prompt.replace(SKY[0], "Is it?")} No\n\n'
  assert question.context == 2 * example + prompt


def test_solutions_of_llm_adapters(write):
  options = ['Cut it: then glue.', 'Glue it.']
  record = adapters('To mend?', options, 1, word='Solution', kind='solution')
  path = write('piqa.test.json', [record])
  (question,) = tasks.get('piqa', path).questions
  assert question == ('Question: To mend?\nAnswer:', tuple(options), 1, '')


LABELS = ['A', 'B', 'C']


@pytest.mark.parametrize(
  'name, record',
  [
    (
      'arc_easy',
      {
        'question': {
          'stem': SKY[0],
          'choices': [
            {'text': text, 'label': label}
            for text, label in zip(SKY[1], LABELS, strict=True)
          ],
        },
        'answerKey': 'B',
      },
    ),
    (
      'arc_easy',
      {
        'question': SKY[0],
        'choices': {'text': SKY[1], 'label': LABELS},
        'answerKey': 'B',
      },
    ),
    (
      'openbookqa',
      {
        'question_stem': SKY[0],
        'choices': {'text': SKY[1], 'label': LABELS},
        'answerKey': ' B',
      },
    ),
    (
      'openbookqa',
      {'question': SKY[0], 'choices': SKY[1], 'label': 1},
    ),
    (
      'piqa',
      {'goal': SKY[0], 'sol1': SKY[1][0], 'sol2': SKY[1][1], 'label': 1},
    ),
  ],
)
def test_questions_as_they_were_published(write, name, record):
  path = write('mine.jsonl', [record])
  (question,) = tasks.get(name, path).questions
  assert SKY[0] in question.context
  assert question.options[question.answer] == 'Paint.'


@pytest.mark.parametrize(
  'record, context, answer',
  [
    (
      {
        'instruction': 'Please answer the following question with true or '
        'false, question: is it so?\n\nAnswer format: true/false',
        'answer': 'true',
      },
      'Question: is it so?\nAnswer:',
      1,
    ),
    (
      {'question': 'is it so', 'passage': 'It is not.', 'answer': False},
      'It is not.\nQuestion: is it so?\nAnswer:',
      0,
    ),
    (
      {'question': 'is it so', 'passage': 'It is.', 'label': 1},
      'It is.\nQuestion: is it so?\nAnswer:',
      1,
    ),
  ],
)
def test_questions_of_boolq(write, record, context, answer):
  path = write('boolq.jsonl', [record])
  task = tasks.get('boolq', path)
  assert task.questions == [(context, ('no', 'yes'), answer, '')]
  assert not task.has_acc_norm


MMLU = {
  'test/high_school_art_test.csv': '"Who, then?",Ann,Bob,Cy,Di,{}\n',
  'dev/high_school_art_dev.csv': 'First?,1,2,3,4,A\nSecond?,5,6,7,8,D\n',
}
HEADER = 'question,choice0,choice1,choice2,choice3,answer\n'


@pytest.mark.parametrize('header, answer', [(HEADER, '2'), ('', 'C')])
def test_questions_of_mmlu(write, header, answer):
  for name, text in MMLU.items():
    write(f'mmlu/{name}', header + text.format(answer))
  (question,) = tasks.get('mmlu', write.folder, shots=2).questions
  assert question.context == (
    'The following are multiple choice questions (with answers) about high '
    'school art.\n\n'
    'First?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n'
    'Second?\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: D\n\n'
    'Who, then?\nA. Ann\nB. Bob\nC. Cy\nD. Di\nAnswer:'
  )
  assert question[1:] == (('A', 'B', 'C', 'D'), 2, 'high_school_art')


def test_rows_of_mmlu_that_are_no_questions_are_refused(write):
  for name, text in MMLU.items():
    write(f'mmlu/{name}', text.format('A'))
  path = write('mmlu/test/high_school_art_test.csv', HEADER)
  assert message('mmlu', write.folder, shots=2) == (
    f'{path} holds no questions; expected rows of a question, four options and '
    'an answer. Is it a copy that broke off?'
  )
  write('mmlu/test/high_school_art_test.csv', 'Who?,' + 'x' * 1000 + '\n')
  found = message('mmlu', write.folder, shots=2)
  assert 'four options and an answer (A to D, or 0 to 3), not [' in found
  assert len(found) < 300


def test_questions_of_gsm8k(write):
  one = {'question': 'What is 600 + 600?', 'answer': 'It is\n#### 1,200'}
  write('gsm8k/test.jsonl', [one])
  write('gsm8k/train.jsonl', [{'question': '1?', 'answer': '#### 1'}] * 3)
  task = tasks.get('gsm8k', write.folder, shots=3)
  assert task.questions == [
    (
      3 * 'Question: 1?\nAnswer: #### 1\n\n'
      + 'Question: What is 600 + 600?\nAnswer:',
      '1200',
      '',
    )
  ]
  assert 'Question:' in task.stop


@pytest.mark.parametrize(
  'text, strict, flexible',
  [
    (' 6 * 2 = 12.\n#### 12', '12', '12'),
    (' So $1,200 it is.\n#### $1,200', gsm8k.NO_ANSWER, '1200'),
    (' #### -3. And 4', '-3', '4'),
    (' No numbers.', gsm8k.NO_ANSWER, gsm8k.NO_ANSWER),
    (' 1, then 25.', gsm8k.NO_ANSWER, '25'),
  ],
)
def test_answers_of_gsm8k(text, strict, flexible):
  assert gsm8k.strict(text) == strict
  assert gsm8k.flexible(text) == flexible


# Mistakes.


def message(*args, **options):
  with pytest.raises(ValueError) as error:
    tasks.get(*args, **options)
  return str(error.value)


def test_unknown_tasks_and_numbers_are_refused(tmp_path):
  assert message('arc', tmp_path) == (
    f"Unknown task 'arc'; expected one of {tasks.names()}."
  )
  assert message('PIQ', tmp_path) == (
    f"Unknown task 'PIQ'; expected one of {tasks.names()}. Did you mean 'piqa'?"
  )
  assert message('piqa', tmp_path, shots=-1) == (
    'shots=-1 must not be negative.'
  )
  assert message('piqa', tmp_path, limit=0) == (
    'limit=0 must be positive, or None for all.'
  )
  assert message('piqa', tmp_path / 'no') == (
    f"data='{tmp_path}/no' does not exist. Name a folder with the files of the "
    'tasks.'
  )


def test_missing_files_are_named(tmp_path, write):
  assert message('arc_easy', tmp_path) == (
    f'Task arc_easy lacks its file: {tmp_path} holds none of '
    "['ARC-Easy.test.json', '*/ARC-Easy.test.json', 'ARC-Easy-Test.jsonl', "
    "'*/ARC-Easy-Test.jsonl']. Name a folder with one of them."
  )
  assert message('mmlu', tmp_path) == (
    f'Task mmlu lacks its files: {tmp_path} holds none of '
    "['*_test.csv', 'test/*_test.csv', '*/test/*_test.csv']. Name a folder "
    'with them.'
  )
  write('test/art_test.csv', 'Who?,a,b,c,d,A\n')
  assert message('mmlu', tmp_path) == (
    f'Task mmlu lacks the file {tmp_path}/dev/art_dev.csv, whose questions are '
    'shown solved before those of art_test.csv. Add it, or ask with shots=0.'
  )


def test_too_few_examples_are_an_error(write):
  path = write('piqa.test.json', [adapters('Mend?', ['a', 'b'], 0)])
  write('piqa.train.json', [adapters('Mend?', ['a', 'b'], 0)])
  assert message('piqa', path, shots=2) == (
    f'shots=2, but {path.with_name("piqa.train.json")} has 1 examples. Ask for '
    'fewer.'
  )


@pytest.mark.parametrize(
  'name, content, text',
  [
    ('a.json', '[{"a": ', 'Cannot read {}: '),
    ('a.json', '[]', '{} holds no records: expected objects with fields.'),
    ('a.jsonl', '3\n', '{} holds no records: expected objects with fields.'),
    (
      'a.jsonl',
      '{"text": "?", "b": 1}\n',
      'Record 0 of {} is of no known format, or its answer is none of its '
      "options. It has the fields ['text', 'b']; expected instruction, answer "
      '(LLM-Adapters); question, choices, answerKey or label (ARC, '
      'OpenBookQA); or goal, sol1, sol2, label (PIQA).',
    ),
    (
      'a.jsonl',
      '{"question": "?", "choices": ["a", "b"], "label": 2}\n',
      'Record 0 of {} is of no known format, or its answer is none of its '
      "options. It has the fields ['question', 'choices', 'label']; ",
    ),
  ],
)
def test_files_that_cannot_be_understood_are_refused(
  write, name, content, text
):
  path = write(name, content)
  assert message('arc_easy', path).startswith(text.format(path))


@pytest.mark.parametrize(
  'asked, name, other',
  [
    ('piqa', 'openbookqa.test.json', 'openbookqa'),
    ('openbookqa', 'piqa.train.json', 'piqa'),
    ('arc_easy', 'ARC-Challenge-Test.jsonl', 'arc_challenge'),
    ('boolq', 'gsm8k/test.jsonl', 'gsm8k'),
  ],
)
def test_files_with_the_name_of_another_task_are_refused(
  write, asked, name, other
):
  path = write(name, [])
  assert message(asked, path) == (
    f'{path} has the name of a file of {other}, and is asked as {asked}. Name '
    f'the file of {asked}, or the folder of both.'
  )


@pytest.mark.parametrize(
  'name', ['test.jsonl', 'dev.jsonl', 'openbookqa.jsonl']
)
def test_files_of_names_that_all_tasks_may_have_are_read(write, name):
  path = write(name, [{'question': '?', 'choices': ['a', 'b'], 'label': 1}])
  assert len(tasks.get('openbookqa', path).questions) == 1


@pytest.mark.parametrize('name', ['piqa', 'boolq'])
@pytest.mark.parametrize(
  'record',
  [
    adapters('?', ['a', 'b', 'c', 'd'], 1),
    {'question': '?', 'choices': ['a', 'b', 'c', 'd'], 'label': 1},
  ],
)
def test_records_of_another_number_of_options_are_refused(write, name, record):
  path = write('mine.jsonl', [record])
  assert message(name, path) == (
    f'Record 0 of {path} has 4 options; a question of {name} has 2. Is it the '
    'file of another task?'
  )


def test_one_file_is_not_several_tasks(write):
  path = str(write('mine.jsonl', []))
  tasks.check_data(['piqa'], path)
  tasks.check_data(['piqa', 'boolq'], str(write.folder))
  with pytest.raises(ValueError) as error:
    tasks.check_data(['piqa', 'boolq'], path, 'eval.')
  assert str(error.value) == (
    f'eval.data names one file, {path}, and eval.tasks 2 tasks: name their '
    'folder.'
  )


def test_damaged_records_of_other_tasks_are_refused(write):
  path = write('a.jsonl', [{'question': '?', 'passage': 'x'}])
  assert message('boolq', path).startswith(f'Record 0 of {path} is of no known')
  path = write('test.jsonl', [{'question': '?'}])
  assert message('gsm8k', path, shots=0) == (
    f"Record 0 of {path} lacks the fields ['answer']. It has the fields "
    "['question']."
  )
  path = write('art_test.csv', 'Who?,a,b,c,d,E\n')
  assert message('mmlu', path, shots=0) == (
    f'Record 0 of {path} must have a question, four options and an answer (A '
    "to D, or 0 to 3), not ['Who?', 'a', 'b', 'c', 'd', 'E']."
  )
