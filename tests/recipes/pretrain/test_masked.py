"""Masked-LM pre-training through `train_lm.py`: text in, a RoBERTa out."""

import contextlib
import dataclasses
import io
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train_lm
from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.settings import OptimConfig, StepConfig
from gnlorp_jax.models import hf, llama, roberta
from gnlorp_jax.recipes.pretrain import recipe, settings
from gnlorp_jax.recipes.pretrain.settings import (
  MASKED,
  DataConfig,
  TrainConfig,
)
from gnlorp_jax.training import objectives, state, step

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
  params = jax.jit(model.init)(jax.random.key(0))
  batch = masked_batch()
  loss_fn = jax.jit(objectives.language_model(model, 5).loss)
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


def run_config(mode, labels=(('.*', 'full'),), **changes):
  return dataclasses.replace(
    MASKED,
    batch_size=4,
    data=DataConfig(seq_len=16),
    optim=OptimConfig(name='adamw', param_labels=labels),
    step=StepConfig(mode=mode),
    **{'model': TINY} | changes,
  )


def one_step(planned, batch):
  built, config = planned.program, planned.config
  numbers = optimizer.numbers(config.optim, config.steps)
  start, frozen = built.start(jax.random.key(0), numbers)
  new, values = built.train_step(start, batch, frozen)
  return jax.device_get((new.params, values))


@pytest.mark.slow
def test_layers_one_by_one_take_the_step_of_the_whole():
  batch = masked_batch()
  results = []
  for mode in ('whole', 'layerwise'):
    planned = recipe.plan(run_config(mode), jax.devices()[:1])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), planned.abstract_batch)
    # The shapes that are compiled for are those of real batches.
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    results.append(one_step(planned, batch))
  (whole, values), (layered, layered_values) = results
  np.testing.assert_allclose(values['loss'], layered_values['loss'], rtol=1e-5)
  start = jax.jit(roberta.make(TINY).init)(jax.random.key(0))
  # Adam's first step is nearly the sign of a gradient: where that is rounding
  # error alone (the keys' bias has none), the two may differ by a whole step.
  del start['layers']['attn']['k_proj']['bias']
  for path, before in jax.tree_util.tree_leaves_with_path(start):
    a, b = whole, layered
    for entry in path:
      a, b = a[entry.key], b[entry.key]
    travelled = np.linalg.norm(a - np.asarray(before))
    assert np.linalg.norm(a - b) <= 2e-3 * travelled, path


def test_dropout_follows_the_seeds_layer_by_layer_too():
  dropping = dataclasses.replace(TINY, hidden_dropout=0.3)
  labels = (('down_proj/kernel', 'full'), ('.*', 'frozen'))
  planned = recipe.plan(
    run_config('layerwise', labels, model=dropping), jax.devices()[:1]
  )
  batch = masked_batch()
  other = batch | {'seeds': batch['seeds'] + np.uint32(1)}
  losses = [one_step(planned, b)[1]['loss'] for b in (batch, batch, other)]
  assert losses[0] == losses[1] != losses[2]


def test_dropout_follows_the_seeds_of_the_batch():
  dropping = dataclasses.replace(TINY, hidden_dropout=0.2)
  model = roberta.make(dropping)
  params = jax.jit(model.init)(jax.random.key(0))
  batch = masked_batch()
  loss = {
    dropout: jax.jit(objectives.language_model(model, 64, dropout=dropout).loss)
    for dropout in (False, True)
  }

  def value(batch, dropout):
    return float(loss[dropout](params, batch)[0])

  other = batch | {'seeds': batch['seeds'] + np.uint32(1)}
  assert value(batch, True) == value(batch, True)
  assert value(batch, True) != value(other, True)
  assert value(batch, False) == value(other, False)
  assert value(batch, False) != value(batch, True)


