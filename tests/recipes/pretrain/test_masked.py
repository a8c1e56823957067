"""Masked-LM pre-training through `train_lm.py`: text in, a RoBERTa out."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train_lm
from gnlorp_jax import build, config
from gnlorp_jax.config import MASKED, DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import hf, llama, roberta
from gnlorp_jax.training import state, step

pytestmark = pytest.mark.usefixtures('compiled_once', 'logging_as_before')

TINY = roberta.RobertaConfig(
  vocab_size=300,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=2,
  max_seq_len=16,
  hidden_dropout=0.0,
  attention_dropout=0.0,
)


def masked_batch(batch=4, seq_len=16, predictions=3, seed=0):
  rng = np.random.default_rng(seed)
  shape = batch, predictions
  return {
    'inputs': rng.integers(5, 300, (batch, seq_len), np.int32),
    'positions': rng.integers(1, seq_len - 1, shape, np.int32),
    'targets': rng.integers(5, 300, shape, np.int32),
    'weights': rng.integers(0, 2, shape).astype(np.float32),
    'seeds': rng.integers(2**32, size=batch, dtype=np.uint32),
  }


def test_loss_is_that_of_the_positions_to_be_guessed():
  model = roberta.make(TINY)
  params = model.init(jax.random.key(0))
  batch = masked_batch()
  loss_fn = jax.jit(functools.partial(build.language_model_loss, model, 5))
  total, count = loss_fn(params, batch)
  logits = np.asarray(jax.jit(model.apply)(params, batch['inputs']), np.float64)
  log_z = np.log(np.exp(logits).sum(axis=-1))
  expected = 0.0
  for b, p in np.ndindex(batch['positions'].shape):
    where = b, batch['positions'][b, p]
    loss = log_z[where] - logits[(*where, batch['targets'][b, p])]
    expected += batch['weights'][b, p] * loss
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert count == batch['weights'].sum()


def run_config(**changes):
  return dataclasses.replace(
    MASKED,
    model=TINY,
    batch_size=4,
    data=DataConfig(seq_len=16),
    optim=OptimConfig(rank=4),
    **changes,
  )


def one_step(parts, batch):
  params = parts.model.init(jax.random.key(0))
  start = state.from_params(params, parts.tx, parts.mesh)
  new, values = parts.train_step(start, batch)
  return jax.device_get((new.params, values))


def test_layers_one_by_one_take_the_step_of_the_whole():
  batch = masked_batch()
  results = []
  for mode in ('whole', 'layerwise'):
    parts = build.program(
      run_config(step=config.StepConfig(mode=mode)), jax.devices()[:1]
    )
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), parts.abstract_batch)
    # The shapes that are compiled for are those of real batches.
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    results.append(one_step(parts, batch))
  (whole, values), (layered, layered_values) = results
  np.testing.assert_allclose(values['loss'], layered_values['loss'], rtol=1e-5)
  start = roberta.make(TINY).init(jax.random.key(0))
  # Adam's first step is nearly the sign of a gradient: where that is rounding
  # error alone (the keys' bias has none), the two may differ by a whole step.
  del start['layers']['attn']['k_proj']['bias']
  for path, before in jax.tree_util.tree_leaves_with_path(start):
    a, b = whole, layered
    for entry in path:
      a, b = a[entry.key], b[entry.key]
    travelled = np.linalg.norm(a - np.asarray(before))
    assert np.linalg.norm(a - b) <= 2e-3 * travelled, path


def test_dropout_follows_the_seeds_of_the_batch():
  dropping = dataclasses.replace(TINY, hidden_dropout=0.2)
  model = roberta.make(dropping)
  params = model.init(jax.random.key(0))
  batch = masked_batch()
  loss = jax.jit(
    functools.partial(build.language_model_loss, model, 64),
    static_argnames='dropout',
  )

  def value(batch, dropout):
    return float(loss(params, batch, dropout=dropout)[0])

  other = batch | {'seeds': batch['seeds'] + np.uint32(1)}
  assert value(batch, True) == value(batch, True)
  assert value(batch, True) != value(other, True)
  assert value(batch, False) == value(other, False)
  assert value(batch, False) != value(batch, True)


def test_micro_batches_drop_different_features():
  """With one dropout mask for both, twice the same rows give the same twice."""
  dropping = dataclasses.replace(TINY, hidden_dropout=0.5)
  model = roberta.make(dropping)
  params = model.init(jax.random.key(0))
  rows = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), masked_batch())
  rows['weights'][:] = 1
  rows['seeds'] = np.array([1, 2], np.uint32)
  loss_fn = functools.partial(
    build.language_model_loss, model, 64, dropout=True
  )
  tx = optax.sgd(0.0)
  taken = jax.jit(step.make_train_step(loss_fn, tx, num_micro_batches=2))
  start = state.TrainState(jnp.int32(0), jnp.int32(0), params, tx.init(params))
  total = float(taken(start, rows)[1]['loss']) * 2

  def loss_of(row):
    return float(jnp.divide(*loss_fn(params, jax.tree.map(row, rows))))

  one, other = loss_of(lambda x: x[:1]), loss_of(lambda x: x[1:])
  assert one != other
  np.testing.assert_allclose(total, one + other, rtol=1e-5)


# A run of the program.


@pytest.fixture(scope='module')
def options(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  rng = random.Random(0)
  words = [
    ''.join(rng.choices('abcdefghij', k=rng.randint(2, 6))) for _ in range(30)
  ]
  # A word is followed by the one after it in the list: there is something to
  # be learnt from both sides.
  lines = []
  for _ in range(500):
    first = rng.randrange(30)
    lines.append(' '.join(words[(first + i) % 30] for i in range(8)))
  (folder / 'text.txt').write_text('\n'.join(lines))
  settings = {
    'objective': 'masked',
    'steps': 60,
    'batch-size': 8,
    'eval-every': 30,
    'checkpoint-every': 20,
    'mesh.data': 1,
    'sample.num-tokens': 16,
    'model.vocab-size': 300,
    'model.hidden-size': 32,
    'model.intermediate-size': 64,
    'model.num-layers': 2,
    'model.num-heads': 2,
    'model.max-seq-len': 16,
    'model.hidden-dropout': 0.1,
    'data.source': folder / 'text.txt',
    'data.seq-len': 16,
    'data.cache-dir': folder / 'cache',
    'optim.rank': 8,
    'optim.learning-rate': 0.02,
  }

  def make(run_dir, **changes):
    every = {'run-dir': run_dir} | settings | changes
    return [w for k, v in every.items() for w in (f'--{k}', str(v))]

  return make


def run_main(args):
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    train_lm.main(args)
  return output.getvalue()


@pytest.fixture(scope='module')
def finished(options, tmp_path_factory, compiled_once):
  folder = tmp_path_factory.mktemp('runs') / 'finished'
  return folder, run_main(options(folder))


def test_run_learns_and_tells_what_it_guesses(finished):
  folder, output = finished
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['last_eval_loss'] < 0.8 * summary['first_eval_loss']
  sample = (folder / 'sample.txt').read_text()
  assert '|' in sample and '[' in sample
  assert 'Validation loss' in output and 'lower' in output


def test_resumed_run_ends_as_the_whole_one(finished, options, tmp_path):
  """Same dropout, same masks: a run in two halves gives the same bits."""
  folder, _ = finished
  args = options(tmp_path / 'halves')
  # A learning rate follows from the length of the run: it is stopped by hand.
  stopped = build.build(config.parse(args, ''))
  with contextlib.redirect_stdout(io.StringIO()):
    with pytest.raises(SystemExit):
      stop_at(20, stopped)
  run_main(args)
  ours = tmp_path / 'halves/hf/model.safetensors'
  assert ours.read_bytes() == (folder / 'hf/model.safetensors').read_bytes()


def stop_at(number, run):
  """Trains until a step, then as if a signal had come."""
  batches = run.train_batches

  class Stopping:
    def __init__(self):
      self.count = 0

    def __next__(self):
      self.count += 1
      if self.count == number:
        os.kill(os.getpid(), signal.SIGTERM)
      return next(batches)

    def __getattr__(self, name):
      return getattr(batches, name)

  train_lm.train(run._replace(train_batches=Stopping()))


def test_export_is_read_by_transformers(finished, options):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  folder, _ = finished
  theirs = transformers.RobertaForMaskedLM.from_pretrained(folder / 'hf').eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'hf')
  assert tokenizer.mask_token == '<mask>'
  ids = tokenizer(['abc <mask> defg', 'a b'], padding=True, return_tensors='pt')
  first = ids['input_ids'][0].tolist()
  assert first[0] == tokenizer.cls_token_id and tokenizer.mask_token_id in first
  run = build.build(config.parse(options(folder), ''))
  found = roberta.config_from_hf(hf.load_config(folder / 'hf'))
  assert found == run.config.model
  params = hf.load_params(
    folder / 'hf',
    roberta.HF_TENSORS,
    jax.eval_shape(run.model.init, jax.random.key(0)),
  )
  ours = run.apply(params, jnp.asarray(ids['input_ids'].numpy()))
  with torch.no_grad():
    expected = theirs(
      input_ids=ids['input_ids'], attention_mask=ids['attention_mask']
    ).logits
  np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


def test_init_from_goes_on_with_the_exported_model(finished, options, tmp_path):
  folder, _ = finished
  args = options(tmp_path, **{'init-from': folder / 'hf', 'steps': 1})
  run_main(args)
  rows = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  summary = json.loads((folder / 'summary.json').read_text())
  np.testing.assert_allclose(
    json.loads(rows[0])['eval/loss'], summary['last_eval_loss'], rtol=1e-5
  )


# Settings.


def test_objective_on_the_command_line_chooses_the_model():
  for args in (['--objective', 'masked'], ['--objective=masked']):
    parsed = config.parse([*args, '--model.num-layers', '3'], '')
    assert parsed == dataclasses.replace(
      MASKED, model=dataclasses.replace(MASKED.model, num_layers=3)
    )
  assert isinstance(config.parse([], '').model, llama.LlamaConfig)


def test_help_of_the_masked_objective_explains_the_encoder(capsys):
  with pytest.raises(SystemExit):
    config.parse(['--objective', 'masked', '--help'], '')
  text = ' '.join(capsys.readouterr().out.split())
  assert '--model.hidden-dropout' in text and '--mask-rate' in text
  assert '--model.rope-theta' not in text


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: TrainConfig(objective='masked'),
      "objective='masked' trains a RobertaConfig, and model is a LlamaConfig",
    ),
    (
      lambda: dataclasses.replace(MASKED, objective='causal'),
      "objective='causal' trains a LlamaConfig, and model is a RobertaConfig",
    ),
    (
      lambda: dataclasses.replace(MASKED, mask_rate=1.0),
      'mask_rate must lie between 0 and 1, got 1.0',
    ),
    (
      lambda: dataclasses.replace(MASKED, data=DataConfig(mode='padded')),
      "objective='masked' needs data.mode='packed', got 'padded'",
    ),
    (
      lambda: dataclasses.replace(
        MASKED,
        model=dataclasses.replace(TINY, max_seq_len=128, hidden_dropout=0.1),
        step=config.StepConfig(mode='layerwise'),
      ),
      'goes without dropout, got model.hidden_dropout=0.1, '
      'model.attention_dropout=0.0. Set both to 0.',
    ),
  ],
)
def test_settings_that_do_not_fit_are_told(make, message):
  with pytest.raises(ValueError) as error:
    make()
  assert message in str(error.value)


def test_padding_of_another_tokenizer_is_told():
  class Tokenizer:
    vocab_size, pad_id = 300, 0

  with pytest.raises(ValueError) as error:
    build.check_tokenizer(run_config(), Tokenizer())
  assert str(error.value) == (
    'The tokenizer pads with id 0, the model with model.pad_id=1. Set the '
    'latter to the former.'
  )
