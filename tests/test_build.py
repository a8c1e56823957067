"""The parts of a run, and how the configuration chooses them."""

import dataclasses
import functools
import inspect
import json
import logging
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from gnlorp_jax import build, optim
from gnlorp_jax.config import DataConfig, OptimConfig, StepConfig, TrainConfig
from gnlorp_jax.models import hf, llama
from gnlorp_jax.training.checkpoint import check_compatible

TINY = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=8,
)


def rates(steps, **settings):
  config = OptimConfig(learning_rate=0.5, **settings)
  schedule = build.learning_rate_schedule(config, steps)
  return np.array([schedule(count) for count in range(steps)])


def params():
  """A projected kernel and others, named as in the model, fast to compile."""
  normal = np.random.default_rng(0).normal
  return jax.tree.map(
    jnp.float32,
    {
      'layers': {'attn': {'q_proj': {'kernel': normal(size=(2, 16, 24))}}},
      'lm_head': {'kernel': normal(size=(16, 30))},
      'norm': {'scale': normal(size=16)},
    },
  )


def gradients(like, seed=0):
  leaves, treedef = jax.tree.flatten(like)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    treedef,
    [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)],
  )


def one_update(tx, grads, weights):
  updates, _ = jax.jit(tx.update)(grads, tx.init(weights), weights)
  return updates


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


# The optimizer.


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
      'galore',
      lambda: optim.galore(
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
  tx = build.optimizer(config, lambda count: 0.1, llama.LABEL_RULES)
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
  tx = build.optimizer(config, lambda count: 0.1, llama.LABEL_RULES)
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


NAMES = typing.get_args(typing.get_type_hints(OptimConfig)['name'])


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
def test_every_name_builds_and_moves_every_parameter(name, caplog):
  rank = 1 if name in ('vlorp', 'projfactor') else 4
  config = OptimConfig(name=name, rank=rank, weight_decay=0.01)
  if rank == 1:
    config = dataclasses.replace(config, granularity=4)
  with caplog.at_level(logging.WARNING, logger='gnlorp_jax.build'):
    tx = build.optimizer(config, lambda count: 0.1, llama.LABEL_RULES)
  unused = ['rank'] if name in ('adamw', 'apollo_mini') else []
  assert [record.args[0] for record in caplog.records] == unused
  weights = params()
  found = one_update(tx, gradients(weights), weights)
  for update in jax.tree.leaves(found):
    assert np.isfinite(update).all()
    assert np.abs(update).max() > 1e-4


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
  tx = build.optimizer(config, lambda count: 0.1, llama.LABEL_RULES)
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


def test_stochastic_rounding_closes_the_chain():
  config = OptimConfig(
    name='adamw', stochastic_rounding=True, learning_rate=1e-5
  )
  tx = build.optimizer(config, lambda count: 1e-5, llama.LABEL_RULES)
  weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  update = jax.jit(tx.update)
  state, moved = tx.init(weights), weights
  for _ in range(3):  # Far below half a unit in the last place of most weights.
    updates, state = update(gradients(weights), state, moved)
    moved = optax.apply_updates(moved, updates)
  changed = jnp.mean(moved['lm_head']['kernel'] != weights['lm_head']['kernel'])
  assert 0 < changed < 0.5


def test_adamw_trains_every_parameter_as_optax_does():
  config = OptimConfig(name='adamw', clip_global_norm=None, weight_decay=0.1)
  tx = build.optimizer(config, lambda count: 0.01, llama.LABEL_RULES)
  weights = params()
  grads = gradients(weights)
  jax.tree.map(
    # float32; the same formula in another order.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
    one_update(tx, grads, weights),
    one_update(optax.adamw(0.01, weight_decay=0.1), grads, weights),
  )


@pytest.mark.parametrize('mode', ['whole', 'layerwise'])
def test_gradients_are_clipped_before_the_optimizer_sees_them(mode):
  # With so large an eps Adam's step is the gradient divided by it.
  adam = OptimConfig(
    name='adamw', eps=1e6, clip_global_norm=0.01, learning_rate=1e3
  )
  config = dataclasses.replace(
    TrainConfig(), optim=adam, batch_size=2, step=StepConfig(mode=mode)
  )
  free = dataclasses.replace(adam, clip_global_norm=None)
  norms = []
  for settings in (config, dataclasses.replace(config, optim=free)):
    parts = build.program(settings, jax.devices()[:1])
    batch = jax.tree.map(
      lambda x: jnp.ones(x.shape, x.dtype), parts.abstract_batch
    )
    _, metrics = parts.train_step(build.new_state(parts), batch)
    norms.append((metrics['grad_norm'], metrics['update_norm']))
  (grad_norm, clipped), (_, whole) = norms
  assert grad_norm > 0.1
  np.testing.assert_allclose(clipped / whole, 0.01 / grad_norm, rtol=1e-4)


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
  with caplog.at_level(logging.WARNING, logger='gnlorp_jax.build'):
    build.optimizer(
      OptimConfig(**settings), lambda count: 0.1, llama.LABEL_RULES
    )
  assert [record.getMessage() for record in caplog.records] == texts


def test_unknown_projection_is_told():
  with pytest.raises(ValueError) as error:
    build.optimizer(
      OptimConfig(projection='foo'), lambda count: 0.1, llama.LABEL_RULES
    )
  assert str(error.value) == (
    f"Unknown projection 'foo'; expected one of {optim.projections.names()}."
  )


# The model and what a checkpoint must agree with.


def exported(folder, **changes):
  config = dataclasses.replace(TINY, **changes)
  weights = llama.make(config).init(jax.random.key(0))
  hf.export(folder, weights, llama.HF_TENSORS, llama.config_to_hf(config))
  return config


def test_architecture_is_that_of_the_folder_to_start_from(tmp_path):
  found = exported(tmp_path / 'hf', num_layers=1)
  asked = dataclasses.replace(TINY, compute_dtype='bfloat16', remat=True)
  config = TrainConfig(
    init_from=str(tmp_path / 'hf'), model=asked, data=DataConfig(seq_len=8)
  )
  assert build.architecture(config) == dataclasses.replace(
    found, num_kv_heads=2, compute_dtype='bfloat16', remat=True
  )
  plain = dataclasses.replace(config, init_from=None)
  assert build.architecture(plain) == asked


def test_sequences_too_long_for_the_folder_are_an_error(tmp_path):
  exported(tmp_path / 'hf')
  config = TrainConfig(
    init_from=str(tmp_path / 'hf'), data=DataConfig(seq_len=9)
  )
  with pytest.raises(ValueError) as error:
    build.architecture(config)
  assert str(error.value) == (
    f'data.seq_len=9 is longer than the model in {tmp_path / "hf"} accepts: '
    'max_seq_len=8. Lower it.'
  )


def metadata(tokenizer='f', part=(0, 90), **changes):
  config = TrainConfig(model=TINY, data=DataConfig(seq_len=8))
  for name, value in changes.items():
    group, _, field = name.rpartition('__')
    if group:
      value = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group or field: value})
  return build._metadata(
    config,
    types.SimpleNamespace(fingerprint=tokenizer),
    types.SimpleNamespace(start=part[0], stop=part[1], tokens=100),
  )


