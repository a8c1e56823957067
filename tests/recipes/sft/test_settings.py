"""What a command line of train_sft.py becomes, and what it refuses."""

import dataclasses
import math

import pytest

from gnlorp_jax.compose.settings import AdapterOptions, LayerSamplingOptions
from gnlorp_jax.recipes.sft import protocol, settings
from gnlorp_jax.recipes.sft.settings import (
  ChatDataConfig,
  SftConfig,
  SftEvalOptions,
)


def parse(*args):
  return settings.parse(list(args), '')


def refused(make, **fields):
  with pytest.raises(ValueError) as error:
    make(**fields)
  return str(error.value)


def test_short_names_set_the_fields_that_they_mean():
  found = parse(
    *('--model', 'm', '--data', 'a.json', 'b.jsonl@0.5', '--rank', '4'),
    *('--learning-rate', '0.1', '--max-length', '64'),
  )
  assert found == SftConfig(
    init_from='m',
    data=ChatDataConfig(source='a.json,b.jsonl@0.5', max_length=64),
    optim=dataclasses.replace(SftConfig().optim, rank=4, learning_rate=0.1),
    adapter=AdapterOptions(rank=4),
  )


def test_all_files_are_one_source():
  found = parse('--data', 'a', '--model', 'm', '--data', 'b', 'c')
  assert found.data.source == 'a,b,c'
  message = refused(lambda: parse('--data', '--model', 'm'))
  assert message == '--data needs files of conversations.'


def test_a_file_is_what_options_override(tmp_path):
  (tmp_path / 'c.py').write_text(
    'from gnlorp_jax.config import ChatDataConfig, SftConfig\n'
    "config = SftConfig(init_from='m', data=ChatDataConfig(source='a.json'))\n"
  )
  found = parse('--config', str(tmp_path / 'c.py'), '--data', 'b.json')
  assert (found.init_from, found.data.source) == ('m', 'b.json')
  (tmp_path / 'd.py').write_text('config = 1')
  message = refused(lambda: parse('--config', str(tmp_path / 'd.py')))
  assert message.endswith(
    "it must assign a SftConfig to the name 'config', which is of int."
  )


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'method': 'lorra'}, "Unknown method 'lorra'. Did you mean 'lora'?"),
    (
      {'data': ChatDataConfig(source='a.json')},
      "data.source='a.json' needs a model: give its Hugging Face folder, or "
      'hf:OWNER/NAME, as init_from (or --model).',
    ),
    (
      {'export': 'adapter'},
      "export='adapter' writes adapters of kind lora or dora for PEFT, and "
      "method='gradnormlorp' trains all weights.",
    ),
    (
      {
        'export': 'adapter',
        'method': 'lora',
        'adapter': AdapterOptions(restart_every=5),
      },
      "export='adapter' writes what changes the model of init_from, and with "
      'adapter.restart_every or adapter.train_others its own weights change '
      "too. Use export='merged'.",
    ),
    (
      {'export': 'adapter', 'method': 'gradnormlorp_adapter'},
      "trains adapters of kind 'gradnormlorp'.",
    ),
    (
      {
        'init_from': 'm',
        'data': ChatDataConfig(source='a.json', val_size=0),
        'learning_rates': '1,2',
      },
      "learning_rates='1,2' are chosen by the validation loss, and "
      'data.val_size=0 holds out nothing.',
    ),
    (
      {'patience': 2, 'keep_best': False},
      'patience=2 counts evaluations since the best one; that needs '
      'keep_best=True and held-out examples (data.val_size).',
    ),
    ({'method': 'AdamW'}, "Did you mean 'full', which is AdamW?"),
    ({'method': 'QLoRA'}, "Did you mean 'lora', with step.weight_bits=4?"),
    (
      {'adapter': AdapterOptions(alpha=3.0)},
      "method='gradnormlorp' has no adapters for options of adapter to change.",
    ),
    (
      {
        'optim': dataclasses.replace(SftConfig().optim, rank=4),
        'adapter': AdapterOptions(rank=8),
      },
      "method='gradnormlorp' has no adapters for options of adapter to change.",
    ),
    ({'epochs': 0.0}, 'SftConfig.epochs must be in (0, inf), got 0.0.'),
    (
      {
        'learning_rates': '1,2',
        'optim': dataclasses.replace(SftConfig().optim, learning_rate=1.0),
      },
      'exclude each other: give one rate, or several to choose from.',
    ),
  ],
)
def test_what_does_not_fit_is_refused(fields, expected):
  assert expected in refused(SftConfig, **fields)


@pytest.mark.parametrize('size', [-1, 1.5, math.inf, math.nan])
def test_sizes_to_hold_out_are_shares_or_numbers(size):
  assert f'data.val_size={size} must be a number of examples' in refused(
    ChatDataConfig, val_size=size
  )


