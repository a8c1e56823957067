"""What a run tells about itself: bytes by hand count, speed, summary."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from gnlorp_jax import build, optim, results
from gnlorp_jax.config import MASKED, DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama, roberta
from gnlorp_jax.training import metrics, sharding
from gnlorp_jax.training import state as state_lib

D, F, V, L, R = 16, 24, 300, 2, 4  # Width, feed-forward, vocabulary, ...


def make_run(name='gradnormlorp', run_dir='unused', data=1, **model):
  """A run without data: what `results` reads of one before it trains."""
  config = TrainConfig(
    run_dir=str(run_dir),
    model=llama.LlamaConfig(
      vocab_size=V,
      hidden_size=D,
      intermediate_size=F,
      num_layers=L,
      num_heads=2,
      max_seq_len=8,
      **model,
    ),
    data=DataConfig(seq_len=8),
    optim=OptimConfig(name=name, rank=R, clip_global_norm=None),
  )
  mesh = sharding.make_mesh(data, 1, devices=jax.devices()[:data])
  tx = build.optimizer(config.optim, lambda count: 0.1, llama.LABEL_RULES)
  functions = llama.make(config.model)
  return types.SimpleNamespace(
    config=config,
    model=functions,
    tx=tx,
    mesh=mesh,
    abstract_state=state_lib.abstract(
      functions.init, tx, jax.random.key(0), mesh
    ),
  )


# Entries by hand. Projected per layer: q, k, v, o (D x D), gate, up (D x F),
# down (F x D). Not projected: embedding, head, two norms a layer, last norm.
PROJECTED = L * (4 * D * D + 3 * D * F)
FULL = 2 * V * D + 2 * L * D + D
# All compress the axis of length D: the other one has D or F entries.
LOW_RANK = L * (4 * D * R + 3 * F * R)
BASES = L * 7 * D * R
MAGNITUDES = L * (4 * D + 2 * F + D)  # One per output unit.


@pytest.mark.parametrize(
  ('name', 'moments', 'bases'),
  [
    ('gradnormlorp', 2 * (FULL + LOW_RANK + MAGNITUDES), BASES),
    ('galore', 2 * (FULL + LOW_RANK), BASES),
    ('adamw', 2 * (FULL + PROJECTED), 0),
  ],
)
def test_memory_is_that_of_a_count_by_hand(name, moments, bases):
  table = results.memory(make_run(name))
  entries = PROJECTED + FULL
  other = table.pop('other')
  assert table == {
    'parameters': {'this run': 4 * entries, 'adamw': 4 * entries},
    'gradients': {'this run': 4 * entries, 'adamw': 4 * entries},
    'moments': {'this run': 4 * moments, 'adamw': 8 * entries},
    'bases': {'this run': 4 * bases, 'adamw': 0},
  }
  # Counts and statistics: when a refresh is due, how many there were, overlap
  # and energy of each kernel and layer.
  assert other['adamw'] == 0
  assert other['this run'] < 4 * (L * 7 * 4 + 20)


def test_memory_of_bfloat16_parameters_keeps_float32_moments():
  table = results.memory(make_run(param_dtype='bfloat16'))
  entries = PROJECTED + FULL
  assert table['parameters'] == {'this run': 2 * entries, 'adamw': 2 * entries}
  assert table['gradients'] == {'this run': 2 * entries, 'adamw': 2 * entries}
  moments = 2 * (FULL + LOW_RANK + MAGNITUDES)
  assert table['moments'] == {'this run': 4 * moments, 'adamw': 8 * entries}


def test_dry_run_totals_are_those_of_the_state():
  run = make_run('galore')
  lines = optim.format_report(build.dry_run(run.config)).splitlines()
  down = next(line for line in lines if line.startswith('layers/mlp/down_proj'))
  assert down.split()[1:5] == [f'{L}x{F}x{D}', 'low_rank', str(R), 'out']
  shown = 4 * (2 * (FULL + LOW_RANK) + BASES) / 1024
  total = lines[-1].split()
  # Beside moments and bases some statistics: less than a KiB.
  assert shown < float(total[1]) < shown + 1
  assert total[3] == f'{8 * (FULL + PROJECTED) / 1024:.1f}'


def test_speed_of_an_unknown_device_has_no_utilisation():
  assert results.speed(make_run(), 1e6) == {'train/tokens_per_second': 1e6}


@pytest.mark.parametrize('devices', [1, 2])
def test_utilisation_is_flops_over_the_peak_of_all_devices(
  monkeypatch, devices
):
  run = make_run(data=devices)
  kind = types.SimpleNamespace(device_kind='NVIDIA A100-SXM4-80GB')
  monkeypatch.setattr(results.jax, 'devices', lambda: [kind])
  # 6 per matrix weight (head included, embedding not), 12 L D T of attention.
  flops = 6 * (PROJECTED + D * V) + 12 * L * D * 8
  found = results.speed(run, 1e6)
  assert found['train/tokens_per_second'] == 1e6
  assert found['train/mfu'] == pytest.approx(1e6 * flops / (312e12 * devices))


def test_utilisation_of_masked_training_counts_the_head_where_it_guesses(
  monkeypatch,
):
  model = roberta.preset('tiny', vocab_size=300)
  config = dataclasses.replace(MASKED, model=model, mask_rate=0.5)
  run = types.SimpleNamespace(config=config, mesh=make_run().mesh)
  kind = types.SimpleNamespace(device_kind='NVIDIA A100-SXM4-80GB')
  monkeypatch.setattr(results.jax, 'devices', lambda: [kind])
  width, length = 128, 128
  blocks = 4 * (4 * width**2 + 2 * width * 512)
  # Of 126 tokens of text up to 64 are guessed.
  head = 64 / length * (width**2 + width * 300)
  flops = 6 * (blocks + head) + 12 * 4 * width * length
  found = results.speed(run, 1e6)['train/mfu']
  assert found == pytest.approx(1e6 * flops / 312e12)


def write_rows(folder, rows):
  with metrics.MetricsWriter(folder) as writer:
    for number, row in rows:
      writer.write(number, row)
  return folder / 'metrics.jsonl'


def test_summary_takes_first_and_last_loss_and_the_median_speed(tmp_path):
  path = write_rows(
    tmp_path,
    [
      (0, {'eval/loss': 5.0, 'eval/perplexity': 148.4}),
      (1, {'train/loss': 5.0}),
      (2, {'train/loss': 4.0, 'train/tokens_per_second': 10.0}),
      (2, {'eval/loss': 4.5, 'eval/perplexity': 90.0}),
      (3, {'train/loss': 3.0, 'train/tokens_per_second': 1000.0}),
      (4, {'train/loss': 3.0, 'train/tokens_per_second': 30.0}),
      (4, {'eval/loss': 3.0, 'eval/perplexity': 20.1}),
    ],
  )
  summary = results.summarise(make_run(), path)
  assert summary['optimizer'] == 'gradnormlorp'
  assert summary['parameters'] == PROJECTED + FULL
  assert summary['first_eval_loss'] == 5.0
  assert summary['last_eval_loss'] == 3.0
  assert summary['last_eval_perplexity'] == 20.1
  assert summary['median_tokens_per_second'] == 30.0
  assert summary['mfu'] is None  # The peak of a CPU is not known.
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summary_of_a_diverged_run_is_still_json(tmp_path, capsys):
  run = make_run(run_dir=tmp_path)
  path = write_rows(
    tmp_path,
    [
      (0, {'eval/loss': 5.0, 'eval/perplexity': np.exp(5.0)}),
      (1, {'train/loss': np.nan}),
      (1, {'eval/loss': np.nan, 'eval/perplexity': np.nan}),
    ],
  )
  summary = results.summarise(run, path)
  assert summary['last_eval_loss'] is summary['last_eval_perplexity'] is None
  assert summary['median_tokens_per_second'] is None
  json.dumps(summary, allow_nan=False)
  results.show(run, summary, '')
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'The validation loss is not finite. Plot, sample,' in shown


def test_shown_table_adds_up(tmp_path, capsys):
  run = make_run('galore', run_dir=tmp_path)
  path = write_rows(
    tmp_path, [(0, {'eval/loss': 4.0, 'eval/perplexity': 55.0})]
  )
  summary = results.summarise(run, path)
  results.show(run, summary, 'a [sample]')
  shown = capsys.readouterr().out
  total = sum(s['this run'] for s in summary['memory_bytes'].values())
  line = next(line for line in shown.splitlines() if 'total' in line)
  assert f'{total / 1024:.1f} KiB' in line
  assert 'a [sample]' in shown
  assert 'Validation loss 4.000 -> 4.000 (0% lower), perplexity 55.0.' in shown
