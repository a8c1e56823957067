"""Pre-training on a choice of a pool: features, runs, and what is said.

Shape suffixes: N rows.
"""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import train_lm
from gnlorp_jax.compose import coreset
from gnlorp_jax.compose.coreset_settings import CoresetOptions
from gnlorp_jax.compose.settings import AdapterOptions, OptimConfig, StepConfig
from gnlorp_jax.models import llama
from gnlorp_jax.models.families import phi3
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from gnlorp_jax.training import metrics
from gnlorp_jax.training.checkpoint import Checkpointer
from gnlorp_jax.training.selection import selection

T, ROWS = 8, 4
SIZES = {
  **{'vocab_size': 64, 'hidden_size': 16, 'intermediate_size': 24},
  **{'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 2, 'max_seq_len': T},
  'initializer_std': 0.3,
}
TINY = llama.LlamaConfig(**SIZES)
FUSED = phi3.Phi3Config(**SIZES)
LORA = AdapterOptions(kind='lora', rank=2)
CONFIG = TrainConfig(
  model=TINY,
  data=DataConfig(seq_len=T),
  batch_size=2,
  coreset=CoresetOptions(pool=ROWS, sketch=0),
  optim=OptimConfig(name='adamw'),
)
CASES = {
  'whole': {},
  'fused': {'model': FUSED},
  'adapters': {'adapter': LORA},
  'adapters beside 8 bits': {
    'adapter': LORA,
    'step': StepConfig(weight_bits=8),
  },
  '8 bits, layer by layer': {
    'step': StepConfig(mode='layerwise', weight_bits=8),
    'optim': OptimConfig(name='galore', rank=2),
  },
  'adapters that restart': {
    'adapter': dataclasses.replace(LORA, restart_every=40),
    'optim': OptimConfig(name='adamw', schedule='jagged'),
  },
}


def pool():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 64, (ROWS, T + 1), dtype=np.int32)
  lengths = np.array([8, 3, 1, 6])[:, None]
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': (np.arange(T) < lengths).astype(np.float32),
  }


@pytest.mark.parametrize('case', CASES)
def test_features_are_gradients_of_what_the_run_computes(case):
  config = dataclasses.replace(CONFIG, **CASES[case])
  program = recipe.plan(config, jax.devices()[:1]).program
  params, frozen = program.parameters.start(jax.random.key(1))
  if 'adapter' in CASES[case]:  # Not zeros, from which all would be alike.
    params = jax.tree.map(
      lambda x: x + 0.1 if x.dtype == jnp.float32 else x, params
    )
  tail = coreset.tail(program, config.model, chunk_tokens=8)
  rule = coreset.rule(config.coreset, 2, 1, 0)
  candidates = pool()
  found, seen = jax.jit(
    lambda *weights: selection.measure(
      *(rule, tail, *weights, None, candidates)
    )
  )(params, frozen)
  assert found['features'].shape == (ROWS, tail.shape[0] * 8)

  stored = program.parameters.join(params, frozen)
  path = ('layers', *tail.path)
  flat = traverse_util.flatten_dict(stored)
  exact = program.parameters.decode_exact({'x': flat[path]})['x']

  @jax.jit
  def gradient(row):
    def loss(matrix):
      new = traverse_util.unflatten_dict(flat | {path: matrix})
      total, weight = program.objective.loss(new, row)
      return total / weight

    return jax.grad(loss)(exact)[-1]

  for number in range(ROWS):
    row = {name: x[number : number + 1] for name, x in candidates.items()}
    expected = gradient(row)[:, tail.start :].ravel()
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(
      found['features'][number], expected, rtol=2e-4, atol=1e-6
    )
  assert seen['gram'].shape == (ROWS, ROWS)


def test_the_matrix_is_the_last_value_projection():
  tails = {}
  for case in ('whole', 'fused', 'adapters'):
    config = dataclasses.replace(CONFIG, **CASES[case])
    program = recipe.plan(config, jax.devices()[:1]).program
    tails[case] = coreset.tail(program, config.model, chunk_tokens=8)
  found = {c: (t.path[1:], t.start, t.shape) for c, t in tails.items()}
  assert found == {
    'whole': (('v_proj', 'kernel'), 0, (16, 8)),
    'fused': (('qkv_proj', 'kernel'), 24, (16, 8)),
    'adapters': (('v_proj', 'lora_b'), 0, (2, 8)),
  }


