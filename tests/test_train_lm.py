"""Whole runs of train_lm.py: what they leave, how they resume, how they fail.

One tiny run is made once and shared. It is damaged and repeated in copies,
which must end as it did, bit for bit; test_resume.py kills and stops runs.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import random
import shutil
import struct
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

import train_lm
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.models import hf, llama
from gnlorp_jax.optim import projections
from gnlorp_jax.recipes.pretrain import data, recipe, settings
from gnlorp_jax.training import metrics, sharding
from gnlorp_jax.training.checkpoint import Checkpointer

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('compiled_once', 'built_once', 'logging_as_before'),
]

# What is projected: more kernels take longer to compile.
KERNELS = ['attn/q_proj', 'mlp/down_proj']
LABELS = ['--optim.param-labels', '(q|down)_proj', 'low_rank', '.*', 'full']


@pytest.fixture(scope='module')
def options(tmp_path_factory):
  """Command line of a tiny run, as a function of its run directory."""
  folder = tmp_path_factory.mktemp('data')
  rng = random.Random(0)
  words = [
    ''.join(rng.choices('abcdefghij', k=rng.randint(2, 6))) for _ in range(50)
  ]
  lines = [' '.join(rng.choices(words, k=8)) for _ in range(400)]
  (folder / 'text.txt').write_text('\n'.join(lines))
  usual = {
    'steps': 24,
    'batch-size': 8,
    'eval-every': 8,
    'checkpoint-every': 4,
    'log-every': 2,
    'mesh.data': 1,
    'sample.num-tokens': 16,
    'model.vocab-size': 300,
    'model.hidden-size': 32,
    'model.intermediate-size': 48,
    'model.num-layers': 2,
    'model.num-heads': 2,
    'model.max-seq-len': 16,
    'data.source': folder / 'text.txt',
    'data.seq-len': 16,
    'data.cache-dir': folder / 'cache',
    'optim.rank': 4,
    'optim.update-proj-gap': 5,
  }

  def make(run_dir, **changes):
    changes = {
      k.replace('__', '.').replace('_', '-'): changes[k] for k in changes
    }
    every = {'run-dir': run_dir} | usual | changes
    words = [w for k, v in every.items() for w in (f'--{k}', str(v))]
    return words + LABELS

  return make


def run_main(args):
  """Runs `main` in this process; returns what it printed, in one line."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    train_lm.main(args)
  return ' '.join(output.getvalue().split())


@pytest.fixture(scope='module')
def finished(options, tmp_path_factory, compiled_once):
  """The run that was never interrupted: its folder and what it printed."""
  folder = tmp_path_factory.mktemp('runs') / 'finished'
  return types.SimpleNamespace(folder=folder, output=run_main(options(folder)))


def read_rows(folder):
  """The metrics, by a parser that takes nothing but JSON."""

  def reject(constant):
    raise ValueError(f'{constant} is not JSON')

  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line, parse_constant=reject) for line in text.splitlines()]


def read_state(args):
  """The last checkpoint: state on the host, position in the data."""
  config = settings.parse(args, '')
  abstract = recipe.plan(config).program.abstract_state
  directory = pathlib.Path(config.run_dir, 'checkpoints')
  with Checkpointer(directory, read_only=True) as saved:
    state, position, _ = saved.restore_latest(abstract)
  return jax.device_get(state), position['batches']


def assert_ends_alike(args, expected_args):
  """Same bits in the last checkpoints, same rows apart from measured time."""
  state, position = read_state(args)
  expected, expected_position = read_state(expected_args)
  assert int(state.step) == 24
  assert position == expected_position
  leaves = jax.tree_util.tree_leaves_with_path(state)
  for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path
  folder, expected_folder = (
    pathlib.Path(args[1]),
    pathlib.Path(expected_args[1]),
  )
  timeless = [
    [
      {k: v for k, v in row.items() if k != 'train/tokens_per_second'}
      for row in read_rows(f)
    ]
    for f in (folder, expected_folder)
  ]
  assert timeless[0] == timeless[1]
  weights = 'hf/model.safetensors'
  assert (folder / weights).read_bytes() == (
    expected_folder / weights
  ).read_bytes()


# What a run leaves.


