"""The protocol's numbers, against the published ones, copied here by hand."""

import dataclasses
import itertools

import pytest

from gnlorp_jax.compose import methods
from gnlorp_jax.compose.settings import AdapterOptions
from gnlorp_jax.recipes.glue.protocol import resolve
from gnlorp_jax.recipes.glue.settings import GlueConfig, parse

# Rates times 1e5: of GaLore at rank 8, at rank 4, of LoRA, of GradNormLoRP.
RATES = {
  'cola': (1, 3, 40, 3),
  'stsb': (3, 1, 40, 3),
  'mrpc': (2, 3, 40, 3),
  'rte': (2, 1, 50, 3),
  'sst2': (2, 1, 50, 3),
  'mnli': (1, 1, 50, 3),
  'qnli': (1, 1, 40, 3),
  'qqp': (2, 1, 50, 3),
  'wnli': (2, 1, 50, 3),
  'mine': (2, 2, 40, 3),
  'demo': (100, 100, 200, 300),
}
# Which of those rates, which rank and scale a method's optimizer takes, and
# whether adapters train. Of rank and scale: None for none, 'own' for what the
# optimizer itself has.
FAMILY = {
  'full': ('galore', None, None),
  'lora': ('lora', None, None),
  'dora': ('lora', None, None),
  'galore': ('galore', 'given', 'sixteenth'),
  'gradnormlorp': ('gradnormlorp', 'given', 'four'),
  'gradnormlorp_adapter': ('gradnormlorp', 'given', 'four'),
  'q_galore': ('galore', 'given', 'sixteenth'),
  'galore_adafactor': ('galore', 'given', 'sixteenth'),
  'dct_adamw': ('galore', 'given', None),
  'apollo': ('galore', 'given', None),
  'apollo_mini': ('galore', None, None),
  'fira': ('galore', 'given', None),
  'ldadam': ('galore', 'given', None),
  'vlorp': ('galore', 'given', None),
  'projfactor': ('galore', 'given', None),
  'alice': ('galore', 'given', None),
  'alice0': ('galore', 'given', None),
  'frugal': ('galore', 'given', None),
  'subtrack': ('galore', 'given', None),
  'muon': ('galore', None, None),
  'racs': ('galore', None, None),
  'scale': ('galore', None, None),
  'sinkgd': ('galore', None, None),
}
ADAPTED = ('lora', 'dora', 'gradnormlorp_adapter')
# Optimizers without subspaces.
UNPROJECTED = ('full', 'muon', 'racs', 'scale', 'sinkgd')
WITHOUT_GAP = (*UNPROJECTED, 'lora', 'dora', 'ldadam')
WITHOUT_SCALE = ('full', 'lora', 'dora', 'ldadam', 'muon', 'scale')


def resolved(task, method, rank=None, **changes):
  config = GlueConfig(**changes)
  return resolve(
    dataclasses.replace(
      config,
      optim=dataclasses.replace(config.optim, rank=rank),
      adapter=dataclasses.replace(config.adapter, rank=rank),
    ),
    task,
    method,
  )


def test_methods_of_the_table_exist():
  assert set(FAMILY) <= set(methods.METHODS)


@pytest.mark.parametrize('method', FAMILY)
def test_numbers_of_a_method_are_those_of_the_table(method):
  row, rank_of, scale_of = FAMILY[method]
  for task, rank in itertools.product(RATES, (2, 4, 8, 16)):
    is_demo = task == 'demo'
    column = {'galore': 0, 'lora': 2, 'gradnormlorp': 3}[row]
    if row == 'galore' and rank <= 4 and method not in UNPROJECTED:
      column = 1
    scale = {'sixteenth': 16 / rank, 'four': 4, None: None}[scale_of]
    if is_demo and method not in WITHOUT_SCALE:
      scale = 1
    gap = 50 if is_demo else 500
    found = resolved(task, method, rank)
    where = (task, rank)
    assert found.optim.learning_rate == pytest.approx(
      RATES[task][column] * 1e-5, rel=1e-12
    ), where
    assert found.optim.rank == (rank if rank_of else None), where
    assert found.optim.scale == scale, where
    expected = None if method in WITHOUT_GAP else gap
    assert found.optim.update_proj_gap == expected, where
    assert found.optim.weight_decay == found.optim.warmup_fraction == 0
    assert found.optim.schedule == 'linear' and not found.optim.final_fraction
    assert found.optim.clip_global_norm is None
    assert found.batch_size == (32 if task in ('cola', 'demo') else 16), where
    assert found.epochs == (5 if is_demo else 30), where
    assert found.max_length == (16 if is_demo else 512), where
    kind = methods.METHODS[method].adapter
    adapter = AdapterOptions()
    if method in ADAPTED:
      dropout = 0.0 if is_demo else 0.1
      adapter = AdapterOptions(kind=kind, rank=rank, alpha=16, dropout=dropout)
    assert found.adapter == adapter, where


