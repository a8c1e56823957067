"""Muon: momentum whose singular values are all made about one.

Shape suffixes in this file:
  I, O  the input and output axes of a kernel, the last two of its array
  S     the shorter of the two
Leading axes `[*]` stack matrices; each is orthogonalised by itself.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import bias_corrections, scale_by_adam
from gnlorp_jax.optim.parts.checks import (
  check_int,
  check_interval,
  check_matrix,
)
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.plain import path_name

# Of the quintic polynomial, steep at zero: singular values end in about
# [0.7, 1.2], not at one.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-8  # Beside the norm of a matrix.


def orthogonalise(x_IO: jax.Array, ns_steps: int = 5) -> jax.Array:
  r"""About ``U V^T`` of matrices ``U S V^T``, by Newton-Schulz.

  From ``X / (|X| + 1e-8)``, with ``A = X X^T``, steps

  .. math:: X \leftarrow a X + b A X + c A^2 X.

  Args:
    x_IO: Matrices ``[*, in, out]``, float32.
    ns_steps: Steps, at least 1.

  Returns:
    The same with singular values in about [0.7, 1.2], float32; those below
    about 1e-3 of the norm remain smaller.

  References:
    Jordan et al., `Muon`, 2024, https://kellerjordan.github.io/posts/muon.
  """
  a, b, c = _COEFFICIENTS
  norm = jnp.linalg.norm(x_IO, axis=(-2, -1), keepdims=True)
  x = x_IO / (norm + _EPS)
  is_tall = x_IO.shape[-2] > x_IO.shape[-1]
  x = x.mT if is_tall else x
  for _ in range(ns_steps):
    gram_SS = x @ x.mT
    x = a * x + (b * gram_SS + c * gram_SS @ gram_SS) @ x
  return x.mT if is_tall else x


class MuonState(NamedTuple):
  """State of `scale_by_muon`."""

  # int32 [], updates so far; optax's name for it is also a tuple's method.
  count: jax.Array  # type: ignore[assignment]
  mu: optax.Params  # float32, like the gradients


def scale_by_muon(
  beta: float = 0.95,
  ns_steps: int = 5,
  *,
  nesterov: bool = True,
  consistent_rms: float | None = 0.2,
) -> optax.GradientTransformationExtraArgs:
  r"""Muon's direction for kernels, with float32 momentum.

  With ``m <- beta m + (1 - beta) G``, and after t steps

  .. math:: \hat m = \beta \frac{m}{1 - \beta^{t + 1}}
    + (1 - \beta) \frac{G}{1 - \beta^t}

  (without `nesterov` m alone), the direction is `orthogonalise` of that, times
  ``rho sqrt(max(n_in, n_out))`` or, if `consistent_rms` is None,
  ``sqrt(max(1, n_out / n_in))``.

  Args:
    beta: Decay of the momentum, in [0, 1).
    ns_steps: Steps of Newton-Schulz, at least 1.
    nesterov: Whether the gradient counts once more.
    consistent_rms: ``rho``, at least 0: the root mean square of the
      elements of a direction, whatever its shape; or None.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: If a number is out of its interval; at `init`, if a leaf has
      fewer than two axes.

  Examples:
    >>> scale_by_muon().init({'kernel': jnp.ones((12, 8, 4))}).mu[
    ...   'kernel'
    ... ].shape
    (12, 8, 4)

  References:
    Jordan et al., `Muon`, 2024, https://kellerjordan.github.io/posts/muon; Liu
    et al., `Muon is Scalable for LLM Training`, 2025, arXiv:2502.16982, for
    `consistent_rms`.

  Note:
    The bias corrections are those of `optax.contrib.muon`; the first public
    code has none. Either way only the weight of the gradient beside the
    momentum differs, and after some ten steps nothing. Public code multiplies
    matrices in bfloat16; here precision is that of float32 on the device.
  """
  check_interval('beta', beta, '[0, 1)')
  check_int('ns_steps', ns_steps)
  if consistent_rms is not None:
    check_interval('consistent_rms', consistent_rms, '[0, inf)')

  def init_fn(params: optax.Params) -> MuonState:
    def zeros(path: Any, param: jax.Array) -> jax.Array:
      check_matrix(path_name(path), param.shape)
      return jnp.zeros(param.shape, jnp.float32)

    return MuonState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree_util.tree_map_with_path(zeros, params),
    )

  def update_fn(
    updates: optax.Updates,
    state: MuonState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, MuonState]:
    del params
    updates = optax.tree.cast(updates, jnp.float32)
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    now, _ = bias_corrections(beta, beta, count)
    later, _ = bias_corrections(beta, beta, count + 1)

    def direction(grad_IO: jax.Array, mean_IO: jax.Array) -> jax.Array:
      if nesterov:
        # The length does not matter: multiplied by both corrections, none of
        # which divides.
        mean_IO = beta * now * mean_IO + (1 - beta) * later * grad_IO
      return _scale_of(grad_IO.shape, consistent_rms) * orthogonalise(
        mean_IO, ns_steps
      )

    updates = jax.tree.map(direction, updates, mu)
    return updates, MuonState(count, mu)

  return skip_empty(optax.GradientTransformation(init_fn, update_fn))


def _scale_of(shape: tuple[int, ...], consistent_rms: float | None) -> float:
  """What an orthogonal matrix of a shape is multiplied by."""
  n_in, n_out = shape[-2:]
  if consistent_rms is None:
    return max(1, n_out / n_in) ** 0.5
  return consistent_rms * max(n_in, n_out) ** 0.5


class MuonOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `muon`."""


@with_options()
def muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  beta: float = 0.95,
  ns_steps: int = 5,
  nesterov: bool = True,
  consistent_rms: float | None = 0.2,
  **options: Unpack[MuonOptions],
) -> optax.GradientTransformationExtraArgs:
  """Muon: steps along momentum, made nearly orthogonal.

  A kernel labelled ``low_rank`` has one moment, which may be of 8 or 4 bits.
  All that is labelled ``full`` (embeddings, heads, norms, biases) takes Adam.

  Args:
    beta: Decay of the momentum of kernels, in [0, 1).
    ns_steps: Steps of the Newton-Schulz iteration, at least 1.
    nesterov: Whether the gradient counts once more beside the momentum.
    consistent_rms: Root mean square of the elements of a kernel's direction,
      at least 0. About 0.2 is Adam's, so that one learning rate serves both.
      None scales by the root of out / in where that is above 1 instead, which
      needs a learning rate some times higher.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.

  Examples:
    >>> tx = muon(1e-3, moment_bits=8)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Jordan et al., `Muon`, 2024, https://kellerjordan.github.io/posts/muon; Liu
    et al., `Muon is Scalable for LLM Training`, 2025, arXiv:2502.16982.

  Note:
    ``consistent_rms=None`` is the default of `optax.contrib.muon` and of the
    first public code, which give Adam a learning rate of its own. Optax takes
    every array of two axes for a kernel, embeddings and heads too; here the
    labels decide. See `scale_by_muon` for the bias corrections.
  """
  return assemble(
    scale_by_muon(
      beta, ns_steps, nesterov=nesterov, consistent_rms=consistent_rms
    ),
    scale_by_adam(**pick(options, AdamOptions)),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
