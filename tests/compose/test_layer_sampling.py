"""Methods that draw layers, from settings to what a run holds."""

import dataclasses

import jax
import numpy as np
import pytest

from gnlorp_jax.compose import layer_sampling, methods, report
from gnlorp_jax.compose.program import report as report_rows
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  LayerSamplingOptions,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig

LAYERS = 4
TINY = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=LAYERS,
  num_heads=2,
  max_seq_len=8,
)
CONFIG = TrainConfig(
  model=TINY,
  data=DataConfig(seq_len=8),
  batch_size=4,
  optim=OptimConfig(name='adamw', rank=None),
  sampling=LayerSamplingOptions(method='lisa'),
)


def plan(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return recipe.plan(config, jax.devices()[:1]).program


def test_published_methods_draw_as_they_say(tmp_path):
  scores = tmp_path / 'scores.txt'
  scores.write_text('0.4\n0\n0.1\n0.3\n0.2\n0.1\n')
  found = {
    name: layer_sampling.resolve(
      LayerSamplingOptions(
        method=name,
        scores=str(scores) if name in ('owlore', 'ows') else None,
      ),
      6,
    )
    for name in layer_sampling.PRESETS
  }
  assert {n: (s.layers, s.every) for n, s in found.items()} == {
    'owlore': (5, 50),
    'ows': (2, 50),
    'lisa': (2, 20),
    'badam': (1, 50),
  }
  assert found['owlore'].weights == (0.4, 0, 0.1, 0.3, 0.2, 0.1)
  assert found['lisa'].weights is None
  assert found['badam'].draw == 'shuffled'
  lower = LayerSamplingOptions(draw='decreasing', layers=1)
  assert layer_sampling.resolve(lower, 3).weights == (3, 2, 1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'layers': 3}, r'sampling\.layers=3 has no effect where all layers'),
    ({'method': 'ows'}, 'need a file of them, sampling.scores'),
    ({'draw': 'uniform', 'scores': 'a.json'}, "needs sampling.draw='scores'"),
    ({'method': 'lisa', 'layers': 9}, 'layers=9 cannot be drawn of 4'),
    ({'method': 'lisa', 'warmup_steps': 20}, 'warmup_steps=20 must be shorter'),
    ({'method': 'lisa', 'always_on': ('hat',)}, "always_on names 'hat'"),
    ({'method': 'lisa', 'always_on': ('[',)}, r"always_on: '\[' is no regex"),
    ({'method': 'lisa', 'layers': 9}, 'what is not given of them are those of'),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    plan(sampling=LayerSamplingOptions(**options))


def test_nothing_to_draw_is_refused():
  rules = (('layers', 'frozen'), ('.*', 'full'))
  with pytest.raises(ValueError, match='nothing in them trains: label'):
    plan(optim=OptimConfig(name='adamw', rank=None, param_labels=rules))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'on_leave': 'keep', 'carry': False},
      "sampling.carry=False has no effect: sampling.on_leave='keep' keeps",
    ),
    (
      {'method': 'badam', 'reset_always': True},
      'sampling.reset_always=True has no effect: nothing outside of the layers',
    ),
    ({'layers': 4}, 'All 4 layers train at a time: nothing is drawn.'),
    ({'every': 200}, 'In 300 steps 2 layers are drawn 2 times'),
  ],
)
def test_what_has_no_effect_is_told(changes, message, caplog):
  options = LayerSamplingOptions(**{'method': 'lisa', 'layers': 1} | changes)
  if changes == {'every': 200}:
    options = dataclasses.replace(options, layers=2)
    plan(sampling=options, model=dataclasses.replace(TINY, num_layers=5))
  else:
    plan(sampling=options)
  assert message in caplog.text


def test_scores_are_fixed_in_a_run_wherever_their_file_is(tmp_path):
  path = tmp_path / 'scores.txt'
  path.write_text('1\n2\n3\n4\n')
  options = LayerSamplingOptions(method='ows', scores=str(path))
  built = plan(sampling=options)
  assert built.fixed == {'scores of layers': [1, 2, 3, 4]}
  assert plan().fixed == {}


def test_projected_sums_are_refused():
  with pytest.raises(ValueError, match="accumulate='projected' adds up"):
    dataclasses.replace(
      CONFIG, step=StepConfig(mode='layerwise', accumulate='projected')
    )


def test_state_is_that_of_the_drawn_layers():
  built = plan()
  opt = built.abstract_state.opt_state
  for leaf in jax.tree.leaves(opt.slots):
    assert leaf.shape[0] == 2
  # Two moments, of two layers of four, of the embedding, the norm and the head.
  sizes = jax.tree.map(lambda x: x.size, built.parameters.trained)
  layers = sum(jax.tree.leaves(sizes['layers'])) // 2
  outer = sum(jax.tree.leaves(sizes)) - 2 * layers
  found = report.memory(built, CONFIG.step, CONFIG.optim)
  assert found['moments']['this run'] == 8 * (layers + outer)
  assert found['gradients']['this run'] == 4 * (layers + outer)
  rows = {row.name: row for row in report_rows(built)}
  assert rows['layers/mlp/up_proj/kernel'].shape == (4, 16, 24)