def test_rows_hold_every_metric(finished):
  rows = read_rows(finished.folder)
  trained = [row for row in rows if 'train/loss' in row]
  assert [row['step'] for row in trained] == [1, *range(2, 25, 2)]
  assert [row['step'] for row in rows if 'eval/loss' in row] == [0, 8, 16, 24]
  per_kernel = {
    f'{field}/{name}'
    for field in ('refreshes', 'overlap', 'energy', 'saved_refreshes')
    for name in ('low_rank', *(f'layers/{k}/kernel' for k in KERNELS))
  }
  for number, row in enumerate(trained):
    expected = {
      'step',
      *(f'train/{k}' for k in ('loss', 'perplexity', 'tokens', 'weight_sum')),
      'train/skipped_steps',
      *(f'train/{k}_norm' for k in ('grad', 'update', 'weight')),
      'optim/learning_rate',
      'optim/state_bytes',
      *per_kernel,
    }
    if number:  # The first row has no time to compare with: it compiled.
      expected.add('train/tokens_per_second')
    assert set(row) == expected
    assert all(np.isfinite(list(row.values())))
    assert row['train/perplexity'] == pytest.approx(np.exp(row['train/loss']))
    assert row['train/tokens'] == row['step'] * 8 * 16


def test_rows_tell_the_learning_rate_that_was_used(finished):
  rates = {
    row['step']: row['optim/learning_rate']
    for row in read_rows(finished.folder)
    if 'train/loss' in row
  }
  # round(0.1 * 24) = 2 steps of warm-up to 0.01, the last at a tenth of it.
  assert rates[1] == pytest.approx(0.005)
  assert rates[2] == pytest.approx(0.01)
  assert rates[24] == pytest.approx(0.001)
  # Cosine over the updates 2 to 23, counted from 0: update 13 is that of 14.
  middle = 0.01 * (0.1 + 0.9 * (1 + np.cos(np.pi * 11 / 21)) / 2)
  assert rates[14] == pytest.approx(middle)


def test_rows_count_the_refreshes_of_every_kernel(finished):
  last = read_rows(finished.folder)[-2]
  # Each of the 2 matrices of a leaf: at step 1, then once every 5 steps; the
  # leaves and matrices take turns, so 24 steps hold 4 or 5 more of them.
  for kernel in KERNELS:
    assert 5 <= last[f'refreshes/layers/{kernel}/kernel'] <= 6
  for field in ('refreshes', 'overlap', 'energy'):
    values = [last[f'{field}/layers/{kernel}/kernel'] for kernel in KERNELS]
    assert last[f'{field}/low_rank'] == pytest.approx(np.mean(values))
  assert 0 < last['energy/low_rank'] <= 1


def test_state_bytes_are_those_of_the_state(finished, options):
  state, _ = read_state(options(finished.folder))
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
  rows = read_rows(finished.folder)
  assert {row.get('optim/state_bytes', held) for row in rows} == {held}


def test_validation_loss_falls_and_the_summary_says_so(finished):
  losses = [
    row['eval/loss'] for row in read_rows(finished.folder) if 'eval/loss' in row
  ]
  assert losses[-1] < 0.7 * losses[0]
  # An untrained model knows nothing: ln 300.
  assert losses[0] == pytest.approx(np.log(300), rel=0.01)
  summary = json.loads((finished.folder / 'summary.json').read_text())
  assert summary['first_eval_loss'] == losses[0]
  assert summary['last_eval_loss'] == losses[-1]
  assert summary['steps'] == 24
  assert summary['median_tokens_per_second'] > 0
  assert (
    f'Validation loss {losses[0]:.3f} -> {losses[-1]:.3f}' in finished.output
  )


def test_run_leaves_events_picture_and_sample(finished):
  assert list(finished.folder.glob('events.out.tfevents.*'))
  png = (finished.folder / 'loss.png').read_bytes()
  assert png[:8] == b'\x89PNG\r\n\x1a\n' and png[-8:-4] == b'IEND'
  assert struct.unpack('>2I', png[16:24]) == (1200, 675)
  sample = (finished.folder / 'sample.txt').read_text()
  assert len(sample.strip()) > 0
  assert ' '.join(sample.split()) in finished.output


