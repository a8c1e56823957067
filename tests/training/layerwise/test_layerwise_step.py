"""The step layer by layer against the whole step.

Shape suffixes in this file: B sequences, T positions, D features.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.training import layerwise, parameters, state, step
from gnlorp_jax.training.layerwise import checks

# Those of `toy.TXS`.
NAMES = (
  *('adamw', 'alice', 'apollo', 'apollo_mini', 'dct_adamw'),
  *('dct_adamw, no errors', 'frugal', 'subtrack'),
  *('fira', 'galore', 'galore, frozen', 'galore_adafactor', 'gradnormlorp'),
  *('gradnormlorp, both sides', 'ldadam', 'muon', 'projfactor', 'q_galore'),
  *('racs', 'scale', 'sinkgd', 'vlorp'),
)
CLIPPED = {'num_micro_batches': 2, 'clip_global_norm': 12.0}
# XLA splits the arrays of any program. One optimizer whose gradients wait for
# their norm, one that factors moments, and one that takes every step at once.
SHARDED = ('gradnormlorp', 'galore_adafactor', 'apollo')


def start(toy, name):
  """What trains, and what is frozen."""
  # Its rules say what is frozen of all.
  return (toy.init(), {}) if name == 'galore, frozen' else toy.in_part()


def whole_trajectory(toy, name, options):
  trained, frozen = start(toy, name)
  tx = toy.optimizer(name)
  return toy.trajectory(
    lambda params: step.make_train_step(toy.whole_loss, tx, **options),
    tx,
    toy.mesh_of(1),
    params=trained,
    frozen=frozen,
  )


def layered_trajectory(toy, name, options, mesh=(1, 1)):
  trained, frozen = start(toy, name)
  tx = toy.optimizer(name)
  return toy.trajectory(
    lambda params: layerwise.make_train_step(
      toy.PIECES, tx, parameters.plain(params, frozen), **options
    ),
    tx,
    toy.mesh_of(*mesh),
    params=trained,
    frozen=frozen,
  )


def assert_equal_with_counts(toy, found, expected):
  toy.assert_equal(found, expected)
  # Counts of steps and refreshes, and what waits, are the same numbers.
  for (now, _), (whole, _) in zip(found, expected, strict=True):
    for x, y in zip(
      jax.tree.leaves(now.opt_state),
      jax.tree.leaves(whole.opt_state),
      strict=True,
    ):
      if x.dtype == np.int32:
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=[pytest.mark.slow] * (name not in ('adamw', 'galore'))
    )
    for name in NAMES
  ],
)
def test_every_optimizer_takes_the_whole_steps(toy, name):
  """In micro-batches, clipped, and some of a model that is sharded."""
  expected = whole_trajectory(toy, name, CLIPPED)
  norms = [metrics['grad_norm'] for _, metrics in expected]
  assert CLIPPED['clip_global_norm'] < max(norms)  # It matters in some steps.
  mesh = (2, 2) if name in SHARDED else (1, 1)
  found = layered_trajectory(toy, name, CLIPPED, mesh)
  assert_equal_with_counts(toy, found, expected)


@pytest.mark.slow
def test_steps_without_clipping_are_the_whole_steps(toy):
  # A layer is updated at once by the optimizer's `update`. That this equals the
  # two halves which clipping needs is tested in tests/optim/test_split.py.
  expected = whole_trajectory(toy, 'gradnormlorp', {})
  found = layered_trajectory(toy, 'gradnormlorp', {})
  assert_equal_with_counts(toy, found, expected)


def test_every_optimizer_has_a_test(toy):
  assert set(NAMES) == set(toy.TXS)


@pytest.mark.slow
def test_tied_head_equals_the_whole_step(toy):
  """With gradients that wait, and at once after they were measured."""
  tx, mesh = toy.optimizer('galore'), toy.mesh_of(1)
  loss = functools.partial(toy.whole_loss, loss=toy.tied_loss)
  clip = {'clip_global_norm': 12.0}
  trained = toy.init()
  del trained['head']
  frozen = {'layers': {'down': trained['layers'].pop('down')}}
  pieces = toy.PIECES._replace(loss=toy.tied_loss)
  whole, *layered = (
    toy.trajectory(make_step, tx, mesh, 6, params=trained, frozen=frozen)
    for make_step in (
      lambda params: step.make_train_step(loss, tx, **clip),
      *(
        lambda params, clipping=clipping: layerwise.make_train_step(
          pieces,
          tx,
          parameters.plain(params, frozen),
          clipping=clipping,
          **clip,
        )
        for clipping in ('waiting', 'recompute')
      ),
    )
  )
  assert clip['clip_global_norm'] < max(m['grad_norm'] for _, m in whole)
  for found in layered:
    toy.assert_equal(found, whole)


@pytest.mark.parametrize(
  'clip', [None, pytest.param(12.0, marks=pytest.mark.slow)]
)
def test_rows_of_large_matrices_are_updated_apart(toy, monkeypatch, clip):
  monkeypatch.setattr(checks, 'ROW_BLOCK', 4096)
  tx = optim.split.chain(
    toy.optimizer('galore', moment_bits=8), optim.stochastic_rounding()
  )
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.init(vocab=1024))
  frozen = {'layers': params.pop('layers')}  # They are not cut.
  init = jax.jit(tx.init)

  def run(rows):
    zero = jnp.int32(0)
    now = state.TrainState(zero, zero, params, init(params))
    train_step = layerwise.make_train_step(
      toy.PIECES,
      tx,
      parameters.plain(params, frozen),
      clip_global_norm=clip,
      row_blocks=rows,
    )
    traced = jax.jit(train_step).trace(now, toy.make_batch(0), frozen)
    compiled = traced.lower().compile()
    for number in range(3):
      now, _ = compiled(now, toy.make_batch(number), frozen)
    return jax.device_get(now), toy.loop_lengths(traced.jaxpr)

  (apart, lengths), (whole, whole_lengths) = run(True), run(False)
  # Eight parts of the embedding and of the head.
  assert lengths.count(8) == 2
  assert 8 not in whole_lengths
  # Another program rounds here and there in the last digit, which now and then
  # takes a random number to the other side.
  for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(whole), strict=True):
    close = np.isclose(a.astype(float), b.astype(float), rtol=1e-6, atol=0)
    assert np.mean(close) > 0.999


def abstract_state(toy, tx):
  return state.abstract(
    lambda key: toy.init(), tx, jax.random.key(0), toy.mesh_of(1)
  )


def test_rows_of_adafactor_stay_together(toy, monkeypatch):
  monkeypatch.setattr(checks, 'ROW_BLOCK', 256)
  tx = toy.optimizer('galore_adafactor')
  train_step = layerwise.make_train_step(
    toy.PIECES,
    tx,
    parameters.plain(toy.init()),
    row_blocks=True,
  )
  jaxpr = jax.make_jaxpr(train_step)(abstract_state(toy, tx), toy.make_batch(0))
  assert 8 not in toy.loop_lengths(jaxpr)


# What goes wrong.


@pytest.mark.parametrize('clip', [None, 12.0])
def test_a_bad_gradient_is_left_out(toy, clip):
  tx = toy.optimizer('gradnormlorp')
  trained, frozen = toy.in_part()
  start = state.from_params(trained, tx, toy.mesh_of(1))
  train_step = jax.jit(
    layerwise.make_train_step(
      toy.PIECES, tx, parameters.plain(trained, frozen), clip_global_norm=clip
    )
  )

  def run(bad):
    now, rows = start, []
    for number in range(4):
      batch = toy.make_batch(0 if bad and number == 1 else number)
      if bad and number == 1:
        batch['weights'] = batch['weights'] * np.float32('nan')
      if bad or number != 1:
        now, metrics = train_step(now, batch, frozen)
        rows.append(jax.device_get((now, metrics)))
    return rows

  bad, good = run(True), run(False)
  before, (after, metrics) = bad[0][0], bad[1]
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
  assert metrics['skipped_steps'] == after.skipped == 1
  assert np.isfinite(metrics['weight_norm'])
  assert metrics['update_norm'] == 0
  # Training goes on as if the batch had not been there.
  jax.tree.map(
    np.testing.assert_array_equal, bad[-1][0].params, good[-1][0].params
  )


def test_what_moved_before_a_bad_gradient_is_reported(toy):
  tx = toy.optimizer('galore')
  params = toy.init()

  @jax.custom_vjp
  def read(table):
    return table

  read.defvjp(lambda table: (table, None), lambda _, g: (g * jnp.nan,))

  def embed_badly(params, batch):
    return read(params['embed']['embedding'])[batch['inputs']]

  train_step = layerwise.make_train_step(
    toy.PIECES._replace(embed=embed_badly), tx, parameters.plain(params)
  )
  now = state.from_params(params, tx, toy.mesh_of(1))
  after, metrics = jax.jit(train_step)(now, toy.make_batch(0))
  assert metrics['skipped_steps'] == 1
  assert metrics['update_norm'] > 0
  before, moved = now.params, after.params
  np.testing.assert_array_equal(
    before['embed']['embedding'], moved['embed']['embedding']
  )
  assert np.any(before['head']['kernel'] != moved['head']['kernel'])
  assert np.isfinite(metrics['weight_norm'])


def test_kernels_labelled_frozen_are_not_rounded_anew(toy):
  weights = optim.quantized_weights

  def load(tree):
    return weights.dequantize_weights(tree, jnp.float32)

  def store(new, old, number, first):
    key = jax.random.fold_in(jax.random.key(0), number)
    return weights.requantize_weights(new, old, jax.random.fold_in(key, first))

  tx = toy.optimizer('galore, frozen')
  params = toy.init()
  stored = {**params, 'layers': weights.quantize_weights(params['layers'])}
  held = parameters.plain(stored)._replace(
    decode=load, decode_exact=load, store=store
  )
  train_step = layerwise.make_train_step(toy.PIECES, tx, held)
  zero = jnp.zeros((), jnp.int32)
  now = state.TrainState(zero, zero, stored, jax.jit(tx.init)(params))
  after, _ = jax.jit(train_step)(now, toy.make_batch(0))
  before, after = stored['layers'], after.params['layers']
  jax.tree.map(np.testing.assert_array_equal, before['down'], after['down'])
  assert np.any(before['up']['kernel'].codes != after['up']['kernel'].codes)


def test_projected_outer_matrices_stay_whole(toy, monkeypatch):
  monkeypatch.setattr(checks, 'ROW_BLOCK', 256)
  rules = [('head|kernel', 'low_rank'), ('.*', 'full')]
  tx = toy.optimizer('galore', param_labels=rules)
  params = toy.init()
  train_step = layerwise.make_train_step(
    toy.PIECES, tx, parameters.plain(params), row_blocks=True
  )
  jaxpr = jax.make_jaxpr(train_step)(abstract_state(toy, tx), toy.make_batch(0))
  lengths = toy.loop_lengths(jaxpr)
  assert lengths.count(8) == 1  # The embedding's alone.


def test_one_layer_is_a_stack_too(toy):
  tx = toy.optimizer('galore')
  trained, frozen = toy.in_part(layers=1)
  now = state.from_params(trained, tx, toy.mesh_of(1))
  found, expected = (
    jax.jit(train_step)(now, toy.make_batch(0), frozen)
    for train_step in (
      layerwise.make_train_step(
        toy.PIECES,
        tx,
        parameters.plain(trained, frozen),
        clip_global_norm=12.0,
      ),
      step.make_train_step(
        functools.partial(toy.whole_loss, layers=1), tx, clip_global_norm=12.0
      ),
    )
  )
  toy.assert_equal([found], [expected])


def test_parameters_must_be_stacked(toy):
  with pytest.raises(ValueError) as error:
    layerwise.make_train_step(
      toy.PIECES, optax.sgd(1.0), parameters.plain({'kernel': jnp.ones(3)})
    )
  assert str(error.value) == (
    "Parameters must be a dict with the key 'layers', stacked [L, ...], and "
    "others, to be trained layer by layer; got ['kernel']."
  )
  with pytest.raises(
    ValueError, match=r'the first axes are \[\(2,\), \(3,\)\]'
  ):
    layers = {'a': jnp.ones((2, 4)), 'b': jnp.ones((3, 4))}
    held = parameters.plain({'layers': layers}, {'x': jnp.ones(1)})
    layerwise.make_train_step(toy.PIECES, optax.sgd(1.0), held)


def test_state_must_be_cut_into_layers(toy):
  params = toy.init()
  params['layers']['shift'] = jnp.ones((toy.LAYERS, 4000))
  tx = optim.quantize_moments(optax.adam(1e-3), 8)
  with pytest.raises(ValueError) as error:
    layerwise.make_train_step(toy.PIECES, tx, parameters.plain(params))
  assert str(error.value) == (
    "The optimizer keeps something of ['layers/shift'] that cannot be cut into "
    'layers, such as the moments of stacked vectors quantised in one piece. '
    "Name vectors 'scale' or 'bias', or train in whole steps."
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'accumulate': 'project'},
      "accumulate='project' must be one of ('gradient', 'projected').",
    ),
    (
      {'clipping': 'wait'},
      "clipping='wait' must be one of ('waiting', 'recompute').",
    ),
  ],
)
def test_unknown_choices_are_named(toy, options, message):
  with pytest.raises(ValueError) as error:
    held = parameters.plain(toy.init())
    layerwise.make_train_step(toy.PIECES, optax.sgd(1.0), held, **options)
  assert str(error.value) == message


def test_micro_batches_must_be_positive(toy):
  held = parameters.plain(toy.init())
  with pytest.raises(
    ValueError, match='num_micro_batches=0 must be at least 1'
  ):
    layerwise.make_train_step(
      toy.PIECES, optax.sgd(1.0), held, num_micro_batches=0
    )


def test_the_optimizer_warns_once_and_others_are_heard(toy, caplog):
  """Its state is looked at several times; it has warned at its own start."""

  class Told:
    """A tree whose shapes are asked for while the state is."""

    def __init__(self):
      self.times = 0

    def __call__(self, tree):
      self.times += 1
      logging.getLogger('gnlorp_jax.training').warning('decoding')
      return tree

  told = Told()
  tx = optim.galore(1e-2, rank=64, skip_nonfinite=False)
  params = toy.init()
  with caplog.at_level(logging.WARNING):
    jax.eval_shape(lambda p: tx.init(p), params)
    assert any('rank' in message for message in caplog.messages)
    caplog.clear()
    held = parameters.plain(params)._replace(decode_exact=told)
    layerwise.make_train_step(toy.PIECES, tx, held)
    assert set(caplog.messages) == {'decoding'}
    assert told.times > 0
    caplog.clear()
    jax.eval_shape(lambda p: tx.init(p), params)
    assert any('rank' in message for message in caplog.messages)
