"""The comparison of tuned optimizers over seeds, on a tiny model and text."""

import functools
import json
import math
import statistics

import numpy as np
import pytest

from benchmarks.common import harness
from benchmarks.quality import measure as quality
from benchmarks.quality import runs
from gnlorp_jax import optim
from gnlorp_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama
from gnlorp_jax.optim import methods
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import sharding

MODEL = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=8,
  intermediate_size=12,
  num_layers=1,
  num_heads=1,
  max_seq_len=8,
)
STEPS = 6
FIELDS = {
  *('method', 'learning_rate', 'seed', 'outcome', 'eval', 'train'),
  *('skipped_steps', 'state_bytes', 'seconds', 'cpu_seconds', 'date'),
  'commit',
}


@pytest.fixture
def call(tmp_path, monkeypatch):
  """`main` on a text, in a folder of its own; the rows of its file."""
  monkeypatch.setenv('HOME', str(tmp_path))  # The cache is there.
  words = np.random.default_rng(0).choice(['a', 'bc', 'def', 'gh\n'], 4000)
  (tmp_path / 'train.txt').write_text(' '.join(words[:3500]))
  (tmp_path / 'validation.txt').write_text(' '.join(words[3500:]))

  def call(*options):
    common = {
      '--data': tmp_path / 'train.txt',
      '--validation': tmp_path / 'validation.txt',
      '--steps': STEPS,
      '--batch-size': 2,
      '--seq-len': 8,
      '--rank': 4,
      '--gap': 3,
      '--eval-every': 4,
      '--eval-batches': 3,
      '--extend': 0,
      '--seeds': 2,
      '--output': tmp_path / 'out.json',
      '--plot': tmp_path / 'out.png',
    }
    words = [str(word) for pair in common.items() for word in pair]
    quality.main([*words, *options], MODEL)
    return json.loads((tmp_path / 'out.json').read_text())['rows']

  return call


def keys(rows):
  return [(row['method'], row['learning_rate'], row['seed']) for row in rows]


def assert_is_a_run_of_the_library(row, folder, **options):
  """The same run, step by step."""
  prepared = recipe.prepare(
    TrainConfig(
      steps=STEPS,
      batch_size=2,
      seed=row['seed'],
      model=MODEL,
      data=DataConfig(
        source=str(folder / 'train.txt'),
        validation_source=str(folder / 'validation.txt'),
        seq_len=8,
      ),
      optim=OptimConfig(learning_rate=row['learning_rate'], **options),
      mesh=MeshConfig(data=1),
    )
  )
  run = recipe.make_run(prepared, prepared.config)
  state, frozen = run.start()

  def evaluate():
    sums = np.zeros(2)
    stream = data.evaluation_batches(prepared.config, prepared.text)()
    for _ in range(3):
      placed = sharding.put_batch(next(stream), run.mesh)
      sums += prepared.program.eval_step(state.params, placed, frozen)
    stream.close()
    return sums[0] / sums[1]

  losses, evals = [], [evaluate()]
  for number in range(1, STEPS + 1):
    batch = sharding.put_batch(next(run.batches), run.mesh)
    state, values = run.train_step(state, batch, frozen)
    losses.append(float(values['loss']))
    if number in (4, STEPS):
      evals.append(evaluate())
  run.batches.close()
  steps, found = zip(*row['train'], strict=True)
  assert steps == tuple(range(1, STEPS + 1))
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  steps, found = zip(*row['eval'], strict=True)
  assert steps == (0, 4, STEPS)
  np.testing.assert_allclose(found, evals, rtol=1e-5)
  held = tree_bytes(run.abstract_state.opt_state)
  assert sum(row['state_bytes'].values()) == held


@pytest.fixture
def built(monkeypatch):
  """The optimizers that are built: one for states, one for each trace."""
  found = []
  alias, get = optim.galore, methods.get

  @functools.wraps(alias)
  def counting(*arguments, **options):
    found.append(options['rank'])
    return alias(*arguments, **options)

  monkeypatch.setattr(
    methods, 'get', lambda name: counting if name == 'galore' else get(name)
  )
  return found


