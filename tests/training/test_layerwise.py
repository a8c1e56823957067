"""The step layer by layer against the whole step.

Shape suffixes in this file: B sequences, T positions, D features, F hidden
features, V vocabulary, L layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.training import layerwise, passes, sharding, state, step

VOCAB, FEATURES, HIDDEN, LAYERS, POSITIONS, BATCH = 64, 32, 48, 3, 8, 8
STEPS, GAP = 12, 5
# Compiling takes nearly all of the time here.
COMPILER_OPTIONS = {'xla_backend_optimization_level': 0}
if jax.__version_info__ < (0, 11):  # Later there is nothing else.
  COMPILER_OPTIONS['xla_cpu_use_fusion_emitters'] = False

LOW_RANK = {'rank': 8, 'update_proj_gap': GAP}
# Adam divides by the root of the second moment: where that is near zero it
# turns roundings of a gradient into steps. A large eps does not.
EPS = {'eps': 1e-3}
FINE = {'rank': 2, 'update_proj_gap': GAP, 'granularity': 2, **EPS}
TXS = {
  'adamw': functools.partial(optim.adamw, **EPS),
  'apollo': functools.partial(optim.apollo, **LOW_RANK, **EPS),
  'apollo_mini': functools.partial(
    optim.apollo_mini, update_proj_gap=GAP, scale=4.0, **EPS
  ),
  'dct_adamw': functools.partial(optim.dct_adamw, **LOW_RANK, **EPS),
  'fira': functools.partial(optim.fira, **LOW_RANK, **EPS),
  'galore': functools.partial(optim.galore, **LOW_RANK, **EPS),
  'galore_adafactor': functools.partial(optim.galore_adafactor, **LOW_RANK),
  'gradnormlorp': functools.partial(optim.gradnormlorp, **LOW_RANK, **EPS),
  'ldadam': functools.partial(optim.ldadam, rank=8, **EPS),
  'projfactor': functools.partial(optim.projfactor, **FINE),
  'q_galore': functools.partial(
    optim.q_galore, basis_bits=32, moment_bits=32, **LOW_RANK, **EPS
  ),
  'vlorp': functools.partial(optim.vlorp, **FINE),
}


# Forms of the state that a slice, or a half of a step, must carry along.
FORMS = {
  'rotated, tracked': functools.partial(
    optim.gradnormlorp,
    moments_on_refresh='rotate',
    norm_state='tracked',
    **LOW_RANK,
    **EPS,
  ),
  'both, reset': functools.partial(
    optim.gradnormlorp,
    moments_on_refresh='reset',
    side='both',
    **LOW_RANK,
    **EPS,
  ),
  'lazy': functools.partial(
    optim.q_galore,
    basis_bits=32,
    moment_bits=32,
    lazy_refresh=optim.LazyRefresh(threshold=-1.0, queue=1),
    **LOW_RANK,
    **EPS,
  ),
  'errors': functools.partial(
    optim.dct_adamw, error_bits=32, **LOW_RANK, **EPS
  ),
  'decayed, frozen': functools.partial(
    optim.galore,
    weight_decay=0.1,
    param_labels=[('down|embed', 'frozen'), ('up', 'low_rank'), ('.*', 'full')],
    **LOW_RANK,
    **EPS,
  ),
}


def init(key, layers=LAYERS, vocab=VOCAB):
  """Parameters of a small model; kernels are stacked ``[L, in, out]``."""
  shapes = {
    'embed': {'embedding': (vocab, FEATURES)},
    'head': {'kernel': (FEATURES, vocab)},
    'layers': {
      'down': {'kernel': (layers, HIDDEN, FEATURES)},
      'norm': {'scale': (layers, FEATURES)},
      'up': {'kernel': (layers, FEATURES, HIDDEN)},
    },
  }
  rng = np.random.default_rng(int(jax.random.key_data(key)[-1]))
  return jax.tree.map(
    lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def embed(params, batch):
  return params['embed']['embedding'][batch['inputs']]


def block(layer, x_BTD):
  y_BTD = x_BTD * (1 + layer['norm']['scale'][None, None])
  hidden_BTF = jax.nn.silu(y_BTD @ layer['up']['kernel'])
  return x_BTD + hidden_BTF @ layer['down']['kernel']


def loss(params, x_BTD, batch):
  losses_BT = optax.softmax_cross_entropy_with_integer_labels(
    x_BTD @ params['head']['kernel'], batch['targets']
  )
  return jnp.sum(losses_BT * batch['weights']), jnp.sum(batch['weights'])


def tied_loss(params, x_BTD, batch):
  head = {'head': {'kernel': params['embed']['embedding'].T}}
  return loss(head, x_BTD, batch)


def whole_loss(params, batch, loss=loss, layers=LAYERS):
  """The whole model in one piece: a plain loop over its layers."""
  x_BTD = embed(params, batch)
  for i in range(layers):
    x_BTD = block(jax.tree.map(lambda w, i=i: w[i], params['layers']), x_BTD)
  return loss(params, x_BTD, batch)


PIECES = passes.Pieces(embed, block, loss, ('embed',))


def make_batch(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (BATCH, POSITIONS + 1), dtype=np.int32)
  lengths = rng.integers(1, POSITIONS + 1, (BATCH, 1))
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': (np.arange(POSITIONS) < lengths).astype(np.float32),
  }


def optimizer(name, **options):
  return {**TXS, **FORMS}[name](3e-2, skip_nonfinite=False, **options)


def trajectory(make_step, tx, mesh, steps=STEPS, batch=make_batch):
  """States and metrics after every step, on the host."""
  now = state.from_params(init(jax.random.key(0)), tx, mesh)
  shardings = state.shardings(now)
  train_step = jax.jit(
    make_step(now.params),
    in_shardings=(shardings, sharding.batch_sharding(mesh)),
    out_shardings=(shardings, None),
    donate_argnums=0,
    compiler_options=COMPILER_OPTIONS,
  )
  seen = []
  for number in range(steps):
    now, metrics = train_step(now, sharding.put_batch(batch(number), mesh))
    seen.append(jax.device_get((now, metrics)))
  assert train_step._cache_size() == 1
  return seen


def mesh_of(data, fsdp=1):
  return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def assert_equal(found, expected, rtol=1e-5):
  """Every parameter within `rtol` of its array's largest, at every step."""
  for number, ((a, a_metrics), (b, b_metrics)) in enumerate(
    zip(found, expected, strict=True)
  ):
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(a.params),
      jax.tree.leaves(b.params),
      strict=True,
    ):
      np.testing.assert_allclose(
        x,
        y,
        rtol=0,
        atol=rtol * np.abs(y).max(),
        err_msg=f'step {number}, {path}',
      )
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for key in b_metrics:
      np.testing.assert_allclose(
        a_metrics[key], b_metrics[key], rtol=1e-4, err_msg=f'{key} {number}'
      )