def test_export_is_read_back_exactly(finished, options):
  state, _ = read_state(options(finished.folder))
  folder = finished.folder / 'hf'
  found = llama.config_from_hf(hf.load_config(folder))
  given = settings.parse(options('unused'), '').model
  assert found == dataclasses.replace(given, num_kv_heads=given.num_heads)
  shapes = jax.eval_shape(llama.make(found).init, jax.random.key(0))
  params = hf.load_params(folder, llama.HF_TENSORS, shapes)
  assert jax.tree.structure(params) == jax.tree.structure(state.params)
  for a, b in zip(
    jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_export_is_read_by_transformers(finished):
  transformers = pytest.importorskip('transformers')
  folder = finished.folder / 'hf'
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenizers.load(str(folder))
  (ids,) = ours.encode_batch(['abc def'])
  assert theirs('abc def')['input_ids'] == ids[:-1].tolist()
  assert theirs.eos_token_id == ids[-1] == ours.eos_id


def test_export_gives_equal_logits_in_pytorch(finished, options):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  folder = finished.folder / 'hf'
  oracle = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
  state, _ = read_state(options(finished.folder))
  model = llama.make(llama.config_from_hf(hf.load_config(folder)))
  tokens_BT = np.random.default_rng(0).integers(0, 300, (2, 16))
  with torch.no_grad():
    expected = oracle(torch.from_numpy(tokens_BT)).logits.numpy()
  logits_BTV = model.apply(state.params, tokens_BT)
  # float32 in both; logits are of order 1 to 10, summed in another order.
  np.testing.assert_allclose(logits_BTV, expected, rtol=1e-4, atol=1e-5)


# Starting and resuming.


@pytest.fixture(scope='module')
def diverging(finished, options, tmp_path_factory):
  """A run that goes on with the exported model, at far too high a rate."""
  folder = tmp_path_factory.mktemp('runs') / 'diverging'
  args = options(
    folder, init_from=finished.folder / 'hf', optim__learning_rate=0.5
  )
  args.append('--keep-best')
  return types.SimpleNamespace(folder=folder, args=args, output=run_main(args))


def test_init_from_starts_with_the_exported_weights(finished, diverging):
  last = read_rows(finished.folder)[-1]
  first = read_rows(diverging.folder)[0]
  assert first['step'] == 0
  assert first['eval/loss'] == last['eval/loss']


def test_fewer_steps_than_the_run_holds_is_an_error(
  finished, options, tmp_path, capsys
):
  folder = shutil.copytree(finished.folder, tmp_path / 'run')
  message = message_of([*options(folder), '--steps', '5'], capsys)
  assert 'holds step 24, beyond steps=5. Raise steps or use another' in message


def test_dry_run_reports_and_trains_nothing(options, tmp_path, capsys):
  train_lm.main([*options(tmp_path / 'run'), '--dry-run'])
  table = capsys.readouterr().out
  lines = [line.split() for line in table.splitlines()]
  header = ['parameter', 'shape', 'label', 'rank', 'side', 'state', 'AdamW']
  start = next(i for i, line in enumerate(lines) if line[:7] == header)
  rows = {line[0]: line for line in lines[start + 1 :]}
  assert rows['layers/attn/q_proj/kernel'][1:5] == [
    '2x32x32', 'low_rank', '4', 'in',
  ]  # fmt: skip
  assert rows['embed/embedding'][1:5] == ['300x32', 'full', '-', '-']
  assert 'less than AdamW' in table
  assert not (tmp_path / 'run').exists()


# Layer by layer, and in 8 bits.


# Steps of runs that go on from the finished one. A cosine is of so many steps:
# runs of other lengths are other programs.
LONGER = 26
EIGHT_BITS = {'step__mode': 'layerwise', 'step__weight_bits': 8}


def test_run_in_8_bits_learns_and_counts_its_bytes(options, tmp_path):
  folder = tmp_path / 'run'
  run_main(options(folder, **EIGHT_BITS))
  losses = [row['eval/loss'] for row in read_rows(folder) if 'eval/loss' in row]
  assert losses[-1] < 0.7 * losses[0]
  assert (folder / 'sample.txt').read_text().strip()
  summary = json.loads((folder / 'summary.json').read_text())
  # Vectors: 2 norms a layer and the last; kernels: 4 of 32 x 32, 3 of 32 x 48.
  kernels = 2 * (4 * 32 * 32 + 3 * 32 * 48)
  around = 2 * 300 * 32 + 5 * 32
  assert summary['parameters'] == kernels + around
  # A byte each and eight per block: 4 x 4 and 3 x 6 blocks in a layer.
  held = kernels + 8 * 2 * (4 * 4 + 3 * 6) + 4 * around
  assert summary['memory_bytes']['parameters']['this run'] == held


def test_a_run_may_change_between_whole_steps_and_layers(
  finished, options, tmp_path
):
  start, _ = read_state(options(finished.folder))
  ends = []
  for mode in ('whole', 'layerwise'):
    folder = shutil.copytree(finished.folder, tmp_path / mode)
    args = options(folder, steps=LONGER, step__mode=mode)
    assert 'at step 24.' in run_main(args)
    ends.append(read_state(args)[0])
  assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
  assert int(ends[1].step) == LONGER
  # Sums in another order: float32 rounding, which Adam makes larger.
  way = distance(ends[0].params, start.params)
  assert distance(ends[0].params, ends[1].params) < 1e-3 * way


def test_bits_of_the_weights_cannot_change_within_a_run(
  finished, options, capsys
):
  args = options(finished.folder, **EIGHT_BITS)
  assert message_of(args, capsys) == (
    f'error: Checkpoint in {finished.folder} was made with other settings: '
    'step.weight_bits None != 8. Use another run directory or the same '
    'settings. To go on all the same, name what may differ: --accept '
    "'step.weight_bits'."
  )


def truncate(path):
  with open(path, 'r+b') as file:
    file.truncate(path.stat().st_size // 2)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
  finished, options, tmp_path
):
  folder = tmp_path / 'run'
  shutil.copytree(finished.folder, folder)
  newest = folder / 'checkpoints' / '24'
  files = [path for path in newest.rglob('*') if path.is_file()]
  truncate(max(files, key=lambda path: path.stat().st_size))
  output = run_main(options(folder))
  assert 'The checkpoint of step 24 in' in output
  assert 'is damaged' in output
  assert 'at step 20.' in output
  assert_ends_alike(options(folder), options(finished.folder))


def test_finished_run_can_be_repeated(finished, options, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(finished.folder, folder)
  left = ('loss.png', 'sample.txt', 'summary.json', 'hf/model.safetensors')
  for name in left:
    (folder / name).unlink()
  run_main(options(folder))
  for name in left:
    assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()
  assert read_rows(folder) == read_rows(finished.folder)


# Another learning rate than before.


def test_resumed_run_takes_the_learning_rate_that_is_asked_for_now(
  finished, options, tmp_path
):
  start, _ = read_state(options(finished.folder))
  folder = shutil.copytree(finished.folder, tmp_path / 'run')
  args = options(folder, steps=LONGER, optim__learning_rate=1e-9)
  assert 'at step 24.' in run_main(args)
  end, _ = read_state(args)
  assert int(end.step) == LONGER
  assert distance(end.params, start.params) < 1e-6
  (rate,) = {
    row['optim/learning_rate']
    for row in read_rows(folder)
    if row['step'] == LONGER and 'train/loss' in row
  }
  assert rate == pytest.approx(1e-10)  # The last step: a tenth of the peak.


def test_best_parameters_are_kept_and_exported(diverging):
  folder, args, output = diverging.folder, diverging.args, diverging.output
  losses = {
    row['step']: row['eval/loss']
    for row in read_rows(folder)
    if 'eval/loss' in row
  }
  best = min(losses, key=losses.get)
  assert best < 24
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['last_eval_loss'] == losses[best]
  assert f'Validation loss {losses[0]:.3f} -> {losses[best]:.3f}' in output
  abstract = recipe.plan(settings.parse(args, '')).program.abstract_state.params
  with Checkpointer(folder / 'best', read_only=True) as saved:
    params, position, _ = saved.restore_latest(abstract)
  assert position == {'step': best}
  found = hf.load_params(folder / 'hf', llama.HF_TENSORS, abstract)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  last, _ = read_state(args)
  assert distance(last.params, jax.device_get(params)) > 1


# Adapters.


ADAPTERS = {
  'adapter__kind': 'lora',
  'adapter__rank': 4,
  'adapter__dropout': 0.1,
  'step__weight_bits': 8,
}


@pytest.fixture(scope='module')
def adapted(finished, options, tmp_path_factory):
  """Adapters beside the model of the first run, kept in 8 bits."""
  folder = tmp_path_factory.mktemp('runs') / 'adapted'
  args = options(folder, init_from=finished.folder / 'hf', **ADAPTERS)
  return types.SimpleNamespace(folder=folder, args=args, output=run_main(args))


def test_adapters_begin_where_the_model_ended_and_learn(finished, adapted):
  losses = [
    row['eval/loss'] for row in read_rows(adapted.folder) if 'eval/loss' in row
  ]
  last = read_rows(finished.folder)[-1]['eval/loss']
  # The kernels are rounded to 8 bits.
  assert losses[0] == pytest.approx(last, rel=1e-2)
  assert losses[-1] < losses[0] - 1e-3
  summary = json.loads((adapted.folder / 'summary.json').read_text())
  assert summary['adapter'] == 'lora'
  assert summary['first_eval_loss'] == losses[0]
  kernels = 2 * (4 * 32 * 32 + 3 * 32 * 48)
  outside = 2 * 300 * 32 + 5 * 32
  assert summary['parameters'] == kernels + outside
  factors = 2 * 4 * (4 * 2 * 32 + 3 * (32 + 48))
  held = kernels + 8 * 2 * (4 * 4 + 3 * 6) + 4 * (outside + factors)
  memory = summary['memory_bytes']
  assert memory['parameters']['this run'] == held
  assert memory['gradients']['this run'] == 4 * factors
  assert (adapted.folder / 'sample.txt').read_text().strip()


def test_checkpoints_of_adapters_hold_no_frozen_weights(adapted):
  state, _ = read_state(adapted.args)
  names = {
    sharding.path_string(path).rpartition('/')[2]
    for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
  }
  assert names == {'lora_a', 'lora_b'}
  # The record has the name of every array.
  records = (adapted.folder / 'checkpoints/24/record').rglob('*')
  text = ''.join(path.read_text() for path in records if path.is_file())
  assert 'q_proj/lora_a' in text
  assert 'embed/' not in text and '/kernel' not in text


def test_export_with_adapters_gives_equal_logits_in_pytorch(adapted):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  oracle, report = transformers.LlamaForCausalLM.from_pretrained(
    adapted.folder / 'hf', output_loading_info=True
  )
  assert not any(report.values()), report
  built = recipe.plan(settings.parse(adapted.args, '')).program
  state, _ = read_state(adapted.args)
  frozen = built.parameters.start_frozen(jax.random.key(0))
  tokens_BT = np.random.default_rng(0).integers(0, 300, (2, 16))
  with torch.no_grad():
    expected = oracle.eval()(torch.from_numpy(tokens_BT)).logits.numpy()
  logits_BTV = built.apply(state.params, frozen, tokens_BT)
  # float32 in both; kernels with their change folded in, or beside it.
  np.testing.assert_allclose(logits_BTV, expected, rtol=1e-4, atol=1e-5)


def test_frozen_weights_of_a_run_cannot_be_others(
  finished, adapted, options, tmp_path, capsys
):
  other = shutil.copytree(finished.folder / 'hf', tmp_path / 'other')
  weights = safetensors.numpy.load_file(other / 'model.safetensors')
  weights['model.norm.weight'] = weights['model.norm.weight'] + 1
  safetensors.numpy.save_file(
    weights, other / 'model.safetensors', metadata={'format': 'pt'}
  )
  args = options(adapted.folder, init_from=other, **ADAPTERS)
  message = message_of(args, capsys)
  assert 'init_from folder with the fingerprint ' in message
  assert "--accept 'init_from'" in message


def test_kernels_in_8_bits_that_train_in_whole_steps_are_told(
  options, tmp_path, capsys
):
  args = options(tmp_path / 'run', step__weight_bits=8)
  assert message_of(args, capsys) == (
    "error: step.weight_bits=8 needs step.mode='layerwise', which rounds the "
    'updates of kernels stochastically, or adapters '
    "(adapter.kind='lora') beside kernels that stay as they are; got "
    "step.mode='whole' and adapter.kind=None."
  )


# A search over learning rates and seeds.


SEARCH = {'steps': 8, 'eval_every': 4, 'learning_rates': '0.003,0.03'}


@pytest.fixture(scope='module')
def searched(options, tmp_path_factory, compiled_once):
  """A search whose second run was broken off; what was compiled for it."""
  folder = tmp_path_factory.mktemp('runs') / 'search'
  args = options(folder, **SEARCH, seeds='0,1')
  prepared, outputs = [], []
  prepare, write = recipe.prepare, metrics.MetricsWriter.write

  def remember(config):
    prepared.append(prepare(config))
    return prepared[-1]

  def break_off(self, number, row):
    write(self, number, row)
    if number == 6 and 'lr0.03' in self._file.name:
      raise RuntimeError('broken off')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(recipe, 'prepare', remember)
    with patch.context() as inner:
      inner.setattr(metrics.MetricsWriter, 'write', break_off)
      with pytest.raises(RuntimeError, match='broken off'):
        run_main(args)
    outputs += [run_main(args), run_main(args)]
  results = json.loads((folder / 'results.json').read_text())
  return types.SimpleNamespace(
    folder=folder, outputs=outputs, results=results, prepared=prepared
  )


def test_search_tries_rates_with_one_seed_and_takes_the_best(searched):
  runs = {(r['learning_rate'], r['seed']): r for r in searched.results}
  assert len(searched.results) == len(runs) == 3
  tried = {rate: runs[rate, 0]['best']['loss'] for rate in (0.003, 0.03)}
  best = min(tried, key=tried.get)
  assert set(runs) == {(0.003, 0), (0.03, 0), (best, 1)}
  for (rate, seed), result in runs.items():
    folder = searched.folder / f'lr{rate:g}_seed{seed}'
    assert json.loads((folder / 'result.json').read_text()) == result
    assert result['main_metric'] == 'loss'
    assert not result['higher_is_better']
    assert result['best'] == result['last']  # The best are not kept.
    assert result['best']['step'] == 8
    shown = [r['eval/loss'] for r in read_rows(folder) if 'eval/loss' in r]
    assert result['best']['loss'] == shown[-1]
    assert result['settings']['optim.learning_rate'] == rate
    assert result['settings']['seed'] == seed
    for name in ('hf/model.safetensors', 'summary.json', 'loss.png'):
      assert (folder / name).is_file()
  text = f'learning rate {best:g} has the best loss with seed 0 ('
  assert text in searched.outputs[0]


def test_search_goes_on_and_repeats_nothing(searched):
  again, last = searched.outputs
  assert 'lr0.003_seed0 is finished already.' in again
  assert 'Resuming lr0.03_seed0 at step 4.' in again
  assert last.count('is finished already.') == 3
  assert 'evaluated at step 8' not in last
  for output in searched.outputs:
    assert 'results.json and the runs are in' in output


def test_search_compiles_nothing_for_another_rate_or_seed(searched):
  _, prepared, _ = searched.prepared
  built = prepared.program
  assert built.train_step._cache_size() == 1
  assert built.eval_step._cache_size() == 1


def test_run_of_a_search_is_the_run_by_itself(searched, options, tmp_path):
  (run,) = (r for r in searched.results if r['seed'] == 1)
  rate = run['learning_rate']
  alone = tmp_path / 'alone'
  changes = SEARCH | {'learning_rates': None, 'optim__learning_rate': rate}
  # The seed of a single run may be given in either way.
  run_main(options(alone, **changes, seeds=1))
  other = searched.folder / f'lr{rate:g}_seed1'
  weights = 'hf/model.safetensors'
  assert (alone / weights).read_bytes() == (other / weights).read_bytes()
  rows, expected = (
    [{k: v for k, v in r.items() if 'second' not in k} for r in read_rows(f)]
    for f in (alone, other)
  )
  assert rows == expected


def test_search_with_other_settings_is_told(searched, options, capsys):
  args = options(searched.folder, **SEARCH | {'eval_every': 8}, seeds='0,1')
  message = message_of(args, capsys)
  assert 'was made with other settings: eval_every 4 != 8. Use' in message


# More devices than one.


def ten_steps(args):
  """Takes ten steps of a configuration; the run and its parameters by step."""
  prepared = recipe.prepare(settings.parse(args, ''))
  run = recipe.make_run(prepared, prepared.config)
  state, frozen = run.start()
  visited = [jax.device_get(state.params)]
  for _ in range(10):
    batch = sharding.put_batch(next(run.batches), run.mesh)
    state, _ = run.train_step(state, batch, frozen)
    visited.append(jax.device_get(state.params))
  return state, visited


def distance(a, b):
  squares = jax.tree.map(lambda x, y: np.sum((x - y) ** 2, dtype=float), a, b)
  return np.sqrt(sum(jax.tree.leaves(squares)))


def test_four_devices_take_the_steps_of_one(options, tmp_path):
  # Large enough that the rules split kernels and moments.
  common = {
    'model__hidden_size': 64,
    'model__intermediate_size': 512,
    'model__num_layers': 4,
    'optim__rank': 8,
    'optim__update_proj_gap': 4,
    'optim__clip_global_norm': None,
  }
  _, expected = ten_steps(options(tmp_path, **common))
  sharded = {'mesh__data': 2, 'mesh__fsdp': 2, 'micro_batches': 2}
  state, visited = ten_steps(options(tmp_path, **common, **sharded))

  # The moments of a projected kernel are in two pieces, and really so.
  split = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if sharding.path_string(path).endswith('u/layers/mlp/down_proj/kernel')
    and leaf.shape == (4, 512, 8)
  ]
  assert len(split) == 2  # mu and nu.
  for leaf in split:
    shapes = {shard.data.shape for shard in leaf.addressable_shards}
    assert len(leaf.sharding.device_set) == 4 and shapes == {(4, 256, 8)}

  # A sum over devices is taken in another order than on one: gradients differ
  # by float32 rounding, about 1e-7 of their largest entry. Adam divides each
  # entry by its own size, which makes that 1e-6 of the way travelled (measured
  # at steps 1 to 6). A refresh turns the subspace by rounding over the gap of
  # singular values: 1e-5 from step 7 on, in q_proj, whose early gradient is of
  # low rank. Micro-batches on one device differ from no micro-batches by just
  # as much; a device left out of a sum makes it 1e-1.
  for number in range(1, 11):
    way = distance(expected[number], expected[0])
    assert distance(visited[number], expected[number]) < 5e-5 * way, number


# Gradients and weights that are not finite.


class Poisoned:
  """Batches of which some have weights, hence gradients, that are NaN."""

  def __init__(self, batches, numbers):
    self._batches = batches
    self._numbers = iter(numbers)
    self._next = next(self._numbers)
    self._count = 0

  def __iter__(self):
    return self

  def __next__(self):
    self._count += 1
    batch = next(self._batches)
    if self._count == self._next:
      self._next = next(self._numbers, None)
      batch = batch | {'weights': batch['weights'] * np.float32('nan')}
    return batch

  def get_state(self):
    return self._batches.get_state()


def test_steps_of_nan_gradients_are_left_out_and_counted(
  finished, options, tmp_path, monkeypatch
):
  batches = data.batches.batches

  def poisoned(*args, repeat=True, **kwargs):
    found = batches(*args, repeat=repeat, **kwargs)
    return Poisoned(found, (3, 4, 9)) if repeat else found

  monkeypatch.setattr(data.batches, 'batches', poisoned)
  run_main(options(tmp_path / 'run', log_every=1))
  rows = {
    r['step']: r for r in read_rows(tmp_path / 'run') if 'train/loss' in r
  }
  skipped = {number: row['train/skipped_steps'] for number, row in rows.items()}
  assert [skipped[n] for n in (2, 3, 4, 5, 8, 9, 24)] == [0, 1, 2, 2, 2, 3, 3]
  for number, row in rows.items():
    bad = number in (3, 4, 9)
    assert (row['train/loss'] is None) == bad
    assert (row['train/update_norm'] == 0) == bad
    if bad:
      for name in ('train/weight_norm', 'refreshes/low_rank'):
        assert row[name] == rows[number - 1][name]
  # The schedule waits for the steps left out.
  undisturbed = {row['step']: row for row in read_rows(finished.folder)}
  for number, without in ((6, 4), (8, 6), (23, 20)):
    rate = rows[number]['optim/learning_rate']
    assert rate == undisturbed[without]['optim/learning_rate']
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['last_eval_loss'] < 0.8 * summary['first_eval_loss']


def test_run_with_nan_weights_ends_and_says_so(
  finished, options, tmp_path, capsys
):
  start = shutil.copytree(finished.folder / 'hf', tmp_path / 'start')
  tensors = safetensors.numpy.load_file(start / 'model.safetensors')
  tensors['lm_head.weight'][7, 3] = np.nan
  safetensors.numpy.save_file(
    tensors, start / 'model.safetensors', metadata={'format': 'pt'}
  )
  message = message_of(options(tmp_path / 'run', init_from=start), capsys)
  assert 'The weights are not finite at step 1, and no step can' in message
  rows = read_rows(tmp_path / 'run')
  for row in rows:
    assert row.get('train/loss') is None and row.get('eval/loss') is None
  assert rows[-1]['train/skipped_steps'] == 1


# What users get wrong.


def message_of(args, capsys):
  """What a person reads on the standard error who typed `args`."""
  with pytest.raises(SystemExit) as stop:
    train_lm.main(args)
  assert stop.value.code == 2
  message = capsys.readouterr().err
  assert 'Traceback' not in message
  return ' '.join(message.replace('│', ' ').split())


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    (
      {'optim__rnak': 3},
      'There is no option --optim.rnak. Did you mean --optim.rank?',
    ),
    ({'optim__rank': 0}, 'OptimConfig.rank must be at least 1, got 0.'),
    (
      {'batch_size': 6, 'mesh__data': 4},
      'batch_size=6 cannot be split over data=4, fsdp=1 and micro_batches=1: '
      'it must be a multiple of data*fsdp*micro_batches=4. Use 4 or 8.',
    ),
    (
      {'mesh__data': 3},
      'data=3, fsdp=1 does not fit 4 devices: the product of the sizes must '
      'divide 4.',
    ),
    (
      {'model__vocab_size': 250},
      "Tokenizer 'bpe' cannot have vocab_size=250: it needs an entry for each "
      'of the 256 bytes and for <|pad|>, <|endoftext|>. Use at least 258, ',
    ),
    (
      {'data__seq_len': 32},
      'data.seq_len=32 is longer than the model accepts: model.max_seq_len=16. '
      'Lower the former or raise the latter.',
    ),
    (
      {'data__source': 'nowhere.txt'},
      "Unknown data source 'nowhere.txt': no such file, folder or glob, and "
      "not 'stdlib', 'tfds:NAME' or 'hf:OWNER/NAME[:N]'.",
    ),
    (
      {'optim__projection': 'foo'},
      f"Unknown projection 'foo'; expected one of {projections.names()}.",
    ),
    ({'config': 'nowhere.py'}, "No configuration file 'nowhere.py'."),
  ],
)
def test_mistake_is_told_in_one_message(
  options, tmp_path, capsys, changes, text
):
  folder = tmp_path / 'run'
  assert text in message_of(options(folder, **changes), capsys)
  assert not folder.exists()