@pytest.mark.parametrize(
  ('changes', 'difference'),
  [
    ({'model__hidden_size': 32}, 'hidden_size 16 != 32'),
    ({'model__param_dtype': 'bfloat16'}, 'param_dtype float32 != bfloat16'),
    ({'optim__rank': 8}, 'optim.rank 32 != 8'),
    ({'optim__name': 'adamw'}, 'optim.name gradnormlorp != adamw'),
    ({'data__seq_len': 4}, 'data.seq_len 8 != 4'),
    ({'data__source': 'x'}, 'data.source stdlib != x'),
    ({'batch_size': 8}, 'batch_size 16 != 8'),
    ({'seed': 1}, 'seed 0 != 1'),
    ({'tokenizer': 'g'}, 'tokenizer f != g'),
    ({'part': (0, 80)}, 'data.training_part [0, 90] != [0, 80]'),
  ],
)
def test_what_shapes_a_run_cannot_change_within_it(changes, difference):
  saved = json.loads(json.dumps(metadata()))
  with pytest.raises(ValueError) as error:
    check_compatible(saved, metadata(**changes), 'folder')
  assert f'settings: {difference}. Use' in str(error.value)


@pytest.mark.parametrize(
  'changes',
  [
    {'model__compute_dtype': 'bfloat16'},
    {'model__remat': True},
    {'steps': 7},
    {'optim__learning_rate': 1.0},
    {'optim__clip_global_norm': 0.5},
    {'micro_batches': 2},
    {'checkpoint_every': 3},
  ],
)
def test_what_does_not_shape_a_run_may_change_within_it(changes):
  saved = json.loads(json.dumps(metadata()))
  check_compatible(saved, metadata(**changes), 'folder')


def test_start_from_weights_uses_their_tokenizer(tmp_path):
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'</s>': 0, 'a': 1}, unk_token='</s>')
  )
  config = TrainConfig(init_from=str(tmp_path))
  with pytest.raises(ValueError) as error:
    build.load_tokenizer(config)
  assert str(error.value) == (
    f'{tmp_path} has no tokenizer.json, and its weights fit no other tokens: '
    'name the tokenizer as data.tokenizer.'
  )
  words.save(str(tmp_path / 'tokenizer.json'))
  assert build.load_tokenizer(config).vocab_size == 2


# The loss.


def test_loss_is_the_weighted_sum_of_next_token_losses():
  model = llama.make(TINY)
  weights = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 300, (3, 9))
  counted_BT = rng.integers(0, 2, (3, 8)).astype(np.float32)
  batch = {
    'inputs': jnp.array(tokens_BT[:, :-1]),
    'targets': jnp.array(tokens_BT[:, 1:]),
    'weights': jnp.array(counted_BT),
  }
  loss_fn = jax.jit(functools.partial(build.language_model_loss, model, 5))
  total, count = loss_fn(weights, batch)
  logits_BTV = np.float64(model.apply(weights, batch['inputs']))
  log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
  chosen_BT = np.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], -1)[..., 0]
  expected = np.sum(counted_BT * (log_z_BT - chosen_BT))
  assert float(count) == counted_BT.sum()
  # float32 sums of some ten terms of size 6.
  assert float(total) == pytest.approx(expected, rel=1e-6)
