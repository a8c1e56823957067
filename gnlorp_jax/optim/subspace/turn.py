"""Bases that turn a little at every step, as LDAdam's do.

Shape suffixes in this file:
  MN    a gradient's last two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes stack matrices, each with a basis of its own.
"""

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.orthonormal import (
  cholesky_qr,
  orthonormalise,
  unit_columns,
)

# Entries of Q^T Q - 1 from which on a factorisation counts as failed; a good
# one stays below 1e-5.
_ORTHONORMAL = 1e-3


def turn_between(old_NR: jax.Array, new_NR: jax.Array) -> jax.Array:
  """Old basis vectors in new coordinates, ``Q_old^T Q_new``."""
  # In TF32, some accelerators' default, the products would not be orthogonal.
  return jnp.matmul(old_NR.mT, new_NR, precision=jax.lax.Precision.HIGHEST)


def _orthonormalise(wanted_NR: jax.Array, old_NR: jax.Array) -> jax.Array:
  """The factor Q of a QR factorisation, completed where the rank is too low.

  Columns of full rank are factorised as they are. `old` joins in only where
  that fails, because it turns the subspace by about a thousandth.
  """
  basis_NR = orthonormalise(wanted_NR, old_NR, fill=0.0)
  gram_RR = turn_between(basis_NR, basis_NR)
  eye_RR = jnp.eye(gram_RR.shape[-1], dtype=jnp.float32)
  error_RR = jnp.abs(gram_RR - jnp.broadcast_to(eye_RR, gram_RR.shape))
  good = jnp.max(error_RR, axis=(-2, -1)) < _ORTHONORMAL  # False for a NaN.
  return jax.lax.cond(
    jnp.all(good),
    lambda: basis_NR,
    lambda: jnp.where(
      good[..., None, None], basis_NR, orthonormalise(wanted_NR, old_NR)
    ),
  )


def turn_basis(
  grad_MN: jax.Array, mean_MR: jax.Array, basis_NR: jax.Array, rho: float
) -> jax.Array:
  r"""One block power iteration ``orth(b^T (b Q))`` on a blend `b`.

  .. math:: b = \rho \, \hat m Q^T + (1 - \rho) G

  b itself is never formed. Orthonormalising ``b Q`` in between changes the
  factor R alone, and halves the digits lost to small singular values.
  """
  blend_MR = rho * mean_MR + (1 - rho) * (grad_MN @ basis_NR)
  left_MR = cholesky_qr(unit_columns(blend_MR), shifted=True)
  momentum_NR = basis_NR @ (mean_MR.mT @ left_MR)
  wanted_NR = rho * momentum_NR + (1 - rho) * (grad_MN.mT @ left_MR)
  new_NR = _orthonormalise(wanted_NR, basis_NR)
  usable = jnp.any(wanted_NR != 0, axis=(-2, -1), keepdims=True) & jnp.all(
    jnp.isfinite(new_NR), axis=(-2, -1), keepdims=True
  )
  return jnp.where(usable, new_NR, basis_NR)