@pytest.mark.usefixtures('compiled_once')
def test_runs_are_those_of_the_library_and_none_is_repeated(
  call, built, tmp_path, capsys
):
  options = ('--methods', 'galore', 'adamw')
  options += ('--rates', 'galore=1e-2,1e30', 'adamw=1e-2')
  rows = call(*options)
  # Traced once, whatever rates and seeds there are.
  assert built == [4, 4]
  by_key = dict(zip(keys(rows), rows, strict=True))
  assert [*by_key] == [
    *(('adamw', 1e-2, seed) for seed in (0, 1)),
    *(('galore', 1e-2, seed) for seed in (0, 1)),
    ('galore', 1e30, 0),
  ]
  diverged = by_key['galore', 1e30, 0]
  assert diverged['outcome'] != 'trained'
  for row in rows:
    assert row.keys() == FIELDS
    assert row is diverged or row['outcome'] == 'trained'
  by_seed = [by_key['galore', 1e-2, seed] for seed in (0, 1)]
  assert_is_a_run_of_the_library(
    by_seed[1], tmp_path, name='galore', rank=4, update_proj_gap=3
  )
  # Other weights, other data.
  for place in ('eval', 'train'):
    assert by_seed[0][place][0] != by_seed[1][place][0]
  # All methods start from the same weights.
  assert by_seed[0]['eval'][0] == by_key['adamw', 1e-2, 0]['eval'][0]
  shown = capsys.readouterr().out
  assert f'1e+30: {diverged["outcome"]} |' in shown
  assert (tmp_path / 'out.png').stat().st_size > 10_000
  built.clear()
  assert call(*options) == rows
  assert built == []
  before = (tmp_path / 'out.json').read_bytes()
  with pytest.raises(SystemExit):
    call('--seq-len', '4')
  assert (
    'holds runs with other settings: seq_len is 8 there and 4 here. Runs of '
    'different settings do not compare: name another --output, or remove the '
    'file.'
  ) in ' '.join(capsys.readouterr().err.split())
  assert (tmp_path / 'out.json').read_bytes() == before


@pytest.fixture
def pretend(tmp_path):
  """A comparison whose runs take no time; the rows of its file.

  The method `poor` has no memory for its own.
  """

  def make(name):
    if name == 'poor':
      raise MemoryError('out of memory\nallocating 1 byte')
    return lambda rate, seed: {
      'outcome': 'trained',
      'eval': [[0, 6.0], [6, 5.0 + rate + seed / 10]],
      'train': [[3, 6.0], [6, 5.5]],
      'state_bytes': {'moments': 2**20},
    }

  def pretend(plan, *options, **fields):
    comparison = runs.Comparison('none', plot=None, **fields)
    parser = harness.parser('A benchmark.')
    comparison.add_arguments(parser, plan.rates)
    path = tmp_path / 'out.json'
    args = parser.parse_args(['--output', str(path), *options])
    comparison.run(parser, args, plan, lambda: ({'steps': 6}, make))
    return json.loads(path.read_text())['rows'] if path.exists() else None

  return pretend


def test_processes_share_the_methods_and_failures_are_rows(
  pretend, tmp_path, capsys
):
  plan = runs.Plan({'one': (1, 2), 'poor': (1, 2), 'two': (1,)}, seeds=3)
  assert pretend(plan, '--process', '1/2') is None
  assert pretend(plan, '--process', '2/2') is None
  assert capsys.readouterr().out == ''
  parts = [
    json.loads((tmp_path / f'out.{k}of2.json').read_text())['rows']
    for k in (1, 2)
  ]
  # In turns, the rates before the seeds.
  assert keys(parts[0]) == [
    ('one', 1, 0),
    ('two', 1, 0),
    ('one', 2, 0),
    ('two', 1, 1),
    ('one', 1, 1),
    ('two', 1, 2),
    ('one', 1, 2),
  ]
  assert keys(parts[1]) == [('poor', 1, 0), ('poor', 2, 0)]
  assert {row['absent'] for row in parts[1]} == {'MemoryError: out of memory'}
  rows = pretend(plan, '--report')
  assert keys(rows) == sorted(keys(parts[0] + parts[1]))
  shown = capsys.readouterr().out.splitlines()
  # Seed 0 chose the rate.
  perplexities = [math.exp(6 + seed / 10) for seed in (1, 2)]
  spread = (
    f'{statistics.mean(perplexities):.1f} ± '
    f'{statistics.stdev(perplexities):.1f}'
  )
  assert shown[2] == (
    f'| one | 1 | 6.1500 ± 0.0707 | {spread} | 2 | 1.0 | 1: 6.0000, 2: 7.0000 |'
  )
  failure = 'MemoryError: out of memory'
  assert shown[4] == (
    f'| poor | - | - | - | - | - | 1: {failure}, 2: {failure} |'
  )
  # What failed is tried again, and nothing else.
  pretend(plan)
  again = capsys.readouterr().err.splitlines()
  assert [line.partition(',')[0] for line in again if ', rate' in line] == [
    'poor',
    'poor',
  ]


def test_no_run_starts_that_time_does_not_allow(pretend, capsys):
  plan = runs.Plan({'one': (1, 2), 'two': (1,)})
  assert pretend(plan, '--minutes', '0') == []
  err = capsys.readouterr().err
  assert 'Out of time; runs are left of one, two.' in err


def test_a_comparison_may_take_its_runs_again(pretend, capsys):
  plan = runs.Plan({'one': (1,), 'two': (1,)})
  pretend(plan)
  capsys.readouterr()
  rows = pretend(plan, '--methods', 'two', repeats=True)
  assert keys(rows) == [('one', 1, 0), ('two', 1, 0)]
  err = capsys.readouterr().err
  assert 'two, rate 1, seed 0: 6.0000, 0 s' in err and 'one, rate' not in err


