"""Steps of some layers at a time.

Shape suffixes in this file: B sequences, T positions, D features, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.parts.hyperparams import inject_hyperparams
from gnlorp_jax.training import layer_sampling, layerwise, parameters, state
from gnlorp_jax.training.layer_sampling import LayerSampling
from gnlorp_jax.training.layerwise import passes, sampled
from gnlorp_jax.training.step import split_rows

KEY = jax.random.key(7)
RATE = 3e-2
ADAM = {'b1': 0.9, 'b2': 0.99, 'eps': 1e-3, 'weight_decay': 0.1}
# A gap that no period of the samplings below is a multiple of.
RANK, GAP, SCALE = 4, 2, 0.5
GALORE = functools.partial(
  optim.galore,
  rank=RANK,
  update_proj_gap=GAP,
  scale=SCALE,
  projection=optim.projections.get('svd', solver='exact'),
  spread_refreshes=False,
  param_labels=[('layers/.*kernel', 'low_rank'), ('.*', 'full')],
  **ADAM,
)


def with_rate(make, **options):
  return inject_hyperparams(
    lambda learning_rate: make(learning_rate, skip_nonfinite=False, **options),
    learning_rate=0.0,
  )


def constant(count, numbers):
  return numbers['peak']


def placed(opt_state):
  """Shardings of an optimizer's state: what rests lies on the host."""
  device, host = (
    jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    for kind in ('device', 'pinned_host')
  )
  places = jax.tree.map(lambda leaf: device, opt_state)
  resting = jax.tree.map(lambda leaf: host, opt_state.resting)
  return places._replace(resting=resting)


def trajectory(toy, tx, sampling, steps, trained=None, frozen=None, **options):
  """States and metrics after every step, on the host."""
  trained = toy.init() if trained is None else trained
  frozen = frozen or {}
  held = parameters.plain(trained, frozen)
  numbers = {'peak': jnp.float32(RATE)}

  def init(params):
    return sampled.init(tx, held, sampling, params, numbers, KEY)

  places = placed(jax.eval_shape(init, trained))
  opt = jax.jit(init, out_shardings=places)(trained)
  zero = jnp.zeros((), jnp.int32)
  now = jax.device_put(
    state.TrainState(zero, zero, trained, opt),
    state.TrainState(*[places.key] * 3, places),
  )
  step = jax.jit(
    sampled.make_sampled_step(
      toy.PIECES, tx, held, sampling, constant, **options
    ),
    out_shardings=(state.TrainState(*[places.key] * 3, places), None),
  )
  seen = []
  for number in range(steps):
    now, metrics = step(now, toy.make_batch(number), frozen)
    seen.append(jax.device_get((now, metrics)))
  assert step._cache_size() == 1
  return seen


def plain_trajectory(toy, tx, steps, **options):
  held = parameters.plain(toy.init())
  zero = jnp.zeros((), jnp.int32)
  opt = tx.init(toy.init())
  opt = opt._replace(hyperparams={'learning_rate': jnp.float32(RATE)})
  now = state.TrainState(zero, zero, toy.init(), opt)
  step = jax.jit(layerwise.make_train_step(toy.PIECES, tx, held, **options))
  seen = []
  for number in range(steps):
    now, metrics = step(now, toy.make_batch(number))
    seen.append(jax.device_get((now, metrics)))
  return seen


LOW_RANK = {'rank': 8, 'update_proj_gap': 3, 'spread_refreshes': False}
CLIPPED = {'num_micro_batches': 2, 'clip_global_norm': 12.0}


