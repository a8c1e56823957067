"""What a deeper model adds to the memory of the layer-wise step.

The state is donated: beside it, a layer may add the input of its block, and
where gradients wait what projecting leaves of them. A stack that is copied
within the loop over the layers would add its whole size, and the time to copy
it at every layer.
"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.step import layerwise_step
from gnlorp_jax.recipes.pretrain import recipe

# 8, 16, 32 layers, and one more, which is no other axis of the model.
LAYERS = 9, 17, 33
VOCAB, BATCH, POSITIONS, FEATURES, RANK = 192, 4, 32, 128, 16
HIDDEN = FEATURES * 43 // 16
# Compiling takes nearly all of the time here. The growth of the first case is
# that with all optimizations, too.
COMPILER_OPTIONS = {'xla_backend_optimization_level': 0}
if jax.__version_info__ < (0, 11):  # Later there is nothing else.
  COMPILER_OPTIONS['xla_cpu_use_fusion_emitters'] = False

INPUT = BATCH * POSITIONS * FEATURES * 4
# Of a layer, float32: projected kernels of 4 x [D, D] and 3 of D and F, the
# magnitudes of GradNormLoRP, the two norms.
PROJECTED = 4 * RANK * (4 * FEATURES + 3 * HIDDEN)
MAGNITUDES = 4 * (5 * FEATURES + 2 * HIDDEN)
NORMS = 4 * 2 * FEATURES
# XLA copies the stacks of the norms' scales: their last uses, for gradients of
# what comes before them, come after their own. The loops' counters of bases are
# four bytes for each matrix and number.
SLACK = NORMS + 7 * 4 * 8

CASES = {
  'fp32': ({}, INPUT),
  '8 bits': (
    {'moment_bits': 8, 'basis_bits': 4, 'weight_bits': 8},
    INPUT,
  ),
  'fira': ({'name': 'fira'}, INPUT),
  'clipped': (
    {'clip_global_norm': 1.0},
    INPUT + PROJECTED + MAGNITUDES + NORMS,
  ),
  'projected': (
    {'name': 'galore', 'accumulate': 'projected', 'micro_batches': 2},
    INPUT // 2 + PROJECTED + NORMS,
  ),
}


def compiled(layers, options):
  run = layerwise_step.settings(
    hidden=FEATURES,
    layers=layers,
    rank=RANK,
    batch_size=BATCH,
    seq_len=POSITIONS,
    vocab_size=VOCAB,
    mode='layerwise',
    **{'clip_global_norm': None, **options},
  )
  planned = recipe.plan(run, jax.devices()[:1])
  return layerwise_step.compile_step(planned, COMPILER_OPTIONS)


@pytest.mark.parametrize('name', CASES)
def test_a_layer_adds_what_it_must(name):
  options, expected = CASES[name]
  temps = []
  for layers in LAYERS[: 3 if name == 'fp32' else 2]:
    step = compiled(layers, options)
    memory = step.memory_analysis()
    temps.append(memory.temp_size_in_bytes)
    # All of the state is donated: new are six metrics, four bytes each, and
    # the table of what is returned, a pointer for each array.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arrays = len(jax.tree.leaves(step.out_info))
    assert new == 8 * arrays + 6 * 4
    assert layerwise_step.stacked_copies(step.as_text(), layers) == []
  for fewer, more, before, after in zip(
    LAYERS, LAYERS[1:], temps, temps[1:], strict=False
  ):
    growth = (after - before) / (more - fewer)
    assert expected - SLACK <= growth <= expected + SLACK


def test_finds_a_copied_stack():
  def body(i, carry):
    stack, total = carry
    new = stack.at[i].set(stack[i] + total)
    return new, stack[i - 1] + new[i]  # Read after it was written.

  stack, total = jnp.ones((17, 24, 40)), jnp.ones((24, 40))
  step = jax.jit(
    lambda stack, total: jax.lax.fori_loop(0, 17, body, (stack, total)),
    donate_argnums=0,
  )
  text = step.lower(stack, total).compile().as_text()
  assert 'f32[17,24,40]' in layerwise_step.stacked_copies(text, 17)
