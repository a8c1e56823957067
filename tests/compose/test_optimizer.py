"""Optimizers by their settings, and their learning rates."""

import dataclasses
import functools
import inspect
import logging
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from gnlorp_jax import optim
from gnlorp_jax.compose import optimizer, schedules, settings
from gnlorp_jax.compose.settings import OptimConfig
from gnlorp_jax.models import llama, roberta
from gnlorp_jax.optim import methods
from gnlorp_jax.optim.parts.split import SplitTransformation


def rates(steps, **options):
  config = OptimConfig(learning_rate=0.5, **options)
  schedule = optimizer.schedule(config, steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps)))


def params():
  """A projected kernel and others, named as in the model, fast to compile."""
  normal = np.random.default_rng(0).normal
  return jax.tree.map(
    np.float32,
    {
      'layers': {'attn': {'q_proj': {'kernel': normal(size=(2, 16, 24))}}},
      'lm_head': {'kernel': normal(size=(16, 30))},
      'norm': {'scale': normal(size=16)},
    },
  )


def gradients(like, seed=0):
  normal = np.random.default_rng(1 + seed).normal
  return jax.tree.map(lambda x: np.float32(normal(size=x.shape)), like)


def one_update(tx, grads, weights):
  # Not in one program: XLA would fold the first count into constants.
  state = jax.jit(tx.init)(weights)
  return jax.jit(tx.update)(grads, state, weights)[0]


# The schedule.


@pytest.mark.parametrize(('steps', 'warmup'), [(100, 10), (24, 2), (1000, 100)])
def test_schedule_rises_to_the_peak_and_falls_to_its_share(steps, warmup):
  found = rates(steps, warmup_fraction=0.1, final_fraction=0.2)
  assert found[0] == pytest.approx(0.5 / warmup)
  assert found[warmup - 1] == pytest.approx(0.5)
  assert found[-1] == pytest.approx(0.1)
  assert np.all(np.diff(found[:warmup]) > 0)
  assert np.all(np.diff(found[warmup:]) < 0)
  # Half of the way down in the middle of the cosine.
  middle = (warmup + steps - 1) / 2
  if middle.is_integer():
    assert found[int(middle)] == pytest.approx(0.3)


def test_schedule_without_warmup_begins_at_the_peak():
  found = rates(10, warmup_fraction=0, final_fraction=0)
  assert found[0] == pytest.approx(0.5)
  assert found[-1] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize('steps', [1, 2, 3])
def test_schedule_of_a_very_short_run_is_positive(steps):
  found = rates(steps, warmup_fraction=0.1, final_fraction=0.1)
  assert found[0] == pytest.approx(0.5)
  assert np.all(found > 0)
  assert np.all(found <= 0.5)


def test_schedule_that_only_warms_up_ends_at_the_peak():
  found = rates(8, warmup_fraction=1)
  np.testing.assert_allclose(found, 0.5 * np.arange(1, 9) / 8, rtol=1e-6)


# What is computed from arguments and from constants differs by one unit in the
# last place with XLA's older code generator for CPUs, with which tests compile;
# with the one that users have, it does not.
jit_to_the_last_bit = functools.partial(
  jax.jit,
  compiler_options={'xla_cpu_use_fusion_emitters': True}
  if jax.__version_info__ < (0, 11)  # Later there is nothing else.
  else {},
)


def optax_schedule(config, steps):
  """The warm-up and the cosine, of schedules of Optax with constants."""
  warmup = max(round(config.warmup_fraction * steps), 1)
  peak = config.learning_rate
  return optax.join_schedules(
    [
      optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)),
      optax.cosine_decay_schedule(
        peak, max(steps - warmup - 1, 1), config.final_fraction
      ),
    ],
    [warmup],
  )


@pytest.mark.parametrize(
  ('steps', 'options'),
  [
    (1, {}),
    (2, {'learning_rate': 3e-4}),
    (24, {'learning_rate': 0.01}),
    (24, {'learning_rate': 0.3, 'final_fraction': 0.0}),
    (60, {'learning_rate': 7e-4, 'warmup_fraction': 0.37}),
    (60, {'learning_rate': 0.011, 'warmup_fraction': 0.0}),
    (9, {'learning_rate': 0.02, 'warmup_fraction': 1.0}),
  ],
)
def test_cosine_of_numbers_is_that_of_optax_to_the_last_bit(steps, options):
  config = OptimConfig(**options)
  expected = jit_to_the_last_bit(optax_schedule(config, steps))
  warmup = max(round(config.warmup_fraction * steps), 1)

  @jit_to_the_last_bit
  def found(count, numbers):
    return schedules.cosine_rate(
      count, **numbers, warmup=warmup, steps=steps, final=config.final_fraction
    )

  numbers = optimizer.numbers(config, steps)
  assert {x.dtype for x in numbers.values()} == {jnp.dtype('float32')}
  for count in range(steps + 3):
    rate = found(jnp.int32(count), numbers)
    assert rate.dtype == jnp.float32 and rate.shape == ()
    assert rate == expected(jnp.int32(count)), count