@pytest.mark.slow
def test_micro_batches_drop_different_features():
  """With one dropout mask for both, twice the same rows give the same twice."""
  dropping = dataclasses.replace(TINY, hidden_dropout=0.5)
  model = roberta.make(dropping)
  params = jax.jit(model.init)(jax.random.key(0))
  rows = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), masked_batch())
  rows['weights'][:] = 1
  rows['seeds'] = np.array([1, 2], np.uint32)
  loss_fn = objectives.language_model(model, 64, dropout=True).loss
  tx = optax.sgd(0.0)
  taken = jax.jit(step.make_train_step(loss_fn, tx, num_micro_batches=2))
  zero = jnp.int32(0)
  start = state.TrainState(zero, zero, params, jax.jit(tx.init)(params))
  total = float(taken(start, rows)[1]['loss']) * 2

  loss = jax.jit(loss_fn)

  def loss_of(row):
    return float(np.divide(*loss(params, jax.tree.map(row, rows))))

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
  usual = {
    'objective': 'masked',
    'steps': 40,
    'batch-size': 8,
    'eval-every': 20,
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
    'optim.name': 'adamw',
    'optim.learning-rate': 0.01,
  }

  def make(run_dir, **changes):
    every = {'run-dir': run_dir} | usual | changes
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


@pytest.mark.slow
def test_run_learns_and_tells_what_it_guesses(finished):
  folder, output = finished
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['last_eval_loss'] < 0.8 * summary['first_eval_loss']
  sample = (folder / 'sample.txt').read_text()
  assert '|' in sample and '[' in sample
  assert 'Validation loss' in output and 'lower' in output


@pytest.mark.slow
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
  planned = recipe.plan(settings.parse(options(folder), ''))
  found = roberta.config_from_hf(hf.load_config(folder / 'hf'))
  assert found == planned.config.model
  model = planned.program.model
  params = hf.load_params(
    folder / 'hf',
    roberta.HF_TENSORS,
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  ours = jax.jit(model.apply)(params, ids['input_ids'].numpy())
  with torch.no_grad():
    expected = theirs(
      input_ids=ids['input_ids'], attention_mask=ids['attention_mask']
    ).logits
  np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


@pytest.mark.slow
def test_init_from_goes_on_with_the_exported_model(finished, options, tmp_path):
  folder, _ = finished
  args = options(tmp_path, **{'init-from': folder / 'hf', 'steps': 1})
  prepared = recipe.prepare(settings.parse(args, ''))
  run = recipe.make_run(prepared, prepared.config)
  start, frozen = run.start()
  found = run.evaluate(start.params, frozen)
  summary = json.loads((folder / 'summary.json').read_text())
  np.testing.assert_allclose(
    found['loss'], summary['last_eval_loss'], rtol=1e-5
  )


# Settings.


def test_objective_on_the_command_line_chooses_the_model():
  for args in (['--objective', 'masked'], ['--objective=masked']):
    parsed = settings.parse([*args, '--model.num-layers', '3'], '')
    assert parsed == dataclasses.replace(
      MASKED, model=dataclasses.replace(MASKED.model, num_layers=3)
    )
  assert isinstance(settings.parse([], '').model, llama.LlamaConfig)


def test_help_of_the_masked_objective_explains_the_encoder(capsys):
  with pytest.raises(SystemExit):
    settings.parse(['--objective', 'masked', '--help', 'all'], '')
  text = ' '.join(capsys.readouterr().out.split())
  assert '--model.hidden-dropout' in text and '--mask-rate' in text
  assert '--model.rope-theta' not in text


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: TrainConfig(objective='masked'),
      "objective='masked' trains an encoder, such as a RobertaConfig, and "
      'model is a LlamaConfig',
    ),
    (
      lambda: dataclasses.replace(MASKED, objective='causal'),
      "objective='causal' trains a decoder, such as a LlamaConfig, and model "
      'is a RobertaConfig',
    ),
    (
      lambda: dataclasses.replace(MASKED, mask_rate=1.0),
      'TrainConfig.mask_rate must be in (0, 1), got 1.0',
    ),
    (
      lambda: dataclasses.replace(MASKED, data=DataConfig(mode='padded')),
      "objective='masked' needs data.mode='packed', got 'padded'",
    ),
  ],
)
def test_settings_that_do_not_fit_are_told(make, message):
  with pytest.raises(ValueError) as error:
    make()
  assert message in str(error.value)