def test_tokenizer_larger_than_the_model_is_told(
  finished, options, tmp_path, capsys
):
  args = options(
    tmp_path / 'run',
    data__tokenizer=finished.folder / 'hf',
    model__vocab_size=290,
  )
  assert message_of(args, capsys) == (
    'error: The tokenizer produces ids up to 299, but the model has '
    'vocab_size=290: every id must be below it. Give the model a vocab_size of '
    'at least 300 or choose another tokenizer.'
  )


def test_resuming_another_run_is_told(finished, options, capsys):
  args = options(finished.folder, model__hidden_size=16, optim__rank=2, seed=1)
  assert message_of(args, capsys) == (
    f'error: Checkpoint in {finished.folder} was made with other '
    'settings: model.hidden_size 32 != 16, optim.rank 4 != 2, seed 0 != 1. Use '
    'another run directory or the same settings. To go on all the same, name '
    "what may differ: --accept 'model.hidden_size,optim.rank,seed'."
  )


def test_run_directory_that_cannot_be_written_is_told(
  options, tmp_path, capsys
):
  (tmp_path / 'file').write_text('')
  folder = tmp_path / 'file' / 'run'
  assert message_of(options(folder), capsys) == (
    f'error: The run directory {folder} cannot be written: Not a directory. '
    'Choose another or correct its permissions.'
  )
