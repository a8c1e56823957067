# %% [markdown]
# # The layer-wise step
#
# A training step usually computes the gradients of all weights before it makes the first update. These pages
# call that a *whole step*. At that moment every weight has a gradient beside it. None of the gradients
# is needed for long, because what the optimizer does with a block depends on that block's gradient alone. A step
# that goes *layer by layer* updates each block when the backward pass reaches it, and then forgets its gradient.
# This page writes such a step in some twenty lines, for a chain of small blocks, and compares it with a whole one.
#
# ## A chain of blocks

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from gnlorp_jax import galore

L, B, D = 12, 32, 256  # Blocks, rows of a batch, width.
keys = jax.random.split(jax.random.key(0), 3)
params = {
  'up': {'kernel': jax.random.normal(keys[0], (L, D, 4 * D)) / D**0.5},
  'down': {'kernel': jax.random.normal(keys[1], (L, 4 * D, D)) / (16 * D)},
}
x_BD = jax.random.normal(keys[2], (B, D))
target_BD = jnp.roll(x_BD, 1, axis=1)


def block(params, x_BD):
  """One block: what it adds to its input."""
  hidden = jax.nn.gelu(x_BD @ params['up']['kernel'])
  return x_BD + hidden @ params['down']['kernel']


def loss_of(x_BD):
  return jnp.mean((x_BD - target_BD) ** 2)


# %% [markdown]
# The kernels of the blocks, which are their weight matrices, are stacked into arrays `[L, ...]`. The blocks run in
# a `jax.lax.scan`, as in the models of this package. The optimizer treats each matrix of a stack by itself.
#
# ## The whole step
#
# The optimizer is GaLore of rank 16. For every kernel it keeps a basis of 16 directions, and it runs Adam on the
# coordinates that the gradient has along them ([how](projection.html)). From time to time the basis is fitted
# anew, which is called a refresh. By default the refreshes of a stack are spread over the steps. Here all matrices
# are refreshed at the same steps, so that the whole step and the layer-wise one can be compared.

# %%
tx = galore(1e-3, rank=16, scale=1.0, spread_refreshes=False)


@jax.jit
def whole_step(params, opt_state):
  def loss_from(params):
    def forward(x_BD, params):
      return jax.checkpoint(block)(params, x_BD), None

    return loss_of(jax.lax.scan(forward, x_BD, params)[0])

  loss, grads = jax.value_and_grad(loss_from)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


# %% [markdown]
# ## Layer by layer
#
# The forward pass keeps the inputs of the blocks. In the backward pass each turn of the loop computes one block
# again, takes its gradient by `jax.vjp`, updates that block, and passes on the gradient of the block's input. The
# gradient of a kernel exists only inside a turn, and the next turn uses its memory again.

# %%
states = jax.vmap(tx.init)(params)  # A state for every block.


@jax.jit
def layerwise_step(params, states):
  def forward(x_BD, params):
    return block(params, x_BD), x_BD

  last_BD, inputs_LBD = jax.lax.scan(forward, x_BD, params)
  loss, error_BD = jax.value_and_grad(loss_of)(last_BD)

  def backward(error_BD, of_block):
    params, state, x_BD = of_block
    _, pull = jax.vjp(block, params, x_BD)
    grads, error_BD = pull(error_BD)
    updates, state = tx.update(grads, state, params)
    return error_BD, (optax.apply_updates(params, updates), state)

  inputs = (params, states, inputs_LBD)
  _, (params, states) = jax.lax.scan(backward, error_BD, inputs, reverse=True)
  return params, states, loss


# %% [markdown]
# ## The same steps
#
# An optimizer that treats each matrix by itself makes the same updates either way, up to rounding:

# %%
whole, whole_state = params, tx.init(params)
by_layer, by_layer_state = params, states
for _ in range(20):
  whole, whole_state, loss = whole_step(whole, whole_state)
  by_layer, by_layer_state, by_layer_loss = layerwise_step(
    by_layer, by_layer_state
  )
difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, by_layer)
print(f'loss after 20 steps: {loss:.6f} and {by_layer_loss:.6f}')
print('largest difference of weights:', max(jax.tree.leaves(difference)))

# %% [markdown]
# ## In less memory
#
# How much memory does each step need beside its arguments (weights, state) and its results? XLA's compiler tells
# it of a compiled step. Below it is asked for chains of 2 to 12 blocks. Both steps keep the inputs of the blocks.
# The whole step also holds a gradient for every block, so that its memory grows with the length of the chain. The
# layer-wise step holds the gradient of one block.

# %%


def held(step, state, blocks):
  """MiB that a step holds beside its arguments and results."""

  def first(leaf):
    return leaf[:blocks] if leaf.shape[:1] == (L,) else leaf

  shorter = jax.tree.map(first, (params, state))
  memory = step.lower(*shorter).compile().memory_analysis()
  return memory.temp_size_in_bytes / 2**20


lengths = (2, 4, 6, 8, 10, 12)
for name, step, state in (
  ('whole', whole_step, tx.init(params)),
  ('layer by layer', layerwise_step, states),
):
  sizes = [held(step, state, blocks) for blocks in lengths]
  plt.plot(lengths, sizes, 'o-', label=name)
  print(f'{name:15s}', ' '.join(f'{size:6.1f}' for size in sizes), 'MiB')
plt.xlabel('blocks')
plt.ylabel('MiB beside weights and state')
plt.ylim(0)
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What the package does besides
#
# The programs take such steps with `--step.mode layerwise`, and `gnlorp_jax.training.layerwise` takes them in
# a program of your own. These do more than the step above:
#
# * Inside a block one parameter is updated after the other, and weights and states are changed in place.
# * The embedding and the head are updated too, large ones by groups of rows.
# * Micro-batches, dropout, adapters, kernels in 8 bits and several devices go with them.
# * Gradients may be **clipped by their common norm**, which is known only when all of them were computed. Either
#   the gradients wait for it in projected form, or the backward pass runs twice, the first time for the norm alone.
#
# Next: [layer by layer](../layerwise.html) says what each of these takes, and [where memory goes](memory.html) what
# such steps save at 7 billion parameters.
