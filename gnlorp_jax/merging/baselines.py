"""Methods of merging that DOGE is compared with.

All take task vectors, the differences of the experts from their base, and give
the update that is added to the base.

Shape suffixes in this file:
  N     experts
  O, I  rows and columns of a matrix, as PyTorch keeps it: outputs, inputs
  K     leading singular triples of an expert
"""

import zlib

import jax
import jax.numpy as jnp


def task_arithmetic(tau_N: jax.Array, weights_N: jax.Array) -> jax.Array:
  """The weighted sum of task vectors.

  Args:
    tau_N: ``[n, *]``, floating.
    weights_N: ``[n]``; nothing divides them by their sum.

  Returns:
    The update, ``[*]``.

  References:
    Ilharco et al., `Editing Models with Task Arithmetic`, 2022,
    arXiv:2212.04089.
  """
  return jnp.tensordot(weights_N, tau_N, 1)


def trim(tau_N: jax.Array, thresholds_N: jax.Array) -> jax.Array:
  """Task vectors without what is smaller than a threshold, by expert."""
  return jnp.where(jnp.abs(tau_N) >= _along(thresholds_N, tau_N), tau_N, 0)


def signs(trimmed_N: jax.Array) -> jax.Array:
  """The sign of the sum over the experts, ``[*]``."""
  # One by one: XLA sums over a leading axis many times slower on a CPU.
  return jnp.sign(sum(trimmed_N))


def ties(trimmed_N: jax.Array, majority: jax.Array | float) -> jax.Array:
  """The mean of the entries that have the elected sign.

  Args:
    trimmed_N: Trimmed task vectors, ``[n, *]``, times their weights.
    majority: Stands for the sign where the sum is zero: that of the sum of all
      `signs` of all tensors, -1, 0 or 1.

  Returns:
    The update, ``[*]``.

  References:
    Yadav et al., `TIES-Merging`, 2023, arXiv:2306.01708; its release has the
    rule for sums of zero.
  """
  sign = signs(trimmed_N)
  sign = jnp.where(sign == 0, majority, sign)
  agree_N = jnp.where(sign > 0, trimmed_N > 0, trimmed_N < 0)
  total = sum(trimmed_N * agree_N)
  return total / jnp.maximum(sum(agree_N.astype(total.dtype)), 1)


def dare(tau: jax.Array, keep: float, key: jax.Array) -> jax.Array:
  """A task vector with entries dropped at random, the others scaled up.

  Args:
    tau: Of one tensor of one expert, ``[*]``.
    keep: How many percent stay, in (0, 100].
    key: Decides which: see `key_of`.

  References:
    Yu et al., `Language Models are Super Mario`, 2023, arXiv:2311.03099.
  """
  share = keep / 100
  return jnp.where(jax.random.bernoulli(key, share, tau.shape), tau / share, 0)


def key_of(seed: int, name: str, expert: str) -> jax.Array:
  """A random key of a tensor and an expert, in whatever order they come."""
  key = jax.random.key(seed)
  for text in (name, expert):
    key = jax.random.fold_in(key, zlib.crc32(text.encode()))
  return key


def tsv(tau_NOI: jax.Array, num_experts: int) -> jax.Array:
  """The leading singular triples of all experts, their bases made orthonormal.

  Args:
    tau_NOI: Task vectors of a matrix, ``[n, out, in]``, none zero, times their
      weights. See `is_thin` for what has no directions to share.
    num_experts: By how many the ``min(out, in)`` directions are shared, those
      among them that did not change this matrix.

  Returns:
    The update, ``[out, in]``.

  References:
    Gargiulo et al., `Task Singular Vectors`, 2024, arXiv:2412.00081: TSV-M.

  Note:
    Directions of singular values that are zero, as beyond the rank of an
    adapter, are arbitrary. They are left out; the release whitens them too.
  """
  count = min(tau_NOI.shape[1:]) // num_experts

  def leading(tau_OI: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(tau_OI, full_matrices=False)
    there_K = is_there(s, tau_OI.shape)[:count]
    return u[:, :count] * there_K[None], s[:count], v[:count] * there_K[:, None]

  u_NOK, s_NK, v_NKI = jax.lax.map(leading, tau_NOI)
  left = jnp.concatenate(list(u_NOK), 1)
  right = jnp.concatenate(list(v_NKI), 0)
  return (_whiten(left) * s_NK.reshape(1, -1)) @ _whiten(right)


def is_thin(shape: tuple[int, ...], num_experts: int) -> bool:
  """Whether a matrix has fewer directions than there are experts."""
  return min(shape) < num_experts


def is_there(s: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Which singular values of a matrix are more than rounding.

  Args:
    s: Singular values, descending.
    shape: Of the matrix.
  """
  return s > max(shape) * jnp.finfo(s.dtype).eps * s[0]


def _whiten(a: jax.Array) -> jax.Array:
  """The nearest matrix with orthonormal columns or rows."""
  u, s, v = jnp.linalg.svd(a, full_matrices=False)
  return (u * is_there(s, a.shape)[None]) @ v


def _along(x_N: jax.Array, like_N: jax.Array) -> jax.Array:
  return x_N.reshape(-1, *[1] * (like_N.ndim - 1))
