"""DOGE: a modification of the task vectors that keeps tasks apart.

The task vectors tau_i of a matrix get coefficients lambda_i, and all of them
the same modification Delta. It lowers the loss

  sum_j sum_rows <tau_j, tau_j - sum_i lambda_i (tau_i + Delta)>^2,

in which merging moves every row as far along tau_j as expert j alone. It stays
in the complement of the directions P = U U^T that the tasks share. Last, each
expert's smallest entries are masked:

  update = sum_i lambda_i mask_i (tau_i + Delta).

The loss is quadratic in Delta and every row has its own: see `exact`.

Shape suffixes in this file:
  N     experts
  O, I  rows and columns of a matrix, as PyTorch keeps it: outputs, inputs
  R     shared directions

References:
  Wei et al., `Modeling Multi-Task Model Merging as Adaptive Projective Gradient
  Descent`, 2025, arXiv:2501.01230.

Note:
  The paper's abstract projects gradients *within* the shared subspace; its
  release takes that part away, as the default here does. The paper has one
  inner product per task; the release one per row, as the default here.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.merging import baselines

Inner = Literal['row', 'full']
Project = Literal['complement', 'subspace', 'none']
Solver = Literal['adam', 'exact']


class Modification(NamedTuple):
  """What `modification` found.

  Attributes:
    delta_OI: Delta, ``[out, in]``.
    loss_before: The loss without it, a scalar.
    loss_after: The loss with it, a scalar.
  """

  delta_OI: jax.Array
  loss_before: jax.Array
  loss_after: jax.Array


def coefficients(tau_NOI: jax.Array, eta: jax.Array | float) -> jax.Array:
  """``lambda_i = eta / |tau_i|``, ``[n]``, in the Frobenius norm.

  Args:
    tau_NOI: Task vectors, ``[n, out, in]``.
    eta: How far every expert moves the matrix.

  Note:
    It is 0 of a task vector that is 0, where the release writes NaN.
  """
  norms_N = jnp.sqrt(jnp.square(tau_NOI).sum((1, 2)))
  return jnp.where(norms_N > 0, eta / jnp.where(norms_N > 0, norms_N, 1), 0)


def shared_basis(
  tau_NOI: jax.Array, subspace: int, num_experts: int
) -> jax.Array:
  """Orthonormal directions that the task vectors share, ``[out, r]``.

  They are the leading left singular vectors of the matrix that has, side by
  side, the leading ``min(out, in) // num_experts`` of every task vector.

  Args:
    tau_NOI: Task vectors, ``[n, out, in]``, none zero.
    subspace: r is ``min(out, in) // subspace``.
    num_experts: By how many the directions are shared, those among them that
      did not change this matrix.

  Note:
    Columns of singular values that are zero are zero: they are arbitrary. A
    matrix that is too thin for one direction of each expert has none to share.
  """
  k = min(tau_NOI.shape[1:])
  if k < num_experts:
    return jnp.zeros((tau_NOI.shape[1], 0), tau_NOI.dtype)

  def left(x: jax.Array) -> jax.Array:
    u, s, _ = jnp.linalg.svd(x, full_matrices=False)
    return u * baselines.is_there(s, x.shape)[None]

  # One at a time, so that no more than one decomposition is held.
  leading_NOK = jax.lax.map(
    lambda tau: left(tau)[:, : k // num_experts], tau_NOI
  )
  return left(jnp.concatenate(list(leading_NOK), 1))[:, : k // subspace]


def loss_and_gradient(
  tau_NOI: jax.Array, delta_OI: jax.Array, lambda_N: jax.Array, inner: Inner
) -> tuple[jax.Array, jax.Array]:
  """The loss, a scalar, and its gradient by Delta, ``[out, in]``."""
  merged_OI = jnp.tensordot(lambda_N, tau_NOI, 1) + lambda_N.sum() * delta_OI
  residual = _inner(tau_NOI, tau_NOI, inner) - _inner(tau_NOI, merged_OI, inner)
  gradient_OI = -2 * lambda_N.sum() * _back(residual, tau_NOI)
  return jnp.square(residual).sum(), gradient_OI


@functools.partial(
  jax.jit,
  static_argnames=(
    *('subspace', 'num_experts', 'steps', 'solver', 'inner', 'project'),
  ),
)
def modification(
  tau_NOI: jax.Array,
  lambda_N: jax.Array,
  *,
  num_experts: int,
  subspace: int = 6,
  steps: int = 400,
  rate: float = 1e-4,
  solver: Solver = 'adam',
  inner: Inner = 'row',
  project: Project = 'complement',
) -> Modification:
  """Delta of one matrix.

  Args:
    tau_NOI: Task vectors, ``[n, out, in]``, floating, none zero.
    lambda_N: Their coefficients, ``[n]``, with a positive sum.
    num_experts: As of `shared_basis`.
    subspace: As of `shared_basis`.
    steps: Steps of Adam, or the most of conjugate gradients.
    rate: Adam's learning rate.
    solver: 'adam' is the release's, and stops on the way to the minimum or
      beyond it; 'exact' finds the smallest Delta there.
    inner: One inner product per row ('row', the release) or per task ('full').
    project: Where Delta lies: in the complement of the shared directions (the
      release), in their span, or anywhere ('none').
  """

  def onto(x_OI: jax.Array) -> jax.Array:
    return x_OI

  if project != 'none':
    basis_OR = shared_basis(tau_NOI, subspace, num_experts)

    def onto(x_OI: jax.Array) -> jax.Array:
      inside_OI = basis_OR @ (basis_OR.T @ x_OI)
      return inside_OI if project == 'subspace' else x_OI - inside_OI

  zero_OI = jnp.zeros_like(tau_NOI[0])
  loss = functools.partial(
    loss_and_gradient, tau_NOI, lambda_N=lambda_N, inner=inner
  )
  if solver == 'adam':
    delta_OI = _adam(lambda delta: onto(loss(delta)[1]), zero_OI, steps, rate)
  elif project == 'none':
    delta_OI = exact(tau_NOI, lambda_N, inner)
  else:
    delta_OI = _conjugate_gradients(tau_NOI, lambda_N, inner, onto, steps)
  return Modification(delta_OI, loss(zero_OI)[0], loss(delta_OI)[0])


def exact(
  tau_NOI: jax.Array, lambda_N: jax.Array, inner: Inner = 'row'
) -> jax.Array:
  """The smallest Delta without any loss, ``[out, in]``.

  It is ``sum_j c_j tau_j``, by row or as a whole, where the Gram matrix of the
  task vectors times c is ``_wanted``.

  Args:
    tau_NOI: Task vectors, ``[n, out, in]``.
    lambda_N: Their coefficients, ``[n]``.
    inner: As of `modification`.
  """
  scale, tau_NOI = _scaled(tau_NOI)
  wanted = _wanted(tau_NOI, lambda_N, inner)
  gram = jnp.einsum(
    'noi,moi->onm' if inner == 'row' else 'noi,moi->nm', tau_NOI, tau_NOI
  )
  inverse = jnp.linalg.pinv(gram, hermitian=True)
  c = jnp.einsum('onm,mo->no' if inner == 'row' else 'nm,m->n', inverse, wanted)
  return scale * _back(c, tau_NOI)


def combine(
  tau_NOI: jax.Array,
  delta_OI: jax.Array,
  lambda_N: jax.Array,
  thresholds_N: jax.Array,
) -> jax.Array:
  """The update, ``[out, in]``: entries at or above the thresholds move."""
  is_kept = jnp.abs(tau_NOI) >= thresholds_N[:, None, None]
  return jnp.einsum('n,noi->oi', lambda_N, is_kept * (tau_NOI + delta_OI[None]))


def _adam(gradient, start: jax.Array, steps: int, rate: float) -> jax.Array:
  b1, b2, eps = 0.9, 0.999, 1e-8

  def step(index, state):
    x, m, v = state
    count = (index + 1).astype(x.dtype)
    g = gradient(x)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    root = jnp.sqrt(v) / jnp.sqrt(1 - b2**count)
    return x - rate / (1 - b1**count) * m / (root + eps), m, v

  zero = jnp.zeros_like(start)
  return jax.lax.fori_loop(0, steps, step, (start, zero, zero))[0]


def _conjugate_gradients(
  tau_NOI: jax.Array, lambda_N: jax.Array, inner: Inner, onto, steps: int
) -> jax.Array:
  """The smallest minimum among the Deltas that `onto` leaves as they are."""
  scale, tau_NOI = _scaled(tau_NOI)

  def normal(delta_OI: jax.Array) -> jax.Array:
    return onto(_back(_inner(tau_NOI, onto(delta_OI), inner), tau_NOI))

  right_OI = onto(_back(_wanted(tau_NOI, lambda_N, inner), tau_NOI))
  found_OI, _ = jax.scipy.sparse.linalg.cg(
    normal, right_OI, tol=10 * jnp.finfo(tau_NOI.dtype).eps, maxiter=steps
  )
  return scale * onto(found_OI)


def _scaled(tau_NOI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A scale, and task vectors over it, whose products do not underflow."""
  scale = jnp.sqrt(jnp.square(tau_NOI).sum() / len(tau_NOI))
  return scale, tau_NOI / scale