def test_published_numbers_are_those_of_the_papers():
  def numbers(task, method, rank=None):
    return resolved(task, method, rank)

  assert numbers('mrpc', 'galore', 4).optim.learning_rate == 3e-5
  assert numbers('mrpc', 'galore', 8).optim.learning_rate == 2e-5
  assert (
    numbers('rte', 'galore', 4).optim.scale,
    numbers('rte', 'galore').optim.scale,
  ) == (
    4,
    2,
  )
  assert numbers('cola', 'lora').optim.learning_rate == 4e-4
  assert numbers('qqp', 'gradnormlorp').optim.learning_rate == 3e-5
  assert numbers('qqp', 'gradnormlorp').optim.scale == 4
  for task, batch_size in (('cola', 32), ('mnli', 16)):
    found = numbers(task, 'full')
    assert found.batch_size == batch_size
    assert (found.epochs, found.max_length) == (30, 512)
    assert numbers(task, 'galore').optim.update_proj_gap == 500
    assert found.optim.weight_decay == found.optim.warmup_fraction == 0


def test_rank_is_eight_if_none_is_given():
  found = resolved('rte', 'gradnormlorp_adapter')
  assert (found.optim.rank, found.adapter.rank) == (8, 8)
  # Of a piece of a row, of which vlorp has 64: its own.
  assert resolved('rte', 'vlorp').optim.rank is None


def test_settings_come_before_the_table():
  found = resolve(
    parse(
      ['--rank', '4', '--learning-rate', '0.5', '--weight-decay', '0.1'], ''
    ),
    'rte',
    'galore',
  )
  optim = found.optim
  assert (optim.rank, optim.learning_rate, optim.weight_decay) == (4, 0.5, 0.1)
  assert optim.scale == 4 and found.epochs == 30
  words = ['--adapter.alpha', '32', '--adapter.dropout', '0', '--epochs', '3']
  words += ['--batch-size', '8', '--max-length', '64', '--optim.scale', '0.5']
  words += ['--optim.update-proj-gap', '7']
  found = resolve(parse(words, ''), 'cola', 'gradnormlorp_adapter')
  assert (found.adapter.alpha, found.adapter.dropout) == (32, 0)
  assert (found.epochs, found.batch_size, found.max_length) == (3, 8, 64)
  assert (found.optim.scale, found.optim.update_proj_gap) == (0.5, 7)


def test_an_optimizer_or_adapter_that_is_named_replaces_the_methods():
  words = ['--method', 'lora', '--optim.name', 'galore', '--rank', '4']
  found = resolve(parse(words, ''), 'rte', 'lora')
  assert (found.optim.name, found.adapter.kind) == ('galore', 'lora')
  # What is published for LoRA, and GaLore's scale of that rank.
  assert found.optim.learning_rate == 5e-4
  assert (found.optim.rank, found.optim.scale) == (4, 4)
  found = resolve(parse(['--adapter.kind', 'dora'], ''), 'rte', 'full')
  assert (found.optim.name, found.adapter.kind) == ('adamw', 'dora')
  assert (found.adapter.rank, found.adapter.alpha) == (8, 16)


def test_resolved_settings_are_resolved():
  for task, method in itertools.product(('demo', 'cola'), methods.METHODS):
    found = resolved(task, method)
    assert resolve(found, task, method) == found


def test_learning_rate_is_open_where_rates_are_searched():
  found = resolved('rte', 'lora', learning_rates='1e-4,1e-3')
  assert found.optim.learning_rate is None
  assert found.learning_rates == '1e-4,1e-3'
