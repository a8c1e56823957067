"""Weights of any layout, seen as matrices ``[*, in, out]``.

Flax's `DenseGeneral` and its attention modules hold kernels such as
``[d, heads, head_dim]`` (one axis in, two out) or ``[heads, head_dim, d]`` (two
in, one out); Equinox holds ``[out, in]``; a scan may put its axis anywhere.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from gnlorp_jax.optim.parts.checks import check_regex
from gnlorp_jax.optim.parts.plain import is_function, path_name, plain
from gnlorp_jax.optim.parts.split import (
  RefreshContext,
  SplitTransformation,
  split,
)

# Ordered (regex over the path, number of input axes, number of output axes).
KernelAxes = Sequence[tuple[str, int, int]]

# Equinox calls its weights so, and holds them as [out, in].
_OUT_IN = re.compile(r'(^|/)weight$')


class WeightDimensionNumbers(NamedTuple):
  """Which axes of a weight are its inputs and which its outputs.

  All others stack matrices, such as the axis of a scan. Of the same meaning as
  the dimension numbers of `optax.contrib.muon` and `optax.contrib.galore`,
  which serve as well.
  """

  reduction_axis: int | Sequence[int] = 0
  output_axis: int | Sequence[int] = 1


# One for all, a tree of them (None: no matrix), or a function to such a tree.
DimensionNumbers = WeightDimensionNumbers | Callable[[optax.Params], Any] | Any


class MatrixAxes(NamedTuple):
  """The axes of a weight by their role, each axis once."""

  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  @property
  def order(self) -> tuple[int, ...]:
    """All axes, as they are in a stack of matrices."""
    return self.stack + self.inputs + self.outputs

  def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape ``[*, in, out]`` of the stack of matrices."""
    return (
      *(shape[axis] for axis in self.stack),
      math.prod(shape[axis] for axis in self.inputs),
      math.prod(shape[axis] for axis in self.outputs),
    )


def is_dimension_numbers(node: Any) -> bool:
  """Whether a node says which axes are inputs and which are outputs."""
  return hasattr(node, 'reduction_axis') and hasattr(node, 'output_axis')


def dimension_numbers(
  params: optax.Params, numbers: DimensionNumbers
) -> dict[str, Any]:
  """The dimension numbers of every parameter by its path.

  Args:
    params: A plain tree of arrays.
    numbers: As in `with_kernel_axes`.

  Returns:
    Dimension numbers, or None where a parameter is no matrix.

  Raises:
    ValueError: If a parameter has no entry.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if is_dimension_numbers(numbers):
    return {
      path_name(path): numbers if leaf.ndim > 1 else None
      for path, leaf in leaves
    }
  tree = plain(numbers(params) if is_function(numbers) else numbers, _is_entry)
  given = {
    path_name(path): entry
    for path, entry in jax.tree_util.tree_leaves_with_path(tree, _is_entry)
  }

  def entry_of(name: str) -> Any:
    # The tree may be a prefix: one entry for a whole sub-tree.
    parts = name.split('/')
    for end in range(len(parts), -1, -1):
      prefix = '/'.join(parts[:end])
      if prefix in given:
        return given[prefix]
    raise ValueError(
      f'weight_dimension_numbers has no entry for {name!r}: its tree must be '
      'that of the parameters, with None where a parameter is no matrix. Its '
      f'entries: {sorted(given)}.'
    )

  return {path_name(path): entry_of(path_name(path)) for path, _ in leaves}


def _is_entry(node: Any) -> bool:
  return node is None or is_dimension_numbers(node)


def matrix_axes(
  name: str,
  shape: tuple[int, ...],
  kernel_axes: KernelAxes = (),
  numbers: Mapping[str, Any] | None = None,
) -> MatrixAxes:
  """The roles of a weight's axes.

  Args:
    name: Its path.
    shape: Its shape, of two axes at least.
    kernel_axes: Rules, as in `with_kernel_axes`; they come first.
    numbers: Dimension numbers by path, as `dimension_numbers` returns them.

  Returns:
    The axes; without rule and numbers the last two are input and output, for
    names that end in ``weight`` output and input.

  Raises:
    ValueError: If a rule or dimension numbers do not fit the shape.
  """
  ndim = len(shape)
  for pattern, num_in, num_out in kernel_axes:
    if re.search(pattern, name):
      if ndim < num_in + num_out:
        raise ValueError(
          f'kernel_axes rule {(pattern, num_in, num_out)!r} needs '
          f'{num_in + num_out} axes, but {name!r} has the shape '
          f'{list(shape)}. Correct the rule or its regex.'
        )
      first_in, first_out = ndim - num_in - num_out, ndim - num_out
      axes = tuple(range(ndim))
      return MatrixAxes(
        axes[:first_in], axes[first_in:first_out], axes[first_out:]
      )
  found = (numbers or {}).get(name)
  if found is None:
    found = WeightDimensionNumbers(-2, -1)
    if _OUT_IN.search(name):
      found = WeightDimensionNumbers(-1, -2)
  inputs = _axes(found.reduction_axis, name, shape)
  outputs = _axes(found.output_axis, name, shape)
  if (
    not inputs
    or not outputs
    or len({*inputs, *outputs}) < len(inputs + outputs)
  ):
    raise ValueError(
      f'Dimension numbers {found!r} of {name!r} {list(shape)} must name at '
      'least one reduction and one output axis, and no axis twice.'
    )
  stack = [a for a in range(ndim) if a not in (*inputs, *outputs)]
  return MatrixAxes(tuple(stack), inputs, outputs)


def _axes(
  axes: int | Sequence[int], name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Axes as a tuple of numbers from 0."""
  given = (axes,) if isinstance(axes, int) else tuple(axes)
  ndim = len(shape)
  if not all(-ndim <= axis < ndim for axis in given):
    raise ValueError(
      f'Dimension numbers name the axes {given} of {name!r}, which has the '
      f'shape {list(shape)}.'
    )
  return tuple(axis % ndim for axis in given)


