# %% [markdown]
# # An optimizer in your own loop
#
# The optimizers are Optax transformations. A training loop that uses Optax already changes in one place, which
# is where the optimizer is made. This page trains a small network with Flax Linen, Flax NNX and
# Equinox, looks at what the optimizer does with every parameter, and counts what it saves.
#
# ```bash
# pip install .   # In a checkout: all that the optimizers need.
# pip install flax equinox orbax-checkpoint   # What this page uses besides.
# ```
#
# One line comes before jax is imported. On a CPU the small factorisations of a refresh use OpenBLAS, whose
# threads would fight with XLA's over the cores.

# %%
import os

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import pathlib
import tempfile

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx

from gnlorp_jax import format_report, gradnormlorp, report
from gnlorp_jax.optim import inspect

# Something to learn: a random linear map through a nonlinearity.
key = jax.random.key(0)
x_BD = jax.random.normal(key, (128, 64))
y_BD = jnp.tanh(x_BD @ jax.random.normal(jax.random.key(1), (64, 64)) / 8)

# %% [markdown]
# ## Flax Linen, or any tree of arrays
#
# Only the call of `gradnormlorp`, and the report further down, belong to this package. The optimizer projects the
# gradient of each weight matrix onto a few directions, and runs Adam on the coordinates that are left. `rank` is
# the number of these directions; together they span a *subspace*. Biases take Adam as it is.


# %%
class Network(nn.Module):
  @nn.compact
  def __call__(self, x_BD):
    return nn.Dense(64)(nn.relu(nn.Dense(512)(x_BD)))


network = Network()
params = network.init(key, x_BD)

tx = optax.chain(optax.clip_by_global_norm(1.0), gradnormlorp(2e-2, rank=16))
opt_state = tx.init(params)