def test_jagged_rate_is_the_closed_form_of_relora():
  """With every rise one step ahead, so that no update has a rate of 0."""
  steps, warmup, cycle, rewarm, final = 60, 9, 15, 3, 0.1

  def base(x):
    angle = np.pi * (x - warmup) / (steps - 1 - warmup)
    return final + (1 - final) / 2 * (1 + np.cos(angle))

  def relora(u):
    if u < warmup:
      return (u + 1) / warmup
    start, place = u // cycle * cycle, u % cycle
    if place < rewarm and u >= cycle:
      return (place + 1) / rewarm * base(start + rewarm)
    return base(u)

  found = rates(
    steps,
    schedule='jagged',
    warmup_fraction=0.15,
    final_fraction=final,
    cycle=cycle,
    restart_warmup_fraction=0.2,
  )
  expected = [0.5 * relora(u) for u in range(steps)]
  np.testing.assert_allclose(found, expected, rtol=2e-5)
  # First and last, where the first rise ends, and around a restart.
  for u, value in (
    (0, 0.5 / 9),
    (warmup - 1, 0.5),
    (warmup, 0.5),
    (cycle - 1, 0.5 * base(14)),
    (cycle, 0.5 * base(18) / 3),
    (cycle + 1, 0.5 * base(18) * 2 / 3),
    (cycle + rewarm - 1, 0.5 * base(18)),
    (cycle + rewarm, 0.5 * base(18)),
    (steps - 1, 0.05),
  ):
    assert found[u] == pytest.approx(value, rel=2e-5), u


def test_jagged_rate_with_one_long_cycle_is_the_cosine():
  cosine = rates(30)
  np.testing.assert_allclose(rates(30, schedule='jagged', cycle=30), cosine)
  # A rise of no step is one of one.
  found = rates(30, schedule='jagged', cycle=10, restart_warmup_fraction=0)
  expected = cosine.copy()
  expected[[10, 20]] = cosine[[11, 21]]
  np.testing.assert_allclose(found, expected)


def test_jagged_rate_is_decided_by_numbers_in_the_state():
  config = OptimConfig(schedule='jagged', cycle=4, learning_rate=0.5)
  assert optimizer.depends_on_steps(config)
  assert set(optimizer.numbers(config, 20)) == {'peak', 'climb'}
  assert optimizer.without_rates(config).learning_rate is None


def test_cycle_is_that_of_the_restarts():
  jagged = OptimConfig(schedule='jagged')
  restarts = settings.AdapterOptions(kind='lora', restart_every=7)
  none = settings.AdapterOptions()
  assert optimizer.in_cycles(jagged, restarts).cycle == 7
  assert optimizer.in_cycles(OptimConfig(), restarts) == OptimConfig()
  own = dataclasses.replace(jagged, cycle=7)
  assert optimizer.in_cycles(own, none) == own
  assert optimizer.in_cycles(own, restarts) == own
  for config, adapter, text in (
    (
      OptimConfig(cycle=3),
      none,
      "optim.cycle=3 is of optim.schedule='jagged', got 'cosine'. Leave it "
      'out.',
    ),
    (
      jagged,
      none,
      "optim.schedule='jagged' rises again in every cycle, and there is none. "
      'Give adapter.restart_every, or optim.cycle.',
    ),
    (
      dataclasses.replace(jagged, cycle=8),
      restarts,
      'optim.cycle=8 is not adapter.restart_every=7: the learning rate must '
      'rise again when adapters restart. Leave out optim.cycle.',
    ),
  ):
    with pytest.raises(ValueError) as error:
      optimizer.in_cycles(config, adapter)
    assert str(error.value) == text


