"""One training step, layer by layer: one block's gradient exists at a time.

The forward pass keeps the input of every block. The backward pass goes through
the blocks from the last to the first, computes a block afresh from its input,
and is done with its gradient before it goes on. There are two ways to be done:

  at once  The optimizer updates the block's slice of parameters and state.
           Where gradients are clipped, a backward pass before it measures them.
  waiting  The optimizer projects the gradient. The projected gradients of all
           blocks are kept, summed over micro-batches and devices, clipped, and
           then the second half of the step goes through the blocks.

Words of this package:

  trained, frozen  the two trees of `parameters.Parameters`. Gradients, updates
                   and optimizer state exist of the trained one alone.
  stored, decoded  parameters as a run keeps them, perhaps as codes, and as
                   arrays to compute with
  layers           ``params['layers']``, stacked ``[L, ...]``
  outer            all other parameters: embedding, final norm, head
  path             the keys that lead to a parameter in the nested dict
  cut              which part of a parameter along its first axis: a layer of a
                   stack, or some rows of a large matrix
  param state      the part of the optimizer's state that belongs to a parameter
  shared state     the rest of it, such as the count of steps
  projected        of a gradient: what an optimizer that is split in two
                   (`optim.split`) makes of it before the rest of its step
  pass             once through all blocks, forward or backward

`step` builds the step, `at_once` and `waiting` are its two ways; `sampled` is
the step of layers that were drawn (`layer_sampling`). `engine` moves a
parameter, `passes` computes gradients, `slices` takes trees apart, `checks`
finds what cannot be trained so. `gradient_norms` measures gradients and trains
nothing.
"""

from gnlorp_jax.training.layerwise.sampled import init as init_sampled
from gnlorp_jax.training.layerwise.sampled import make_sampled_step
from gnlorp_jax.training.layerwise.step import (
  Accumulate,
  Clipping,
  TrainStep,
  gradients_wait,
  make_train_step,
)
from gnlorp_jax.training.objectives import Pieces

__all__ = [
  'Accumulate',
  'Clipping',
  'Pieces',
  'TrainStep',
  'gradients_wait',
  'init_sampled',
  'make_sampled_step',
  'make_train_step',
]