@functools.cache
def whole_trajectory(name, clip, k):
  tx = optimizer(name)
  return trajectory(
    lambda params: step.make_train_step(
      whole_loss, tx, num_micro_batches=k, clip_global_norm=clip
    ),
    tx,
    mesh_of(1),
  )


@pytest.mark.parametrize(
  ('clip', 'k', 'mesh'),
  [(None, 1, (1, 1)), (12.0, 2, (1, 1)), (12.0, 2, (2, 2))],
  ids=['plain', 'clipped', 'mesh'],
)
@pytest.mark.parametrize('name', TXS)
def test_every_optimizer_takes_the_whole_steps(name, clip, k, mesh):
  tx = optimizer(name)
  found = trajectory(
    lambda params: layerwise.make_train_step(
      PIECES, tx, params, num_micro_batches=k, clip_global_norm=clip
    ),
    tx,
    mesh_of(*mesh),
  )
  expected = whole_trajectory(name, clip, k)
  if clip is not None:  # It matters in some steps.
    assert clip < max(metrics['grad_norm'] for _, metrics in expected)
  assert_equal(found, expected)


@pytest.mark.parametrize(
  ('clip', 'clipping'),
  [(None, 'waiting'), (12.0, 'waiting'), (12.0, 'recompute')],
)
def test_tied_head_equals_the_whole_step(clip, clipping):
  tx = optimizer('gradnormlorp')
  found = trajectory(
    lambda params: layerwise.make_train_step(
      PIECES._replace(loss=tied_loss),
      tx,
      params,
      clip_global_norm=clip,
      clipping=clipping,
    ),
    tx,
    mesh_of(1),
    steps=6,
  )
  loss_fn = functools.partial(whole_loss, loss=tied_loss)
  expected = trajectory(
    lambda params: step.make_train_step(loss_fn, tx, clip_global_norm=clip),
    tx,
    mesh_of(1),
    steps=6,
  )
  assert_equal(found, expected)


