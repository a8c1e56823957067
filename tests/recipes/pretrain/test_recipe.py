"""Pre-training from its settings: programs, metadata, the loss."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.compose.settings import (
  AdapterOptions,
  OptimConfig,
  StepConfig,
  since_before,
)
from gnlorp_jax.models import hf, llama
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from gnlorp_jax.training.compatibility import check_compatible

TINY = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=8,
)
CONFIG = TrainConfig(model=TINY, data=DataConfig(seq_len=8), batch_size=3)


def plan(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return recipe.plan(config, jax.devices()[:1])


def exported(folder, **changes):
  config = dataclasses.replace(TINY, **changes)
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    jax.eval_shape(llama.make(config).init, jax.random.key(0)),
  )
  hf.export(folder, weights, llama.HF_TENSORS, llama.config_to_hf(config))
  return config, weights


# The plan.


@pytest.mark.parametrize(
  ('optim', 'rank'),
  [
    (OptimConfig(name='galore'), 32),
    (OptimConfig(name='galore', rank=4), 4),
    # Theirs counts the directions of pieces of rows.
    (OptimConfig(name='vlorp'), None),
    (OptimConfig(name='projfactor', rank=2), 2),
    (OptimConfig(name='adamw'), None),
  ],
)
def test_rank_is_that_of_the_optimizer(optim, rank):
  found = recipe.with_rank(TrainConfig(optim=optim))
  assert found.optim.rank == rank


def test_plan_has_the_architecture_that_is_really_used(tmp_path):
  found, _ = exported(tmp_path / 'hf', num_layers=1)
  asked = dataclasses.replace(TINY, compute_dtype='bfloat16', remat=True)
  planned = plan(init_from=str(tmp_path / 'hf'), model=asked)
  assert planned.config.model == dataclasses.replace(
    found, num_kv_heads=2, compute_dtype='bfloat16', remat=True
  )
  kernel = planned.program.parameters.trained['layers']['attn']['q_proj']
  assert kernel['kernel'].shape == (1, 16, 16)


def test_sequences_too_long_for_the_folder_are_an_error(tmp_path):
  exported(tmp_path / 'hf')
  with pytest.raises(ValueError) as error:
    plan(init_from=str(tmp_path / 'hf'), data=DataConfig(seq_len=9))
  assert str(error.value) == (
    f'data.seq_len=9 is longer than the model in {tmp_path / "hf"} accepts: '
    'max_seq_len=8. Lower it.'
  )


def test_weights_of_the_folder_are_those_of_the_start(tmp_path):
  _, expected = exported(tmp_path / 'hf')
  planned = plan(
    init_from=str(tmp_path / 'hf'), adapter=AdapterOptions(kind='lora')
  )
  frozen = planned.program.parameters.start_frozen(jax.random.key(7))
  jax.tree.map(np.testing.assert_array_equal, frozen, expected)


def test_seed_of_a_single_run_may_be_given_as_seeds():
  assert plan(seeds='5').config.seed == 5
  assert plan(seeds='5,6').config.seed == 5
  assert plan(seed=4).config.seed == 4


@pytest.mark.parametrize(
  ('settings', 'texts'),
  [
    ({}, []),  # The rank that a run has by default was not asked for.
    ({'rank': 3}, ["optim.rank=3 has no effect with optim.name='adamw'."]),
  ],
)
def test_default_rank_is_no_option_without_effect(settings, texts, caplog):
  default = TrainConfig().optim
  with caplog.at_level(logging.WARNING, logger='gnlorp_jax.compose.optimizer'):
    plan(optim=dataclasses.replace(default, name='adamw', **settings))
  assert caplog.messages == texts


def test_plan_for_one_device_needs_none():
  mesh = dataclasses.replace(CONFIG.mesh, data=64, fsdp=8)
  config = dataclasses.replace(CONFIG, mesh=mesh, batch_size=512)
  planned = recipe.plan(config.on_one_device(), 1)
  assert planned.abstract_batch['inputs'].shape == (512, 8)
  assert planned.program.mesh.size == 1


# What a checkpoint must agree with.


def metadata(
  tokenizer='f',
  part=(0, 90),
  content='c',
  held_out='v',
  single=True,
  frozen=None,
  **changes,
):
  config = TrainConfig(model=TINY, data=DataConfig(seq_len=8))
  for name, value in changes.items():
    group, _, field = name.rpartition('__')
    if group:
      value = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group or field: value})
  shared = dataclasses.replace(config, seeds=None if single else '0,1')
  text = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(fingerprint=tokenizer),
    training=types.SimpleNamespace(
      start=part[0], stop=part[1], tokens=100, fingerprint=content
    ),
    held_out=lambda: {
      '': types.SimpleNamespace(start=90, stop=100, fingerprint=held_out)
    },
  )
  program = types.SimpleNamespace(
    parameters=types.SimpleNamespace(frozen=frozen or {}), fixed={}
  )
  planned = recipe.Planned(shared, program, abstract_batch={})
  return recipe.metadata(recipe.Prepared(planned, text), config)


SHAPING = [
  ({'model__hidden_size': 32}, 'model.hidden_size 16 != 32'),
  ({'model__param_dtype': 'bfloat16'}, 'model.param_dtype float32 != bfloat16'),
  ({'optim__rank': 8}, 'optim.rank None != 8'),
  ({'optim__name': 'adamw'}, 'optim.name gradnormlorp != adamw'),
  ({'optim__schedule': 'linear'}, 'optim.schedule cosine != linear'),
  ({'adapter__kind': 'lora'}, 'adapter.kind None != lora'),
  ({'adapter__rules': ('a', 'b')}, "adapter.rules None != ['a', 'b']"),
  ({'step__weight_bits': 8}, 'step.weight_bits None != 8'),
  ({'data__seq_len': 4}, 'data.seq_len 8 != 4'),
  ({'content': 'd'}, 'data.tokens 100 (c) != 100 (d)'),
  ({'data__mode': 'padded'}, 'data.mode packed != padded'),
  ({'seed': 1}, 'seed 0 != 1'),
  ({'tokenizer': 'g'}, 'tokenizer f != g'),
  ({'part': (0, 80)}, 'data.training_part [0, 90] != [0, 80]'),
]
CHANGING = [
  {'model__compute_dtype': 'bfloat16'},
  {'steps': 7},
  {'optim__learning_rate': 1.0},
  {'optim__clip_global_norm': 0.5},
  {'optim__param_labels': (('a', 'full'),)},
  {'batch_size': 8},
  {'micro_batches': 2},
  {'eval_every': 3},
  {'keep_best': True},
  {'init_from': 'x'},
  {'held_out': 'w'},
]
FREE = [
  {'data__source': 'moved/'},
  {'data__validation_source': 'moved/'},
  {'accept': 'seed'},
  {'model__remat': True},
  {'model__initializer_std': 0.1},
  {'model__max_seq_len': 16},
  {'checkpoint_every': 3},
  {'loss_chunk_tokens': 8},
  {'run_dir': 'y'},
  {'sample__prompt': 'x'},
  {'mesh__fsdp': 2},
]


@pytest.mark.parametrize(('changes', 'difference'), SHAPING)
def test_what_shapes_a_run_cannot_change_within_it(changes, difference):
  saved = json.loads(json.dumps(metadata()))
  with pytest.raises(ValueError) as error:
    check_compatible(saved, metadata(**changes), 'folder')
  assert f'settings: {difference}. Use' in str(error.value)
  # And compares equal to itself, read from a file.
  changed = metadata(**changes)
  check_compatible(json.loads(json.dumps(changed)), changed, 'folder')


@pytest.mark.parametrize('changes', [*CHANGING, *FREE])
def test_what_does_not_shape_a_run_may_change_within_it(changes):
  saved = json.loads(json.dumps(metadata()))
  check_compatible(saved, metadata(**changes), 'folder')


@pytest.mark.parametrize('changes', CHANGING)
def test_what_changes_results_cannot_change_among_compared_runs(changes):
  saved = json.loads(json.dumps(metadata(single=False)))
  with pytest.raises(ValueError, match='made with other settings'):
    check_compatible(saved, metadata(single=False, **changes), 'folder')


@pytest.mark.parametrize('changes', FREE)
def test_what_does_not_matter_may_change_among_compared_runs(changes):
  saved = json.loads(json.dumps(metadata(single=False)))
  check_compatible(saved, metadata(single=False, **changes), 'folder')


def test_a_record_from_before_some_settings_came_is_read():
  """It has a batch size, and lacks what there is now at its default."""
  config = TrainConfig(batch_size=8)
  saved = json.loads(json.dumps(metadata())) | {'batch_size': 16}
  for name in ('coreset.pool', 'optim.error_bits', 'model.hidden_act'):
    saved.pop(name, None)
  current = metadata(batch_size=8)
  check_compatible(saved, current, 'x', since=since_before(config))
  with pytest.raises(
    ValueError, match=r': coreset.pool \(absent\) != 32\. Use'
  ):
    check_compatible(
      *(saved, current | {'coreset.pool': 32}, 'x'), since=since_before(config)
    )


def test_frozen_weights_come_from_where_they_came(tmp_path):
  """They are in no checkpoint: the folder is read once more."""
  for name in ('x', 'copy', 'y'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'model.safetensors').write_text(
      name.replace('copy', 'x')
    )

  def found(name):
    return metadata(frozen={'a': 1}, init_from=str(tmp_path / name))

  saved = json.loads(json.dumps(found('x')))
  check_compatible(saved, found('copy'), 'folder')
  with pytest.raises(ValueError, match='init_from folder with the fingerprint'):
    check_compatible(saved, found('y'), 'folder')


# The loss.


def test_loss_is_the_weighted_sum_of_next_token_losses():
  objective = plan(loss_chunk_tokens=5).program.objective
  model = llama.make(TINY)
  weights = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 300, (3, 9))
  counted_BT = rng.integers(0, 2, (3, 8)).astype(np.float32)
  batch = {
    'inputs': jnp.array(tokens_BT[:, :-1]),
    'targets': jnp.array(tokens_BT[:, 1:]),
    'weights': jnp.array(counted_BT),
  }
  logits_BTV = np.float64(jax.jit(model.apply)(weights, batch['inputs']))
  log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
  chosen_BT = np.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], -1)[..., 0]
  expected = np.sum(counted_BT * (log_z_BT - chosen_BT))
  for loss_fn in (objective.loss, objective.evaluate):
    total, count = jax.jit(loss_fn)(weights, batch)
    assert float(count) == counted_BT.sum()
    # float32 sums of some ten terms of size 6.
    assert float(total) == pytest.approx(expected, rel=1e-6)


# What trains, in real steps.


def batch_of(planned, seed=0):
  rng = np.random.default_rng(seed)
  made = {
    'inputs': rng.integers(0, 300, (3, 8), np.int32),
    'targets': rng.integers(0, 300, (3, 8), np.int32),
    'weights': np.ones((3, 8), np.float32),
    'seeds': rng.integers(2**32, size=3, dtype=np.uint32),
  }
  return {name: made[name] for name in planned.abstract_batch}


def take_steps(planned, count=2, seed=0, number=None):
  """Parameters before and after, the frozen before and after, the metrics."""
  config, built = planned.config, planned.program
  numbers = recipe.optimizer.numbers(config.optim, config.steps)
  state, frozen = built.start(jax.random.key(seed), numbers)
  before = jax.device_get((state.params, frozen))
  for step in range(count):
    batch = batch_of(planned, step if number is None else number)
    state, values = built.train_step(state, batch, frozen)
  return before, jax.device_get((state.params, frozen)), values


def same_bits(a, b):
  return jax.tree.all(
    jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b)
  )


ADAM = OptimConfig(name='adamw', learning_rate=0.1, warmup_fraction=0.0)


@pytest.mark.usefixtures('compiled_once')
@pytest.mark.parametrize(
  ('mode', 'bits'),
  [
    ('whole', None),
    ('layerwise', 8),
    pytest.param('whole', 8, marks=pytest.mark.slow),
    pytest.param('layerwise', None, marks=pytest.mark.slow),
  ],
)
def test_only_adapters_move(mode, bits):
  planned = plan(
    adapter=AdapterOptions(kind='lora', rank=2, rules=('q_proj/kernel',)),
    step=StepConfig(mode=mode, weight_bits=bits),
    optim=ADAM,
  )
  before, after, values = take_steps(planned)
  assert same_bits(before[1], after[1])
  for name in ('lora_a', 'lora_b'):
    factor = after[0]['layers']['attn']['q_proj'][name]
    assert (
      np.abs(factor - before[0]['layers']['attn']['q_proj'][name]).min() > 0
    )
  # Norms are those of what trains.
  norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(after[0])))
  np.testing.assert_allclose(values['weight_norm'], norm, rtol=1e-5)
  shapes = {x.shape for x in jax.tree.leaves(planned.program.abstract_state)}
  assert not any(shape[-2:] == (16, 16) for shape in shapes)


@pytest.mark.usefixtures('compiled_once')
@pytest.mark.parametrize('mode', ['whole', 'layerwise'])
def test_what_is_labelled_frozen_keeps_its_bits(mode):
  labels = (('embed|lm_head|attn|gate|up_proj', 'frozen'), ('.*', 'full'))
  planned = plan(
    optim=dataclasses.replace(ADAM, param_labels=labels),
    step=StepConfig(mode=mode),
  )
  before, after, _ = take_steps(planned)
  assert set(before[1]) == {'embed', 'lm_head', 'layers'}
  assert set(before[0]['layers']['mlp']) == {'down_proj'}
  assert same_bits(before[1], after[1])
  for a, b in zip(
    jax.tree.leaves(before[0]), jax.tree.leaves(after[0]), strict=True
  ):
    assert np.abs(a - b).max() > 0
  # No gradient of them is formed: none of their shape is in the step.
  step = planned.program.train_step
  numbers = recipe.optimizer.numbers(planned.config.optim, 300)
  state, frozen = planned.program.start(jax.random.key(0), numbers)
  text = step.lower(state, batch_of(planned), frozen).as_text()
  outputs = text.split('->', 1)[1].split('{\n', 1)[0]
  assert 'tensor<300x16xf32>' not in outputs
  held = {x.shape for x in jax.tree.leaves(state)}
  assert not {(300, 16), (16, 300)} & held


@pytest.mark.usefixtures('compiled_once')
def test_dropout_of_adapters_follows_the_seeds_of_the_batch():
  planned = plan(
    adapter=AdapterOptions(
      kind='lora', rank=2, dropout=0.5, rules=('q_proj/kernel',)
    ),
    optim=ADAM,
  )
  config, built = planned.config, planned.program
  numbers = recipe.optimizer.numbers(config.optim, config.steps)
  _, frozen = built.start(jax.random.key(0), numbers)
  trained = jax.tree.map(
    lambda x: jnp.full(x.shape, 0.3, x.dtype), built.parameters.trained
  )
  batch = batch_of(planned)
  other = batch | {'seeds': batch['seeds'] + np.uint32(1)}
  params = built.parameters.join(trained, frozen)
  loss = jax.jit(built.objective.loss)
  first = float(loss(params, batch)[0])
  assert float(loss(params, batch)[0]) == first
  assert float(loss(params, other)[0]) != first
  evaluated = [
    float(built.eval_step(trained, b, frozen)[0]) for b in (batch, other)
  ]
  assert evaluated[0] == evaluated[1] != first
