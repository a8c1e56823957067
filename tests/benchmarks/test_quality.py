"""The comparison of tuned optimizers over seeds, on a tiny model and text."""

import functools
import json
import math
import statistics

import numpy as np
import pytest

from benchmarks.quality import measure as quality
from benchmarks.quality import quality_rows
from gnlorp_jax import optim
from gnlorp_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import sharding

MODEL = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=8,
)
STEPS = 6
FIELDS = {
  *('method', 'learning_rate', 'seed', 'outcome', 'eval', 'train'),
  *('skipped_steps', 'state_bytes', 'seconds', 'cpu_seconds', 'date'),
  'commit',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Training and validation text."""
  found = tmp_path_factory.mktemp('text')
  words = np.random.default_rng(0).choice(['a', 'bc', 'def', 'gh\n'], 4000)
  (found / 'train.txt').write_text(' '.join(words[:3500]))
  (found / 'validation.txt').write_text(' '.join(words[3500:]))
  return found


@pytest.fixture
def call(folder, tmp_path, monkeypatch):
  """`main` on that text, in a folder of its own; the rows of its file."""
  monkeypatch.setenv('HOME', str(folder))  # The cache is there.

  def call(*options, rates=('adamw=1e-2', 'gradnormlorp=1e-2')):
    common = {
      '--data': folder / 'train.txt',
      '--validation': folder / 'validation.txt',
      '--steps': STEPS,
      '--batch-size': 2,
      '--seq-len': 8,
      '--rank': 4,
      '--gap': 3,
      '--eval-every': 4,
      '--eval-batches': 3,
      '--output': tmp_path / 'out.json',
      '--plot': tmp_path / 'out.png',
    }
    words = [str(word) for pair in common.items() for word in pair]
    names = [rate.split('=')[0] for rate in rates]
    words += ['--methods', *names, '--rates', *rates, '--extend', '0']
    quality.main([*words, *options], MODEL)
    path = tmp_path / 'out.json'
    return json.loads(path.read_text())['rows'] if path.exists() else None

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

  def count(name):
    alias = getattr(optim, name)

    @functools.wraps(alias)
    def counting(*arguments, **options):
      found.append(name)
      return alias(*arguments, **options)

    monkeypatch.setattr(optim, name, counting)

  count('adamw')
  count('gradnormlorp')
  return found


def test_runs_are_those_of_the_library_and_none_is_repeated(
  call, folder, built, tmp_path, capsys
):
  rates = ('adamw=1e-2,3e-2,1e30', 'gradnormlorp=1e-2')
  rows = call('--seeds', '2', rates=rates)
  # Two methods, each traced once, whatever rates and seeds there are.
  assert sorted(built) == ['adamw'] * 2 + ['gradnormlorp'] * 2
  best = 1e-2 if rows[0]['eval'][-1] < rows[1]['eval'][-1] else 3e-2
  assert sorted(keys(rows)) == sorted(
    [
      *(('adamw', rate, 0) for rate in (1e-2, 3e-2, 1e30)),
      ('adamw', best, 1),
      *(('gradnormlorp', 1e-2, seed) for seed in (0, 1)),
    ]
  )
  by_key = dict(zip(keys(rows), rows, strict=True))
  diverged = by_key['adamw', 1e30, 0]
  assert 'loss not finite ' in diverged['outcome']
  assert diverged['eval'][-1][1] is None
  good = [row for row in rows if row is not diverged]
  for row in good:
    assert row.keys() == FIELDS and row['outcome'] == 'trained'
  by_seed = [by_key['gradnormlorp', 1e-2, seed] for seed in (0, 1)]
  options = {'name': 'gradnormlorp', 'rank': 4, 'update_proj_gap': 3}
  for row in by_seed:
    assert_is_a_run_of_the_library(row, folder, **options)
  # Other weights, other data.
  for place in ('eval', 'train'):
    assert by_seed[0][place][0] != by_seed[1][place][0]
  # All methods start from the same weights.
  assert by_seed[0]['eval'][0] == by_key['adamw', 1e-2, 0]['eval'][0]
  shown = capsys.readouterr().out
  assert f'1e+30: {diverged["outcome"]}' in shown
  ends = [row['eval'][-1][1] for row in by_seed]
  mean, deviation = statistics.mean(ends), statistics.stdev(ends)
  assert f'| gradnormlorp | 0.01 | {mean:.4f} ± {deviation:.4f} |' in shown
  assert 'Not run' not in shown
  assert (tmp_path / 'out.png').stat().st_size > 10_000
  built.clear()
  assert call('--seeds', '2', rates=rates) == rows
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
def pretended(monkeypatch):
  """Runs that take no time; galore has no memory for its own."""

  def trainer(config, corpus):
    if config.optim.name == 'galore':
      raise MemoryError('out of memory\nallocating 1 byte')

    def train(rate, seed):
      return {
        'outcome': 'trained',
        'eval': [[0, 6.0], [STEPS, 5.0 + rate + seed / 10]],
        'train': [[3, 6.0], [6, 5.5]],
        'state_bytes': {'moments': 2**20},
      }

    return train

  monkeypatch.setattr(quality, 'Trainer', trainer)


@pytest.mark.usefixtures('pretended')
def test_processes_share_the_methods_and_failures_are_rows(
  call, tmp_path, capsys
):
  rates = ('adamw=1,2', 'galore=1,2', 'fira=1')
  names = ('--methods', 'adamw', 'galore', 'fira')
  assert call(*names, '--process', '1/2', rates=rates) is None
  assert call(*names, '--process', '2/2', rates=rates) is None
  assert capsys.readouterr().out == ''
  parts = [
    json.loads((tmp_path / f'out.{k}of2.json').read_text())['rows']
    for k in (1, 2)
  ]
  # In turns, the rates before the seeds.
  assert keys(parts[0]) == [
    ('adamw', 1, 0),
    ('fira', 1, 0),
    ('adamw', 2, 0),
    ('fira', 1, 1),
    ('adamw', 1, 1),
    ('fira', 1, 2),
    ('adamw', 1, 2),
  ]
  assert keys(parts[1]) == [('galore', 1, 0), ('galore', 2, 0)]
  assert {row['absent'] for row in parts[1]} == {'MemoryError: out of memory'}
  rows = call('--report', rates=rates)
  assert sorted(keys(rows)) == sorted(keys(parts[0] + parts[1]))
  shown = capsys.readouterr().out.splitlines()
  perplexities = [math.exp(6 + seed / 10) for seed in range(3)]
  spread = (
    f'{statistics.mean(perplexities):.1f} ± '
    f'{statistics.stdev(perplexities):.1f}'
  )
  assert shown[2] == (
    f'| adamw | 1 | 6.1000 ± 0.1000 | {spread} | 3 | 1.0 '
    '| 1: 6.0000, 2: 7.0000 |'
  )
  failure = 'MemoryError: out of memory'
  assert shown[4] == (
    f'| galore | - | - | - | - | - | 1: {failure}, 2: {failure} |'
  )


@pytest.mark.usefixtures('pretended')
def test_runs_that_time_does_not_allow_are_named(call, capsys):
  assert call('--minutes', '0', rates=('adamw=1,2', 'fira=1')) == []
  captured = capsys.readouterr()
  assert 'Out of time; the same command goes on.' in captured.err
  assert captured.out.splitlines()[-1] == (
    'Not run, and what would follow: adamw at 1 with seed 0, adamw at 2 with '
    'seed 0, fira at 1 with seed 0.'
  )


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
  plan = quality_rows.Plan({'m': (4.0, 8.0, 2.0)}, seeds=3, extend=2)
  rows = [*known(**losses), {**known(r1s0=0.0)[0], 'method': 'another'}]
  found = quality_rows.pending('m', rows, plan)
  assert found == [('m', *run) for run in expected]


@pytest.mark.parametrize(
  ('evals', 'losses', 'words'),
  [
    ([4.0, 3.0], [4.0, 3.5], 'trained'),
    ([4.0, 4.5], [4.0, 4.2], 'eval loss 4.50, above the untrained'),
    ([4.0, np.nan], [4.0, 3.5], 'eval loss not finite after step 2'),
    ([4.0, np.nan], [4.0, np.inf], 'loss not finite from step 2'),
  ],
)
def test_outcome(evals, losses, words):
  curve = [[0, evals[0]], [2, evals[1]]]
  assert quality.outcome(curve, losses) == words


def test_curves_are_thinned_to_means():
  losses = np.random.default_rng(0).normal(size=300)
  found = quality.thinned(losses.tolist())
  assert [number for number, _ in found] == list(range(10, 301, 10))
  expected = losses.reshape(30, 10).mean(axis=1)
  np.testing.assert_allclose([loss for _, loss in found], expected)
  assert quality.thinned([1.0, math.nan]) == [[1, 1.0], [2, None]]


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
