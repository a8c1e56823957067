"""Kernels with more than one input or output axis, seen as matrices.

Flax's `DenseGeneral` and its attention modules hold kernels such as
``[d, heads, head_dim]`` (one axis in, two out) or ``[heads, head_dim, d]`` (two
in, one out). Read as ``[*, in, out]`` they would be stacks of small matrices.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from gnlorp_jax.optim.parts.labels import path_name
from gnlorp_jax.optim.parts.split import Look, SplitTransformation, split

# Ordered (regex over the path, number of input axes, number of output axes).
KernelAxes = Sequence[tuple[str, int, int]]


def matrix_shape(
  shape: tuple[int, ...], num_in: int, num_out: int
) -> tuple[int, ...]:
  """The shape ``[*, in, out]`` of a kernel, its axes of each kind merged.

  Args:
    shape: Shape ``[*, in axes, out axes]``.
    num_in: Number of input axes, at least 1.
    num_out: Number of output axes, at least 1.

  Returns:
    The shape of the same array as a stack of matrices.
  """
  first_in = len(shape) - num_in - num_out
  first_out = len(shape) - num_out
  n_in = math.prod(shape[first_in:first_out])
  return (*shape[:first_in], n_in, math.prod(shape[first_out:]))


def with_kernel_axes(
  inner: optax.GradientTransformation, kernel_axes: KernelAxes
) -> optax.GradientTransformationExtraArgs:
  """Shows `inner` the kernels named by rules as matrices ``[*, in, out]``.

  Gradients and parameters are reshaped before `inner` and its updates after
  it; both cost nothing. Parameters that no rule names pass as they are.

  Args:
    inner: Any transformation.
    kernel_axes: Ordered rules ``(regex, num_in, num_out)`` over the
      ``/``-joined path; the first regex found in it decides.

  Returns:
    The wrapped transformation; its state has the matrices' shapes.

  Raises:
    ValueError: If a rule names no axis of a kind, or, at `init`, more axes than
      a parameter has.

  Examples:
    >>> tx = with_kernel_axes(optax.trace(0.9), [('query', 1, 2)])
    >>> tx.init({'query': {'kernel': jnp.ones((8, 2, 4))}}).trace['query'][
    ...   'kernel'
    ... ].shape
    (8, 8)
  """
  for pattern, num_in, num_out in kernel_axes:
    if min(num_in, num_out) < 1:
      raise ValueError(
        f'kernel_axes rule {(pattern, num_in, num_out)!r} must name at least '
        'one input and one output axis, as (regex, num_in, num_out).'
      )
  inner_tx = optax.with_extra_args_support(inner)

  def view(path: Any, x: jax.Array) -> jax.Array:
    name = path_name(path)
    for pattern, num_in, num_out in kernel_axes:
      if re.search(pattern, name):
        if x.ndim < num_in + num_out:
          raise ValueError(
            f'kernel_axes rule {(pattern, num_in, num_out)!r} needs '
            f'{num_in + num_out} axes, but {name!r} has the shape '
            f'{list(x.shape)}. Correct the rule or its regex.'
          )
        return x.reshape(matrix_shape(x.shape, num_in, num_out))
    return x

  def as_matrices(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(view, tree)

  def init_fn(params: optax.Params) -> optax.OptState:
    return inner_tx.init(as_matrices(params))

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    shapes = jax.tree.map(lambda x: x.shape, updates)
    matrices = None if params is None else as_matrices(params)
    updates, state = inner_tx.update(
      as_matrices(updates), state, matrices, **extra_args
    )
    updates = jax.tree.map(
      lambda update, shape: update.reshape(shape), updates, shapes
    )
    return updates, state

  if not isinstance(inner, SplitTransformation):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
  halves = inner

  def project_fn(
    grads: optax.Updates, state: optax.OptState, params: Any, look: Look
  ) -> tuple[Any, optax.OptState]:
    matrices = None if params is None else as_matrices(params)
    return halves.project_fn(as_matrices(grads), state, matrices, look)

  def apply_fn(
    small: Any, state: optax.OptState, params: Any, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = halves.apply(
      small, state, as_matrices(params), **extra_args
    )
    updates = jax.tree.map(lambda u, p: u.reshape(p.shape), updates, params)
    return updates, state

  return split(init_fn, project_fn, apply_fn, update_fn)