@pytest.mark.parametrize(
  ('make', 'options'),
  [
    (functools.partial(optim.adamw, **ADAM), {}),
    pytest.param(
      functools.partial(optim.gradnormlorp, **LOW_RANK),
      CLIPPED,
      marks=pytest.mark.slow,
    ),
    # Without a state of kernels.
    pytest.param(optim.scale, {}, marks=pytest.mark.slow),
  ],
  ids=['adamw', 'gradnormlorp, clipped', 'scale'],
)
def test_all_layers_at_a_time_are_the_plain_steps(toy, make, options):
  """Bit for bit, over three periods."""
  tx = with_rate(make)
  plain = plain_trajectory(toy, tx, 5, clipping='recompute', **options)
  sampling = LayerSampling(num_layers=toy.LAYERS, layers=toy.LAYERS, every=2)
  found = trajectory(toy, tx, sampling, 5, **options)
  for (a, a_metrics), (b, b_metrics) in zip(found, plain, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a_metrics == b_metrics


class Carry(NamedTuple):
  """What a backward pass hands on here."""

  params: Any
  found: dict[tuple[str, ...], jax.Array]
  visits: Any


@pytest.mark.parametrize(
  ('layers', 'trains_embedding'), [((0, 2), True), ((2,), False)]
)
def test_gradients_are_slices_of_all_gradients(toy, layers, trains_embedding):
  params = toy.init()
  batch = toy.make_batch(0)
  is_drawn_L = jnp.zeros(toy.LAYERS, bool).at[jnp.array(layers)].set(True)

  def backward(drawn):
    through = passes.Passes(
      toy.PIECES, parameters.plain(params), toy.LAYERS, offload=False
    )
    kept = through.forward(params, {}, split_rows(batch, 2))
    head = through.head(params, kept)

    def visit(layer, grads, carry):
      found = {
        path: carry.found[path].at[layer].set(grads[path][0]) for path in grads
      }
      return carry._replace(found=found, visits=carry.visits + 1)

    found = {
      ('layers', kind, name): jnp.zeros_like(x)
      for kind, leaves in params['layers'].items()
      for name, x in leaves.items()
    }
    carry = Carry(params, found, 0)
    carry, dx = through.backward(
      visit, carry, kept, head.dx_KBTD, jnp.float32(1), drawn
    )
    return carry.found, carry.visits, dx

  everything, _, dx = jax.jit(lambda: backward(None))()
  some, visits, some_dx = jax.jit(
    lambda: backward(
      passes.Drawn(jnp.array(layers), to_bottom=trains_embedding)
    )
  )()
  assert visits == len(layers)
  for path, full in everything.items():
    # Two programs, whose sums some CPUs add up in another order.
    np.testing.assert_allclose(
      some[path][is_drawn_L],
      full[is_drawn_L],
      rtol=0,
      atol=1e-6 * jnp.abs(full).max(),
      err_msg=str(path),
    )
    assert not some[path][~is_drawn_L].any()
  if trains_embedding:
    np.testing.assert_allclose(
      some_dx, dx, rtol=0, atol=1e-6 * jnp.abs(dx).max()
    )
  grads = jax.grad(lambda p: toy.whole_loss(p, batch)[0])(params)
  for (_, kind, name), full in everything.items():
    np.testing.assert_allclose(
      full, grads['layers'][kind][name], rtol=2e-4, atol=1e-4
    )


class ByHand:
  """Adam of some layers at a time in NumPy, its gradients those of the whole.

  Of each array, or layer of one, it holds moments and a count of its own.
  """

  def __init__(self, toy, sampling):
    self.toy, self.sampling = toy, sampling
    self.params = jax.device_get(toy.init())
    self.states = {}
    self.layers = ()
    self.grad = jax.jit(
      jax.grad(
        lambda p, batch: (lambda sums: sums[0] / sums[1])(
          toy.whole_loss(p, batch)
        )
      )
    )

  def begin_period(self, period):
    before, sampling = self.layers, self.sampling
    self.layers = tuple(
      np.asarray(layer_sampling.draw(sampling, KEY, period)).tolist()
    )
    if sampling.on_leave == 'keep':
      return
    stay = set(before) & set(self.layers) if sampling.carry else set()
    self.states = {
      name: found
      for name, found in self.states.items()
      if (
        name[-1] in stay
        if isinstance(name[-1], int)
        else not sampling.reset_always
      )
    }

  def step(self, number):
    sampling = self.sampling
    shifted = number + sampling.first_period_short
    if number == 0 or shifted % sampling.every == 0:
      self.begin_period(shifted // sampling.every)
    grads = jax.device_get(self.grad(self.params, self.toy.make_batch(number)))
    rate = RATE
    for kind, leaves in self.params.items():
      if kind == 'layers':
        continue
      for name, x in leaves.items():
        leaves[name] = self.move((kind, name), x, grads[kind][name], rate)
    done = shifted % sampling.every
    if shifted < sampling.every:
      done -= sampling.first_period_short
    if sampling.warmup_steps:
      rate *= min(1.0, (done + 1) / sampling.warmup_steps)
    for kind, leaves in self.params['layers'].items():
      for name, x_L in leaves.items():
        x_L = np.array(x_L)
        for layer in self.layers:
          g = grads['layers'][kind][name][layer]
          x_L[layer] = self.move((kind, name, layer), x_L[layer], g, rate)
        leaves[name] = x_L

  def move(self, name, x, g, rate):
    x, g = np.float64(x), np.float64(g)
    m, v, count = self.states.get(name, (0.0, 0.0, 0))
    m = ADAM['b1'] * m + (1 - ADAM['b1']) * g
    v = ADAM['b2'] * v + (1 - ADAM['b2']) * g * g
    count += 1
    self.states[name] = (m, v, count)
    m_hat = m / (1 - ADAM['b1'] ** count)
    v_hat = v / (1 - ADAM['b2'] ** count)
    x = x - rate * ADAM['weight_decay'] * x
    return np.float32(x - rate * m_hat / (np.sqrt(v_hat) + ADAM['eps']))


class GaLoreByHand(ByHand):
  """GaLore of some layers at a time: counts and bases are a layer's own."""

  def move(self, name, x, g, rate):
    x, g = np.float64(x), np.float64(g)
    m, v, count, basis = self.states.get(name, (0.0, 0.0, 0, None))
    is_projected = len(name) == 3 and name[1] == 'kernel'
    if is_projected:  # The shorter side of an (in, out) kernel.
      is_wide = g.shape[0] < g.shape[1]
      if count % GAP == 0:
        left, _, right = np.linalg.svd(g, full_matrices=False)
        basis = left[:, :RANK].T if is_wide else right[:RANK]
        largest = np.abs(basis).argmax(axis=1)
        basis = basis * np.sign(basis[np.arange(RANK), largest])[:, None]
      g = basis @ g if is_wide else g @ basis.T
    m = ADAM['b1'] * m + (1 - ADAM['b1']) * g
    v = ADAM['b2'] * v + (1 - ADAM['b2']) * g * g
    count += 1
    self.states[name] = (m, v, count, basis)
    direction = m / (np.sqrt(v) + ADAM['eps'])
    if is_projected:
      direction = basis.T @ direction if is_wide else direction @ basis
      direction *= SCALE
    step = np.sqrt(1 - ADAM['b2'] ** count) / (1 - ADAM['b1'] ** count)
    x = (x - rate * step * direction) * (1 - rate * ADAM['weight_decay'])
    return np.float32(x)


SAMPLINGS = {
  'drop': {'layers': 2},
  'lisa, all states anew': {'layers': 2, 'carry': False, 'reset_always': True},
  'keep, re-warmed': {'layers': 1, 'on_leave': 'keep', 'warmup_steps': 2},
  'badam': {'layers': 1, 'draw': 'shuffled', 'first_period_short': True},
  'owlore, kept': {
    'layers': 2,
    'on_leave': 'keep',
    'weights': (0.5, 0.2, 0.3),
  },
}


@pytest.mark.parametrize(
  ('name', 'at_once'),
  list(zip(SAMPLINGS, (True, False, True, False, False), strict=True)),
)
def test_steps_are_those_by_hand(toy, name, at_once):
  sampling = LayerSampling(num_layers=toy.LAYERS, every=3, **SAMPLINGS[name])
  is_galore = name.startswith('owlore')
  tx = with_rate(
    GALORE if is_galore else functools.partial(optim.adamw, **ADAM)
  )
  found = trajectory(toy, tx, sampling, 11, at_once=at_once)
  hand = (GaLoreByHand if is_galore else ByHand)(toy, sampling)
  before = jax.device_get(toy.init())
  slots = sampling.layers if sampling.on_leave == 'drop' else toy.LAYERS
  for number, (now, _) in enumerate(found):
    hand.step(number)
    assert sorted(now.opt_state.layers) == list(hand.layers)
    for path, x in jax.tree_util.tree_leaves_with_path(now.params):
      y = functools.reduce(lambda tree, key: tree[key.key], path, hand.params)
      np.testing.assert_allclose(
        x, y, rtol=0, atol=1e-5, err_msg=f'{number} {path}'
      )
    left = [i for i in range(toy.LAYERS) if i not in hand.layers]
    for x, y in zip(
      jax.tree.leaves(now.params['layers']),
      jax.tree.leaves(before['layers']),
      strict=True,
    ):
      np.testing.assert_array_equal(x[left], y[left])
    before = now.params
    # Adam turns roundings of a gradient near zero into steps: they must not
    # add up.
    hand.params = jax.tree.map(np.array, now.params)
  for leaf in jax.tree.leaves(now.opt_state.slots):
    assert leaf.shape[0] == slots
  assert now.opt_state.visits.sum() == 11 * sampling.layers


@pytest.mark.parametrize('every', [1, 2])
def test_states_that_rest_on_the_host_are_those_that_are_kept(toy, every):
  """Bit for bit; a layer may leave and come back at once."""
  tx = with_rate(GALORE)
  options = {'num_layers': toy.LAYERS, 'layers': 2, 'every': every}
  kept, offloaded = (
    trajectory(toy, tx, LayerSampling(**options, on_leave=on_leave), 7)
    for on_leave in ('keep', 'offload')
  )
  for (a, a_metrics), (b, b_metrics) in zip(kept, offloaded, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a_metrics == b_metrics
    found, expected = b.opt_state, a.opt_state
    for slot, layer in enumerate(found.layers):
      jax.tree.map(
        lambda x, y, slot=slot, layer=layer: np.testing.assert_array_equal(
          x[slot], y[layer]
        ),
        *(found.slots, expected.slots),
      )
    resting = sorted(set(range(toy.LAYERS)) - set(found.layers.tolist()))
    for x, y in zip(
      jax.tree.leaves(found.resting),
      jax.tree.leaves(expected.slots),
      strict=True,
    ):
      if x.shape != (toy.LAYERS,):  # Kept states are all told of a new rate.
        np.testing.assert_array_equal(x[resting], y[resting])


@pytest.mark.slow
def test_gathered_and_clipped_steps_are_those_at_once(toy, monkeypatch):
  """Over a step whose gradient is no number, too."""
  sampling = LayerSampling(num_layers=toy.LAYERS, layers=2, every=2)
  tx = with_rate(functools.partial(optim.adamw, **ADAM))
  make_batch = toy.make_batch

  def batch(number):
    found = make_batch(number)
    if number == 2:  # The first of a period.
      found['weights'] = found['weights'] * np.float32(np.nan)
    return found

  monkeypatch.setattr(toy, 'make_batch', batch)
  options = {'num_micro_batches': 2, 'clip_global_norm': 3.0}
  at_once, gathered = (
    trajectory(toy, tx, sampling, 5, at_once=is_at_once, **options)
    for is_at_once in (True, False)
  )
  assert at_once[0][1]['grad_norm'] > 3
  for (a, a_metrics), (b, b_metrics) in zip(at_once, gathered, strict=True):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
      *(a.params, b.params),
    )
    np.testing.assert_array_equal(a.opt_state.layers, b.opt_state.layers)
    assert a_metrics['skipped_steps'] == b_metrics['skipped_steps']
  before, bad = at_once[1][0], at_once[2][0]
  jax.tree.map(np.testing.assert_array_equal, before.params, bad.params)
  assert at_once[-1][1]['skipped_steps'] == 1
  assert at_once[-1][0].opt_state.visits.sum() == 2 * 4


def test_layers_draw_random_numbers_of_their_own():
  state = {'seed': jnp.zeros(2, jnp.uint32), 'mu': jnp.ones(3)}
  found = [
    layer_sampling.reseed(state, layer, step)
    for layer, step in ((0, 0), (1, 0), (0, 4))
  ]
  assert len({tuple(np.asarray(x['seed']).tolist()) for x in found}) == 3
  for x in found:
    np.testing.assert_array_equal(x['mu'], state['mu'])


@pytest.mark.slow
def test_a_layer_that_comes_back_has_another_random_subspace(toy):
  sampling = LayerSampling(
    num_layers=toy.LAYERS, layers=1, every=1, draw='shuffled', carry=False
  )
  tx = with_rate(
    functools.partial(
      optim.galore, rank=4, update_proj_gap=50, projection='random'
    )
  )
  seen = set()
  for now, _ in trajectory(toy, tx, sampling, 6):
    words = [
      x for x in jax.tree.leaves(now.opt_state.slots) if x.dtype == np.uint32
    ]
    seen.add(tuple(int(x.reshape(-1)[0]) for x in words))
  assert len(seen) == 6


def torch_adamw(torch, monkeypatch):
  del monkeypatch
  betas = ADAM['b1'], ADAM['b2']
  return lambda kernels, others: torch.optim.AdamW(
    *([*kernels, *others], RATE, betas, ADAM['eps'], ADAM['weight_decay'])
  )


def torch_galore(torch, monkeypatch):
  del torch
  projector = pytest.importorskip('galore_torch.galore_projector')
  GaLoreAdamW = pytest.importorskip('galore_torch').GaLoreAdamW
  find = projector.GaLoreProjector.get_orthogonal_matrix

  def signed(self, weights, rank, type):
    """Which signs LAPACK returns is arbitrary."""
    basis, axis = find(self, weights, rank, type), int(type == 'right')
    index = basis.abs().argmax(axis, keepdim=True)
    return basis * basis.gather(axis, index).sign()

  monkeypatch.setattr(
    projector.GaLoreProjector, 'get_orthogonal_matrix', signed
  )
  options = {'rank': RANK, 'update_proj_gap': GAP, 'scale': SCALE}
  return lambda kernels, others: GaLoreAdamW(
    [
      {'params': kernels, 'proj_type': 'std', **options},
      {'params': others},
    ],
    lr=RATE,
    betas=(ADAM['b1'], ADAM['b2']),
    eps=ADAM['eps'],
    weight_decay=ADAM['weight_decay'],
    no_deprecation_warning=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('make', 'make_torch'),
  [
    (functools.partial(optim.adamw, **ADAM), torch_adamw),
    (GALORE, torch_galore),
  ],
  ids=['adamw', 'owlore'],
)
def test_kept_states_are_those_of_a_loop_in_pytorch(
  toy, make, make_torch, monkeypatch
):
  """A loop that switches `requires_grad`; optimizers skip what has no grad."""
  torch = pytest.importorskip('torch')
  sampling = LayerSampling(
    num_layers=toy.LAYERS, layers=1, every=3, on_leave='keep'
  )
  found = trajectory(toy, with_rate(make), sampling, 9)

  def tensor(x):
    return torch.tensor(np.asarray(x), requires_grad=True)

  params = jax.device_get(toy.init())
  embed, head = (
    tensor(params['embed']['embedding']),
    tensor(params['head']['kernel']),
  )
  layers = [
    jax.tree.map(lambda x, i=i: tensor(x[i]), params['layers'])
    for i in range(toy.LAYERS)
  ]
  optimizer = make_torch(torch, monkeypatch)(
    [layer[name]['kernel'] for layer in layers for name in ('up', 'down')],
    [embed, head, *(layer['norm']['scale'] for layer in layers)],
  )
  for number, (now, _) in enumerate(found):
    period = number // sampling.every
    drawn = np.asarray(layer_sampling.draw(sampling, KEY, period)).tolist()
    for i, layer in enumerate(layers):
      for x in jax.tree.leaves(layer):
        x.requires_grad_(i in drawn)
    batch = {k: torch.tensor(v) for k, v in toy.make_batch(number).items()}
    x = embed[batch['inputs'].long()]
    for layer in layers:
      y = x * (1 + layer['norm']['scale'])
      hidden = torch.nn.functional.silu(y @ layer['up']['kernel'])
      x = x + hidden @ layer['down']['kernel']
    losses = torch.nn.functional.cross_entropy(
      (x @ head).flatten(0, 1),
      batch['targets'].long().flatten(),
      reduction='none',
    )
    weights = batch['weights'].flatten()
    optimizer.zero_grad()
    ((losses * weights).sum() / weights.sum()).backward()
    optimizer.step()
    for i, layer in enumerate(layers):
      np.testing.assert_allclose(
        now.params['layers']['up']['kernel'][i],
        layer['up']['kernel'].detach(),
        rtol=0,
        atol=1e-4,
        err_msg=f'step {number}, layer {i}',
      )
  np.testing.assert_allclose(
    now.params['head']['kernel'], head.detach(), rtol=0, atol=1e-4
  )
  assert now.opt_state.visits.sum() == 9


@pytest.mark.slow
def test_temporaries_do_not_grow_by_undrawn_layers(toy):
  """Beside the inputs of the blocks: no gradient, no state of a layer."""
  tx = with_rate(functools.partial(optim.adamw, **ADAM))

  def temporaries(layers):
    params = jax.eval_shape(lambda: toy.init(layers=layers))
    sampling = LayerSampling(num_layers=layers, layers=2, every=3)
    held = parameters.plain(params)
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    opt = jax.eval_shape(
      lambda params: sampled.init(
        tx, held, sampling, params, {'peak': jnp.float32(RATE)}, KEY
      ),
      params,
    )
    step = sampled.make_sampled_step(
      toy.PIECES, tx, held, sampling, constant, at_once=False
    )
    now = state.TrainState(zero, zero, params, opt)
    lowered = jax.jit(step, donate_argnums=0).lower(now, toy.make_batch(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  growth = (temporaries(33) - temporaries(17)) / 16
  inputs = 4 * toy.BATCH * toy.POSITIONS * toy.FEATURES
  assert inputs <= growth <= inputs + 16  # A few numbers per layer.
