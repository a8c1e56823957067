"""What a pre-training run tells about itself: speed, summary, table."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import tokenizers

from gnlorp_jax.compose import folders, program
from gnlorp_jax.compose.settings import AdapterOptions, OptimConfig
from gnlorp_jax.data import tokenizer as tokenizer_lib
from gnlorp_jax.models import llama, roberta
from gnlorp_jax.recipes.pretrain import recipe, report
from gnlorp_jax.recipes.pretrain.settings import (
  MASKED,
  DataConfig,
  TrainConfig,
)
from gnlorp_jax.training import metrics, sharding
from gnlorp_jax.training.loop import Outcome

D, F, V, L, R = 16, 24, 300, 2, 4  # Width, feed-forward, vocabulary, ...
# Entries by hand. Projected per layer: q, k, v, o (D x D), gate, up (D x F),
# down (F x D). Not projected: embedding, head, two norms a layer, last norm.
PROJECTED = L * (4 * D * D + 3 * D * F)
FULL = 2 * V * D + 2 * L * D + D


def prepare(name='gradnormlorp', run_dir='unused', **changes):
  """A run without data: what `report` reads of one before it trains."""
  config = TrainConfig(
    run_dir=str(run_dir),
    model=llama.LlamaConfig(
      vocab_size=V,
      hidden_size=D,
      intermediate_size=F,
      num_layers=L,
      num_heads=2,
      max_seq_len=8,
    ),
    data=DataConfig(seq_len=8),
    optim=OptimConfig(name=name, rank=R, clip_global_norm=None),
    **changes,
  )
  planned = recipe.plan(config, jax.devices()[:1])
  return recipe.Prepared(planned, text=None)


def speed(prepared, config, mesh=None):
  built = prepared.program
  built = built._replace(mesh=mesh or built.mesh)
  instruments = built.instruments(
    config.optim, config.steps, flops_per_token=recipe.flops_per_token(config)
  )
  return instruments.speed(1e6)


@pytest.fixture
def known_device(monkeypatch):
  """As if this device were one of 312 TFLOPS."""
  kind = jax.devices()[0].device_kind
  monkeypatch.setitem(program.PEAK_FLOPS, kind, 312e12)


def test_speed_of_an_unknown_device_has_no_utilisation():
  prepared = prepare()
  expected = {'train/tokens_per_second': 1e6}
  assert speed(prepared, prepared.config) == expected


@pytest.mark.parametrize('devices', [1, 2])
def test_utilisation_is_flops_over_the_peak_of_all_devices(
  known_device, devices
):
  prepared = prepare()
  mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
  # 6 per matrix weight (head included, embedding not), 12 L D T of attention.
  flops = 6 * (PROJECTED + D * V) + 12 * L * D * 8
  found = speed(prepared, prepared.config, mesh)
  assert found['train/tokens_per_second'] == 1e6
  assert found['train/mfu'] == pytest.approx(1e6 * flops / (312e12 * devices))


def test_utilisation_of_masked_training_counts_the_head_where_it_guesses(
  known_device,
):
  model = roberta.preset('tiny', vocab_size=300)
  config = dataclasses.replace(MASKED, model=model, mask_rate=0.5)
  width, length = 128, 128
  blocks = 4 * (4 * width**2 + 2 * width * 512)
  # Of 126 tokens of text up to 64 are guessed.
  head = 64 / length * (width**2 + width * 300)
  flops = 6 * (blocks + head) + 12 * 4 * width * length
  found = speed(prepare(), config)['train/mfu']
  assert found == pytest.approx(1e6 * flops / 312e12)


def word_tokenizer():
  """One that puts a token before and after a text."""
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3}, unk_token='b'
    )
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
  )
  return tokenizer_lib.Tokenizer(words)


@pytest.mark.parametrize(
  ('prompt', 'add_bos', 'expected'),
  [
    ('a b', False, [2, 3]),
    ('a b', True, [0, 2, 3]),
    ('', False, [1]),
    ('', True, [0]),
  ],
)
def test_prompt_begins_as_a_document_of_the_training(prompt, add_bos, expected):
  found = report.prompt_ids(word_tokenizer(), prompt, add_bos)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('masked', 'add_bos', 'expected'),
  [
    (False, False, [2, 3]),
    (False, True, [0, 2, 3]),
    (True, False, [0, 2, 3, 1]),
  ],
)
def test_exported_tokenizer_encodes_as_in_training(
  tmp_path, monkeypatch, masked, add_bos, expected
):
  transformers = pytest.importorskip('transformers')
  config = dataclasses.replace(
    MASKED if masked else TrainConfig(), data=DataConfig(add_bos=add_bos)
  )
  prepared = types.SimpleNamespace(
    config=config,
    text=types.SimpleNamespace(tokenizer=word_tokenizer()),
    program=types.SimpleNamespace(
      parameters=types.SimpleNamespace(merge=lambda params, frozen: {})
    ),
  )
  # The weights are another matter.
  monkeypatch.setattr(folders, 'export', lambda *args, **kwargs: None)
  report.export(prepared, outcome((3.0, 20.1)), tmp_path)
  pretrained = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  assert pretrained('a b')['input_ids'] == expected
  assert (tmp_path / 'generation_config.json').exists() != masked


def write_rows(folder, rows):
  with metrics.MetricsWriter(folder) as writer:
    for number, row in rows:
      writer.write(number, row)


def outcome(last, best=None):
  record = {
    'last': {'step': 4, 'loss': last[0], 'perplexity': last[1]},
    'best': None,
    'peak_device_bytes': 7,
  }
  if best is not None:
    record['best'] = {'step': 2, 'loss': best[0], 'perplexity': best[1]}
  return Outcome(params=None, constants={}, record=record)


def test_summary_takes_first_and_last_loss_and_the_median_speed(tmp_path):
  write_rows(
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
  prepared = prepare(run_dir=tmp_path)
  found = outcome((3.0, 20.1))
  summary = report.summarise(prepared, prepared.config, found)
  assert summary['optimizer'] == 'gradnormlorp'
  assert summary['parameters'] == PROJECTED + FULL
  assert summary['first_eval_loss'] == 5.0
  assert summary['last_eval_loss'] == 3.0
  assert summary['last_eval_perplexity'] == 20.1
  assert summary['median_tokens_per_second'] == 30.0
  assert summary['peak_device_bytes'] == 7  # Of this run, by its loop.
  assert summary['mfu'] is None  # The peak of a CPU is not known.
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summary_of_a_diverged_run_is_still_json(tmp_path, capsys):
  prepared = prepare(run_dir=tmp_path)
  write_rows(
    tmp_path,
    [
      (0, {'eval/loss': 5.0, 'eval/perplexity': np.exp(5.0)}),
      (1, {'train/loss': np.nan}),
      (1, {'eval/loss': np.nan, 'eval/perplexity': np.nan}),
    ],
  )
  summary = report.summarise(prepared, prepared.config, outcome((None, None)))
  assert summary['last_eval_loss'] is summary['last_eval_perplexity'] is None
  assert summary['median_tokens_per_second'] is None
  json.dumps(summary, allow_nan=False)
  report.show(prepared.config, summary, '')
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'The validation loss is not finite. Plot, sample,' in shown


def test_lost_metrics_are_no_reason_not_to_end(tmp_path, capsys):
  prepared = prepare(run_dir=tmp_path)
  (tmp_path / 'metrics.jsonl').touch()
  summary = report.summarise(prepared, prepared.config, outcome((3.0, 20.1)))
  assert summary['first_eval_loss'] is None
  report.show(prepared.config, summary, '')
  shown = ' '.join(capsys.readouterr().out.split())
  assert 'Validation loss 3.000; of the first, no number is known.' in shown


def test_shown_table_adds_up(tmp_path, capsys):
  prepared = prepare('galore', run_dir=tmp_path)
  write_rows(tmp_path, [(0, {'eval/loss': 4.0, 'eval/perplexity': 55.0})])
  summary = report.summarise(prepared, prepared.config, outcome((4.0, 55.0)))
  report.show(prepared.config, summary, 'a [sample]')
  shown = capsys.readouterr().out
  total = sum(s['this run'] for s in summary['memory_bytes'].values())
  line = next(line for line in shown.splitlines() if 'total' in line)
  assert f'{total / 1024:.1f} KiB' in line
  assert 'a [sample]' in shown
  assert 'Validation loss 4.000 -> 4.000 (0% lower), perplexity 55.0.' in shown


def test_summary_of_a_run_that_keeps_the_best_tells_of_it(tmp_path):
  write_rows(tmp_path, [(0, {'eval/loss': 5.0, 'eval/perplexity': 148.4})])
  prepared = prepare(run_dir=tmp_path, adapter=AdapterOptions(kind='dora'))
  found = outcome((3.0, 20.1), best=(2.0, 7.4))
  summary = report.summarise(prepared, prepared.config, found)
  assert summary['last_eval_loss'] == 2.0
  assert summary['last_eval_perplexity'] == 7.4
  assert summary['adapter'] == 'dora'
  # Those of the model, adapters left out: what is exported.
  assert summary['parameters'] == PROJECTED + FULL
