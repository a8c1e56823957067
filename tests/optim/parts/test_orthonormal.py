"""Columns made orthonormal; see also the bases of tests/optim/projections."""

import jax
import numpy as np

from gnlorp_jax.optim.parts.orthonormal import cholesky_qr, normalise_signs


def test_unshifted_pass_would_fail_where_the_shifted_one_does_not():
  columns = np.full((16, 4), 0.25, np.float32)
  qr = jax.jit(cholesky_qr, static_argnames='shifted')
  assert not np.isfinite(qr(columns, shifted=False)).all()
  assert np.isfinite(qr(columns, shifted=True)).all()


def test_signs_are_normalised_by_the_largest_entry():
  basis = np.float32([[0.6, -0.6], [-0.8, 0.8]])
  np.testing.assert_allclose(
    jax.jit(normalise_signs)(basis), np.float32([[-0.6, -0.6], [0.8, 0.8]])
  )