@pytest.mark.parametrize('final', [0.0, 0.25])
@pytest.mark.parametrize('warmup', [0.0, 0.25, 1.0])
def test_linear_rate_is_a_closed_form(warmup, final):
  steps, peak = 12, 0.3
  found = rates(
    steps + 2, schedule='linear', warmup_fraction=warmup, final_fraction=final
  )
  assert found.max() <= 0.5
  config = OptimConfig(
    learning_rate=peak,
    schedule='linear',
    warmup_fraction=warmup,
    final_fraction=final,
  )
  schedule = jax.jit(optimizer.schedule(config, steps))
  rise = round(warmup * steps)
  for count in range(steps):
    if count < rise:
      expected = peak * (count + 1) / rise
    else:
      part = (steps - count) / (steps - rise)
      expected = peak * (final + (1 - final) * part)
    np.testing.assert_allclose(schedule(count), expected, rtol=3e-7)
  if not rise:  # The linear schedule of Optax then, and of transformers.
    same = optax.linear_schedule(peak, peak * final, steps)
    for count in range(steps):
      np.testing.assert_allclose(schedule(count), same(count), rtol=3e-7)


@pytest.mark.parametrize('kind', ['cosine', 'linear'])
def test_what_is_no_number_in_the_state_tells_programs_apart(kind):
  config = OptimConfig(schedule=kind, learning_rate=0.1, warmup_fraction=0.3)
  assert optimizer.depends_on_steps(config) == (kind == 'cosine')
  other = dataclasses.replace(config, learning_rate=0.2)
  slower = dataclasses.replace(config, warmup_fraction=0.4)
  plain = optimizer.without_rates(config)
  assert plain == optimizer.without_rates(other)
  same = plain == optimizer.without_rates(slower)
  assert same == (kind == 'linear')
  # What is equal has numbers of the same names.
  names = set(optimizer.numbers(config, 10))
  assert names == set(optimizer.numbers(slower, 20))


# The optimizer.


@pytest.mark.parametrize(
  ('name', 'kind'), [('adamw', 'cosine'), ('galore', 'linear')]
)
def test_learning_rates_in_the_state_make_the_same_updates(name, kind):
  """And one compiled program does for all rates."""
  steps = 4
  weights = params()
  config = OptimConfig(
    name=name,
    schedule=kind,
    weight_decay=0.1,
    **({} if name == 'adamw' else {'rank': 4, 'update_proj_gap': 2}),
  )
  tx = optimizer.make(config, steps, llama.LABEL_RULES)
  init, update = jax.jit(tx.init), jax.jit(tx.update)
  for rate in (0.01, 0.3):
    config = dataclasses.replace(config, learning_rate=rate)
    constant = optimizer.transformation(
      config, optimizer.schedule(config, steps), llama.LABEL_RULES
    )
    constant_update = jax.jit(constant.update)
    state = optimizer.start(init(weights), optimizer.numbers(config, steps))
    expected_state = jax.jit(constant.init)(weights)
    for number in range(steps):
      grads = gradients(weights, number)
      found, state = update(grads, state, weights)
      expected, expected_state = constant_update(grads, expected_state, weights)
      # XLA multiplies constants in another order: float32 rounding.
      for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
      ):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b))
        assert error <= 1e-6 * np.linalg.norm(b), number
  assert update._cache_size() == 1


@pytest.mark.parametrize('name', ['gradnormlorp', 'adamw', 'apollo'])
def test_numbers_in_the_state_leave_an_optimizer_split(name):
  tx = optimizer.make(OptimConfig(name=name), 10, llama.LABEL_RULES)
  plain = optimizer.transformation(
    OptimConfig(name=name), 0.1, llama.LABEL_RULES
  )
  assert isinstance(plain, SplitTransformation) == isinstance(
    tx, SplitTransformation
  )


@pytest.mark.parametrize(
  ('config', 'adapted', 'expected'),
  [
    (OptimConfig(), False, llama.LABEL_RULES),
    (OptimConfig(param_labels='blocks'), False, llama.LABEL_RULES),
    (OptimConfig(), True, (('/lora_[ab]$', 'low_rank'), ('.*', 'full'))),
    (
      OptimConfig(param_labels='blocks'),
      True,
      (('/lora_[ab]$', 'low_rank'), ('.*', 'full')),
    ),
    (OptimConfig(name='adamw'), True, (('.*', 'full'),)),
    (
      OptimConfig(name='muon'),
      True,
      (('/lora_[ab]$', 'low_rank'), ('.*', 'full')),
    ),
    (
      OptimConfig(param_labels=(('a', 'full'),)),
      True,
      (('a', 'full'),),
    ),
    (
      OptimConfig(param_labels=(('a', 'frozen'),)),
      False,
      (('a', 'frozen'),),
    ),
  ],
)
def test_rules_are_those_asked_for_or_what_suits(config, adapted, expected):
  found = optimizer.label_rules(config, llama.LABEL_RULES, adapted=adapted)
  assert found == expected


