"""Layer-wise steps of adapters on a LLaMA, in full precision and in 8 bits.

Shape suffixes in this file: B sequences, T positions.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.models import adapters, llama
from gnlorp_jax.optim.quantized.weights import quantize_weights
from gnlorp_jax.training import (
  forward,
  layerwise,
  objectives,
  parameters,
  state,
  step,
)

KINDS = ('lora', 'dora', 'gradnormlorp')
VOCAB, FEATURES, HIDDEN, LAYERS, POSITIONS, BATCH = 96, 32, 80, 3, 12, 8
RANK = 2


def llama_of(layers=LAYERS, features=FEATURES, hidden=HIDDEN):
  return llama.make(
    llama.LlamaConfig(
      vocab_size=VOCAB,
      hidden_size=features,
      intermediate_size=hidden,
      num_layers=layers,
      num_heads=4,
      num_kv_heads=2,
      max_seq_len=POSITIONS,
      initializer_std=0.2,
    )
  )


# Of seven kernels; the others are frozen without adapters. Compiling takes the
# time: it grows with the number of arrays that train.
ONE = ('mlp/down_proj/kernel',)
ALL = ('layers/(attn|mlp)/.*/kernel',)


def adapter_of(kind, rules=ONE):
  return adapters.AdapterConfig(kind=kind, rank=RANK, alpha=4.0, rules=rules)


def adapted(kind, model, rules=ONE):
  """The model that uses the adapters it is given."""
  return adapters.adapt(adapter_of(kind, rules), model)


@functools.cache
def base_weights():
  base = jax.jit(llama_of().init)(jax.random.key(0))
  return base, jax.jit(quantize_weights)(base)


@functools.cache
def weights(kind, rules=ONE):
  """Adapters, both factors at random, and a quantised base."""
  base, quantised = base_weights()
  init = jax.jit(functools.partial(adapters.init, adapter_of(kind, rules)))
  trained = init(base, jax.random.key(1))
  rng = np.random.default_rng(2)
  trained = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32)
      if path[-1].key == 'lora_b'
      else x
    ),
    trained,
  )
  return trained, quantised


def optimizer(name, kind):
  if name == 'adamw':
    return optim.adamw(1e-2, eps=1e-3, skip_nonfinite=False)
  rules = [(r'/lora_[ab]$', 'low_rank'), ('.*', 'full')]
  return optim.galore(
    1e-2,
    rank=1,
    update_proj_gap=5,
    side='both',
    eps=1e-3,
    skip_nonfinite=False,
    param_labels=rules[: 1 if kind == 'lora' else 2],
  )


def tokens(seed):
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(0, VOCAB, (BATCH, POSITIONS + 1), dtype=np.int32)
  lengths_B1 = rng.integers(1, POSITIONS + 1, (BATCH, 1))
  return {
    'inputs': tokens_BT[:, :-1],
    'targets': tokens_BT[:, 1:],
    'weights': (np.arange(POSITIONS) < lengths_B1).astype(np.float32),
  }


OPTIONS = {'num_micro_batches': 2, 'clip_global_norm': 0.4}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'name', 'bits'),
  [
    # A layer sees decoded weights, and the optimizer sees only what trains.
    # So each kind, optimizer and number of bits is here, but not all together.
    ('lora', 'galore', 8),
    ('dora', 'adamw', 32),
    ('gradnormlorp', 'galore', 8),
  ],
)
def test_adapters_take_the_whole_steps(toy, kind, name, bits):
  trained, frozen = weights(kind)
  decoded = jax.jit(toy.decode)(frozen)
  if bits == 32:
    frozen = decoded
  tx = optimizer(name, kind)
  objective = objectives.language_model(adapted(kind, llama_of()), 40)

  def loss(params, batch, frozen):
    return objective.loss(parameters.join(params, frozen), batch)

  found, expected = (
    toy.trajectory(
      make_step,
      tx,
      toy.mesh_of(1),
      batch=tokens,
      params=trained,
      frozen=constants,
    )
    for make_step, constants in (
      (
        lambda params: layerwise.make_train_step(
          objective.pieces, tx, toy.held(params, frozen), **OPTIONS
        ),
        frozen,
      ),
      (lambda params: step.make_train_step(loss, tx, **OPTIONS), decoded),
    )
  )
  norms = [metrics['grad_norm'] for _, metrics in expected]
  assert min(norms) < OPTIONS['clip_global_norm'] < max(norms)
  moved = [
    np.abs(x - y).max()
    for x, y in zip(
      jax.tree.leaves(expected[-1][0].params),
      jax.tree.leaves(trained),
      strict=True,
    )
  ]
  assert min(moved) > 1e-3
  toy.assert_equal(found, expected)


# No gradient of what is frozen.


@jax.custom_vjp
def guarded(x):
  """An array whose gradient must not be asked for."""
  return x


def _refuse(_, slope):
  raise AssertionError(f'a gradient of a frozen array, {slope.shape}')


guarded.defvjp(lambda x: (x, None), _refuse)


def guard(tree):
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x if path[-1].key in ('lora_a', 'lora_b', 'magnitude') else guarded(x)
    ),
    tree,
  )


def guarding(model):
  """The model with all but adapters guarded."""

  def with_guard(fn):
    return lambda params, *args, **key: fn(guard(params), *args, **key)

  fns = model.layer_fns
  return model._replace(
    hidden=with_guard(model.hidden),
    logits=with_guard(model.logits),
    layer_fns=fns._replace(
      embed=with_guard(fns.embed),
      block=with_guard(fns.block),
      head=with_guard(fns.head),
    ),
  )


# At once, at once after a pass that measures the norm, and waiting for it.
MODES = {
  'at once': {},
  'recompute': {'clip_global_norm': 1.0, 'clipping': 'recompute'},
  'waiting': {'clip_global_norm': 1.0, 'num_micro_batches': 2},
}


@functools.cache
def guarded_case(kind):
  """A model, an optimizer in two halves, a state, and what is frozen."""
  trained, frozen = weights(kind)
  tx = optim.split.as_split(optax.sgd(1e-2))
  zero = jnp.zeros((), jnp.int32)
  now = state.TrainState(zero, zero, trained, tx.init(trained))
  return guarding(adapted(kind, llama_of())), tx, now, frozen


@pytest.mark.parametrize(
  ('kind', 'mode'),
  # All modes go backward through the same function: one of each is enough.
  [('lora', 'at once'), ('dora', 'waiting'), ('gradnormlorp', 'recompute')],
)
def test_no_frozen_array_is_differentiated(toy, kind, mode):
  model, tx, now, frozen = guarded_case(kind)
  pieces = objectives.language_model(model, 40).pieces
  train_step = layerwise.make_train_step(
    pieces, tx, toy.held(now.params, frozen), **MODES[mode]
  )
  jax.eval_shape(train_step, now, tokens(0), frozen)


@pytest.mark.parametrize('kind', KINDS)
def test_no_frozen_array_is_differentiated_in_a_whole_step(toy, kind):
  model, tx, now, frozen = guarded_case(kind)
  stored = forward.on_stored(model, toy.decode)
  loss = objectives.language_model(stored, 40).loss
  whole = step.make_train_step(
    lambda params, batch, frozen: loss(parameters.join(params, frozen), batch),
    tx,
  )
  jax.eval_shape(whole, now, tokens(0), frozen)
  # The guard sees what it must.
  both = jax.eval_shape(lambda: parameters.join(now.params, toy.decode(frozen)))
  with pytest.raises(AssertionError, match='a gradient of a frozen array'):
    jax.eval_shape(jax.grad(loss, has_aux=True), both, tokens(0))


def instructions(hlo_text):
  """(shape without leading ones, opcode) of every instruction."""
  pattern = re.compile(r'= \w+\[([\d,]*)\]\S* ([\w-]+)\(')
  for match in pattern.finditer(hlo_text):
    sizes = [int(size) for size in match[1].split(',') if size]
    while sizes and sizes[0] == 1:
      del sizes[0]
    yield tuple(sizes), match[2]


def compiled_text(toy, trained, frozen, tx):
  zero = jnp.zeros((), jnp.int32)
  now = state.TrainState(zero, zero, trained, tx.init(trained))
  model = adapted('lora', llama_of(), ALL)
  pieces = objectives.language_model(model, 40).pieces
  train_step = layerwise.make_train_step(
    pieces, tx, toy.held(trained, frozen), num_micro_batches=2
  )
  lowered = jax.jit(train_step, donate_argnums=0).lower(now, tokens(0), frozen)
  return lowered.compile().as_text()


@pytest.mark.parametrize('bits', [pytest.param(32, marks=pytest.mark.slow), 8])
def test_compiled_step_forms_no_gradient_of_a_frozen_shape(toy, bits):
  trained, frozen = weights('lora', ALL)
  full = jax.jit(toy.decode)(frozen)
  tx = optax.sgd(1e-2)
  kernels = {
    shape[::order]
    for shape in (
      *((FEATURES, FEATURES), (FEATURES, FEATURES // 2), (FEATURES, HIDDEN)),
      (FEATURES, VOCAB),
    )
    for order in (1, -1)
  }

  def products(text):
    return [s for s, op in instructions(text) if op == 'dot' and s in kernels]

  def of_embedding(text):
    return {op for s, op in instructions(text) if s == (VOCAB, FEATURES)}

  text = compiled_text(toy, trained, frozen if bits == 8 else full, tx)
  assert products(text) == []
  # It is read; what sums up a gradient is a scatter or an addition.
  assert not of_embedding(text) & {'scatter', 'add', 'fusion', 'while'}
  if bits == 32:  # Where all of it trains, the gradients are found.
    whole = compiled_text(toy, parameters.join(trained, full), {}, tx)
    assert set(products(whole)) >= {(FEATURES, HIDDEN), (FEATURES, VOCAB)}
    assert of_embedding(whole) & {'scatter', 'add'}


# No decoded stack.


def temporaries(toy, layers, make_step, features, hidden):
  """Bytes that a compiled step needs beside its arguments and results."""
  model = adapted('lora', llama_of(layers, features, hidden))
  base = jax.eval_shape(
    lambda key: quantize_weights(model.init(key)), jax.random.key(0)
  )
  trained = jax.eval_shape(
    lambda key: adapters.init(
      adapter_of('lora'), jax.eval_shape(model.init, key), key
    ),
    jax.random.key(0),
  )
  tx = optim.adamw(1e-2, skip_nonfinite=False)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  now = state.TrainState(
    scalar, scalar, trained, jax.eval_shape(tx.init, trained)
  )
  lowered = jax.jit(make_step(toy, model, tx, trained, base), donate_argnums=0)
  lowered = lowered.lower(now, tokens(0), base)
  compiled = lowered.compile()
  return compiled.memory_analysis().temp_size_in_bytes


def layerwise_step(toy, model, tx, trained, base):
  pieces = objectives.language_model(model, 40).pieces
  return layerwise.make_train_step(pieces, tx, toy.held(trained, base))


def whole_step(toy, model, tx, trained, base):
  del trained, base
  loss = objectives.language_model(
    forward.on_stored(model, toy.decode), 40
  ).loss
  return step.make_train_step(
    lambda params, batch, frozen: loss(parameters.join(params, frozen), batch),
    tx,
  )


@pytest.mark.parametrize(
  ('make_step', 'copies'),
  [pytest.param(layerwise_step, 0, marks=pytest.mark.slow), (whole_step, 4)],
)
def test_memory_does_not_grow_by_decoded_stacks(toy, make_step, copies):
  features, hidden = 128, 352
  few, many = (
    temporaries(toy, layers, make_step, features, hidden) for layers in (3, 9)
  )
  inputs = BATCH * POSITIONS * features * 4
  adapter = 4 * RANK * (hidden + features)
  decoded = 4 * (3 * features**2 + 3 * features * hidden)
  # A whole step holds gradients and updates of all adapters, as well.
  allowed = inputs + copies * adapter
  assert allowed < decoded / 2
  assert (many - few) / 6 <= allowed + 4096