def test_answers_have_numbers_in_range():
  assert 'generate must be in [0, inf), got -1' in refused(
    SftEvalOptions, generate=-1
  )
  assert 'temperature must be in [0, inf), got -1.0' in refused(
    SftEvalOptions, temperature=-1.0
  )
  assert 'max_tokens must be at least 1' in refused(
    SftEvalOptions, max_tokens=0
  )
  message = refused(ChatDataConfig, validation_source='v.json')
  assert "data.source is 'demo', which holds out some of its own." in message


# What is not given.


@pytest.mark.parametrize(
  ('method', 'optimizer', 'kind', 'rank'),
  [
    ('full', 'adamw', None, None),
    ('lora', 'adamw', 'lora', None),
    ('gradnormlorp_adapter', 'galore', 'gradnormlorp', 8),
    ('galore', 'galore', None, 32),
    ('vlorp', 'vlorp', None, None),
    ('apollo_mini', 'apollo_mini', None, None),
  ],
)
def test_a_method_is_an_optimizer_and_adapters(method, optimizer, kind, rank):
  found = protocol.resolve(SftConfig(method=method, init_from='m'))
  assert (found.optim.name, found.adapter.kind) == (optimizer, kind)
  assert found.optim.rank == rank and found.optim.learning_rate > 0
  assert found.adapter.rank == (None if kind is None else 8)
  assert (found.batch_size, found.epochs, found.eval.generate) == (8, 1, 8)


@pytest.mark.parametrize(
  ('options', 'rate'),
  [
    ({'method': 'full'}, 1e-5),
    ({'method': 'muon'}, 2e-5),
    ({'method': 'galore'}, 2e-4),
    ({'method': 'lisa'}, 1e-4),
    (
      {'method': 'full', 'sampling': LayerSamplingOptions(draw='uniform')},
      1e-4,
    ),
    # What projects, and what adapts, has rates of its own, drawn or not.
    ({'method': 'owlore'}, 2e-4),
    (
      {'method': 'lora', 'sampling': LayerSamplingOptions(draw='uniform')},
      2e-4,
    ),
  ],
)
def test_rate_of_a_kind_of_method(options, rate):
  found = protocol.resolve(SftConfig(init_from='m', **options))
  assert found.optim.learning_rate == rate


def test_what_is_given_counts_more():
  given = SftConfig(
    method='lora',
    learning_rates='0.1,0.2',
    batch_size=3,
    adapter=AdapterOptions(rank=4, alpha=1.0, dropout=0.1),
  )
  found = protocol.resolve(given)
  assert found.adapter == dataclasses.replace(given.adapter, kind='lora')
  assert found.batch_size == 3 and found.optim.learning_rate is None


def test_rank_stabilized_adapters_begin_as_strong_as_others():
  for stabilized, expected in ((False, 32.0), (True, 8.0)):
    adapter = AdapterOptions(rank=16, rank_stabilized=stabilized)
    found = protocol.resolve(SftConfig(method='lora', adapter=adapter)).adapter
    assert found.alpha == expected  # Twice the product of the factors.


def test_the_demo_has_a_folder_of_its_own():
  assert protocol.resolve(SftConfig()).run_dir == 'runs/sft_demo'
  assert protocol.resolve(SftConfig(init_from='m')).run_dir == 'runs/sft'


def test_adapters_to_start_from_keep_their_own_rank():
  given = SftConfig(method='lora', adapter=AdapterOptions(init_from='folder'))
  found = protocol.resolve(given).adapter
  assert (found.kind, found.rank, found.alpha) == ('lora', None, None)


def resolved(*args):
  return protocol.resolve(parse('--model', 'm', '--data', 'a.json', *args))


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    (
      ['--method', 'lora', '--optim.rank', '4'],
      'optim.rank=4 is about subspaces, and adamw, the optimizer of '
      "method='lora', has none. The rank of its adapters is adapter.rank.",
    ),
    (
      ['--method', 'full', '--rank', '4'],
      'optim.rank=4 is about subspaces, and adamw, the optimizer of '
      "method='full', has none. Leave it out, or use a method that has some, "
      'such as galore.',
    ),
    (
      ['--method', 'lora', '--optim.update-proj-gap', '9'],
      'optim.update_proj_gap=9 is about subspaces, and adamw, the optimizer of '
      "method='lora', has none. Leave it out, or use a method that has some, "
      'such as galore.',
    ),
  ],
)
def test_options_of_subspaces_are_refused_where_there_are_none(args, expected):
  assert refused(lambda: resolved(*args)) == expected


def test_the_short_rank_is_that_of_what_there_is():
  lora = resolved('--method', 'lora', '--rank', '4')
  assert (lora.adapter.rank, lora.optim.rank) == (4, None)
  galore = resolved('--method', 'galore', '--rank', '4')
  assert (galore.adapter.kind, galore.optim.rank) == (None, 4)
