"""A model of three layers, optimizers, and steps side by side.

Shape suffixes in this file: B sequences, T positions, D features, F hidden
features, V vocabulary, L layers.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.quantized.weights import dequantize_weights
from gnlorp_jax.training import objectives, parameters, sharding, state

VOCAB, FEATURES, HIDDEN, LAYERS, POSITIONS, BATCH = 64, 32, 48, 3, 8, 8
STEPS, GAP = 12, 5

LOW_RANK = {'rank': 8, 'update_proj_gap': GAP}
# Adam divides by the root of the second moment: where that is near zero it
# turns roundings of a gradient into steps. A large eps does not.
EPS = {'eps': 1e-3}
SPARING = {
  'weight_decay': 0.1,
  'weight_decay_mask': optim.spare_norms_and_biases,
}
FINE = {'rank': 2, 'update_proj_gap': GAP, 'granularity': 2, **EPS}
# Each with a form of the state that a slice, or a half of a step, must carry
# along: moments that a refresh rotates or resets, tracked norms, queues of lazy
# refreshes, errors that are fed back, parameters that decay or are frozen.
TXS = {
  'adamw': functools.partial(optim.adamw, weight_decay=0.1, **EPS),
  'alice': functools.partial(optim.alice, b3=0.9, leading=4, **LOW_RANK, **EPS),
  'apollo': functools.partial(optim.apollo, **LOW_RANK, **EPS),
  'apollo_mini': functools.partial(
    optim.apollo_mini, update_proj_gap=GAP, scale=4.0, **EPS
  ),
  'dct_adamw': functools.partial(
    optim.dct_adamw, error_bits=32, **LOW_RANK, **EPS
  ),
  'dct_adamw, no errors': functools.partial(
    optim.dct_adamw, error_bits=None, **LOW_RANK, **EPS
  ),
  'fira': functools.partial(optim.fira, **LOW_RANK, **EPS),
  'frugal': functools.partial(optim.frugal, **LOW_RANK, **EPS),
  'galore': functools.partial(optim.galore, **SPARING, **LOW_RANK, **EPS),
  'galore, frozen': functools.partial(
    optim.galore,
    param_labels=[('down|embed', 'frozen'), ('up', 'low_rank'), ('.*', 'full')],
    **LOW_RANK,
    **EPS,
  ),
  'galore_adafactor': functools.partial(optim.galore_adafactor, **LOW_RANK),
  'gradnormlorp': functools.partial(
    optim.gradnormlorp,
    moments_on_refresh='rotate',
    norm_state='tracked',
    **LOW_RANK,
    **EPS,
  ),
  'gradnormlorp, both sides': functools.partial(
    optim.gradnormlorp,
    moments_on_refresh='reset',
    side='both',
    **SPARING,
    **LOW_RANK,
    **EPS,
  ),
  'ldadam': functools.partial(optim.ldadam, rank=8, **EPS),
  'projfactor': functools.partial(optim.projfactor, **FINE),
  'q_galore': functools.partial(
    optim.q_galore,
    basis_bits=32,
    moment_bits=32,
    lazy_refresh=optim.LazyRefresh(threshold=-1.0, queue=1),
    **LOW_RANK,
    **EPS,
  ),
  'muon': functools.partial(optim.muon, **EPS),
  'racs': functools.partial(optim.racs, **EPS),
  'scale': functools.partial(optim.scale, **EPS),
  'sinkgd': functools.partial(optim.sinkgd, **EPS),
  'subtrack': functools.partial(optim.subtrack, **LOW_RANK, **EPS),
  'vlorp': functools.partial(optim.vlorp, **FINE),
}


def init(seed=0, layers=LAYERS, vocab=VOCAB):
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
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def in_part(**sizes):
  """One array of each kind trains: a kernel, a vector and an outer matrix.

  Compiling takes the time, and an optimizer is compiled array by array.
  """
  trained = init(**sizes)
  frozen = {'embed': trained.pop('embed')}
  frozen['layers'] = {'down': trained['layers'].pop('down')}
  return trained, frozen


def embed(params, batch):
  return params['embed']['embedding'][batch['inputs']]


def block(layer, x_BTD, batch=None, number=None):
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


def whole_loss(params, batch, frozen=None, loss=loss, layers=LAYERS):
  """The whole model in one piece: a plain loop over its layers."""
  params = parameters.join(params, frozen or {})
  x_BTD = embed(params, batch)
  for i in range(layers):
    x_BTD = block(jax.tree.map(lambda w, i=i: w[i], params['layers']), x_BTD)
  return loss(params, x_BTD, batch)


PIECES = objectives.Pieces(embed, block, loss, ('embed',))


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
  return TXS[name](3e-2, skip_nonfinite=False, **options)


def trajectory(
  make_step, tx, mesh, steps=STEPS, batch=make_batch, params=None, frozen=None
):
  """States and metrics after every step, on the host."""
  params = init() if params is None else params
  # From the host: a step that gives its state away must not take the caller's.
  now = state.from_params(jax.device_get(params), tx, mesh)
  constants = () if frozen is None else (frozen,)
  shardings = state.shardings(now)
  train_step = jax.jit(
    make_step(now.params),
    in_shardings=(
      shardings,
      sharding.batch_sharding(mesh),
      *(None for _ in constants),
    ),
    out_shardings=(shardings, None),
    donate_argnums=0,
  )
  seen = []
  for number in range(steps):
    rows = sharding.put_batch(batch(number), mesh)
    now, metrics = train_step(now, rows, *constants)
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


def loop_lengths(jaxpr):
  """Turns of the outermost loops of a program."""
  return [
    eqn.params['length']
    for eqn in jaxpr.jaxpr.eqns
    if eqn.primitive.name == 'scan'
  ]


decode = functools.partial(dequantize_weights, dtype=jnp.float32)


def held(trained, frozen=None):
  """Parameters of which some may be codes."""
  return parameters.plain(trained, frozen)._replace(decode=decode)


@pytest.fixture(scope='session')
def toy():
  """All that stands above."""
  return sys.modules[__name__]
