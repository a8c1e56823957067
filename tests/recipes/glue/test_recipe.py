"""Programs and runs of fine-tuning: what trains, what stays, what is counted.

The demo's model and task, cut down to a few examples.
"""

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax.compose import methods
from gnlorp_jax.compose.settings import LayerSamplingOptions, MeshConfig
from gnlorp_jax.models import adapters, roberta
from gnlorp_jax.recipes.glue import evaluation, recipe, report
from gnlorp_jax.training import sharding


@pytest.fixture(scope='module')
def prepare(settings, data):
  """Builds a method on the task; `changes` are of the settings."""

  def make(method, **changes):
    changed = dataclasses.replace(settings, **changes)
    return recipe.prepare(changed, data, method)

  return make


def optim_for(settings, method):
  """The settings' optimizer, with pieces of rows that this model has."""
  pieces = {'granularity': 4} if method in ('vlorp', 'projfactor') else {}
  return optim_of(settings, **pieces)


def few_projected(settings, method):
  """All of the model trains, two of its kernels projected.

  Compiling takes the time, and of every matrix that is projected anew.
  """
  if methods.METHODS[method].adapter is not None:
    return {}
  labels = (('layers/.*(q|down)_proj/kernel', 'low_rank'), ('.*', 'full'))
  return {'optim': optim_of(settings, param_labels=labels)}


def new_run(prepared, seed=0):
  return recipe.make_run(prepared, None, seed).run


def put(run, batch):
  return sharding.put_batch(batch, run.mesh)


def optim_of(settings, **changes):
  return dataclasses.replace(settings.optim, **changes)


def paths(tree):
  return set(traverse_util.flatten_dict(tree, sep='/'))


