"""Runs of every recipe, from the command line to what a step is given."""

import ast
import math
import pathlib
import re

import jax
import pytest

from gnlorp_jax import models, plan, recipes
from gnlorp_jax.models import roberta
from gnlorp_jax.plan.__main__ import main, parse
from gnlorp_jax.plan.accelerators import ACCELERATORS
from gnlorp_jax.plan.settings import RECIPES

TINY = ['glue', '--init-from', 'tiny', '--device', 'rtx4090']


def sizes(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def classifier(num_outputs):
  """Abstract parameters of the preset with a new head."""
  model = roberta.make_classifier(roberta.PRESETS['tiny'], num_outputs)
  return jax.eval_shape(model.init, jax.random.key(0))


def components(*words):
  return plan.lower_bound(parse([*TINY, *words])).components


def test_every_recipe_can_be_planned():
  folder = pathlib.Path(recipes.__file__).parent
  names = {
    path.parent.name
    for path in folder.glob('*/recipe.py')
    if 'def make_run(' in path.read_text()  # Others train nothing.
  }
  assert set(RECIPES) == names


def test_the_first_word_names_the_recipe():
  assert type(parse([])) is plan.PlanConfig
  assert parse(['pretrain', '--batch-size', '8']).batch_size == 8
  assert type(parse(['glue'])) is plan.GluePlanConfig


def test_fine_tuning_all_weights_by_hand():
  found = components('--method', 'full', '--task', 'mnli')
  count = sizes(classifier(3))
  assert found['weights'] == 4 * count
  assert found['moments'] == 2 * 4 * count
  assert 'frozen_weights' not in found
  # Tokens, and a weight, a seed and a label of each sequence.
  assert found['batch'] == 16 * (512 + 3) * 4
  config = roberta.PRESETS['tiny']
  inputs = config.num_layers * 16 * 512 * config.hidden_size
  assert found['saved_activations'] == 4 * inputs


def test_fine_tuning_adapters_by_hand():
  found = components('--method', 'lora', '--adapter.rank', '4')
  params = classifier(2)
  config = roberta.PRESETS['tiny']
  width, inner = config.hidden_size, config.intermediate_size
  rows = config.num_layers * (4 * 2 * width + 2 * (width + inner))
  trained = 4 * rows + sizes(params['classifier'])
  assert found['weights'] == 4 * trained
  assert found['frozen_weights'] == 4 * (sizes(params) - trained + 4 * rows)
  assert found['gradients'] == 4 * trained


def test_a_shell_is_told_of_all_recipes(capsys):
  with pytest.raises(SystemExit) as stop:
    parse(['sft', '--print-completion', 'zsh'])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  # Of pre-training, GLUE and conversations.
  assert all(f"'--{name}'" in text for name in ('budget', 'task', 'model'))
  assert "'pretrain': {" in text and "'glue': {" in text and "'sft': {" in text


def test_sizes_come_from_the_protocol_unless_they_are_given():
  run = parse(['glue', '--task', 'cola', '--method', 'lora'])
  assert run.title == 'cola with lora: 32 sequences of 512 tokens'
  run = parse(['glue', '--batch-size', '4', '--max-length', '64'])
  assert run.title == 'mrpc with gradnormlorp: 4 sequences of 64 tokens'
  assert run.optim.rank == 8
  shorter = components('--batch-size', '4', '--max-length', '64')
  assert shorter['batch'] == 4 * (64 + 3) * 4


def test_earlier_names_of_options_are_known():
  assert parse(['glue', '--model', 'large', '--rank', '4']).init_from == 'large'


def test_the_demo_brings_model_and_tokenizer():
  run = parse(['glue', '--task', 'demo', '--init-from', 'None'])
  found = run.build(1)
  assert found.abstract_batch['inputs'].shape == (32, 16)
  assert found.config.model.vocab_size != run.model.vocab_size


def test_the_table_says_what_is_fine_tuned(no_wheels, capsys):
  main([*TINY, '--method', 'dora'])
  text = ' '.join(capsys.readouterr().out.split())
  assert 'mrpc with dora: 16 sequences of 512 tokens' in text
  assert 'frozen weights' in text


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (
      ['glu'],
      "Unknown recipe 'glu'; expected one of ('pretrain', 'glue', 'sft'). Did "
      "you mean 'glue'?",
    ),
    (
      ['glue', '--task', 'mrpc,rte'],
      "task='mrpc,rte' names several, and a plan is for one. Name one.",
    ),
    (
      ['glue', '--method', 'all'],
      "method='all' names several, and a plan is for one. Name one.",
    ),
    (['glue', '--devices', '0'], 'GluePlanConfig.devices must be at least 1'),
    (['glue', '--init-from', 'lrge'], "init_from='lrge' is neither a folder"),
  ],
)
def test_mistakes_get_the_value_the_rule_and_the_fix(words, text, capsys):
  with pytest.raises(SystemExit) as stop:
    main(words)
  assert stop.value.code == 2
  assert text in ' '.join(capsys.readouterr().err.replace('│', ' ').split())


def test_adapters_of_a_chat_model_by_hand():
  words = ['sft', '--model', 'qwen2.5-0.5b', '--method', 'lora', '--rank', '4']
  run = parse([*words, '--max-length', '64', '--batch-size', '2'])
  assert run.title == 'qwen2.5-0.5b with lora: 2 rows of 64 tokens'
  found = plan.lower_bound(run).components
  config = models.presets()['qwen2.5-0.5b']
  width, inner = config.hidden_size, config.intermediate_size
  kv = config.num_kv_heads * width // config.num_heads
  # Of q, k, v, o, gate, up and down.
  sides = 2 * 2 * width + 2 * (width + kv) + 3 * (width + inner)
  trained = config.num_layers * 4 * sides
  assert found['weights'] == 4 * trained
  assert found['frozen_weights'] == 4 * models.family(config).num_params(config)
  # Inputs, documents, targets and weights.
  assert found['batch'] == 2 * 64 * 4 * 4


CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(
  'path', sorted(CONFIGS.glob('sft_*gb.py')), ids=lambda path: path.stem
)
def test_configurations_for_a_card_say_what_may_be_used_of_it(path):
  """As far as it is known without compiling them."""
  head = ast.get_docstring(ast.parse(path.read_text()))
  command = re.search(r'gnlorp_jax\.plan (sft (?:.*\\\n)*.*)', head)[1]
  run = parse(command.replace('\\\n', '').split())
  gpu = ACCELERATORS[run.device]
  size = re.search(r', (\d+) GB$', gpu.description)[1]
  assert path.stem.endswith(f'_{size}gb')
  assert f'XLA_PYTHON_CLIENT_MEM_FRACTION={gpu.fraction:.2f} ' in head
  found = re.search(r'([\d.]+) GiB of the ([\d.]+)\s', head)
  planned, usable = map(float, found.groups())
  assert usable == round(gpu.usable / 2**30, 1)
  assert plan.lower_bound(run).peak / 2**30 < planned < usable