def test_cost_counts_what_choosing_takes():
  options = CoresetOptions(pool=ROWS, selector='facility')
  planned = recipe.plan(
    dataclasses.replace(CONFIG, coreset=options), jax.devices()[:1]
  )
  found = coreset.cost(
    options, planned.program, TINY, planned.abstract_batch, 1
  )
  assert found == {
    'pool': 3 * 4 * ROWS * T,
    'features': 3 * 4 * ROWS * 128,
    'gradients': 3 * 4 * 2 * 128,
    'moments': 8 * 128,
    'forward': 2 * 2 * T * 16 * 4,
  }
  options = CoresetOptions(pool=ROWS, selector='random')
  assert coreset.cost(
    *(options, planned.program, TINY, planned.abstract_batch, 1)
  ) == {'pool': 3 * 4 * ROWS * T}


@pytest.mark.parametrize(
  'options', [{'sketch': 0}, {'selector': 'facility'}], ids=str
)
def test_cost_is_no_less_than_the_compiler_takes(options):
  options = CoresetOptions(pool=64, **options)
  model = dataclasses.replace(
    TINY, hidden_size=64, num_kv_heads=4, num_layers=1
  )
  config = dataclasses.replace(
    CONFIG, model=model, batch_size=8, coreset=options
  )
  planned = recipe.plan(config, jax.devices()[:1])
  program = planned.program
  rule = coreset.rule(options, 8, 1, 0)
  tail = coreset.tail(program, model, chunk_tokens=64)
  candidates = {
    name: jax.ShapeDtypeStruct((64, T), leaf.dtype)
    for name, leaf in planned.abstract_batch.items()
  }
  memory = selection.make(rule, tail, program.mesh).abstract
  measured = jax.jit(functools.partial(selection.measure, rule, tail))
  taken = (
    measured.lower(
      *(program.abstract_state.params, program.parameters.frozen),
      *(memory, candidates),
    )
    .compile()
    .memory_analysis()
  )
  counted = coreset.cost(options, program, model, planned.abstract_batch, 1)
  taken = taken.temp_size_in_bytes + taken.output_size_in_bytes
  assert 0.7 * sum(counted.values()) < taken < sum(counted.values())


def said_of(options, caplog, **changes):
  config = dataclasses.replace(CONFIG, coreset=options, **changes)
  planned = recipe.plan(config, jax.devices()[:1])
  caplog.clear()
  with caplog.at_level(logging.INFO):
    coreset.make(
      *(options, planned.program, config.model),
      batch_size=2,
      micro_batches=1,
      chunk_tokens=8,
      seed=0,
    )
  return caplog.messages


def test_one_direction_is_said_to_tell_next_to_nothing(caplog):
  messages = said_of(CoresetOptions(pool=ROWS, features='spsa'), caplog)
  assert messages == [
    'Each step trains on 2 of 4 rows, chosen by herding on spsa features of '
    'the last layers/attn/v_proj/kernel, 1 numbers a row. Rows by source: not '
    'told apart; kept whole: none.',
    'coreset.directions=1 gives one number a row, which says almost nothing of '
    'its gradient: the choice is near to a random one within the quotas. '
    "coreset.features='exact' costs as much.",
  ]
  more = CoresetOptions(pool=ROWS, features='spsa', directions=16)
  assert len(said_of(more, caplog)) == 1
  messages = said_of(CoresetOptions(pool=ROWS, selector='random'), caplog)
  assert messages[1].startswith("coreset.selector='random' among rows of one")


MISTAKES = {
  'coreset.sketch=64 has no effect where nothing is chosen: give coreset.pool, '
  'rows to choose from.': {'sketch': 64},
  "coreset.features='exact' has no effect: coreset.selector='random' picks "
  "without looking. Use selector='facility', or leave it out.": {
    'pool': 4,
    'selector': 'random',
    'features': 'exact',
  },
  "coreset.top=8 has no effect: coreset.selector='herding' matches gradients "
  "as they are. Use selector='facility', or leave it out.": {
    'pool': 4,
    'top': 8,
  },
  "coreset.directions=4 is of coreset.features='spsa', got None. Leave it "
  'out.': {'pool': 4, 'directions': 4},
  'coreset.sketch=64 is of gradients that Adam does not normalise: use '
  "normalise='none'. Or leave it out.": {
    'pool': 4,
    'selector': 'facility',
    'sketch': 64,
  },
}


