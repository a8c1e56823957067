import contextlib
import io
import json
import shutil

import pytest
import rich.console

from gnlorp_jax import models
from gnlorp_jax.compose import scores
from gnlorp_jax.data import tasks
from gnlorp_jax.models.families import roberta
from gnlorp_jax.recipes.evaluate import recipe, report, settings
from tests.compose import small_lm

QUESTIONS = [
  {'question': 'Predators eat', 'choices': ['lions', 'bunnies'], 'label': 1},
  {'question': 'Fog is found in', 'choices': ['a marsh', 'a box'], 'label': 0},
  {'question': 'Seeds', 'choices': ['grow', 'sleep', 'sing'], 'label': 0},
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('models') / 'small'
  return small_lm.write(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  path = tmp_path_factory.mktemp('files')
  lines = '\n'.join(map(json.dumps, QUESTIONS))
  (path / 'openbookqa.jsonl').write_text(lines)
  (path / 'words.txt').write_text('Words and more words.\n' * 10)
  return path


@contextlib.contextmanager
def silent(title):
  yield lambda done, total: None


def make(folder, files, **options):
  return settings.EvaluateConfig(
    folder=folder, data=str(files), batch_size=2, **options
  )


def test_a_folder_is_scored_and_reported(folder, files, tmp_path):
  samples = tmp_path / 'samples.jsonl'
  titles = []

  @contextlib.contextmanager
  def progress(title):
    titles.append(title)
    yield lambda done, total: None

  text = f'perplexity:{files}/words.txt'
  config = make(
    folder, files, tasks=f'openbookqa, {text}', samples=str(samples)
  )
  found = recipe.evaluate(config, progress)
  assert titles == ['openbookqa', 'words.txt']

  # The same of the model in memory.
  task = tasks.get('openbookqa', files)
  direct = scores.evaluate_tasks(
    *small_lm.model(), small_lm.tokenizer(), [task]
  )
  result = found['results']['openbookqa']
  assert result.pop('seconds') >= 0
  assert result == direct['openbookqa']
  words = found['results'][text]
  assert words['tokens'] == 220
  assert words['window'] == 128
  assert found['settings']['batch_size'] == 2
  records = [json.loads(line) for line in samples.read_text().splitlines()]
  assert [record['task'] for record in records] == ['openbookqa'] * 3
  assert len(records[2]['log_likelihoods']) == 3

  output = tmp_path / 'scores.json'
  report.write(str(output), found)
  assert json.loads(output.read_text()) == found
  shown = io.StringIO()
  report.show(found, rich.console.Console(file=shown, width=100))
  rows = [line.split() for line in shown.getvalue().splitlines()]
  acc = result['metrics']['acc']
  error = f'{acc["stderr"]:.4f}' if acc['stderr'] else ''
  row = f'openbookqa acc {acc["value"]:.4f} {error} 0.6667 3 0'
  assert row.split() in rows
  value = f'{words["metrics"]["perplexity"]:.6g}'
  assert ['words.txt', 'perplexity', value, '220', '128'] in rows


def test_weights_may_be_bfloat16(folder, files):
  config = make(folder, files, tasks='openbookqa', dtype='bfloat16', limit=1)
  loaded = recipe.load(config)
  assert loaded.params['embed']['embedding'].dtype == 'bfloat16'
  assert recipe.evaluate(config, silent)['results']['openbookqa']['questions']


def show(results, text=None):
  shown = io.StringIO()
  found = {'model': 'm', 'results': results, 'settings': {'text': text}}
  report.show(found, rich.console.Console(file=shown, width=80))
  return shown.getvalue()


def score(value, stderr, **others):
  metrics = {'acc': {'value': value, 'stderr': stderr}}
  return {'questions': 2, 'metrics': metrics, **others}


def test_the_tables_have_a_row_for_each_metric():
  group = score(0.5, 0.25, majority=1.0)
  long = 'a_task_of_lm_eval_whose_name_is_longer_than_most_terminals_are_wide'
  shown = show(
    {
      'mmlu': {**group, 'shots': 5, 'groups': {'art': group, 'law': group}},
      'lm_eval:x': {
        'tasks': {
          'x': score(12345678.5, None),
          long: score(0.25, None),
        }
      },
      'perplexity:dir/[a].txt': {
        'tokens': 7,
        'window': 4,
        'metrics': {'perplexity': 1234567.5, 'word_perplexity': None},
      },
      'perplexity': {'tokens': 7, 'window': 4, 'metrics': {'p': 20.48312345}},
    },
    text='/home/b.txt',
  )
  lines = [line.split() for line in shown.splitlines() if '─' not in line]
  assert [line for line in lines if line][:-2] == [
    ['m'],
    'task metric value error majority questions shots'.split(),
    ['mmlu', 'acc', '0.5000', '0.2500', '1.0000', '2', '5'],
    ['lm_eval:x', 'acc', '1.23457e+07', '2'],
    [f'lm_eval:{long}', 'acc', '0.2500', '2'],
    'text metric value tokens window'.split(),
    ['[a].txt', 'perplexity', '1.23457e+06', '7', '4'],
    ['[a].txt', 'word_perplexity', 'no', 'number', '7', '4'],
    ['b.txt', 'p', '20.4831', '7', '4'],
  ]
  assert shown.endswith(
    '\nerror: standard error of the mean. majority: what always giving the most'
    ' \nfrequent answer would score; compare acc with it.\n'
  )


def test_the_footnote_stands_below_accuracies_alone():
  text = {'tokens': 7, 'window': 4, 'metrics': {'perplexity': 2.0}}
  shown = show({'perplexity:a.txt': text})
  assert 'majority' not in shown
  assert 'shots' not in shown


def test_the_table_of_our_tasks_fits_a_terminal():
  scores = {'value': 0.123456, 'stderr': 0.123456}
  rest = {'majority': 0.123456, 'questions': 14042, 'shots': 5}
  shown = show(
    {
      'arc_challenge': {'metrics': {'acc_norm': scores}, **rest},
      'gsm8k': {'metrics': {'exact_match_flexible': scores}, **rest},
    }
  )
  assert max(map(len, shown.splitlines())) <= 80
  assert 'exact_match_flexible' in shown
  assert shown.count('14042') == 2


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_no_error_is_shown_where_none_or_all_answers_are_right(value):
  shown = show({'piqa': score(value, 0.0, majority=0.5, shots=0)})
  row = ['piqa', 'acc', f'{value:.4f}', '0.5000', '2', '0']
  assert row in [line.split() for line in shown.splitlines()]


def test_tasks_that_are_named_twice_are_asked_once(folder, files):
  config = make(folder, files, tasks='piqa, boolq,piqa')
  assert config.task_names == ('piqa', 'boolq')


# Mistakes.


def message(function, *args):
  with pytest.raises(ValueError) as error:
    function(*args)
  return str(error.value)


def test_models_that_are_unknown_or_do_not_fit_are_refused(files, tmp_path):
  other = small_lm.write(tmp_path / 'other', model_type='gpt2')
  assert message(recipe.load, make(other, files, tasks='openbookqa')) == (
    "Unsupported model: model_type='gpt2' (supported: "
    f'{list(models.family_names())}).'
  )
  small = small_lm.write(tmp_path / 'small', vocab_size=99)
  assert message(recipe.load, make(small, files, tasks='openbookqa')) == (
    'The tokenizer has ids up to 257, the model has 99 tokens. Name the '
    'tokenizer that the model was trained with by --tokenizer.'
  )


def test_encoders_are_refused(files, tmp_path):
  encoder = roberta.RobertaConfig(
    vocab_size=260,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    max_seq_len=16,
  )
  fields = roberta.config_to_hf(encoder)
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  small_lm.tokenizer().save(tmp_path)
  assert message(recipe.load, make(str(tmp_path), files, tasks='piqa')) == (
    f'{tmp_path} holds a roberta, which sees the whole of a text and continues '
    'none. Name a causal language model.'
  )


def test_windows_longer_than_the_model_reads_are_refused(folder, files):
  config = make(folder, files, tasks='openbookqa', max_length=129)
  assert message(recipe.load, config) == (
    'max_length=129 must be in [1, 128], what the model accepts.'
  )


def test_texts_that_are_missing_or_empty_are_refused(folder, files, tmp_path):
  config = make(folder, files, tasks='perplexity', text=str(tmp_path / 'no'))
  assert message(recipe.read_tasks, config).startswith(
    f'Cannot read the text {tmp_path}/no: '
  )
  (tmp_path / 'empty').write_text(' \n')
  config = make(folder, files, tasks=f'perplexity:{tmp_path}/empty')
  assert message(recipe.read_tasks, config) == (
    f'The text {tmp_path}/empty is empty, and has no perplexity.'
  )


def test_missing_files_are_found_before_weights_are_read(files, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  config = make(str(tmp_path), files, tasks='piqa')
  assert message(recipe.evaluate, config, silent).startswith(
    'Task piqa lacks its file'
  )


@pytest.fixture(scope='module')
def weightless(folder, tmp_path_factory):
  """A folder of the same model without its weights."""
  path = tmp_path_factory.mktemp('models') / 'weightless'
  skip = shutil.ignore_patterns('*.safetensors*')
  return str(shutil.copytree(folder, path, ignore=skip))


def never(title):
  raise AssertionError(f'A progress bar began: {title}.')


def test_answers_that_do_not_fit_are_refused_before_weights_are_read(
  weightless, tmp_path
):
  line = json.dumps({'question': '1 + 1?', 'answer': '#### 2'})
  (tmp_path / 'test.jsonl').write_text(line)
  config = make(weightless, tmp_path, tasks='gsm8k', shots=0)
  assert message(recipe.evaluate, config, never) == (
    'gsm8k writes up to 256 tokens after its question; the model accepts 128 '
    'in all: leave the task out.'
  )


def test_strides_longer_than_a_window_are_refused_before_weights_are_read(
  weightless, files
):
  text = f'perplexity:{files}/words.txt'
  config = make(weightless, files, tasks=text, stride=129)
  assert message(recipe.evaluate, config, never) == (
    'stride=129 must be in [1, 128], the length of a window.'
  )


KNOWN = (*tasks.names(), 'perplexity')


@pytest.mark.parametrize(
  'args, text',
  [
    (
      ['--tasks', 'piqa'],
      'No model is named. Begin with its Hugging Face folder: '
      'python -m gnlorp_jax.evaluate FOLDER --tasks ...',
    ),
    (
      ['{files}', '--tasks', 'piqa'],
      '{files} is no Hugging Face folder: it holds no config.json. Name the '
      'hf/ of a run, what save_pretrained wrote, or hf:OWNER/NAME.',
    ),
    (
      ['{folder}', '--tasks', ' ,'],
      f"tasks=' ,' asks nothing; expected some of {KNOWN} or lm_eval:TASK, "
      'parted by commas.',
    ),
    (
      ['{folder}', '--tasks', 'piqa,boolqa'],
      f"Unknown task 'boolqa'; expected one of {KNOWN}, perplexity:FILE or "
      "lm_eval:TASK. Did you mean 'boolq'?",
    ),
    (
      ['{folder}', '--tasks', 'ARC-Easy'],
      f"Unknown task 'ARC-Easy'; expected one of {KNOWN}, perplexity:FILE or "
      "lm_eval:TASK. Did you mean 'arc_easy'?",
    ),
    (
      ['{folder}', '--tasks', 'Perplexty:a.txt'],
      f"Unknown task 'Perplexty:a.txt'; expected one of {KNOWN}, "
      "perplexity:FILE or lm_eval:TASK. Did you mean 'perplexity:a.txt'?",
    ),
    (
      ['{folder}', '--text', 'f.txt'],
      '--text alone asks nothing: add --tasks perplexity.',
    ),
    (
      ['{folder}', '--tasks', 'lm_eval:'],
      f"Unknown task 'lm_eval:'; expected one of {KNOWN}, perplexity:FILE or "
      'lm_eval:TASK.',
    ),
    (
      ['{folder}', '--tasks', 'perplexity'],
      'tasks=perplexity needs a text: --text FILE.',
    ),
    (
      ['{folder}', '--tasks', 'piqa'],
      'Task piqa is read from files on this machine: name their folder by '
      '--data FOLDER.',
    ),
    (
      ['{folder}', '--tasks', 'piqa,boolq,piqa', '--data', '{files}/words.txt'],
      'data names one file, {files}/words.txt, and tasks 2 tasks: name their '
      'folder.',
    ),
    (
      ['{folder}', '--tasks', 'piqa', '--output', 'nodir/o.json'],
      '--output nodir/o.json: the folder nodir does not exist. Create it, or '
      'name another file.',
    ),
    (
      ['{folder}', '--tasks', 'piqa', '--samples', '{files}/nodir/s.jsonl'],
      '--samples {files}/nodir/s.jsonl: the folder {files}/nodir does not '
      'exist. Create it, or name another file.',
    ),
    (
      ['{folder}', '--tasks', 'piqa', '--output', '{files}'],
      '--output {files}: that is a folder. Name a file in it.',
    ),
  ],
)
def test_impossible_settings_are_refused(folder, files, args, text):
  places = {'folder': folder, 'files': files}
  args = [word.format(**places) for word in args]
  assert message(settings.parse, args, '') == text.format(**places)


@pytest.mark.parametrize(
  'options, text',
  [
    ({'limit': 0}, 'limit=0 must be positive.'),
    ({'batch_size': -2}, 'batch_size=-2 must be positive.'),
    ({'shots': -1}, 'shots=-1 must not be negative.'),
  ],
)
def test_impossible_numbers_are_refused(options, text):
  with pytest.raises(ValueError) as error:
    settings.EvaluateConfig(**options)
  assert str(error.value) == text
