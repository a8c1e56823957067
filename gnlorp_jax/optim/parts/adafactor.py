"""Adafactor's direction: a second moment of one number per row and column.

Shape suffixes in this file:
  M, N  the rows and the columns of a matrix, the last two axes of its array
Leading axes `[*]` stack matrices (layers of a scan), or vectors; each of them
is treated by itself.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.plain import path_name

# Flax's boxed parameters end in `/value`.
MATRIX_NAMES = r'(kernel|embedding)(/value)?$'


def factored_direction(
  grad_MN: jax.Array, row_M: jax.Array, col_N: jax.Array
) -> jax.Array:
  """``G_ij / sqrt(r_i c_j / r')``, ``[*, m, n]``.

  Args:
    grad_MN: ``G``, float32 ``[*, m, n]``.
    row_M: ``r``, means over the columns, float32 ``[*, m]``, positive.
    col_N: ``c``, means over the rows, float32 ``[*, n]``, positive.
  """
  mean = jnp.mean(row_M, axis=-1, keepdims=True)
  # Not the root of a ratio: r_i / mean(r) underflows for a row of zeros beside
  # large gradients, and its root's inverse times 0 is NaN.
  scale_M = jnp.sqrt(mean) * jax.lax.rsqrt(row_M)
  return grad_MN * scale_M[..., :, None] * jax.lax.rsqrt(col_N)[..., None, :]


def clip_rms(
  x: jax.Array, threshold: float, axis: int | tuple[int, ...]
) -> jax.Array:
  """Divides x by ``max(1, RMS(x) / threshold)``, the RMS taken over `axis`."""
  rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=axis, keepdims=True))
  return x / jnp.maximum(1, rms / threshold)


class AdafactorState(NamedTuple):
  """State of `scale_by_adafactor`.

  A parameter has either `row` and `col` or `nu`; the others hold None for it.
  """

  # int32 [], updates so far; optax's name for it is also a tuple's method.
  count: jax.Array  # type: ignore[assignment]
  mu: optax.Params | None  # float32, like the gradients; None without b1
  row: optax.Params  # float32 [*, m] for a matrix [*, m, n]
  col: optax.Params  # float32 [*, n] for a matrix [*, m, n]
  nu: optax.Params  # float32 [*, d] for a vector [*, d]


def scale_by_adafactor(
  decay_rate: float = 0.8,
  b1: float | None = None,
  eps: float = 1e-30,
  clip_threshold: float = 1.0,
  *,
  matrix_names: str = MATRIX_NAMES,
) -> optax.GradientTransformation:
  r"""Adafactor's direction, with float32 state whatever the gradients' dtype.

  For each matrix, with ``w_t = t^{-c}`` and means along each axis,

  .. math::
    r &\leftarrow (1 - w_t) r + w_t \, \mathrm{mean}_n(G^2 + \epsilon) \\
    c &\leftarrow (1 - w_t) c + w_t \, \mathrm{mean}_m(G^2 + \epsilon) \\
    U &= G \, \sqrt{\bar r} / \sqrt{r c^T}, \qquad
    U \leftarrow U / \max(1, \mathrm{RMS}(U) / d)

  and, with `b1`, the moving average of U, without bias correction. A vector has
  one second moment per element instead. Zero gradients give zero directions.

  Args:
    decay_rate: ``c``, positive; 0.8 forgets ever more slowly.
    b1: Decay of the average of the directions, in [0, 1); None keeps none.
    eps: ``eps``, added to the squared gradient, positive.
    clip_threshold: ``d``, largest RMS of a matrix's direction, positive.
    matrix_names: Regex over the ``/``-joined path. A parameter in whose path it
      is found, and that has two axes or more, is a stack of matrices; every
      other one is a stack of vectors ``[*, d]``. The shape cannot tell.

  Returns:
    A transformation whose directions are float32. It has neither a learning
    rate nor the paper's relative steps: let `descend` follow.

  Raises:
    ValueError: If `b1` is outside its interval or another number not positive.

  Examples:
    >>> tx = scale_by_adafactor()
    >>> params = {'kernel': jnp.ones((12, 8, 4)), 'scale': jnp.ones((12, 8))}
    >>> state = tx.init(params)
    >>> state.row['kernel'].shape, state.col['kernel'].shape
    ((12, 8), (12, 4))
    >>> state.nu['scale'].shape
    (12, 8)

  References:
    Shazeer & Stern, `Adafactor`, 2018, arXiv:1804.04235, algorithms 4 and 5;
    as GaLore's inner optimizer: Zhao et al., 2024, arXiv:2403.03507.

  Note:
    PyTorch's Adafactor, from which GaLore's descends, multiplies by the
    learning rate before it averages: while that rate changes its momentum lags
    behind it; this one's does not. It factors every array of two axes or more
    and clips arrays whole; here stacked matrices or vectors equal single ones.
    Its `decay_rate` is negative. `optax.scale_by_factored_rms` leaves matrices
    with fewer than 128 rows or columns, thus most projected ones, unfactored.
  """
  check_interval(
    'decay_rate', decay_rate, '(0, inf)', 'The usual value is 0.8.'
  )
  check_interval('eps', eps, '(0, inf)', 'The usual value is 1e-30.')
  check_interval(
    'clip_threshold', clip_threshold, '(0, inf)', 'The usual value is 1.0.'
  )
  if b1 is not None:
    check_interval('b1', b1, '[0, 1)')

  def is_matrix(path: tuple[Any, ...], param: jax.Array) -> bool:
    return param.ndim >= 2 and bool(re.search(matrix_names, path_name(path)))

  def init_fn(params: optax.Params) -> AdafactorState:
    def zeros(select: Any) -> optax.Params:
      def leaf(path: Any, param: jax.Array) -> jax.Array | None:
        shape = select(param.shape, is_matrix(path, param))
        return None if shape is None else jnp.zeros(shape, jnp.float32)

      return jax.tree_util.tree_map_with_path(leaf, params)

    return AdafactorState(
      count=jnp.zeros([], jnp.int32),
      mu=None if b1 is None else zeros(lambda shape, _: shape),
      row=zeros(lambda shape, matrix: shape[:-1] if matrix else None),
      col=zeros(
        lambda shape, matrix: (*shape[:-2], shape[-1]) if matrix else None
      ),
      nu=zeros(lambda shape, matrix: None if matrix else shape),
    )

  # The three moments are arrays or None, as in the state.
  def direction(grad: jax.Array, row_M: Any, col_N: Any, nu: Any) -> jax.Array:
    if nu is None:
      u_MN = factored_direction(grad, row_M, col_N)
      return clip_rms(u_MN, clip_threshold, axis=(-2, -1))
    axis = -1 if grad.ndim else ()
    return clip_rms(grad * jax.lax.rsqrt(nu), clip_threshold, axis)

  def update_fn(
    updates: optax.Updates,
    state: AdafactorState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, AdafactorState]:
    del params
    updates = optax.tree.cast(updates, jnp.float32)
    count = optax.safe_increment(state.count)
    weight = count.astype(jnp.float32) ** -decay_rate

    def averaged(moment: optax.Params, axis: int | tuple[()]) -> optax.Params:
      def leaf(g: jax.Array, old: jax.Array | None) -> jax.Array | None:
        if old is None:
          return None
        new = jnp.mean(jnp.square(g) + eps, axis=axis)
        return (1 - weight) * old + weight * new

      return jax.tree.map(leaf, updates, moment)

    row = averaged(state.row, -1)
    col = averaged(state.col, -2)
    nu = averaged(state.nu, ())  # The mean over no axis: element by element.
    updates = jax.tree.map(direction, updates, row, col, nu)
    mu = None
    if b1 is not None:
      mu = updates = optax.tree.update_moment(updates, state.mu, b1, 1)
    return updates, AdafactorState(count, mu, row, col, nu)

  return skip_empty(optax.GradientTransformation(init_fn, update_fn))
