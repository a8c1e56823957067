"""Instruction tuning in this process: what a run learns, says and leaves.

One short run on conversations from files is made once and shared.
"""

import dataclasses
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.settings import MeshConfig
from gnlorp_jax.recipes.sft import data, evaluation, recipe, report
from gnlorp_jax.recipes.sft.settings import (
  ChatDataConfig,
  SftConfig,
  SftEvalOptions,
)
from gnlorp_jax.training import loop
from gnlorp_jax.training.checkpoint import Checkpointer
from gnlorp_jax.training.interrupt import StopRequest
from tests.compose import small_lm

TEMPLATE = (
  "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
RECORDS = [
  {'prompt': f'Say {word}.', 'completion': word}
  for word in ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  lines = [json.dumps(record) for record in RECORDS]
  (path / 'train.jsonl').write_text('\n'.join(lines[:6]))
  (path / 'valid.jsonl').write_text('\n'.join(lines[6:]))
  (path / 'chat.jinja').write_text(TEMPLATE)
  return SftConfig(
    run_dir=str(path / 'run'),
    init_from=small_lm.write(path / 'model'),
    method='full',
    mesh=MeshConfig(data=1),
    batch_size=2,
    epochs=3,
    eval_every=3,
    log_every=1,
    optim=dataclasses.replace(SftConfig().optim, learning_rate=1e-2),
    data=ChatDataConfig(
      source=str(path / 'train.jsonl'),
      validation_source=str(path / 'valid.jsonl'),
      template=str(path / 'chat.jinja'),
      max_length=40,
    ),
    eval=SftEvalOptions(max_tokens=4, batch_size=2),
  )


@pytest.fixture(scope='module')
def prepared(config):
  return recipe.prepare(config)


@pytest.fixture(scope='module')
def finished(prepared):
  run = recipe.make_run(prepared, prepared.config)
  with StopRequest() as stop:
    outcome = loop.train(run, stop)
  return outcome, report.finish(prepared, prepared.config, outcome)


def test_a_run_is_as_long_as_its_epochs(prepared):
  # Six examples, of which two fill a row.
  lengths = [len(x.ids) for x in prepared.chat.examples.training]
  assert 2 * max(lengths) <= 40 < 3 * min(lengths)
  assert prepared.steps_per_epoch == 2
  assert prepared.config.steps == 6


def test_steps_end_a_run_before_its_epochs(config, caplog):
  caplog.set_level('INFO')
  shorter = recipe.prepare(dataclasses.replace(config, steps=4))
  assert shorter.config.steps == 4
  assert (
    'An epoch is 2 steps of 2 rows of up to 40 tokens; 4 steps in all, at a '
    'learning rate of 0.01.'
  ) in caplog.messages
  longer = recipe.prepare(dataclasses.replace(config, steps=9))
  assert longer.config.steps == 6
  warned = 'steps=9, and epochs=3 end after 6 steps: raise epochs for more.'
  assert warned in caplog.messages
  recipe.prepare(config)
  assert caplog.messages[-2] == (
    '6 steps change a model little. Raise --epochs, which is 3, or lower '
    '--batch-size, which is 2.'
  )


def test_length_of_a_search_and_few_held_out_are_told(prepared, caplog):
  caplog.set_level('INFO')
  config = dataclasses.replace(
    prepared.config,
    optim=dataclasses.replace(prepared.config.optim, learning_rate=None),
    learning_rates='0.1,0.2',
    seeds='0,1',
    steps=None,
  )
  examples = prepared.chat.examples
  few = prepared.chat._replace(
    examples=examples._replace(validation=examples.training[:4])
  )
  recipe.tell_length(config, few, recipe.Length(30, 2, 0, 40))
  assert caplog.messages == [
    'An epoch is 2 steps of 2 rows of up to 40 tokens; 30 steps in all in each '
    'of 3 runs, at a learning rate of 0.1 or 0.2.',
    'What is measured rests on 4 examples held out: give --data.val-size a '
    'number of them, such as 6, or --data.validation-source.',
  ]
  caplog.clear()
  enough = few._replace(
    examples=examples._replace(validation=examples.training[:1] * 5)
  )
  recipe.tell_length(config, enough, recipe.Length(30, 2, 0, 40))
  assert len(caplog.messages) == 1


@pytest.mark.parametrize(
  ('position', 'size', 'steps', 'more'),
  [
    ({'batches': {'sequences': 5, 'drawn_for': 2}, 'batch_size': 2}, 2, 6, 0),
    ({'batches': {'sequences': 5, 'drawn_for': 2}, 'batch_size': 2}, 1, 7, -2),
    # What is left are 1 row of the second epoch, and the third.
    ({'batches': {'sequences': 5, 'drawn_for': 2}, 'batch_size': 2}, 3, 5, 2),
    # Of a run of pre-training, which is refused later.
    ({'batches': {'sequences': 5}, 'batch_size': 2}, 2, 6, 0),
  ],
)
def test_epochs_end_where_they_did_with_another_batch_size(
  config, tmp_path, position, size, steps, more
):
  """Of three epochs of three rows, two rows of the second were seen."""
  with Checkpointer(tmp_path / 'checkpoints') as saved:
    metadata = {'batch_size': 2}
    saved.save(3, {'x': np.zeros(1)}, position, metadata, wait=True)
  changed = dataclasses.replace(config, run_dir=str(tmp_path), batch_size=size)
  found = recipe.prepare(changed)
  assert (found.config.steps, found.more_steps) == (steps, more)


def test_it_learns_and_tells(finished):
  _, summary = finished
  assert summary['last']['loss'] < 0.8 * summary['first']['loss']
  assert summary['first']['token_accuracy'] <= summary['last']['token_accuracy']
  assert summary['epochs'] == 3
  assert summary['data']['train']['examples'] == 6
  assert summary['data']['validation valid']['validation'] == 2


def test_answers_are_kept_by_step(config, finished):
  path = f'{config.run_dir}/{evaluation.SAMPLES_FILE}'
  with open(path, encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  assert [row['step'] for row in rows] == [0, 0, 3, 3, 6, 6]
  assert [row['expected'] for row in rows[:2]] == ['seven', 'eight']
  assert rows[0]['messages'] == [{'role': 'user', 'content': 'Say seven.'}]
  assert all(
    row['exact_match'] == (row['answer'] == row['expected']) for row in rows
  )


def run_of_page(number, folder, what, **names):
  """Runs a program of the page on instruction tuning on what a run left."""
  pytest.importorskip('torch')
  page = pathlib.Path(__file__).parents[3] / 'docs/instruction-tuning.md'
  blocks = re.findall('```python\n(.*?)```', page.read_text(), re.DOTALL)
  assert len(blocks) == 2
  block = blocks[number].replace(f'runs/sft/{what}', f'{folder}/{what}')
  exec(compile(block, f'{page}, program {number}', 'exec'), names)
  return names['model']


def test_page_hands_a_model_to_transformers(config, finished):
  pytest.importorskip('transformers')
  model = run_of_page(0, config.run_dir, 'hf')
  assert (
    model.config.vocab_size == finished[0].params['embed']['embedding'].shape[0]
  )


def test_export_is_read_by_transformers_with_template_and_ends(
  config, finished, prepared
):
  transformers = pytest.importorskip('transformers')
  folder = f'{config.run_dir}/hf'
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  conversation = prepared.chat.examples.validation_conversations[0]
  messages = [
    {'role': m.role, 'content': m.content} for m in conversation.messages
  ]
  found = tokenizer.apply_chat_template(messages, return_dict=False)
  assert found == prepared.chat.examples.validation[0].ids.tolist()
  generation = transformers.GenerationConfig.from_pretrained(folder)
  assert generation.eos_token_id == tokenizer.eos_token_id


def test_loss_is_that_of_learned_tokens_of_all_examples(prepared, tmp_path):
  """Packed, in micro-batches or alone: the mean over the same tokens."""
  config = dataclasses.replace(prepared.config, run_dir=str(tmp_path))
  state, frozen = prepared.program.start(
    jax.random.key(0), optimizer.numbers(config.optim, config.steps)
  )
  model, examples = prepared.program.model, prepared.chat.examples.validation
  total = count = 0.0
  for example in examples:
    logits_TV = np.float64(model.apply(state.params, example.ids[None]))[0]
    log_z = np.log(np.exp(logits_TV).sum(-1))
    ahead = logits_TV[np.arange(len(example.ids) - 1), example.ids[1:]]
    total += (example.weights[1:] * (log_z[:-1] - ahead)).sum()
    count += example.weights.sum()
  run = recipe.make_run(prepared, config)
  found = run.evaluate(state.params, frozen)
  assert found['loss'] == pytest.approx(total / count, rel=1e-5)


def step_of(prepared, **changes):
  """Loss and gradient norm of the first step."""
  config = dataclasses.replace(prepared.config, **changes)
  built = recipe.plan(config, jax.devices()[: config.mesh.data]).program
  state, frozen = built.start(
    jax.random.key(0), optimizer.numbers(config.optim, config.steps)
  )
  batch = next(data.training_batches(config, prepared.chat))
  _, metrics = built.train_step(state, batch, frozen)
  return [float(metrics[name]) for name in ('loss', 'grad_norm')]


def test_micro_batches_and_devices_change_nothing(prepared):
  expected = step_of(prepared, batch_size=4)
  for changes in ({'micro_batches': 2}, {'mesh': MeshConfig(data=2)}):
    found = step_of(prepared, batch_size=4, **changes)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_demo_has_a_model_of_its_own():
  config = SftConfig(mesh=MeshConfig(data=1))
  planned = recipe.plan(config.on_one_device(), 1)
  assert planned.config.model.vocab_size == 260
  assert planned.abstract_batch['segments'].shape == (16, 128)


def test_examples_that_may_be_too_long_for_the_model_are_refused(config):
  longer = dataclasses.replace(config.data, max_length=999)
  with pytest.raises(ValueError) as error:
    recipe.resolve(dataclasses.replace(config, data=longer))
  assert str(error.value) == (
    'data.max_length=999 is more than the model accepts: 128 tokens. Lower it.'
  )


def test_a_preset_has_no_tokenizer(config):
  preset = dataclasses.replace(config, init_from='60m')
  with pytest.raises(
    ValueError, match="init_from='60m' is a preset, which has"
  ):
    data.load(recipe.resolve(preset))


def test_samples_of_a_step_replace_those_that_an_interrupted_run_left(tmp_path):
  path = tmp_path / 'samples.jsonl'
  for step in (0, 3, 6, 3):
    evaluation.keep_samples(path, step, [{'step': step, 'n': step}])
  found = [json.loads(line)['step'] for line in path.read_text().splitlines()]
  assert found == [0, 3]


def test_preview_shows_examples_as_the_model_reads_them(
  config, prepared, capsys
):
  report.show_preview(prepared.config, prepared.chat)
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'example 1: 16 tokens, 4 of them learned' in shown
  assert 'u:Say one.a:⟦one</s>⟧' in shown
  assert 'several examples in each' in shown


def test_the_end_of_a_run_is_told(prepared, finished, capsys):
  _, summary = finished
  report.show(prepared.config, summary)
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'Validation loss: ' in shown, shown
  assert 'Say seven.' in shown, shown
  assert f'python -m gnlorp_jax.chat {prepared.config.run_dir}/hf' in shown


def test_an_export_of_an_earlier_command_is_no_result(
  prepared, finished, capsys
):
  _, summary = finished
  folder = pathlib.Path(prepared.config.run_dir) / 'adapter'
  folder.mkdir()
  report.show(prepared.config, summary)
  folder.rmdir()
  shown = capsys.readouterr().out
  assert 'model (hf).' in shown and 'adapters (adapter)' not in shown
  # What was expected stands beside an answer that differs.
  path = pathlib.Path(prepared.config.run_dir) / evaluation.SAMPLES_FILE
  last = [row for row in evaluation.read_samples(path) if row['step'] == 6]
  for row in last[:3]:
    assert (f'Expected: {row["expected"]}' in shown) != row['exact_match']
  assert f'{folder} is of an earlier command, which exported it; it is' in shown


def test_answers_that_never_were_as_expected_are_not_counted(
  prepared, finished, capsys
):
  _, summary = finished
  for first, last, is_told in ((0.0, 0.0, False), (0.0, 0.5, True)):
    report.show(
      prepared.config,
      summary
      | {'first': summary['first'] | {'exact_match': first}}
      | {'last': summary['last'] | {'exact_match': last}},
    )
    assert ('Answers as expected' in capsys.readouterr().out) == is_told


def test_a_model_without_conversations_is_told_how_to_name_them(
  config, tmp_path
):
  unnamed = dataclasses.replace(
    config, run_dir=str(tmp_path), data=ChatDataConfig()
  )
  with pytest.raises(ValueError) as error:
    recipe.prepare(unnamed)
  assert str(error.value) == (
    'No conversations are named for the model to learn: add --data FILE '
    '(data.source), or --data demo for generated instructions.'
  )


@pytest.mark.usefixtures('compiled_once')
def test_a_search_over_rates_and_seeds_of_adapters(config, tmp_path, capsys):
  """Unpacked, without answers, and with folders of PEFT at the end."""
  searched = dataclasses.replace(
    config,
    run_dir=str(tmp_path / 'grid'),
    method='lora',
    steps=1,
    export='adapter',
    learning_rates='1e-3,1e-2',
    seeds='0,1',
    optim=dataclasses.replace(config.optim, learning_rate=None),
    data=dataclasses.replace(config.data, packing=False),
    eval=SftEvalOptions(generate=0),
  )
  prepared = recipe.prepare(searched)
  with StopRequest() as stop:
    results = report.run_grid(prepared, stop)
  rates = [(r['learning_rate'], r['seed']) for r in results]
  best = min(results[:2], key=lambda r: r['best']['loss'])['learning_rate']
  assert rates == [(1e-3, 0), (1e-2, 0), (best, 1)]
  for rate, seed in rates:
    folder = tmp_path / 'grid' / f'lr{rate:g}_seed{seed}'
    assert (folder / 'adapter/adapter_model.safetensors').is_file()
    assert (folder / 'adapter/chat_template.jinja').is_file()
    assert not (folder / evaluation.SAMPLES_FILE).exists()
  summary = json.loads((folder / 'summary.json').read_text())
  one = dataclasses.replace(prepared.config, run_dir=str(folder))
  capsys.readouterr()
  report.show(one, summary)
  shown = capsys.readouterr().out
  assert f'chat {config.init_from} --adapter {folder}/adapter' in shown
  assert 'answers (samples.jsonl)' not in shown
  pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  auto = transformers.AutoModelForCausalLM
  names = {'BASE': config.init_from, 'AutoModelForCausalLM': auto}
  model = run_of_page(1, folder, 'adapter', **names)
  assert any('lora_A' in name for name, _ in model.named_parameters())


def test_a_run_without_held_out_examples_says_nothing_of_them(
  config, tmp_path, caplog
):
  alone = dataclasses.replace(
    config,
    run_dir=str(tmp_path),
    steps=2,
    data=dataclasses.replace(
      config.data, validation_source=None, val_size=0, limit=2
    ),
  )
  prepared = recipe.prepare(alone)
  assert len(prepared.chat.examples.training) == 2
  caplog.set_level('INFO')
  with StopRequest() as stop:
    outcome = loop.train(recipe.make_run(prepared, prepared.config), stop)
  summary = report.finish(prepared, prepared.config, outcome)
  assert summary['first'] == {} and 'loss' not in summary['last']
  assert not [r for r in caplog.messages if r.startswith('step 2: ')]
  assert (tmp_path / 'hf/model.safetensors').is_file()


def test_a_template_with_tokens_that_the_model_lacks_is_refused(config):
  template = types.SimpleNamespace(stop_ids=(260,))
  examples = types.SimpleNamespace(training=[], validation=[])
  with pytest.raises(ValueError) as error:
    data._check_ids(examples, template, 260)
  assert str(error.value).startswith(
    'The chat template writes the token of id 260, and the model has those of '
    '[0, 260). Use the tokenizer and the template'
  )
