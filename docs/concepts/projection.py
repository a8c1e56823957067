# %% [markdown]
# # What a projection does to a gradient
#
# Adam keeps two numbers for every weight. A low-rank method keeps two numbers for every *coordinate of
# the gradient in a subspace*, and there are fewer of those. This page shows, for one matrix, what is
# kept, what is lost, and when that is enough.
#
# ## Gradients have few directions
#
# The gradient of a matrix `W` of a layer `y = x W` is a sum over tokens, `x^T dy`. Its
# singular values fall quickly: a few directions carry most of it. Here is a layer of a small network
# in training.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

keys = jax.random.split(jax.random.key(0), 4)
# Inputs as a layer sees them: some directions are much stronger than others.
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
# A basis `P` of `r` columns spans the subspace. The gradient's coordinates are `P^T G`, of shape
# `[r, n]`; Adam's two moments have that shape, and the update is expanded again by `P`. With `m = 128`,
# `n = 256` and `r = 16`:

# %%
m, n, r = 128, 256, 16
print(f'AdamW:    {2 * m * n:6,d} numbers, two for every weight')
print(
  f'low rank: {2 * r * n + m * r:6,d} numbers, two for every coordinate and the basis'
)

# %% [markdown]
# ## The subspace turns
#
# What lies outside of the subspace is not learned until the basis is fitted anew, every
# `update_proj_gap` steps. Two runs of gradient descent in a subspace of rank 16, one with the basis of
# the first step for ever, one that refreshes it, beside one with the whole gradient. What was learned
# leaves the gradient, so the share that a basis catches falls until the next refresh.

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
# The run that refreshes goes on learning, though its last bases hold a third of what is left; the other has
# nothing left to learn in its subspace. Here the projection costs loss in exchange for memory. Whether
# it does in training a language model is measured in [the results](../results/quality.html). (Plain descent is shown because its steps are
# the gradient's. Adam, which the methods run on the coordinates, takes weak directions with steps as
# long as those of strong ones.) In this package a refresh happens inside the compiled step, one
# matrix at a time, so that no step waits for all of them.
#
# What methods do with the rest differs: [GaLore](../reference/optimizers.html) leaves it out,
# Fira and Alice add it scaled, FRUGAL adds its sign, APOLLO uses the subspace only to find out how long
# the steps should be, and GradNormLoRP projects the gradient of each kernel's direction after
# splitting it into magnitude and direction. [The optimizers](../optimizers.html) compares them.