def _wanted(tau_NOI: jax.Array, lambda_N: jax.Array, inner: Inner) -> jax.Array:
  """The inner products of task vectors and Delta where there is no loss.

  Of task vectors over a scale, and a Delta over the same scale.
  """
  merged_OI = jnp.tensordot(lambda_N, tau_NOI, 1)
  rest = _inner(tau_NOI, tau_NOI, inner) - _inner(tau_NOI, merged_OI, inner)
  return rest / lambda_N.sum()


def _inner(tau_NOI: jax.Array, x: jax.Array, inner: Inner) -> jax.Array:
  """Inner products with ``[out, in]`` or ``[n, out, in]``; ``[n(, out)]``."""
  axes = 1 if inner == 'row' else (0, 1)
  others = x if x.ndim == 3 else [x] * len(tau_NOI)
  return jnp.stack(
    [(tau * y).sum(axes) for tau, y in zip(tau_NOI, others, strict=True)]
  )


def _back(c: jax.Array, tau_NOI: jax.Array) -> jax.Array:
  """``sum_n c_n tau_n``, ``[out, in]``, with c by row or not."""
  # One by one: XLA sums over a leading axis many times slower on a CPU.
  return sum(c.reshape(len(c), -1, 1)[n] * tau for n, tau in enumerate(tau_NOI))
