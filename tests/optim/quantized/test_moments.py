"""Quantised moments: 8-bit Adam of bitsandbytes, and every Optax feature."""

import functools
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import (
  adamw,
  galore,
  gradnormlorp,
  inspect,
  with_low_rank_projection,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.quantized import moments as moments_lib
from gnlorp_jax.optim.quantized.arrays import QuantizedArray, dequantize
from gnlorp_jax.optim.quantized.codecs import dynamic
from gnlorp_jax.optim.quantized.moments import quantize_moments
from gnlorp_jax.training import sharding
from gnlorp_jax.training import state as state_lib
from gnlorp_jax.training.checkpoint import Checkpointer

both_bits = pytest.mark.parametrize('bits', [8, 4])


def is_quantized(node):
  return isinstance(node, QuantizedArray)


def quantized_in(state):
  leaves = jax.tree.leaves(state, is_leaf=is_quantized)
  return [leaf for leaf in leaves if is_quantized(leaf)]


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    'layers': {'kernel': (3, 64, 128)},
    'head': (70, 100),
    'bias': (64,),
    'scalar': (),
  }
  return jax.tree.map(
    lambda shape: np.asarray(rng.standard_normal(shape), np.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def make_grads(step, params):
  """Gradients over some decades, as a function of the step."""
  rng = np.random.default_rng(100 + step)
  return jax.tree.map(
    lambda p: np.asarray(rng.standard_normal(p.shape) ** 3, p.dtype), params
  )


def compiled(tx):
  """A donating step, and how often it was compiled."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class Adam8bit:
  """`bitsandbytes.optim.Adam8bit` on NumPy arrays."""

  def __init__(self, w, **options):
    torch = pytest.importorskip('torch')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # About kernels it might download.
      bitsandbytes = pytest.importorskip('bitsandbytes')
    self._tensor = torch.tensor
    self._w = torch.nn.Parameter(torch.tensor(w))
    self._optimizer = bitsandbytes.optim.Adam8bit([self._w], **options)

  def step(self, grad):
    self._w.grad = self._tensor(grad)
    self._optimizer.step()
    return self._w.detach().numpy().copy()

  def moments(self):
    """Codes and scales of both moments, as our state holds them."""
    state = self._optimizer.state[self._w]
    return [
      (state[f'state{i}'].numpy().copy(), state[f'absmax{i}'].numpy().copy())
      for i in (1, 2)
    ]

  def values(self):
    state = self._optimizer.state[self._w]
    return [state[f'qmap{i}'].numpy().astype(np.float64) for i in (1, 2)]


def round_to_nearest(monkeypatch):
  """Lets bitsandbytes take its own path for float64, which it rounds first.

  Its compiled path for float32 finds codes by a table of 65536 cells over
  [-1, 1], too coarse for most second moments; CUDA and this one do not.
  """
  torch = pytest.importorskip('torch')
  ops = pytest.importorskip('bitsandbytes.backends.cpu.ops')

  def encode(x, code, absmax_out, out, blocksize):
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(
      x.double(), code, blocksize
    )
    out.copy_(codes)
    absmax_out.copy_(absmax)

  monkeypatch.setattr(ops, '_quant_blockwise_fp32_direct', encode)


@pytest.fixture
def without_floor(monkeypatch):
  """Second moments may become 0, as in bitsandbytes."""
  codecs = moments_lib._CODECS[8]
  monkeypatch.setitem(codecs, 'nu', dynamic(8, signed=False))


ADAM = {'betas': (0.9, 0.99), 'eps': 1e-6, 'lr': 1e-2}
SHAPES = [(64, 96), (67, 100), (5000,)]


def our_adam8bit():
  b1, b2 = ADAM['betas']
  inner = scale_by_adam(b1, b2, ADAM['eps'], eps_mode='standard')
  return optax.chain(
    quantize_moments(inner, 8), optax.scale_by_learning_rate(ADAM['lr'])
  )


@pytest.mark.parametrize('shape', SHAPES)
def test_free_running_adam8bit_follows_bitsandbytes(
  shape, monkeypatch, without_floor
):
  rng = np.random.default_rng(0)
  w = rng.standard_normal(shape).astype(np.float32)
  theirs = Adam8bit(w, **ADAM)
  round_to_nearest(monkeypatch)
  tx = our_adam8bit()
  params = jnp.asarray(w)
  state = jax.jit(tx.init)(params)
  step = compiled(tx)
  flipped = np.zeros(shape, bool)
  flips = 0
  for t in range(20):
    g = rng.standard_normal(shape).astype(np.float32) * np.float32(
      1 + np.sin(t)
    )
    params, state = step(params, state, jnp.asarray(g))
    expected = theirs.step(g)
    for ours, (codes, scale) in zip(
      (state[0].mu, state[0].nu), theirs.moments(), strict=True
    ):
      # A few roundings per step, of which the scale keeps a trace.
      np.testing.assert_allclose(ours.scale, scale, rtol=2e-6)
      differ = np.asarray(ours.codes) != codes
      apart = np.abs(np.asarray(ours.codes, int) - codes)
      assert apart[differ & ~flipped].max(initial=0) <= 1
      flips += np.sum(differ & ~flipped)
      flipped |= differ
  # Roundings of 1e-7 in a moment, with cells of 1e-2 of it, decide one code in
  # 1e5; 20 steps of two moments make 40 codes per element. Three times that.
  assert flips <= 3 * 1e-5 * 40 * params.size
  error = np.abs(np.asarray(params) - expected)
  assert error[~flipped].max() < 1e-6
  # An element on the other side of a tie has one moment off by a cell.
  assert error.max() < 20 * ADAM['lr'] * 0.1


def test_each_step_follows_bitsandbytes_as_it_is(without_floor):
  shape = (67, 100)  # The test before has other shapes.
  # Heavy tails: moments over ten decades, and some steps of more than 1.
  rng = np.random.default_rng(1)
  w = rng.standard_normal(shape).astype(np.float32)
  theirs = Adam8bit(w, **ADAM)
  tx = our_adam8bit()
  params = jnp.asarray(w)
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  cell = 2 / 65536  # Of its table, see `round_to_nearest`.
  for _ in range(20):
    g = rng.standard_normal(shape).astype(np.float32) ** 3
    updates, state = update(jnp.asarray(g), state, params)
    before, w = w, theirs.step(g)
    np.testing.assert_allclose(before + updates, w, rtol=1e-6, atol=1e-6)
    moments = []
    for ours, (codes, scale), values in zip(
      (state[0].mu, state[0].nu), theirs.moments(), theirs.values(), strict=True
    ):
      np.testing.assert_allclose(ours.scale, scale, rtol=3e-7)
      # Both codes are of values in the same cell of the table: ours lies
      # within one cell, and the error of one value, of theirs.
      at = np.asarray(ours.codes, int)
      middles = (values[1:] + values[:-1]) / 2
      low = np.concatenate([[-np.inf], middles])[codes] - cell
      high = np.concatenate([middles, [np.inf]])[codes] + cell
      assert (np.concatenate([middles, [np.inf]])[at] >= low).all()
      assert (np.concatenate([[-np.inf], middles])[at] <= high).all()
      moments.append(
        QuantizedArray(
          jnp.asarray(codes), jnp.asarray(scale), None, ours.codec, ours.shape
        )
      )
    state = (state[0]._replace(mu=moments[0], nu=moments[1]), *state[1:])


@both_bits
def test_step_uses_the_moments_before_they_are_encoded(bits):
  grads = make_grads(0, make_params())
  tx = quantize_moments(scale_by_adam(), bits)
  exact_tx = scale_by_adam()

  def first(tx):
    return jax.jit(lambda g: tx.update(g, tx.init(g)))(grads)

  exact, _ = first(exact_tx)
  updates, state = first(tx)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, exact
  )
  assert len(quantized_in(state)) == 4


def test_bits_choose_the_codecs():
  params = make_params()
  for bits, mu, nu in (
    (8, ('dynamic', 8, True, 256), ('dynamic', 8, False, 256)),
    (4, ('dynamic', 4, True, 128), ('linear', 4, False, 128)),
  ):
    state = jax.eval_shape(quantize_moments(scale_by_adam(), bits).init, params)
    for moment, expected in ((state.mu, mu), (state.nu, nu)):
      codec = moment['head'].codec
      assert expected == (codec.kind, codec.bits, codec.signed, codec.block)
    momentum = jax.eval_shape(
      quantize_moments(optax.trace(0.9), bits).init, params
    )
    assert momentum.trace['head'].codec == state.mu['head'].codec
  tx = quantize_moments(scale_by_adam(), 32)
  assert not quantized_in(jax.eval_shape(tx.init, params))


def test_small_matrices_stay_float32_however_many_are_stacked():
  params = {
    'enough': jnp.ones((2, 64, 64)),
    'small': jnp.ones((50, 63, 65)),
    'vector': jnp.ones((4096,)),
    'short': jnp.ones((4095,)),
    'half': jnp.ones((64, 64), jnp.bfloat16),
  }

  def mu_of(**options):
    tx = quantize_moments(optax.scale_by_adam(), 8, **options)
    return jax.eval_shape(tx.init, params).mu

  mu = mu_of()
  quantized = {name for name, leaf in mu.items() if is_quantized(leaf)}
  # optax keeps the moments of bfloat16 parameters in bfloat16.
  assert quantized == {'enough', 'vector'}
  mu = mu_of(min_size=1)
  assert is_quantized(mu['small']) and not is_quantized(mu['half'])


@pytest.mark.parametrize(
  ('bits', 'per_matrix'),
  # Codes, and four bytes per block of 256 or 128.
  [(8, 64 * 128 + 4 * 32), (4, 64 * 128 // 2 + 4 * 64)],
)
def test_state_bytes_are_exact_and_count_as_moments(bits, per_matrix):
  params = {'kernel': jnp.ones((3, 64, 128)), 'bias': jnp.ones(64)}
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), quantize_moments(optax.adamw(1e-3), bits)
  )
  shapes = jax.eval_shape(tx.init, params)
  count = inspect.state_bytes(shapes)
  assert count['moments'] == 2 * (3 * per_matrix + 4 * 64)
  assert count == inspect.state_bytes(jax.jit(tx.init)(params))


@pytest.mark.parametrize(('alias', 'bits'), [(galore, 8), (gradnormlorp, 4)])
def test_moments_are_found_deep_inside_an_optimizer(alias, bits):
  params = make_params()
  tx = quantize_moments(alias(1e-2, rank=64), bits)
  state = jax.jit(tx.init)(params)
  # Both moments of both kernels in their subspaces; all else is small.
  assert len(quantized_in(state)) == 4
  step = compiled(tx)
  new = jax.tree.map(jnp.asarray, params)
  for t in range(3):
    new, state = step(new, state, make_grads(t, params))
  assert len(quantized_in(state)) == 4
  for leaf in jax.tree.leaves((new, state)):
    assert np.isfinite(leaf).all()


@both_bits
def test_stack_equals_each_matrix_by_itself(bits):
  params = make_params()['layers']
  tx = quantize_moments(scale_by_adam(), bits)
  init, update = jax.jit(tx.init), jax.jit(tx.update)
  state = init(params)
  alone = init(jax.tree.map(lambda p: p[1], params))
  for t in range(3):
    grads = make_grads(t, params)
    updates, state = update(grads, state)
    expected, alone = update(jax.tree.map(lambda g: g[1], grads), alone)
    np.testing.assert_allclose(
      np.asarray(updates['kernel'])[1], expected['kernel'], rtol=1e-6
    )
  np.testing.assert_array_equal(
    np.asarray(state.mu['kernel'].codes)[1], alone.mu['kernel'].codes
  )


@both_bits
def test_donated_step_compiles_once(bits):
  params = jax.tree.map(jnp.asarray, make_params())
  tx = quantize_moments(optax.adamw(1e-3), bits)
  state = jax.jit(tx.init)(params)
  step = compiled(tx)
  for t in range(3):
    grads = make_grads(t, params)
    given, (params, state) = state, step(params, state, grads)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  assert step._cache_size() == 1


def test_map_params_and_injected_hyperparameters():
  params = make_params()
  tx = quantize_moments(optax.adamw(1e-3), 8)
  state = jax.jit(tx.init)(params)
  assert_same_bits(optax.tree.map_params(tx, lambda x: x, state), state)
  names = jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path), params
  )
  named = optax.tree.map_params(
    tx, lambda _, name: name, state, names, is_leaf=is_quantized
  )
  assert named[0].nu == names

  injected = [
    quantize_moments(
      optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), 8
    ),
    optax.inject_hyperparams(
      lambda learning_rate: quantize_moments(optax.adamw(learning_rate), 8)
    )(learning_rate=1e-3),
  ]
  params = {'head': params['head']}
  grads = make_grads(0, params)

  def first(tx):
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)

  expected, _ = first(tx)
  for other in injected:
    assert len(quantized_in(jax.eval_shape(other.init, params))) == 2
    updates, _ = first(other)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
      updates,
      expected,
    )


def both_kinds():
  """Adam in 8 bits after one in 4."""
  return optax.chain(
    *(quantize_moments(scale_by_adam(), bits) for bits in (4, 8))
  )


def test_checkpoint_returns_every_bit(tmp_path):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  tx = both_kinds()
  key = jax.random.key(0)

  def init(key):
    del key
    return make_params()

  state = state_lib.create(init, tx, key, mesh)
  step = jax.jit(tx.update)
  for t in range(2):
    updates, opt_state = step(
      make_grads(t, state.params), state.opt_state, state.params
    )
    state = state._replace(opt_state=opt_state)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(2, state, {}, {}, wait=True)
  with Checkpointer(tmp_path) as checkpointer:
    restored, _, _ = checkpointer.restore_latest(
      state_lib.abstract(init, tx, key, mesh)
    )
  assert len(quantized_in(restored)) == 8
  assert_same_bits(restored, state)


def test_four_devices_equal_one():
  # The kernel's moments are split over its longer axis, 128 of 64 x 128; the
  # head's 70 x 100 over 100: neither split falls between blocks.
  rules = (('.*', sharding.shard_largest_axis('fsdp', min_size=1024)),)
  tx = both_kinds()
  params = make_params()
  grads = [make_grads(t, params) for t in range(3)]
  results = []
  for count in (1, 4):
    mesh = sharding.make_mesh(fsdp=count, devices=jax.devices()[:count])
    state = jax.jit(tx.init)(params)
    placed = sharding.infer_shardings(state, mesh, rules)
    like = sharding.infer_shardings(params, mesh, rules)
    state = jax.device_put(state, placed)
    update = jax.jit(tx.update, out_shardings=(like, placed))
    for g in grads:
      updates, state = update(jax.device_put(g, like), state)
    for adam in state:
      codes = adam.mu['layers']['kernel'].codes
      assert len(codes.addressable_shards) == count
      assert codes.addressable_shards[0].data.size * count == codes.size
    results.append((updates, state))
  (updates, state), (expected, expected_state) = results
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    updates,
    expected,
  )
  for a, b in zip(
    quantized_in(state), quantized_in(expected_state), strict=True
  ):
    # A code may differ at a tie if the moments differ in their last bit.
    assert np.mean(np.asarray(a.codes) != np.asarray(b.codes)) <= 1e-4
    np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)


@functools.cache
def regression_loss(bits, steps=300):
  """Loss of a noisy linear regression, over the loss at the start."""
  tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))
  tx = quantize_moments(tx, bits)
  rng = np.random.default_rng(0)
  target = rng.standard_normal((64, 96)).astype(np.float32)

  def loss(w, x):
    return jnp.mean((x @ (w - target)) ** 2)

  def body(t, carry):
    w, state = carry
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), (32, 64))
    # Inputs of very different sizes, as embeddings have them.
    x = x * jnp.logspace(-1, 0.5, 64)[None]
    updates, state = tx.update(jax.grad(loss)(w, x), state, w)
    return optax.apply_updates(w, updates), state

  w = np.zeros_like(target)
  w, _ = jax.jit(lambda w: jax.lax.fori_loop(0, steps, body, (w, tx.init(w))))(
    w
  )
  x = np.diag(np.logspace(-1, 0.5, 64))
  before, after = x @ target, x @ (np.asarray(w) - target)
  return np.mean(after**2) / np.mean(before**2)


@pytest.mark.parametrize(('bits', 'factor'), [(8, 1.1), (4, 4.0)])
def test_regression_trains_almost_as_with_float32(bits, factor):
  # What is left is noise, of which 4-bit codes add as much again twice: nearly
  # all of it comes from mu (with mu in 8 bits and nu in 4, 0.97 of float32's).
  # With a 4-bit code for nu that has a zero, i / 15, the loss ends 2e5 times
  # above its start. An 8-bit one, i / 255, passes: here few gradients are below
  # 1 / sqrt(510) of their block's largest, whose nu it would round to 0.
  exact = regression_loss(32)
  assert exact < 5e-4
  coarse = regression_loss(bits)
  assert coarse < factor * exact


def test_quantised_momentum_follows_float32():
  params = make_params()
  exact_tx = optax.sgd(0.1, momentum=0.9)
  tx = quantize_moments(exact_tx, 8)
  state, exact_state = jax.jit(tx.init)(params), exact_tx.init(params)
  update, exact_update = jax.jit(tx.update), jax.jit(exact_tx.update)
  for t in range(5):
    grads = make_grads(t, params)
    updates, state = update(grads, state)
    exact, exact_state = exact_update(grads, exact_state)
  assert len(quantized_in(state)) == 2
  largest = np.abs(exact['head']).max()
  # Four times half a cell of the highest decade, decayed and multiplied by lr.
  assert np.abs(updates['head'] - exact['head']).max() < (
    3.5 * 0.45 / 64 * largest
  )
  np.testing.assert_allclose(
    dequantize(state[0].trace['head']),
    -10 * updates['head'],
    atol=0.45 / 64 * 10 * largest,
  )


@pytest.mark.parametrize('bits', [16, 0, [('kernel', 8), ('.*', 5)]])
def test_other_bits_are_an_error(bits):
  with pytest.raises(ValueError) as error:
    quantize_moments(optax.adam(1e-3), bits)
  assert str(error.value) == (
    f'moment_bits must be 32, 8 or 4, or rules (regex, bits), got {bits!r}.'
  )


def test_rules_say_the_bits_of_each_parameter():
  params = {
    'embed': {'embedding': jnp.ones((64, 64))},
    'up': {'kernel': jnp.ones((64, 64))},
    'down': {'kernel': jnp.ones((64, 64))},
  }

  def bits_of(tx):
    state = jax.eval_shape(tx.init, params)
    return {
      name: leaf.codec.bits if is_quantized(leaf) else 32
      for name, tree in state.mu.items()
      for leaf in jax.tree.leaves(tree, is_leaf=is_quantized)
    }

  rules = [('up', 4), ('embed', 8)]
  tx = quantize_moments(scale_by_adam(), rules)
  assert bits_of(tx) == {'embed': 8, 'up': 4, 'down': 32}
  # They decode what they encode.
  grads = jax.tree.map(lambda p: 0.1 * p, params)
  updates, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params))
  jax.tree.map(lambda u: np.testing.assert_allclose(u, 1, rtol=1e-5), updates)
  updates, _ = jax.jit(tx.update)(grads, state)
  jax.tree.map(lambda u: np.testing.assert_allclose(u, 1, rtol=0.05), updates)


def test_embeddings_keep_float32_moments_unless_a_rule_says_otherwise():
  params = {
    'token_embed': {'embedding': jnp.ones((64, 64))},
    'head': {'kernel': jnp.ones((64, 64))},
  }

  def few(bits):
    state = jax.eval_shape(adamw(1e-3, moment_bits=bits).init, params)
    paths = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
    names = [jax.tree_util.keystr(p) for p, x in paths if is_quantized(x)]
    return [any(part in n for n in names) for part in ('embed', 'head')]

  assert few(8) == [False, True]
  assert few([('.*', 8)]) == [True, True]


def test_small_second_moment_does_not_make_the_step_explode():
  # One gradient of 1 in the block, and one of 1e-4 that falls to 1e-7: its
  # second moment is 1e-8 of the block's largest.
  tx = quantize_moments(scale_by_adam(eps=1e-12), 8)
  grad = np.full((64, 64), 1e-4, np.float32)
  grad[:, ::32] = 1
  state = jax.jit(tx.init)(grad)
  update = jax.jit(tx.update)
  for size in (1.0, 1.0, 1e-3):
    grad[:, 1::32] = np.float32(1e-4) * np.float32(size)
    updates, state = update(grad, state)
  assert np.abs(updates).max() < 2


def test_fields_of_parameters_do_not_pass_for_moments():
  class Params(typing.NamedTuple):
    mu: jax.Array

  params = Params(jnp.zeros((64, 64)))
  state = jax.eval_shape(quantize_moments(scale_by_adam(), 8).init, params)
  assert state.mu.mu.codec.signed
  assert not state.nu.mu.codec.signed
  tx = quantize_moments(with_low_rank_projection(optax.identity(), 64), 8)
  basis = jax.eval_shape(tx.init, params).subspace.mu.basis['in']
  assert basis.dtype == jnp.float32


def test_bad_moment_bits_of_an_alias_are_named():
  with pytest.raises(ValueError) as error:
    gradnormlorp(1e-3, moment_bits=16)
  assert str(error.value) == (
    'moment_bits must be 32, 8 or 4, or rules (regex, bits), got 16.'
  )