@pytest.mark.parametrize('message', MISTAKES)
def test_options_without_effect_are_errors(message):
  with pytest.raises(ValueError) as error:
    CoresetOptions(**MISTAKES[message])
  assert str(error.value) == message


def test_pool_must_fit_the_batch():
  for size, message in (
    (
      2,
      'coreset.pool=2 must be more than batch_size=2, the rows that are '
      'chosen from it. Raise it, or leave it out.',
    ),
    (
      5,
      'coreset.pool=5 must be a multiple of batch_size / micro_batches=2, '
      'the rows that go through the model at once. Use 4 or 6.',
    ),
  ):
    with pytest.raises(ValueError) as error:
      coreset.check(CoresetOptions(pool=size), 2, 1)
    assert str(error.value) == message


# Runs.


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  found = []
  for name, letters, lines in (
    *(('web', 'abcdef', 300), ('code', 'ghijkl', 250), ('rare', 'mnop', 40)),
  ):
    text = [' '.join(rng.choice(list(letters), 12)) for _ in range(lines)]
    (folder / f'{name}.txt').write_text('\n'.join(text))
    found.append(f'{name}={folder / name}.txt')
  return ','.join(found), folder


def words_of(sources, run_dir):
  source, folder = sources
  return f"""
    --steps 6 --batch-size 4 --log-every 1 --eval-every 3 --checkpoint-every 2
    --eval-batches 2 --sample.num-tokens 0 --optim.rank 2 --data.seq-len 16
    --model.vocab-size 300 --model.hidden-size 16 --model.max-seq-len 16
    --model.intermediate-size 24 --model.num-layers 2 --model.num-heads 2
    --data.source {source} --data.cache-dir {folder} --run-dir {run_dir}
  """.split()


def rows_of(folder):
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  return [
    {n: v for n, v in row.items() if n != 'train/tokens_per_second'}
    for row in rows
  ]


@pytest.mark.usefixtures('compiled_once', 'built_once', 'logging_as_before')
@pytest.mark.parametrize('selector', ['facility', 'herding'])
def test_stopped_run_picks_as_the_whole_one(
  selector, sources, tmp_path, stopped_by_a_signal
):
  options = ['--coreset.pool', '8', '--coreset.selector', selector]
  options += ['--mesh.data', '1']
  train_lm.main([*words_of(sources, tmp_path / 'whole'), *options])
  args = [*words_of(sources, tmp_path / 'stopped'), *options]
  stopped_by_a_signal(train_lm.main, args, 3)
  train_lm.main(args)
  whole, found = rows_of(tmp_path / 'whole'), rows_of(tmp_path / 'stopped')
  assert found == whole
  last = next(row for row in whole[::-1] if 'coreset/picked/web' in row)
  picked = [last[f'coreset/picked/{n}'] for n in ('web', 'code', 'rare')]
  assert sum(picked) == 6 * 4
  # Sources below the mean size are kept whole.
  assert picked[2] == last['coreset/offered/rare']
  evaluated = next(row for row in whole if 'eval/loss' in row)
  losses = {evaluated[f'eval/loss_{n}'] for n in ('web', 'code', 'rare')}
  assert min(losses) < evaluated['eval/loss'] < max(losses)
  with Checkpointer(
    tmp_path / 'whole' / 'checkpoints', read_only=True
  ) as saved:
    metadata = saved.latest_metadata()
  assert metadata['coreset.pool'] == 8
  summary = json.loads((tmp_path / 'whole' / 'summary.json').read_text())
  assert summary['coreset']['picked/rare'] == picked[2]


@pytest.mark.usefixtures('compiled_once', 'logging_as_before')
def test_four_devices_train_on_the_rows_of_one(sources, tmp_path):
  options = ['--coreset.pool', '8']
  found = {}
  for devices in (1, 4):
    folder = tmp_path / str(devices)
    mesh = ['--mesh.data', str(devices)]
    train_lm.main([*words_of(sources, folder), *options, *mesh])
    found[devices] = rows_of(folder)
  for one, four in zip(found[1], found[4], strict=True):
    for name, value in one.items():
      if name.startswith('coreset/picked/') or name == 'train/loss':
        np.testing.assert_allclose(four[name], value, rtol=1e-4)