@pytest.mark.parametrize('family', ['llama', 'roberta', 'tied'])
def test_all_matrices_of_a_model_are_those_that_decay(family):
  if family == 'roberta':
    config = roberta.RobertaConfig(**SIZES)
    model = roberta.make_classifier(config, 3)
  else:
    config = llama.LlamaConfig(**SIZES, tie_embeddings=family == 'tied')
    model = llama.make(config)
  rules = optimizer.label_rules(
    OptimConfig(param_labels='all'), llama.LABEL_RULES, adapted=False
  )
  found = traverse_util.flatten_dict(
    optim.labels.labels(rules)(jax.eval_shape(model.init, jax.random.key(0))),
    sep='/',
  )
  expected = set(DECAYING.get(family, DECAYING['llama']).split())
  expected -= {'embed/types/embedding'}  # A table of a few rows.
  expected &= set(found)
  assert {n for n, label in found.items() if label == 'low_rank'} == expected
  assert {'llama': 9, 'roberta': 10, 'tied': 8}[family] == len(expected)


def test_all_matrices_beside_adapters_is_an_error():
  with pytest.raises(ValueError, match="param_labels='all' projects the matr"):
    optimizer.label_rules(
      OptimConfig(param_labels='all'), llama.LABEL_RULES, adapted=True
    )


def test_rules_of_factors_alone_name_nothing_else():
  options = {'adapted': True, 'only_factors': True}
  found = optimizer.label_rules(OptimConfig(), llama.LABEL_RULES, **options)
  assert found == (('/lora_[ab]$', 'low_rank'),)
  adam = OptimConfig(name='adamw')
  assert optimizer.label_rules(adam, llama.LABEL_RULES, **options) == (
    ('.*', 'full'),
  )


def test_factors_of_adapters_are_projected_on_both_sides():
  config = OptimConfig(name='galore')
  assert optimizer.for_adapters(config).side == 'both'
  asked = dataclasses.replace(config, side='short')
  assert optimizer.for_adapters(asked) == asked
  # Moments or ratios of one whole axis; of adamw there is no subspace.
  for name in ('apollo', 'fira', 'ldadam', 'projfactor', 'vlorp', 'adamw'):
    config = OptimConfig(name=name)
    assert optimizer.for_adapters(config) == config


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    (
      'gradnormlorp',
      lambda: optim.gradnormlorp(
        0.1, 4, 7, 0.5, weight_decay=0.01, param_labels=llama.LABEL_RULES
      ),
    ),
    (
      'adamw',
      lambda: optim.adamw(
        0.1, weight_decay=0.01, param_labels=llama.LABEL_RULES
      ),
    ),
  ],
)
def test_optimizer_is_the_one_of_that_name(name, expected):
  config = OptimConfig(
    name=name,
    rank=4,
    update_proj_gap=7,
    scale=0.5,
    weight_decay=0.01,
    clip_global_norm=None,
  )
  tx = optimizer.transformation(config, lambda count: 0.1, llama.LABEL_RULES)
  weights = params()
  grads = gradients(weights)
  found = one_update(tx, grads, weights)
  jax.tree.map(
    np.testing.assert_array_equal,
    found,
    one_update(expected(), grads, weights),
  )


def test_options_reach_the_optimizer():
  config = OptimConfig(
    rank=4,
    solver='exact',
    side='both',
    norm_state='tracked',
    spread_refreshes=False,
    b1=0.8,
    b2=0.95,
    eps=1e-3,
    eps_mode='standard',
    clip_global_norm=None,
  )
  tx = optimizer.transformation(config, lambda count: 0.1, llama.LABEL_RULES)
  expected = optim.gradnormlorp(
    0.1,
    4,
    projection=optim.projections.get('svd', solver='exact'),
    side='both',
    norm_state='tracked',
    spread_refreshes=False,
    b1=0.8,
    b2=0.95,
    eps=1e-3,
    eps_mode='standard',
    param_labels=llama.LABEL_RULES,
  )
  weights = params()
  grads = gradients(weights)
  jax.tree.map(
    np.testing.assert_array_equal,
    one_update(tx, grads, weights),
    one_update(expected, grads, weights),
  )


NAMES = typing.get_args(settings.OptimizerName)
WITHOUT_RANK = ('adamw', 'apollo_mini', 'muon', 'racs', 'scale', 'sinkgd')


