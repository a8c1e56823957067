"""Features as facility location compares them: Adam's steps, largest entries.

Shape suffixes in this file:
  N     examples of a pool
  D, H  entries of a feature, those that are compared
  S     sources
"""

import jax
import jax.numpy as jnp

B1, B2, EPS = 0.9, 0.999, 1e-8


def adam(
  features_ND: jax.Array, mu_D: jax.Array, nu_D: jax.Array, step: jax.Array
) -> jax.Array:
  """The step that Adam would take on every example's gradient alone.

  Args:
    features_ND: Gradients.
    mu_D: First moment, zeros before the first step.
    nu_D: Second moment.
    step: Number of the step, int32, counted from 1.

  Returns:
    Like `features_ND`.

  References:
    CoLM, section 4.2.

  Note:
    Equation 3 of the paper prints the correction for a zero start inside of the
    recursion; as the release, this corrects as Adam does.
  """
  mu_ND = B1 * mu_D[None] + (1 - B1) * features_ND
  nu_ND = B2 * nu_D[None] + (1 - B2) * features_ND**2
  mu_ND /= 1 - B1**step
  nu_ND /= 1 - B2**step
  return mu_ND / (jnp.sqrt(nu_ND) + EPS)


def moments(
  features_ND: jax.Array, mu_D: jax.Array, nu_D: jax.Array, learns_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Adam's moments after a step: the mean over the examples that it learns.

  Args:
    features_ND: Gradients.
    mu_D: First moment.
    nu_D: Second moment.
    learns_N: Whether an example counts: picked, and not of a small source. With
      none the moments stay.
  """
  weights_N = learns_N.astype(features_ND.dtype)
  count = weights_N.sum()
  weights_N /= jnp.maximum(count, 1)

  def mean(old_D: jax.Array, new_ND: jax.Array, decay: float) -> jax.Array:
    moved_D = decay * old_D + (1 - decay) * (weights_N @ new_ND)
    return jnp.where(count > 0, moved_D, old_D)

  return mean(mu_D, features_ND, B1), mean(nu_D, features_ND**2, B2)


def sparsify(
  features_ND: jax.Array,
  source_N: jax.Array,
  counts_N: jax.Array,
  num_sources: int,
  top: int,
) -> jax.Array:
  """The entries that are largest in the mean of each source.

  Args:
    features_ND: Features, finite.
    source_N: Sources, int32.
    counts_N: Whether an example counts in the mean of its source.
    num_sources: S.
    top: H, entries of each example.

  Returns:
    ``[N, H]``; of examples of one source the same entries, those with the
    largest absolute mean, the lowest first among equals.

  References:
    CoLM, section 4.2.
  """
  is_of_SN = source_N[None] == jnp.arange(num_sources)[:, None]
  weights_SN = (is_of_SN & counts_N[None]).astype(features_ND.dtype)
  sums_SD = jnp.matmul(
    weights_SN, features_ND, precision=jax.lax.Precision.HIGHEST
  )
  # The number of examples is the same for all entries of a source.
  _, entries_SH = jax.lax.top_k(jnp.abs(sums_SD), top)
  return jnp.take_along_axis(features_ND, entries_SH[source_N], axis=1)


def distances(features_NH: jax.Array) -> jax.Array:
  """Sums of absolute differences of all pairs, ``[N, N]``."""
  return jax.lax.map(
    lambda row_H: jnp.abs(features_NH - row_H[None]).sum(1), features_NH
  )


def gram(features_ND: jax.Array) -> jax.Array:
  """Inner products of all pairs, ``[N, N]``."""
  return jnp.matmul(
    features_ND, features_ND.T, precision=jax.lax.Precision.HIGHEST
  )