def test_what_rests_lies_on_the_host():
  built, kept, dropped = (
    plan(sampling=LayerSamplingOptions(method='lisa', on_leave=on_leave))
    for on_leave in ('offload', 'keep', 'drop')
  )
  opt = built.abstract_state.opt_state
  for leaf in jax.tree.leaves(opt.resting):
    assert leaf.sharding.memory_kind == 'pinned_host'
    assert leaf.shape[0] == LAYERS
  assert built.state_bytes == dropped.state_bytes < kept.state_bytes
  found, expected = (
    report.memory(x, CONFIG.step, CONFIG.optim) for x in (built, dropped)
  )
  assert found == expected
  params, _ = built.parameters.start(jax.random.key(0))
  numbers = {name: np.float32(1) for name in opt.hyperparams}
  started = built.init_optimizer(params, numbers, jax.random.key(0))
  leaf = jax.tree.leaves(started.resting)[0]
  assert leaf.sharding.memory_kind == 'pinned_host'
  assert set(built.stats(started)) == set(dropped.stats(started))


@pytest.mark.parametrize(
  ('options', 'trained'),
  [
    ({'method': 'badam'}, {'layers'}),
    ({'method': 'badam', 'always_on': ('norm',)}, {'layers', 'norm'}),
    ({'method': 'lisa', 'always_on': ()}, {'layers'}),
    ({'method': 'lisa'}, {'layers', 'embed', 'norm', 'lm_head'}),
  ],
)
def test_what_is_not_always_on_is_frozen(options, trained):
  built = plan(sampling=LayerSamplingOptions(**options))
  assert set(built.parameters.trained) == trained
  assert set(built.parameters.frozen) == {'embed', 'norm', 'lm_head'} - trained


def bytes_of_always(state, optimizer='galore'):
  built = plan(
    optim=OptimConfig(name=optimizer, rank=4),
    sampling=LayerSamplingOptions(method='lisa', always_on_state=state),
    model=dataclasses.replace(TINY, hidden_size=64),
  )
  always = built.abstract_state.opt_state.always
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(always))


def test_state_of_what_is_always_on_can_be_small():
  full, eighth, projected = map(bytes_of_always, ('full', 'int8', 'low_rank'))
  assert eighth < 0.27 * full
  # Of [300, 64], moments of [300, 4] and a basis.
  assert projected < 0.12 * full
  with pytest.raises(ValueError, match='needs an optimizer with subspaces'):
    bytes_of_always('low_rank', 'adamw')


def test_methods_of_fine_tuning_bring_their_draw():
  given = LayerSamplingOptions(layers=3)
  lisa = methods.sampling_of(methods.get_method('lisa'), given)
  assert lisa == LayerSamplingOptions(method='lisa', layers=3)
  assert methods.sampling_of(methods.get_method('full'), given) == given
  other = LayerSamplingOptions(method='badam')
  assert methods.sampling_of(methods.get_method('lisa'), other) == other


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {
      'optim': OptimConfig(name='adamw', rank=None),
      'step': StepConfig(mode='layerwise', weight_bits=8),
    },
    {'adapter': AdapterOptions(kind='lora', rank=2)},
  ],
  ids=['8 bits', 'adapters'],
)
def test_drawn_layers_alone_move(changes):
  """Codes of undrawn layers, and adapters, keep every bit."""
  built = plan(
    model=dataclasses.replace(TINY, hidden_size=32, intermediate_size=64),
    sampling=LayerSamplingOptions(draw='uniform', layers=1, every=2),
    **changes,
  )
  numbers = {
    name: np.float32(value)
    for name, value in {'peak': 0.01, 'climb': -0.005}.items()
  }
  state, frozen = built.start(jax.random.key(0), numbers)
  batch = {
    'inputs': np.arange(32, dtype=np.int32).reshape(4, 8),
    'targets': np.arange(1, 33, dtype=np.int32).reshape(4, 8),
    'weights': np.ones((4, 8), np.float32),
  }
  seen = set()
  for _ in range(5):
    before = jax.device_get(state.params['layers'])
    state, metrics = built.train_step(state, batch, frozen)
    after = jax.device_get(state.params['layers'])
    (drawn,) = np.asarray(state.opt_state.layers).tolist()
    seen.add(drawn)
    moved = [
      {i for i in range(LAYERS) if (a[i] != b[i]).any()}
      for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(before), strict=True
      )
    ]
    assert set().union(*moved) == {drawn}
    assert np.isfinite(metrics['loss'])
  assert len(seen) > 1
