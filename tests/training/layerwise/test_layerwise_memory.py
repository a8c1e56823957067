"""What a deeper model adds to the memory of the layer-wise step.

The state is donated: beside it, a layer may add the input of its block, and
where gradients wait what projecting leaves of them. A stack that is copied
within the loop over the layers would add its whole size, and the time to copy
it at every layer.
"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.common import programs
from benchmarks.step import layerwise_step
from gnlorp_jax import optim
from gnlorp_jax.training import layerwise, parameters, state

# 8 and 16 layers, and one more, which is no other axis of the models.
LAYERS = 9, 17


def growth(compile_step):
  """Bytes of temporaries that a layer adds; stacks must not be copied."""
  temps = []
  for layers in LAYERS:
    step = compile_step(layers)
    memory = programs.memory(step)
    temps.append(memory['temporaries'])
    # All of the state is donated: new are the metrics, four bytes each, and
    # the table of what is returned, a pointer for each array.
    new = memory['outputs'] - memory['aliases']
    _, metrics = step.out_info
    assert new == 8 * len(jax.tree.leaves(step.out_info)) + 4 * len(metrics)
    assert layerwise_step.stacked_copies(step.as_text(), layers) == []
  return (temps[1] - temps[0]) / (LAYERS[1] - LAYERS[0])


def test_a_layer_of_a_llama_adds_the_input_of_its_block():
  """The program of `train_lm.py`; moments and weights are codes."""
  batch, positions, features = 4, 32, 128

  def compile_step(layers):
    planned = layerwise_step.plan(
      **{'hidden': features, 'layers': layers, 'rank': 16, 'vocab_size': 192},
      **{'batch_size': batch, 'seq_len': positions, 'clip_global_norm': None},
      **{'name': 'galore', 'moment_bits': 8, 'weight_bits': 8},
      # One kernel of every shape is projected: compiling takes the time.
      param_labels=(('(q|up|down)_proj', 'low_rank'), ('.*', 'full')),
    )
    return programs.compiled(lambda: programs.lower(planned))[0]

  expected = batch * positions * features * 4
  # XLA copies the stacks of the norms' scales: their last uses, for gradients
  # of what comes before them, come after their own. The loops' counters of
  # bases are four bytes for each matrix and number.
  slack = 4 * 2 * features + 7 * 4 * 8
  assert expected - slack <= growth(compile_step) <= expected + slack


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('gradnormlorp', {}),
    ('galore', {'accumulate': 'projected', 'num_micro_batches': 2}),
  ],
  ids=['waiting', 'summed'],
)
def test_where_gradients_wait_a_layer_adds_what_projecting_leaves(
  toy, name, options
):
  make = getattr(optim, name)
  tx = make(1e-2, skip_nonfinite=False, **toy.LOW_RANK)

  def compile_step(layers):
    params = toy.init(layers=layers)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    now = state.TrainState(
      count, count, params, jax.eval_shape(tx.init, params)
    )
    step = layerwise.make_train_step(
      toy.PIECES, tx, parameters.plain(params), clip_global_norm=1.0, **options
    )
    jitted = jax.jit(step, donate_argnums=0)
    return programs.compiled(lambda: jitted.lower(now, toy.make_batch(0)))[0]

  d, f, rank = toy.FEATURES, toy.HIDDEN, toy.LOW_RANK['rank']
  rows = toy.BATCH // options.get('num_micro_batches', 1)
  kept = 2 * rank * f + d  # Two kernels, and the scale of the norm.
  if name == 'gradnormlorp':
    kept += f + d  # Magnitudes of both.
  assert growth(compile_step) == 4 * (rows * toy.POSITIONS * d + kept)


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