@jax.jit
def train_step(params, opt_state):
  def loss_fn(params):
    return jnp.mean((network.apply(params, x_BD) - y_BD) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


for step in range(100):
  params, opt_state, loss = train_step(params, opt_state)
  if step % 33 == 0:
    print(f'step {step:3d}: loss {loss:.4f}')

# %% [markdown]
# ## What it does with every parameter
#
# `report` computes from shapes alone: it can be asked before anything is allocated, and says
# why a parameter is treated as it is. Here the biases are the only parameters without a
# subspace.

# %%
print(format_report(report(params, gradnormlorp(2e-2, rank=16))))

# %% [markdown]
# Weight matrices, which these pages call *kernels* as Flax does, are found by their names: `kernel` (Flax), `weight`
# (Equinox) or `w` (Haiku), unless the path names an embedding, a head, a norm or a classifier. Whatever has another
# name takes plain Adam, and the report says so. If yours have other names, say which of them are to be projected.
# Rules are tried in their order, and the first pattern that is found in a path counts:

# %%
unusual = {
  'Wq': jnp.ones((64, 64)),
  'theta': jnp.ones((64, 512)),
  'shift': jnp.ones(64),
}
rules = [('Wq|theta', 'low_rank'), ('.*', 'full')]
labelled = gradnormlorp(2e-2, rank=16, param_labels=rules)
print(format_report(report(unusual, labelled, rules)))

# %% [markdown]
# Such a matrix is taken as `[in, out]`. Axes in another order are named by `weight_dimension_numbers`.
# [The optimizers](../optimizers.html#what-happens-to-a-parameter) has the rules.
#
# ## Flax NNX


# %%
class Module(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(64, 512, rngs=rngs)
    self.down = nnx.Linear(512, 64, rngs=rngs)

  def __call__(self, x_BD):
    return self.down(nnx.relu(self.up(x_BD)))


module = Module(nnx.Rngs(0))
optimizer = nnx.Optimizer(module, gradnormlorp(2e-2, rank=16), wrt=nnx.Param)


@nnx.jit
def nnx_step(module, optimizer):
  loss, grads = nnx.value_and_grad(
    lambda module: jnp.mean((module(x_BD) - y_BD) ** 2)
  )(module)
  optimizer.update(module, grads)
  return loss


losses = [float(nnx_step(module, optimizer)) for _ in range(100)]
print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f}')

# %% [markdown]
# ## Equinox
#
# The weights of Equinox are `[out, in]`. The optimizer knows that by their name, `weight`.

# %%
model = eqx.nn.MLP(64, 64, width_size=512, depth=1, key=key)
tx = gradnormlorp(2e-2, rank=16)
opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def eqx_step(model, opt_state):
  loss, grads = eqx.filter_value_and_grad(
    lambda model: jnp.mean((jax.vmap(model)(x_BD) - y_BD) ** 2)
  )(model)
  weights = eqx.filter(model, eqx.is_inexact_array)
  updates, opt_state = tx.update(grads, opt_state, weights)
  return eqx.apply_updates(model, updates), opt_state, loss


for _ in range(100):
  model, opt_state, loss = eqx_step(model, opt_state)
print(f'loss {loss:.4f}')

# %% [markdown]
# ## Smaller still
#
# Adam's moments, and the bases (the matrices that hold the directions), may be kept in 8 or 4 bits. Every other
# optimizer is called in the same way. This is what each keeps for the network above, in bytes:

# %%
import gnlorp_jax

for name, made in {
  'optax.adamw': optax.adamw(1e-3),
  'gradnormlorp': gnlorp_jax.gradnormlorp(2e-2, rank=16),
  'gradnormlorp, 8 bits': gnlorp_jax.gradnormlorp(
    2e-2, rank=16, moment_bits=8, basis_bits=8
  ),
  'galore': gnlorp_jax.galore(2e-2, rank=16),
  'apollo': gnlorp_jax.apollo(2e-2, rank=16),
}.items():
  state = jax.eval_shape(made.init, params)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  print(f'{name:21s} {size:8,d} bytes')

# %% [markdown]
# ## A whole loop
#
# What a longer run has besides: a learning rate that rises and falls, clipping, weight decay of the kernels alone,
# moments in 8 bits, a look at the state, and a checkpoint from which it goes on.
#
# A projected kernel moves by the learning rate times `scale`, which is 0.25, and all else by the plain learning
# rate. That is why it is larger here than Adam's usually is: [learning rates](../optimizers.html#learning-rates).
#
# `weight_decay_mask` is a function from the parameters to a tree of booleans. `keystr` writes the path of a
# parameter of any library; with NNX this function is the same, and with Equinox it asks for `weight`.

# %%
STEPS = 200


def kernels_only(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'kernel' in jax.tree_util.keystr(path), params
  )


schedule = optax.warmup_cosine_decay_schedule(
  init_value=0.0,
  peak_value=2e-2,
  warmup_steps=20,
  decay_steps=STEPS,
  end_value=2e-3,
)
tx = optax.chain(
  optax.clip_by_global_norm(1.0),
  gradnormlorp(
    schedule,
    rank=16,
    weight_decay=0.01,
    weight_decay_mask=kernels_only,
    moment_bits=8,
  ),
)


@jax.jit
def whole_step(params, opt_state, step):
  # New data for every step, which follow from its number alone.
  x_BD = jax.random.normal(jax.random.fold_in(key, step), (128, 64))
  y_BD = jnp.tanh(x_BD @ jax.random.normal(jax.random.key(1), (64, 64)) / 8)

  def loss_fn(params):
    return jnp.mean((network.apply(params, x_BD) - y_BD) ** 2)

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def train(params, opt_state, first, end):
  for step in range(first, end):
    params, opt_state, loss = whole_step(params, opt_state, step)
    if step % 50 == 49:
      print(f'step {step + 1:3d}: loss {loss:.4f}')
  return params, opt_state


params = network.init(key, x_BD)
params, opt_state = train(params, tx.init(params), 0, STEPS // 2)

# %% [markdown]
# The state tells how large it is, how many steps were left out because their gradients were not finite, and what each
# subspace holds of its gradient. ([All that it tells](../optimizers.html#inspecting-states).)

# %%
print('bytes:', inspect.state_bytes(opt_state))
print('skipped:', inspect.skipped_steps(opt_state))
for name, stats in inspect.subspace_stats(opt_state).items():
  print(
    f'{name}: {stats.refreshes:.0f} refreshes, '
    f'{stats.energy:.0%} of the gradient captured'
  )

# %% [markdown]
# Parameters and state are trees of arrays, so any checkpointer can save them. Orbax, and `flax.serialization` too,
# restore into a tree of the same structure: make it with the same options (rank, bits, labels and their like decide
# which arrays there are). Only shapes are needed, which `jax.eval_shape` finds without computing anything.

# %%
folder = pathlib.Path(tempfile.mkdtemp()) / str(STEPS // 2)
with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(folder, {'params': params, 'opt_state': opt_state})

# In the program that goes on, be it another process:
shapes = jax.eval_shape(network.init, key, x_BD)
with ocp.StandardCheckpointer() as checkpointer:
  restored = checkpointer.restore(
    folder,
    {'params': shapes, 'opt_state': jax.eval_shape(tx.init, shapes)},
  )

uninterrupted = train(params, opt_state, STEPS // 2, STEPS)
resumed = train(restored['params'], restored['opt_state'], STEPS // 2, STEPS)
same = jax.tree.map(lambda x, y: bool((x == y).all()), uninterrupted, resumed)
print('the same bits:', all(jax.tree.leaves(same)))

# %% [markdown]
# Next: [what a projection does to a gradient](../concepts/projection.html), [all optimizers](../optimizers.html),
# or a whole program: [pre-train a model](pretrain.html).