def check_kernel_axes(kernel_axes: KernelAxes) -> None:
  """Raises a `ValueError` if a rule names no axis of a kind, or no regex."""
  for rule in kernel_axes:
    numbers = rule[1:] if isinstance(rule, tuple | list) else ()
    if len(numbers) != 2 or not all(
      isinstance(number, int) and number > 0 for number in numbers
    ):
      raise ValueError(
        f'kernel_axes rule {rule!r} must name at least one input and one '
        'output axis, as (regex, num_in, num_out).'
      )
    check_regex('kernel_axes', rule)


def as_matrix(x: jax.Array, axes: MatrixAxes) -> jax.Array:
  """A weight ``[*, in, out]``, its axes of each kind merged."""
  return x.transpose(axes.order).reshape(axes.shape(x.shape))


def from_matrix(
  x: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]
) -> jax.Array:
  """The inverse of `as_matrix` for a weight of a shape."""
  order = axes.order
  back = sorted(range(len(order)), key=order.__getitem__)
  return x.reshape([shape[axis] for axis in order]).transpose(back)


def with_kernel_axes(
  inner: optax.GradientTransformation,
  kernel_axes: KernelAxes = (),
  weight_dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Shows `inner` all weights as matrices ``[*, in, out]``.

  Gradients and parameters are transposed and reshaped before `inner` and its
  updates after it. A weight that is a matrix so passes as it is, and so does
  everything of fewer than two axes.

  Args:
    inner: Any transformation.
    kernel_axes: Ordered rules ``(regex, num_in, num_out)`` over the
      ``/``-joined path; the first regex found in it decides.
    weight_dimension_numbers: `WeightDimensionNumbers` for all weights, a tree
      of them with None for parameters that are no matrices, or a function from
      the parameters to such a tree.

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
  check_kernel_axes(kernel_axes)
  inner_tx = optax.with_extra_args_support(inner)

  def mapped(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The function of axes and leaves, where a leaf is a matrix."""
    numbers = None
    if weight_dimension_numbers is not None:
      numbers = dimension_numbers(
        rest[0] if rest else tree, weight_dimension_numbers
      )

    def leaf(path: Any, x: jax.Array, *others: jax.Array) -> jax.Array:
      shape = others[0].shape if others else x.shape
      name = path_name(path)
      if len(shape) < 2 and not _named(name, kernel_axes):
        return x
      axes = matrix_axes(name, shape, kernel_axes, numbers)
      return function(x, axes, *others)

    return jax.tree_util.tree_map_with_path(leaf, tree, *rest)

  def as_matrices(tree: Any) -> Any:
    return mapped(as_matrix, tree)

  def from_matrices(tree: Any, like: Any) -> Any:
    return mapped(lambda x, axes, p: from_matrix(x, axes, p.shape), tree, like)

  def init_fn(params: optax.Params) -> optax.OptState:
    return inner_tx.init(as_matrices(params))

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    matrices = None if params is None else as_matrices(params)
    new, state = inner_tx.update(
      as_matrices(updates), state, matrices, **extra_args
    )
    return from_matrices(new, updates), state

  if not isinstance(inner, SplitTransformation):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
  halves = inner

  def project_fn(
    grads: optax.Updates,
    state: optax.OptState,
    params: Any,
    context: RefreshContext,
  ) -> tuple[Any, optax.OptState]:
    matrices = None if params is None else as_matrices(params)
    return halves.project_fn(as_matrices(grads), state, matrices, context)

  def apply_fn(
    projected: Any, state: optax.OptState, params: Any, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = halves.apply(
      projected, state, as_matrices(params), **extra_args
    )
    return from_matrices(updates, params), state

  return split(init_fn, project_fn, apply_fn, update_fn)


def _named(name: str, kernel_axes: KernelAxes) -> bool:
  return any(re.search(pattern, name) for pattern, _, _ in kernel_axes)