def known(**losses):
  """Rows of `m` by rate and seed, such as ``r4s1``; None stands for failed."""
  rows = []
  for key, loss in losses.items():
    rate, seed = map(float, key[1:].split('s'))
    row = {'method': 'm', 'learning_rate': rate, 'seed': int(seed)}
    if loss is not None:
      row |= {'outcome': 'trained', 'eval': [[0, 9.0], [6, loss]]}
    rows.append(row)
  return rows


@pytest.mark.parametrize(
  ('losses', 'expected'),
  [
    ({}, [(4, 0), (8, 0), (2, 0)]),
    ({'r4s0': 1.0, 'r2s0': 1.0}, [(8, 0)]),
    # In the middle: no more rates, but seeds.
    ({'r4s0': 1.0, 'r2s0': 2.0, 'r8s0': 3.0}, [(4, 1), (4, 2)]),
    ({'r4s0': 1.0, 'r2s0': 2.0, 'r8s0': 3.0, 'r4s1': None}, [(4, 2)]),
    ({'r4s0': 1.0, 'r2s0': 2.0, 'r8s0': 3.0, 'r4s1': 1.0, 'r4s2': 1.0}, []),
    # Beyond the edge, twice at most.
    ({'r4s0': 2.0, 'r2s0': 1.0, 'r8s0': 3.0}, [(1, 0)]),
    ({'r4s0': 2.0, 'r2s0': 3.0, 'r8s0': 1.0}, [(16, 0)]),
    (
      {'r4s0': 2.0, 'r2s0': 3.0, 'r8s0': 1.0, 'r16s0': None},
      [(8, 1), (8, 2)],
    ),
    (
      {'r4s0': 4.0, 'r2s0': 5.0, 'r8s0': 3.0, 'r16s0': 2.0, 'r32s0': 1.0},
      [(32, 1), (32, 2)],
    ),
    # Nothing trained.
    ({'r4s0': None, 'r2s0': None, 'r8s0': None}, [(1, 0)]),
    (dict.fromkeys(('r4s0', 'r2s0', 'r8s0', 'r1s0', 'r0.5s0')), []),
  ],
)
def test_what_runs_next(losses, expected):
  plan = runs.Plan({'m': (4.0, 8.0, 2.0)}, seeds=3, extend=2)
  rows = [*known(**losses), {**known(r1s0=0.0)[0], 'method': 'another'}]
  found = runs.pending('m', rows, plan)
  assert found == [('m', *run) for run in expected]


@pytest.mark.parametrize(
  ('evals', 'losses', 'skipped', 'words'),
  [
    ([4.0, 3.0], [4.0, 3.5], 0, 'trained'),
    ([4.0, 4.5], [4.0, 4.2], 0, 'eval loss 4.50, above the untrained'),
    ([4.0, np.nan], [4.0, 3.5], 0, 'eval loss not finite after step 2'),
    ([4.0, np.nan], [4.0, np.inf], 1, 'loss not finite from step 2'),
    ([4.0, 3.0], [4.0, 3.5], 1, '1 steps had no finite gradient'),
  ],
)
def test_how_a_run_ended(evals, losses, skipped, words):
  curve = [[0, evals[0]], [2, evals[1]]]
  found = runs.ending(curve, losses, skipped)
  assert found['outcome'] == words
  assert found['skipped_steps'] == skipped
  end = None if np.isnan(evals[1]) else evals[1]
  assert found['eval'] == [[0, 4.0], [2, end]]


def test_curves_are_thinned_to_means():
  losses = np.random.default_rng(0).normal(size=300)
  found = runs.ending([[0, 1.0]], losses, 0)['train']
  assert [number for number, _ in found] == list(range(10, 301, 10))
  expected = losses.reshape(30, 10).mean(axis=1)
  np.testing.assert_allclose([x for _, x in found], expected, atol=5.1e-7)
  found = runs.ending([[0, 1.0]], [1.0, math.nan], 0)['train']
  assert found == [[1, 1.0], [2, None]]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (('--process', '3/2'), '--process 3/2 must be I/N with 1 <= I <= N.'),
    (('--seeds', '0'), '--seeds 0 must be at least 1 and --extend 2 at least'),
    (
      ('--rates', 'adam=1'),
      '--rates adam=1 must be METHOD=RATE[,RATE...] with positive rates and a '
      'method of adamw, galore,',
    ),
    (('--rates', 'adamw=0'), '--rates adamw=0 must be METHOD=RATE'),
    (
      ('--report', '--output', 'none.json'),
      'none.json does not exist, so there is nothing to report. Run without '
      '--report first.',
    ),
    (
      ('--seq-len', '100000'),
      'data.seq_len=100000 is longer than the model accepts',
    ),
  ],
)
def test_mistakes_end_with_a_message(capsys, options, message):
  with pytest.raises(SystemExit):
    quality.main(list(options))
  assert message in ' '.join(capsys.readouterr().err.split())