def copied(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


# With these all of the model trains, or has adapters. That other optimizers
# train all of it too is seen from shapes, in
# `test_other_optimizers_train_all_weights_with_less_state`.
WHOLE = ('full', 'lora', 'gradnormlorp')
# Methods that draw layers: below, and in tests/compose/test_layer_sampling.py.
DRAWING = {m for m, made in methods.METHODS.items() if made.sampling}


def one_kernel(settings, method):
  """Settings with which a method trains one kernel, and one in full.

  Compiling takes the time, and an optimizer is compiled array by array.
  """
  if methods.METHODS[method].adapter is not None:
    rules = ('attn/q_proj/kernel',)
    return {'adapter': dataclasses.replace(settings.adapter, rules=rules)}
  labels = (
    ('attn/q_proj/kernel', 'low_rank'),
    ('classifier/out/kernel', 'full'),
    ('.*', 'frozen'),
  )
  optim = dataclasses.replace(optim_for(settings, method), param_labels=labels)
  return {'optim': optim}


@pytest.mark.usefixtures('compiled_once')  # They share all but the steps.
@pytest.mark.parametrize(
  'method',
  [
    pytest.param(m, marks=[pytest.mark.slow] * (m not in ('lora', 'galore')))
    for m in methods.METHODS
    if m not in DRAWING
  ],
)
def test_every_method_trains_and_leaves_the_rest_alone(
  method, settings, prepare
):
  is_whole = method in WHOLE
  parts = few_projected if is_whole else one_kernel
  prepared = prepare(method, **parts(settings, method))
  built, run = prepared.program, new_run(prepared)
  state, frozen = run.start()
  before, frozen_before = copied(state.params), copied(frozen)
  for number in range(1, 4):
    state, values = run.train_step(state, put(run, next(run.batches)), frozen)
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
  shapes = jax.eval_shape(built.model.init, jax.random.key(0))
  if methods.METHODS[method].adapter is None:
    if is_whole:
      assert paths(after) == paths(shapes)
    else:
      assert paths(after) == {
        *('layers/attn/q_proj/kernel', 'classifier/out/kernel')
      }
    assert paths(after) | paths(frozen) == paths(shapes)
    assert not paths(frozen) & paths(after)
  else:
    assert {path.split('/')[-1] for path in paths(after)} <= {
      *('lora_a', 'lora_b', 'magnitude', 'kernel', 'bias')
    }
    assert not paths(frozen) & paths(after)
    assert all('classifier' not in path for path in paths(frozen))
  if is_whole:
    found = run.evaluate(state.params, frozen)
    assert set(found) == {'loss', 'matthews_correlation', 'accuracy'}
    assert np.isfinite(found['loss'])


@pytest.mark.parametrize(
  'method',
  sorted({*methods.METHODS} - DRAWING - {*methods.COMPARED} | {'galore'}),
)
def test_other_optimizers_train_all_weights_with_less_state(
  method, settings, prepare
):
  optim = optim_for(settings, method)
  built = prepare(method, optim=optim).program
  assert built.parameters.frozen == {}
  full = prepare('full').program
  sizes = [
    recipe.describe_sizes(p)['optimizer_state_bytes'] for p in (built, full)
  ]
  assert sizes[0] < sizes[1]


def test_methods_that_draw_layers_train_the_new_head(prepare):
  lisa, badam = (
    prepare(method, sampling=LayerSamplingOptions(layers=1)).program
    for method in ('lisa', 'badam')
  )
  assert lisa.parameters.frozen == {}
  assert set(badam.parameters.trained) == {'layers', 'classifier'}
  assert badam.sampling.layers == 1 and badam.sampling.draw == 'shuffled'


def test_state_of_an_adapter_run_is_small(data, prepare):
  described = recipe.make_run(prepare('lora'), None, 0).describe()
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
  model = roberta.make_classifier(config, 2)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  own = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  added = config.num_layers * per_layer
  assert described['parameters'] == own + added


def test_loss_is_that_of_all_parameters_with_dropout_by_the_first_seed(
  settings, data, prepare
):
  # The demo's model itself drops nothing.
  dropping = dataclasses.replace(settings.adapter, dropout=0.1)
  prepared = prepare('lora', adapter=dropping)
  built, run = prepared.program, new_run(prepared)
  trained, frozen = built.parameters.start(jax.random.key(0))
  # So that the adapters, and their dropout, make a difference.
  params = jax.tree.map(lambda x: np.float32(x + 0.1), jax.device_get(trained))
  batch = next(run.batches)
  merged = built.parameters.join(params, frozen)
  loss_fn = jax.jit(built.objective.loss)
  found, weight = loss_fn(merged, batch)
  # Step by step, with NumPy, from the plain model wrapped by hand.
  config = adapters.AdapterConfig(kind='lora', rank=2, alpha=16, dropout=0.1)
  model = roberta.make_classifier(data.architecture, 2)
  apply = adapters.adapted(config, model.apply)
  key = jax.random.fold_in(jax.random.key(0), batch['seeds'][0])
  logits = np.asarray(jax.jit(apply)(merged, batch['inputs'], key), np.float64)
  losses = (
    np.log(np.exp(logits).sum(axis=1))
    - logits[np.arange(len(logits)), batch['labels']]
  )
  np.testing.assert_allclose(found, losses @ batch['weights'], rtol=1e-5)
  assert weight == batch['weights'].sum()
  other = batch | {'seeds': batch['seeds'] + 1}
  changed, _ = loss_fn(merged, other)
  assert changed != found
  # An evaluation drops nothing, whatever the seeds.
  outputs = jax.jit(built.objective.evaluate)(merged, batch)
  plain = jax.jit(apply)(merged, batch['inputs'])
  np.testing.assert_allclose(outputs, plain, rtol=1e-5, atol=1e-6)


def test_adapted_model_starts_as_the_model_itself(data, prepare):
  prepared = prepare('gradnormlorp_adapter')
  trained, frozen = prepared.program.parameters.start(jax.random.key(0))
  outputs = evaluation.outputs_of(
    prepared.program, data, 8, trained, frozen, data.evaluated['dev']
  )
  # The plain model, in the order of the file.
  encoded = data.evaluated['dev'].encoded
  tokens = np.full(
    (len(encoded), data.max_length), data.architecture.pad_id, np.int32
  )
  for row, ids in zip(tokens, encoded, strict=True):
    row[: len(ids)] = ids
  model = roberta.make_classifier(data.architecture, 2)
  plain = jax.jit(model.init)(jax.random.key(0))
  expected = jax.jit(model.apply)(plain, tokens)
  np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_a_run_that_resumes_has_the_frozen_weights_it_began_with(prepare):
  run = new_run(prepare('lora'), seed=3)
  _, frozen = run.start()
  jax.tree.map(np.testing.assert_array_equal, run.constants(), frozen)


def test_batches_go_on_from_any_step_and_epochs_differ(data, prepare):
  prepared = prepare('full')
  assert prepared.steps_per_epoch == 3 and prepared.steps == 6
  whole = new_run(prepared).batches
  batches = [next(whole) for _ in range(7)]
  for number in (1, 3, 5):
    again = new_run(prepared).batches
    earlier = new_run(prepared).batches
    for _ in range(number):
      next(earlier)
    again.set_state(earlier.get_state())
    later = next(again)
    for name, rows in later.items():
      np.testing.assert_array_equal(rows, batches[number][name])
  # The examples by their tokens: those of the two epochs, in another order.
  orders = [
    [
      row.tobytes()
      for batch in batches[i : i + 3]
      for row in batch['inputs'][batch['weights'] > 0]
    ]
    for i in (0, 3)
  ]
  assert sorted(orders[0]) == sorted(orders[1])
  assert orders[0] != orders[1]


def schedule_of(prepared):
  return new_run(prepared).instruments.schedule


def test_learning_rate_falls_linearly_without_warm_up(prepare):
  schedule = schedule_of(prepare('full'))
  found = [float(schedule(count)) for count in range(7)]
  expected = [1e-2 * (1 - count / 6) for count in range(7)]
  np.testing.assert_allclose(found, expected, atol=1e-9)


def test_learning_rate_rises_first_if_asked_to(settings, prepare):
  optim = optim_of(settings, warmup_fraction=0.5)
  schedule = schedule_of(prepare('full', optim=optim))
  found = [float(schedule(count)) for count in range(7)]
  expected = [1e-2 * x for x in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0)]
  np.testing.assert_allclose(found, expected, atol=1e-9)