def loop_lengths(jaxpr):
  """Turns of the outermost loops of a program."""
  return [
    eqn.params['length']
    for eqn in jaxpr.jaxpr.eqns
    if eqn.primitive.name == 'scan'
  ]


@pytest.mark.parametrize('clip', [None, 12.0])
@pytest.mark.parametrize('name', FORMS)
def test_forms_of_the_state_take_the_whole_steps(name, clip):
  tx = optimizer(name)
  found = trajectory(
    lambda params: layerwise.make_train_step(
      PIECES, tx, params, clip_global_norm=clip
    ),
    tx,
    mesh_of(1),
  )
  expected = whole_trajectory(name, clip, 1)
  assert_equal(found, expected)
  # Counts of steps and refreshes, and what waits, are the same numbers.
  for (now, _), (whole, _) in zip(found, expected, strict=True):
    for x, y in zip(
      jax.tree.leaves(now.opt_state),
      jax.tree.leaves(whole.opt_state),
      strict=True,
    ):
      if x.dtype == np.int32:
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('clip', [None, 12.0])
def test_rows_of_large_matrices_are_updated_apart(monkeypatch, clip):
  monkeypatch.setattr(layerwise, 'ROW_BLOCK', 4096)
  tx = optim.split.chain(
    optimizer('galore', moment_bits=8), optim.stochastic_rounding()
  )

  def bfloat16(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  def run(rows):
    now = state.from_params(
      bfloat16(init(jax.random.key(0), vocab=1024)), tx, mesh_of(1)
    )
    train_step = layerwise.make_train_step(
      PIECES, tx, now.params, clip_global_norm=clip, row_blocks=rows
    )
    jaxpr = jax.make_jaxpr(train_step)(now, make_batch(0))
    for number in range(3):
      now, _ = jax.jit(train_step, compiler_options=COMPILER_OPTIONS)(
        now, make_batch(number)
      )
    return jax.device_get(now), loop_lengths(jaxpr)

  (apart, lengths), (whole, whole_lengths) = run(True), run(False)
  # Eight parts of the embedding and of the head, the last one by itself.
  assert lengths.count(7) == 2
  assert 7 not in whole_lengths
  # Another program rounds here and there in the last digit, which now and then
  # takes a random number to the other side.
  for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(whole), strict=True):
    close = np.isclose(a.astype(float), b.astype(float), rtol=1e-6, atol=0)
    assert np.mean(close) > 0.999


def test_rows_of_adafactor_stay_together(monkeypatch):
  monkeypatch.setattr(layerwise, 'ROW_BLOCK', 256)
  tx = optimizer('galore_adafactor')
  train_step = layerwise.make_train_step(
    PIECES, tx, init(jax.random.key(0)), row_blocks=True
  )
  now = state.from_params(init(jax.random.key(0)), tx, mesh_of(1))
  jaxpr = jax.make_jaxpr(train_step)(now, make_batch(0))
  assert 7 not in loop_lengths(jaxpr)


# What waits.


def projected_by_hand(tx, k, clip):
  """Sums projected gradients of the whole model, without the engine."""
  grad_fn = jax.grad(whole_loss, has_aux=True)

  @jax.jit
  def train_step(now, batch):
    params, opt = now.params, now.opt_state
    total, weight = None, 0.0
    for number in range(k):
      rows = jax.tree.map(lambda x, n=number: x[n::k], batch)
      grads, weights = grad_fn(params, rows)
      small, opt = tx.project(grads, opt, params, due=number == 0)
      total = small if total is None else jax.tree.map(jnp.add, total, small)
      weight += weights
    small = jax.tree.map(lambda x: x / weight, total)
    norm = optax.tree.norm(small)
    factor = 1.0 if clip is None else jnp.minimum(1.0, clip / norm)
    small = jax.tree.map(lambda x: x * factor, small)
    updates, opt = tx.apply(small, opt, params)
    params = optax.apply_updates(params, updates)
    return state.TrainState(now.step + 1, now.skipped, params, opt), {
      'grad_norm': norm
    }

  return train_step


