# %% [markdown]
# # What a projection does to a gradient
#
# Adam keeps two numbers, its *moments*, for every weight. A low-rank method first projects the gradient
# onto a few directions, and keeps two numbers for each coordinate that is left. This page shows, for one
# matrix, what the projection keeps, what it loses, and how the lost part is learned later.
#
# Three words stand on all pages. A **subspace** is what the chosen directions span, its **rank** is their
# number, and a **basis** is a matrix that has them as its columns.
#
# ## Gradients have few directions
#
# In a layer `y = x W` the gradient of the matrix `W` is `x^T dy`, a sum over tokens. Often a few directions
# carry most of it, which means that its singular values fall quickly. The example is one layer with random
# weights. Some directions of its inputs are much stronger than others, and it learns to do what another
# random layer does.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

keys = jax.random.split(jax.random.key(0), 4)
# Some directions of the inputs are much stronger than others.
scales_M = 1.0 / (1 + jnp.arange(128)) ** 0.5
x_BM = jax.random.normal(keys[0], (512, 128)) * scales_M
w_MN = 0.1 * jax.random.normal(keys[1], (128, 256))
target_MN = jax.random.normal(keys[2], (128, 256))


def loss_of(w_MN):
  return jnp.mean((jnp.tanh(x_BM @ w_MN) - jnp.tanh(x_BM @ target_MN)) ** 2)


grad_MN = jax.grad(loss_of)(w_MN)
values = np.linalg.svd(grad_MN, compute_uv=False)
energy = np.cumsum(values**2) / np.sum(values**2)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.semilogy(values / values[0])
left.set(xlabel='number', ylabel='singular value, of the largest')
right.plot(np.arange(1, 129), energy)
right.axvline(16, color='0.6', lw=0.8)
right.set(xlabel='rank', ylabel='share of the squared norm')
figure.tight_layout()
print(f'Rank 16 of 128 keeps {energy[15]:.1%} of the squared norm.')

# %% [markdown]
# ## Project, run Adam, expand
#
# Let `G` be the gradient, of shape `[m, n]`, and `P` a basis with `r` columns, so that the rank is `r`. The
# coordinates of the gradient are `P^T G`, of shape `[r, n]`. Adam runs on these, and its two moments have
# that shape. `P` times Adam's result is the update of the matrix. With `m = 128`, `n = 256` and `r = 16`:

# %%
m, n, r = 128, 256, 16
print(f'AdamW:    {2 * m * n:6,d} numbers, two for every weight')
print(
  f'low rank: {2 * r * n + m * r:6,d} numbers, two for every coordinate and the basis'
)

# %% [markdown]
# ## The subspace turns
#
# What lies outside of the subspace is not learned until the basis is fitted to a new gradient. That is called
# a **refresh**, and happens every `update_proj_gap` steps. Below are three runs of gradient descent. One takes
# the whole gradient. Two project it to rank 16: one of them keeps the basis of the first step, the other
# refreshes it every 20 steps. What was learned is no longer in the gradient, so the share of the gradient
# that a basis catches falls until the next refresh.

# %%
step_size, steps = 20.0, 200
value_and_grad = jax.jit(jax.value_and_grad(loss_of))


@jax.jit
def basis_of(grad_MN):
  return jnp.linalg.svd(grad_MN, full_matrices=False)[0][:, :r]


def descend(gap):
  """Losses, and the shares of the gradient that were kept."""
  w, losses, shares = w_MN, [], []
  for step in range(steps):
    loss, grad_MN = value_and_grad(w)
    if gap and step % gap == 0:
      basis_MR = basis_of(grad_MN)
    used_MN = basis_MR @ (basis_MR.T @ grad_MN) if gap else grad_MN
    losses.append(float(loss))
    shares.append(float(jnp.sum(used_MN**2) / jnp.sum(grad_MN**2)))
    w = w - step_size * used_MN
  return losses, shares


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for name, gap in {
  'whole gradient': None,
  'refreshed every 20 steps': 20,
  'fitted once': steps,
}.items():
  losses, shares = descend(gap)
  left.plot(losses, label=name)
  right.plot(shares, label=name)
  print(f'{name:24s} last loss {losses[-1]:.5f}')
left.set(xlabel='step', ylabel='loss', yscale='log')
right.set(xlabel='step', ylabel='share of the squared norm', ylim=(0, 1.02))
left.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# The run that refreshes goes on learning, though its last bases catch only a third of the gradient. In the run
# that keeps its first basis less than a tenth of the gradient lies in the subspace at the end, and little is
# learned. Here the projection costs loss in exchange for memory. Whether it does so when a language model is
# trained is measured in [the results](../results/quality.html).
#
# Plain gradient descent is shown because its steps are the gradient itself. The methods run Adam on the
# coordinates, and Adam's steps along weak directions are about as long as those along strong ones. In this
# package a refresh happens inside the compiled step, by default one matrix at a time, so that no step waits for
# all of them.
#
# Methods differ in what they do with the part that the projection loses. [GaLore](../reference/optimizers.html)
# leaves it out. Fira and Alice add it, scaled, and FRUGAL adds its sign. APOLLO uses the subspace only to find
# out how long the steps should be. GradNormLoRP first splits each kernel (the weight matrix of a layer) into
# magnitude and direction, and projects the gradient of the direction.
#
# Next: [the optimizers](../optimizers.html) compares all of them, and [where memory goes](memory.html) counts
# what they keep for a model of 7 billion parameters.