def test_seeds_differ_in_classifier_and_order_and_share_what_is_compiled(
  prepare,
):
  prepared = prepare('full')
  runs = [new_run(prepared, seed) for seed in (0, 1)]
  first, second = (run.start()[0].params for run in runs)
  assert not np.array_equal(
    first['classifier']['out']['kernel'], second['classifier']['out']['kernel']
  )
  orders = [next(run.batches)['inputs'] for run in runs]
  assert not np.array_equal(*orders)
  assert runs[0].folder != runs[1].folder
  assert runs[0].train_step is runs[1].train_step


class Compilations(logging.Handler):
  """Names of what XLA compiles."""

  def __init__(self):
    super().__init__()
    self.names = []

  def emit(self, record):
    if (text := record.getMessage()).startswith('Compiling '):
      self.names.append(text.split()[1])


@pytest.fixture
def compilations():
  """What is compiled while a test runs."""
  handler = Compilations()
  logger = logging.getLogger('jax._src.interpreters.pxla')
  propagates, logger.propagate = logger.propagate, False
  logger.addHandler(handler)
  with jax.log_compiles():
    yield handler.names
  logger.removeHandler(handler)
  logger.propagate = propagates


def take_all(run):
  """A run without its files: start, steps, evaluation, a row of metrics."""
  state, frozen = run.start()
  for _ in range(2):
    state, values = run.train_step(state, put(run, next(run.batches)), frozen)
  run.evaluate(state.params, frozen)
  values = {f'train/{name}': value for name, value in values.items()}
  values |= run.instruments.stats(state.opt_state)
  run.constants()
  return run.instruments.row(2, jax.device_get(values))