@pytest.mark.parametrize(
  ('name', 'clip', 'k', 'mesh'),
  [
    ('gradnormlorp', 6.0, 2, (1, 1)),
    ('gradnormlorp', 6.0, 2, (4, 1)),
    ('gradnormlorp', None, 1, (2, 2)),
    ('galore_adafactor', None, 2, (4, 1)),
    ('vlorp', 6.0, 2, (4, 1)),
  ],
)
def test_projected_gradients_are_summed_over_batches_and_devices(
  name, clip, k, mesh
):
  tx = optimizer(name)
  mesh = mesh_of(*mesh)

  found = trajectory(
    lambda params: layerwise.make_train_step(
      PIECES,
      tx,
      params,
      num_micro_batches=k,
      clip_global_norm=clip,
      accumulate='projected',
      mesh=mesh,
    ),
    tx,
    mesh,
  )
  by_hand = projected_by_hand(tx, k, clip)
  now = state.from_params(init(jax.random.key(0)), tx, mesh_of(1))
  expected = []
  for number in range(STEPS):
    now, metrics = by_hand(now, make_batch(number))
    expected.append(jax.device_get((now, metrics)))
  if clip is not None:
    assert clip < max(metrics['grad_norm'] for _, metrics in expected)
  assert_equal(found, expected)


def test_optimizers_that_need_the_gradient_are_not_summed_projected():
  for name in ('apollo', 'fira', 'ldadam', 'adamw'):
    with pytest.raises(ValueError) as error:
      layerwise.make_train_step(
        PIECES,
        optimizer(name),
        init(jax.random.key(0)),
        accumulate='projected',
      )
    assert str(error.value) == (
      "accumulate='projected' keeps nothing of a gradient but its projection, "
      "and this optimizer needs all of it. Use accumulate='gradient'."
    )


def test_moments_that_a_refresh_leaves_keep_their_codes():
  # The largest entry of a block is negative: encoded anew it would shrink.
  tx = optim.quantize_moments(
    optim.galore(
      1e-2, moments_on_refresh='rotate', skip_nonfinite=False, **LOW_RANK
    ),
    4,
    min_size=64,
  )
  params = init(jax.random.key(0))
  now = tx.init(params)
  for number in range(3):
    grads = jax.grad(whole_loss, has_aux=True)(params, make_batch(number))[0]
    _, now = tx.update(grads, now, params)
  _, same = jax.jit(tx.project, static_argnames='due')(
    grads, now, params, due=False
  )
  jax.tree.map(np.testing.assert_array_equal, same, now)


# What goes wrong.


@pytest.mark.parametrize('clip', [None, 12.0])
def test_a_bad_gradient_is_left_out(clip):
  tx = optimizer('gradnormlorp')

  def run(bad):
    now = state.from_params(init(jax.random.key(0)), tx, mesh_of(1))
    train_step = jax.jit(
      layerwise.make_train_step(PIECES, tx, now.params, clip_global_norm=clip),
      compiler_options=COMPILER_OPTIONS,
    )
    rows = []
    for number in range(4):
      batch = make_batch(0 if bad and number == 1 else number)
      if bad and number == 1:
        batch['weights'] = batch['weights'] * np.float32('nan')
      if bad or number != 1:
        now, metrics = train_step(now, batch)
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


def test_what_moved_before_a_bad_gradient_is_reported():
  tx = optimizer('galore')
  params = init(jax.random.key(0))

  @jax.custom_vjp
  def read(table):
    return table

  read.defvjp(lambda table: (table, None), lambda _, g: (g * jnp.nan,))

  def embed_badly(params, batch):
    return read(params['embed']['embedding'])[batch['inputs']]

  train_step = layerwise.make_train_step(
    PIECES._replace(embed=embed_badly), tx, params
  )
  now = state.from_params(params, tx, mesh_of(1))
  after, metrics = jax.jit(train_step)(now, make_batch(0))
  assert metrics['skipped_steps'] == 1
  assert metrics['update_norm'] > 0
  before, moved = now.params, after.params
  np.testing.assert_array_equal(
    before['embed']['embedding'], moved['embed']['embedding']
  )
  assert np.any(before['head']['kernel'] != moved['head']['kernel'])
  assert np.isfinite(metrics['weight_norm'])


