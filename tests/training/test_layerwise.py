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
from gnlorp_jax.training import layerwise, sharding, state, step

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


def init(key):
  """Parameters of a small model; kernels are stacked ``[L, in, out]``."""
  shapes = {
    'embed': {'embedding': (VOCAB, FEATURES)},
    'head': {'kernel': (FEATURES, VOCAB)},
    'layers': {
      'down': {'kernel': (LAYERS, HIDDEN, FEATURES)},
      'norm': {'scale': (LAYERS, FEATURES)},
      'up': {'kernel': (LAYERS, FEATURES, HIDDEN)},
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


def whole_loss(params, batch, loss=loss):
  """The whole model in one piece: a plain loop over its layers."""
  x_BTD = embed(params, batch)
  for i in range(LAYERS):
    x_BTD = block(jax.tree.map(lambda w, i=i: w[i], params['layers']), x_BTD)
  return loss(params, x_BTD, batch)


PIECES = layerwise.Pieces(embed, block, loss, ('embed',))


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


def whole(tx, clip=None, k=1, loss_fn=whole_loss):
  if clip is not None:
    tx = optax.chain(optax.clip_by_global_norm(clip), tx)
  return tx, lambda params: step.make_train_step(
    loss_fn, tx, num_micro_batches=k
  )


@functools.cache
def whole_trajectory(name, clip, k):
  tx, make_step = whole(optimizer(name), clip, k)
  seen = trajectory(make_step, tx, mesh_of(1))
  if clip is not None:  # The state of the chain is that of its second link.
    seen = [
      (now._replace(opt_state=now.opt_state[1]), metrics)
      for now, metrics in seen
    ]
  return seen


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