@pytest.mark.parametrize(
  'method', ['lora', pytest.param('gradnormlorp', marks=pytest.mark.slow)]
)
def test_other_rates_seeds_lengths_and_tasks_compile_nothing_anew(
  method, settings, data, compilations
):
  def prepare(task, optim=None, **changes):
    optim = {'learning_rate': None} | (optim or {})
    few = one_kernel(settings, method) | changes
    few['optim'] = dataclasses.replace(
      few.get('optim', settings.optim), **optim
    )
    changed = dataclasses.replace(settings, **few)
    task = dataclasses.replace(data.task, name=task)
    return recipe.prepare(changed, data._replace(task=task), method)

  first = take_all(new_run(prepare('rte')))
  jax.jit(lambda x: x + 1)(np.zeros(57))
  assert 'jit(<lambda>)' in compilations
  compilations.clear()
  # Other rates and seeds, as in a search.
  searched = prepare('rte', learning_rates='1e-3,2e-3', seeds='0,1')
  for rate, seed in ((1e-3, 0), (2e-3, 0), (2e-3, 1)):
    row = take_all(recipe.make_run(searched, rate, seed).run)
    # The second of six steps.
    assert row['optim/learning_rate'] == pytest.approx(rate * 5 / 6)
  # A longer run, and a warm-up.
  take_all(new_run(prepare('rte', epochs=3)))
  take_all(new_run(prepare('rte', {'warmup_fraction': 0.5})))
  # Another task with as many outputs, and a learning rate of its own.
  other = take_all(new_run(prepare('mrpc')))
  assert not compilations
  if method == 'lora':
    rates = [row['optim/learning_rate'] for row in (first, other)]
    np.testing.assert_allclose(rates, np.array([5e-4, 4e-4]) * 5 / 6)


def test_report_says_what_trains_and_what_does_not(settings):
  text = report.dry_run(
    dataclasses.replace(settings, method='gradnormlorp_adapter,full')
  )
  assert re.search(r'demo, gradnormlorp_adapter: trains [\d,]+ of', text)
  assert re.search(r'q_proj/lora_a +2x64x2 +low_rank +2 +in\+out', text)
  assert re.search(r'q_proj/kernel +2x64x64 +frozen', text)
  assert re.search(r'classifier/out/kernel +64x2 +full', text)
  assert 'batch_size 8' in text
  assert 'optim.name galore, optim.learning_rate 0.01, optim.rank 2' in text


def test_methods_and_tasks_bound_what_is_compiled(prepare, monkeypatch):
  calls = []
  monkeypatch.setattr(recipe.compiled, 'bound', lambda: calls.append(1))
  for method in ('full', 'lora'):
    prepare(method)
  assert calls == [1, 1]


def test_batch_that_cannot_be_split_is_refused(prepare):
  with pytest.raises(ValueError, match='batch_size=6 cannot be split over'):
    prepare('full', batch_size=6, mesh=MeshConfig(data=4))


def test_plan_is_the_program_without_examples(settings, data, prepare):
  planned = recipe.plan(
    dataclasses.replace(settings, method='lora,full'), task=data.task
  )
  assert planned.program is prepare('lora').program
  assert planned.config.model == data.architecture
  run = new_run(prepare('lora'))
  batch = next(run.batches)
  assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
    name: (leaf.shape, leaf.dtype)
    for name, leaf in planned.abstract_batch.items()
  }
  # Shapes alone, of more devices than there are.
  planned = recipe.plan(
    dataclasses.replace(settings, mesh=MeshConfig(data=8)), 8
  )
  assert planned.program.mesh.size == 8
