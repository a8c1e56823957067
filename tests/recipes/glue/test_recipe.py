"""Programs and runs of fine-tuning: what trains, what stays, what is counted.

The demo's model and task, cut down to a few examples.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax import finetune, finetune_data, methods
from gnlorp_jax.config import MeshConfig
from gnlorp_jax.data import glue
from gnlorp_jax.finetune_config import FinetuneConfig, TaskDataConfig
from gnlorp_jax.models import adapters, roberta
from gnlorp_jax.training import sharding

SETTINGS = FinetuneConfig(
  rank=2,
  batch_size=8,
  eval_batch_size=8,
  epochs=2,
  update_proj_gap=2,
  learning_rate=1e-2,
  data=TaskDataConfig(max_train_examples=20, max_dev_examples=13),
  mesh=MeshConfig(data=1),
)

QUICK = ('full', 'lora', 'gradnormlorp', 'gradnormlorp_adapter')


@pytest.fixture(scope='module')
def data():
  (task,) = finetune_data.find_tasks(SETTINGS)
  return finetune_data.load_task(SETTINGS, task)


def make_run(data, method, seed=0, **changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  return finetune.make_run(finetune.program(settings, data, method), seed)


def put(run, batch):
  batch = {name: rows for name, rows in batch.items() if name != 'index'}
  return sharding.put_batch(batch, run.program.compiled.mesh)


def paths(tree):
  return set(traverse_util.flatten_dict(tree, sep='/'))


def copied(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


# Slow are those whose parts the others have too, or that have tests elsewhere.
@pytest.mark.parametrize(
  'method',
  [
    pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK))
    for m in methods.METHODS
  ],
)
def test_every_method_trains_and_leaves_the_rest_alone(method, data):
  run = make_run(data, method)
  state, frozen = finetune.new_state(run)
  before, frozen_before = copied(state.params), copied(frozen)
  batches = finetune.train_batches(run, 0)
  for number in range(1, 4):
    state, values = run.program.compiled.train_step(
      state, put(run, next(batches)), frozen
    )
    assert values['skipped_steps'] == 0, number
    assert all(np.isfinite(float(v)) for v in values.values()), values
  # Not a bit of what is frozen has changed, and it has no state.
  jax.tree.map(np.testing.assert_array_equal, copied(frozen), frozen_before)
  after = copied(state.params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
  changed = {
    path
    for path, leaf in traverse_util.flatten_dict(after, sep='/').items()
    if not np.array_equal(
      leaf, traverse_util.flatten_dict(before, sep='/')[path]
    )
  }
  # The factors of new adapters and the zero biases too, all train.
  assert changed == paths(after)
  if methods.METHODS[method].adapter is None:
    assert frozen == {}
    assert paths(after) == paths(
      run.program.compiled.model.init(jax.random.key(0))
    )
  else:
    assert {path.split('/')[-1] for path in paths(after)} <= {
      *('lora_a', 'lora_b', 'magnitude', 'kernel', 'bias')
    }
    assert not paths(frozen) & paths(after)
    assert all('classifier' not in path for path in paths(frozen))
  found = finetune.evaluate(run.program, state.params, frozen)
  assert set(found) == {'loss', 'matthews_correlation', 'accuracy'}
  assert np.isfinite(found['loss'])


@pytest.mark.parametrize(
  'method', sorted(set(methods.METHODS) - set(methods.COMPARED))
)
def test_other_optimizers_train_all_weights_with_less_state(method, data):
  parts = make_run(data, method).program
  assert parts.compiled.abstract_frozen == {}
  full = make_run(data, 'full').program
  sizes = [
    finetune.describe(finetune.make_run(p, 0))['optimizer_state_bytes']
    for p in (parts, full)
  ]
  assert sizes[0] < sizes[1]


def test_state_of_an_adapter_run_is_small(data):
  described = finetune.describe(make_run(data, 'lora'))
  moments = 2 * 4 * described['trainable_parameters']
  assert moments <= described['optimizer_state_bytes'] < moments + 100
  config = data.architecture
  width, hidden = config.hidden_size, config.intermediate_size
  # Four square kernels and two of the feed-forward layers, A and B of rank 2.
  per_layer = 2 * (4 * 2 * width + 2 * (width + hidden))
  classifier = width * width + width + 2 * width + 2
  assert (
    described['trainable_parameters']
    == config.num_layers * per_layer + classifier
  )


def test_loss_is_that_of_all_parameters_with_dropout_by_the_first_seed(data):
  # The demo's model itself drops nothing.
  run = make_run(data, 'lora', adapter_dropout=0.1)
  parts = run.program
  state, frozen = finetune.new_state(run)
  # So that the adapters, and their dropout, make a difference.
  state = state._replace(params=jax.tree.map(lambda x: x + 0.1, state.params))
  batch = next(finetune.train_batches(run, 0))
  apply = adapters.adapted(parts.compiled.adapter, parts.compiled.model.apply)
  loss_fn = jax.jit(functools.partial(finetune.classifier_loss, apply, False))
  found, weight = loss_fn(state.params, batch, frozen)
  # Step by step, with NumPy.
  key = jax.random.fold_in(jax.random.key(0), batch['seeds'][0])
  merged = adapters.combine(frozen, state.params)
  logits = np.asarray(jax.jit(apply)(merged, batch['tokens'], key), np.float64)
  losses = (
    np.log(np.exp(logits).sum(axis=1))
    - logits[np.arange(len(logits)), batch['labels']]
  )
  np.testing.assert_allclose(found, losses @ batch['weights'], rtol=1e-5)
  assert weight == batch['weights'].sum()
  other = batch | {'seeds': batch['seeds'] + 1}
  changed, _ = loss_fn(state.params, other, frozen)
  assert changed != found


def test_adapted_model_starts_as_the_model_itself(data):
  run = make_run(data, 'gradnormlorp_adapter')
  state, frozen = finetune.new_state(run)
  outputs = finetune.outputs_of(
    run.program, state.params, frozen, data.evaluated['dev']
  )
  # The plain model, in the order of the file.
  encoded = data.evaluated['dev'].encoded
  tokens = np.full(
    (len(encoded), data.max_length), data.architecture.pad_id, np.int32
  )
  for row, ids in zip(tokens, encoded, strict=True):
    row[: len(ids)] = ids
  plain = finetune.starting_params(run)
  expected = jax.jit(run.program.compiled.model.apply)(plain, tokens)
  np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_batches_go_on_from_any_step_and_epochs_differ(data):
  run = make_run(data, 'full')
  assert run.program.steps_per_epoch == 3 and run.program.steps == 6
  whole = finetune.train_batches(run, 0)
  batches = [next(whole) for _ in range(7)]
  for number in (1, 3, 5):
    later = next(finetune.train_batches(run, number))
    for name, rows in later.items():
      np.testing.assert_array_equal(rows, batches[number][name])
  orders = [
    np.concatenate([b['index'] for b in batches[i : i + 3]]) for i in (0, 3)
  ]
  assert sorted(orders[0]) == sorted(orders[1])
  assert not np.array_equal(*orders)


def test_learning_rate_falls_linearly_without_warm_up(data):
  schedule = finetune.program(SETTINGS, data, 'full').schedule
  found = [float(schedule(count)) for count in range(7)]
  expected = [1e-2 * (1 - count / 6) for count in range(7)]
  np.testing.assert_allclose(found, expected, atol=1e-9)


def test_learning_rate_rises_first_if_asked_to(data):
  settings = dataclasses.replace(SETTINGS, warmup_fraction=0.5)
  schedule = finetune.program(settings, data, 'full').schedule
  found = [float(schedule(count)) for count in range(7)]
  expected = [1e-2 * x for x in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0)]
  np.testing.assert_allclose(found, expected, atol=1e-9)


def test_seeds_differ_in_classifier_and_order_and_share_what_is_compiled(data):
  parts = finetune.program(SETTINGS, data, 'full')
  runs = [finetune.make_run(parts, seed) for seed in (0, 1)]
  first, second = (finetune.new_state(run)[0].params for run in runs)
  assert not np.array_equal(
    first['classifier']['out']['kernel'], second['classifier']['out']['kernel']
  )
  orders = [next(finetune.train_batches(run, 0))['index'] for run in runs]
  assert not np.array_equal(*orders)
  assert runs[0].folder != runs[1].folder


def test_report_says_what_trains_and_what_does_not():
  text = finetune.dry_run(
    dataclasses.replace(SETTINGS, method='gradnormlorp_adapter,full')
  )
  assert re.search(r'demo, gradnormlorp_adapter: trains [\d,]+ of', text)
  assert re.search(r'q_proj/lora_a +2x64x2 +low_rank +2 +in\+out', text)
  assert re.search(r'q_proj/kernel +2x64x64 +frozen', text)
  assert re.search(r'classifier/out/kernel +64x2 +full', text)
  assert 'batch_size 8' in text


def test_tasks_without_examples_are_left_out_of_all(shared, caplog):
  folder = str(shared / 'data' / 'glue')
  settings = FinetuneConfig(
    task='all', model='tiny', data=TaskDataConfig(source=folder)
  )
  names = [task.name for task in finetune_data.find_tasks(settings)]
  assert set(names) == {'cola', 'sst2', 'mrpc', 'stsb', 'rte', 'wnli'}
  assert 'qqp (no train and dev), mnli (no train)' in caplog.text
  named = dataclasses.replace(settings, task='cola,qqp')
  with pytest.raises(ValueError, match=r"lacks examples of qqp .*\['cola'\]"):
    finetune_data.find_tasks(named)


def write_rows(path, rows):
  path.write_text(''.join('\t'.join(row) + '\n' for row in rows))
  return str(path)


@pytest.mark.parametrize('regression', [False, True])
def test_a_task_of_ones_own(tmp_path, regression):
  labels = ('0.5', '1.5') if regression else ('bad', 'good')
  rows = [('a', 'b', 'y'), ('the otter', 'sings', labels[0])]
  rows += [('the wizard', 'sings', labels[1])] * 3
  settings = FinetuneConfig(
    task='mine',
    model='tiny',
    tokenizer=_tokenizer(tmp_path),
    data=TaskDataConfig(
      train=write_rows(tmp_path / 'train.tsv', rows),
      dev=write_rows(tmp_path / 'dev.tsv', rows[:3]),
      text_columns='a,b',
      label_column='y',
      regression=regression,
    ),
  )
  (task,) = finetune_data.find_tasks(settings)
  assert (task.name, task.is_regression) == ('mine', regression)
  data = finetune_data.load_task(settings, task)
  assert list(data.evaluated) == ['dev'] and not data.predicted
  words = data.tokenizer.backend.id_to_token
  assert [words(i) for i in data.train.encoded[0]] == [
    *('<s>', 'the', 'otter', '</s>', '</s>', 'sings', '</s>')
  ]
  expected = [0.5, 1.5, 1.5, 1.5] if regression else [0, 1, 1, 1]
  np.testing.assert_array_equal(data.train.labels, expected)
  assert data.architecture.hidden_size == roberta.PRESETS['tiny'].hidden_size
  assert data.buckets == (16, 32, 64, 128, 256, 512)


def _tokenizer(folder):
  path = folder / 'tokenizer.json'
  glue.generated_tokenizer().save(str(path))
  return str(path)


def test_what_does_not_fit_is_refused(tmp_path, data):
  def load(**changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return finetune_data.load_task(settings, data.task)

  with pytest.raises(ValueError, match="'tinny' is no folder that brings a"):
    load(model='tinny')
  with pytest.raises(ValueError, match=r"'tinny' is neither a folder nor a pr"):
    load(model='tinny', tokenizer=_tokenizer(tmp_path))
  with pytest.raises(
    ValueError, match='max_length=99 is longer than the model'
  ):
    load(max_length=99)
  with pytest.raises(ValueError, match='batch_size=6 cannot be split over'):
    settings = dataclasses.replace(
      SETTINGS, batch_size=6, mesh=MeshConfig(data=4)
    )
    finetune.program(settings, data, 'full')


def test_outputs_of_a_sharded_model_are_those_of_one_device(data):
  run = make_run(data, 'lora')
  state, frozen = finetune.new_state(run)
  expected = finetune.outputs_of(
    run.program, state.params, frozen, data.evaluated['dev']
  )
  settings = dataclasses.replace(SETTINGS, mesh=MeshConfig(data=2, fsdp=2))
  sharded = finetune.make_run(finetune.program(settings, data, 'lora'), 0)
  state, frozen = finetune.new_state(sharded)
  kernel = frozen['layers']['mlp']['up_proj']['kernel']  # [2, 64, 256]
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 64, 128)}
  found = finetune.outputs_of(
    sharded.program, state.params, frozen, data.evaluated['dev']
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)