def test_frozen_kernels_in_8_bits_are_not_rounded_anew():
  weights = optim.quantized_weights

  def load(tree):
    return weights.dequantize_weights(tree, jnp.float32)

  def store(new, old, number, first):
    key = jax.random.fold_in(jax.random.key(0), number)
    return weights.requantize_weights(new, old, jax.random.fold_in(key, first))

  tx = optimizer('decayed, frozen')
  params = init(jax.random.key(0))
  stored = {**params, 'layers': weights.quantize_weights(params['layers'])}
  train_step = layerwise.make_train_step(
    PIECES, tx, stored, storage=passes.Storage(load, load, store)
  )
  zero = jnp.zeros((), jnp.int32)
  now = state.TrainState(zero, zero, stored, tx.init(params))
  after, _ = jax.jit(train_step)(now, make_batch(0))
  before, after = stored['layers'], after.params['layers']
  jax.tree.map(np.testing.assert_array_equal, before['down'], after['down'])
  assert np.any(before['up']['kernel'].codes != after['up']['kernel'].codes)


def test_projected_matrices_around_the_layers_stay_whole(monkeypatch):
  monkeypatch.setattr(layerwise, 'ROW_BLOCK', 256)
  rules = [('head|kernel', 'low_rank'), ('.*', 'full')]
  tx = optimizer('galore', param_labels=rules)
  params = init(jax.random.key(0))
  now = state.from_params(params, tx, mesh_of(1))
  train_step = layerwise.make_train_step(PIECES, tx, params, row_blocks=True)
  lengths = loop_lengths(jax.make_jaxpr(train_step)(now, make_batch(0)))
  assert lengths.count(7) == 1  # The embedding's alone.


def test_one_layer_is_a_stack_too():
  tx = optimizer('gradnormlorp')
  params = init(jax.random.key(0), layers=1)
  found, expected = (
    jax.jit(make_step)(state.from_params(params, tx, mesh_of(1)), make_batch(0))
    for make_step in (
      layerwise.make_train_step(PIECES, tx, params, clip_global_norm=12.0),
      step.make_train_step(
        functools.partial(whole_loss, layers=1), tx, clip_global_norm=12.0
      ),
    )
  )
  assert_equal([found], [expected])


def test_parameters_must_be_stacked():
  with pytest.raises(ValueError) as error:
    layerwise.make_train_step(PIECES, optax.sgd(1.0), {'kernel': jnp.ones(3)})
  assert str(error.value) == (
    "Parameters must be a dict with the key 'layers', stacked [L, ...], and "
    "others, to be trained layer by layer; got ['kernel']."
  )
  with pytest.raises(
    ValueError, match=r'the first axes are \[\(2,\), \(3,\)\]'
  ):
    layerwise.make_train_step(
      PIECES,
      optax.sgd(1.0),
      {'layers': {'a': jnp.ones((2, 4)), 'b': jnp.ones((3, 4))}, 'x': 1},
    )


def test_state_must_be_cut_into_layers():
  params = init(jax.random.key(0))
  params['layers']['shift'] = jnp.ones((LAYERS, 4000))
  tx = optim.quantize_moments(optax.adam(1e-3), 8)
  with pytest.raises(ValueError) as error:
    layerwise.make_train_step(PIECES, tx, params)
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
def test_unknown_choices_are_named(options, message):
  with pytest.raises(ValueError) as error:
    layerwise.make_train_step(
      PIECES, optax.sgd(1.0), init(jax.random.key(0)), **options
    )
  assert str(error.value) == message


def test_micro_batches_must_be_positive():
  with pytest.raises(
    ValueError, match='num_micro_batches=0 must be at least 1'
  ):
    layerwise.make_train_step(
      PIECES, optax.sgd(1.0), init(jax.random.key(0)), num_micro_batches=0
    )


def test_loss_for_evaluation_is_that_of_the_whole_model():
  params = init(jax.random.key(0))
  batch = make_batch(0)
  found = jax.jit(passes.make_loss_fn(PIECES))(params, batch)
  np.testing.assert_allclose(found, whole_loss(params, batch), rtol=1e-6)