def test_every_optimizer_has_a_name():
  # An alias is what takes a learning rate and labels.
  aliases = {
    name
    for name, value in vars(optim).items()
    if inspect.isfunction(value)
    and {'learning_rate', 'param_labels'}
    <= set(inspect.signature(value).parameters)
  }
  assert set(NAMES) == aliases - {'released_gradnormlorp'}


@pytest.mark.parametrize('name', NAMES)
def test_every_name_builds_with_what_is_asked_for(name, caplog, monkeypatch):
  # tests/optim/test_conformance.py shows that every alias moves parameters.
  rank = 1 if name in ('vlorp', 'projfactor') else 4
  config = OptimConfig(name=name, rank=rank, weight_decay=0.01)
  if rank == 1:
    config = dataclasses.replace(config, granularity=4)
  alias, given = getattr(optim, name), {}

  @functools.wraps(alias)
  def spy(*args, **options):
    given.update(inspect.signature(alias).bind(*args, **options).arguments)
    return alias(*args, **options)

  monkeypatch.setattr(methods, 'get', lambda _: spy)
  rate = lambda count: 0.1  # noqa: E731
  with caplog.at_level(logging.WARNING, logger='gnlorp_jax.compose.optimizer'):
    tx = optimizer.transformation(config, rate, llama.LABEL_RULES)
  assert given['learning_rate'] is rate
  assert given['weight_decay'] == 0.01
  assert given['param_labels'] == llama.LABEL_RULES
  assert given.get('rank', rank) == rank
  if rank == 1:
    assert given['granularity'] == 4
  unused = ['rank'] if name in WITHOUT_RANK else []
  assert [record.args[0] for record in caplog.records] == unused
  assert ('rank' in given) == (not unused)
  weights = params()
  found = jax.eval_shape(
    lambda g, p: tx.update(g, tx.init(p), p)[0], gradients(weights), weights
  )
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, weights)


@pytest.mark.parametrize(
  ('settings', 'name', 'options'),
  [
    (
      {'lazy_refresh': 'cosine', 'basis_bits': 8, 'moment_bits': 4},
      'gradnormlorp',
      {
        'lazy_refresh': optim.LazyRefresh(similarity='cosine'),
        'basis_bits': 8,
        'moment_bits': 4,
      },
    ),
    ({'lazy_refresh': 'never'}, 'q_galore', {'lazy_refresh': None}),
    ({'error_bits': 0}, 'ldadam', {'error_bits': None}),
    (
      {'error_bits': 8, 'moments_on_refresh': 'reset', 'weight_norm': True},
      'dct_adamw',
      {'error_bits': 8, 'moments_on_refresh': 'reset', 'weight_norm': True},
    ),
  ],
)
def test_options_decide_the_state(settings, name, options):
  config = OptimConfig(name=name, rank=4, clip_global_norm=None, **settings)
  tx = optimizer.transformation(config, lambda count: 0.1, llama.LABEL_RULES)
  expected = getattr(optim, name)(
    lambda count: 0.1,
    4,
    param_labels=llama.LABEL_RULES,
    skip_nonfinite=False,
    **options,
  )
  weights = jax.eval_shape(params)
  found = jax.eval_shape(tx.init, weights)
  assert found == jax.eval_shape(expected.init, weights)
  plain = getattr(optim, name)(
    lambda count: 0.1, 4, param_labels=llama.LABEL_RULES, skip_nonfinite=False
  )
  assert found != jax.eval_shape(plain.init, weights)


# Kernels and embeddings; of norms and biases none.
DECAYING = {
  'llama': """
    embed/embedding lm_head/kernel
    layers/attn/k_proj/kernel layers/attn/o_proj/kernel
    layers/attn/q_proj/kernel layers/attn/v_proj/kernel
    layers/mlp/down_proj/kernel layers/mlp/gate_proj/kernel
    layers/mlp/up_proj/kernel
  """,
  'roberta': """
    classifier/dense/kernel classifier/out/kernel
    embed/positions/embedding embed/tokens/embedding embed/types/embedding
    layers/attn/k_proj/kernel layers/attn/o_proj/kernel
    layers/attn/q_proj/kernel layers/attn/v_proj/kernel
    layers/mlp/down_proj/kernel layers/mlp/up_proj/kernel
  """,
}
SIZES = {
  **{'vocab_size': 12, 'hidden_size': 4, 'intermediate_size': 6},
  **{'num_layers': 2, 'num_heads': 2, 'max_seq_len': 8},
}


@pytest.mark.parametrize('family', DECAYING)
def test_norms_and_biases_decay_if_asked_for(family):
  if family == 'llama':
    model = llama.make(llama.LlamaConfig(**SIZES))
  else:
    config = roberta.RobertaConfig(**SIZES)
    model = roberta.make_classifier(config, 3)
  weights = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, leaf.dtype),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  still = jax.tree.map(np.zeros_like, weights)
  for is_asked in (False, True):
    config = OptimConfig(
      name='adamw', weight_decay=0.5, decay_norms_and_biases=is_asked
    )
    tx = optimizer.transformation(config, 0.1, (('.*', 'full'),))
    updates = traverse_util.flatten_dict(
      one_update(tx, still, weights), sep='/'
    )
    found = {name for name, update in updates.items() if np.any(update)}
    expected = set(updates) if is_asked else set(DECAYING[family].split())
    assert found == expected
    assert {round(float(updates[n].max()), 6) for n in found} == {-0.05}


def test_stochastic_rounding_closes_the_chain():
  config = OptimConfig(
    name='adamw', stochastic_rounding=True, learning_rate=1e-5
  )
  tx = optimizer.transformation(config, lambda count: 1e-5, llama.LABEL_RULES)
  weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())

  @jax.jit
  def step(grads, state, weights):
    updates, state = tx.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state

  state, moved = jax.jit(tx.init)(weights), weights
  for _ in range(3):  # Far below half a unit in the last place of most weights.
    moved, state = step(gradients(weights), state, moved)
  after, before = (
    np.asarray(tree['lm_head']['kernel']) for tree in (moved, weights)
  )
  changed = np.mean(after != before)
  assert 0 < changed < 0.5


def test_adamw_trains_every_parameter_as_optax_does():
  config = OptimConfig(name='adamw', clip_global_norm=None, weight_decay=0.1)
  tx = optimizer.transformation(config, lambda count: 0.01, llama.LABEL_RULES)
  weights = params()
  grads = gradients(weights)
  jax.tree.map(
    # float32; the same formula in another order.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
    one_update(tx, grads, weights),
    one_update(optax.adamw(0.01, weight_decay=0.1), grads, weights),
  )


@pytest.mark.parametrize(
  ('settings', 'texts'),
  [
    (
      {'name': 'adamw', 'side': 'both', 'norm_state': 'tracked', 'rank': 3},
      [
        "optim.norm_state='tracked' has no effect with optim.name='adamw'.",
        "optim.rank=3 has no effect with optim.name='adamw'.",
        "optim.side='both' has no effect with optim.name='adamw'.",
      ],
    ),
    (
      {'name': 'galore', 'side': 'both', 'norm_state': 'tracked'},
      ["optim.norm_state='tracked' has no effect with optim.name='galore'."],
    ),
    ({'name': 'gradnormlorp', 'side': 'both', 'norm_state': 'tracked'}, []),
    (
      {'name': 'apollo', 'solver': 'exact'},
      ["optim.solver='exact' has no effect with optim.name='apollo'."],
    ),
    ({'name': 'apollo', 'solver': 'exact', 'projection': 'svd'}, []),
    ({'name': 'alice0', 'solver': 'exact', 'leading': 3}, []),
    ({'name': 'fira', 'leading': 3}, []),
    (
      {'name': 'subtrack', 'leading': 3},
      ["optim.leading=3 has no effect with optim.name='subtrack'."],
    ),
    (
      {'name': 'galore', 'solver': 'exact', 'projection': 'dct'},
      ["optim.solver='exact' has no effect with optim.name='galore'."],
    ),
    (
      {'name': 'dct_adamw', 'solver': 'exact'},
      ["optim.solver='exact' has no effect with optim.name='dct_adamw'."],
    ),
    ({'name': 'adamw'}, []),
  ],
)
def test_option_without_effect_is_named_in_a_warning(settings, texts, caplog):
  with caplog.at_level(logging.WARNING, logger='gnlorp_jax.compose.optimizer'):
    optimizer.transformation(
      OptimConfig(**settings), lambda count: 0.1, llama.LABEL_RULES
    )
  assert [record.getMessage() for record in caplog.records] == texts


def test_unknown_projection_is_told():
  with pytest.raises(ValueError) as error:
    optimizer.transformation(
      OptimConfig(projection='foo'), lambda count: 0.1, llama.LABEL_RULES
    )
  assert str(error.value) == (
    f"Unknown projection 'foo'; expected one of {optim.projections.names()}."
  )
