"""Kernels of Flax's dense layers as matrices, and where a function uses them.

`nn.Dense` holds ``[in, out]``, `nn.DenseGeneral` ``[batch axes, in axes, out
axes]``, such as ``[d, heads, head_dim]`` in Flax's attention; scans put an axis
of layers before these. Only a layer itself can tell them apart, so functions
are traced to meet it. As a matrix a kernel is ``[*, in, out]``, where layers
and batches stack matrices.

Shape suffixes in this file:
  I, O  a kernel's input and output axes, merged
  N     the axes of an input that are not contracted, batch axes first
"""

import functools
import math
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.models import layers
from gnlorp_jax.models.interface import Params

# Keys in nested dicts of parameters, from the outside in.
Path = tuple[str, ...]


class Axes(NamedTuple):
  """How many axes of a kernel go in and out; those before stack matrices."""

  num_in: int = 1
  num_out: int = 1


def _as_tuple(x: int | Iterable[int]) -> tuple[int, ...]:
  return tuple(x) if isinstance(x, Iterable) else (x,)


def axes_of(module: nn.Module) -> Axes:
  """The axes of a layer's kernel.

  Args:
    module: A layer with an adapter.

  Returns:
    The numbers of input and output axes.

  Raises:
    ValueError: If it is neither an `nn.Dense` nor an `nn.DenseGeneral`.
  """
  if isinstance(module, nn.Dense):
    return Axes()
  if isinstance(module, nn.DenseGeneral):
    return Axes(len(_as_tuple(module.axis)), len(_as_tuple(module.features)))
  raise ValueError(
    f'{"/".join(module.path)!r} has an adapter, but is a '
    f'{type(module).__name__}: only nn.Dense and nn.DenseGeneral can be '
    'adapted. Change the rules so that they leave it out.'
  )


def matrix_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
  """The shape ``[*, in, out]`` of a kernel, its axes of each kind merged.

  Examples:
    >>> matrix_shape((12, 8, 2, 4), Axes(1, 2))
    (12, 8, 8)
  """
  first_out = len(shape) - axes.num_out
  first_in = first_out - axes.num_in
  n_in = math.prod(shape[first_in:first_out])
  return (*shape[:first_in], n_in, math.prod(shape[first_out:]))


def merge_input_axes(
  module: nn.Dense | nn.DenseGeneral, x: jax.Array
) -> jax.Array:
  """A layer's input as ``[N, in]``: what the kernel contracts is one axis."""
  if isinstance(module, nn.Dense):
    return x
  # Flax contracts them in ascending order, whichever `axis` lists first.
  contracted = sorted(axis % x.ndim for axis in _as_tuple(module.axis))
  count = len(contracted)
  x = jnp.moveaxis(x, contracted, range(-count, 0))
  return x.reshape(*x.shape[:-count], math.prod(x.shape[-count:]))


def multiply(
  x_NI: jax.Array, w_IO: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
  """Product ``[N, out]`` of an input and a matrix ``[*, in, out]`` per batch.

  The axes that stack the matrices are the first of the input. There is a
  reverse mode only, see `layers.product`.
  """
  product = functools.partial(layers.product, precision=precision)
  for _ in range(w_IO.ndim - 2):
    product = jax.vmap(product)
  return product(x_NI, w_IO)


def along_outputs(x_O: jax.Array, y_NO: jax.Array) -> jax.Array:
  """One value per output unit, ``[*, out]``, with y's number of axes."""
  *batch, n_out = x_O.shape
  return x_O.reshape(*batch, *(1,) * (y_NO.ndim - x_O.ndim), n_out)


# Boxes.


def array_of(leaf: Any) -> Any:
  """A parameter without Flax's box around it, if it has one."""
  (array,) = jax.tree.leaves(leaf)
  return array


def boxed_beside(
  kernel: Any, axes: Axes, factor_IO: Any, shared: Literal['in', 'out']
) -> Any:
  """A factor in a box like that of the kernel beside it.

  Args:
    kernel: The kernel. In an `nn.Partitioned`, which `LogicallyPartitioned` is
      too, its axes have names; other boxes say nothing of axes.
    axes: The kernel's axes.
    factor_IO: ``[*, in, r]``, ``[*, r, out]`` or ``[*, 1, out]``.
    shared: Which of its last two axes is the kernel's.

  Returns:
    The factor, boxed if the kernel has names. The stacking axes and the shared
    axis keep theirs, the other one has none. What merges several axes has the
    name of the first, along which a device's part of the kernel is in one piece
    when it is merged.
  """
  if not isinstance(kernel, nn.Partitioned):
    return factor_IO
  ndim = array_of(kernel).ndim
  names = (*kernel.names, *(None,) * (ndim - len(kernel.names)))
  first_out = ndim - axes.num_out
  first_in = first_out - axes.num_in
  own = (names[first_in], None) if shared == 'in' else (None, names[first_out])
  return kernel.replace(value=factor_IO, names=(*names[:first_in], *own))


# Where a function uses them.


def is_same(path: Path, other: Path) -> bool:
  """Whether two paths may lead to one layer: one ends with the other.

  A function may be given more than the parameters of the module that it
  applies, such as a collection of variables, or apply a module of a module.
  """
  count = min(len(path), len(other))
  return path[len(path) - count :] == other[len(other) - count :]


def axes_in(
  call: Callable[[Params], Any], params: Params, layers: Iterable[Path]
) -> dict[Path, Axes]:
  """The axes of kernels, from the layers that a function applies to them.

  Args:
    call: A function of the parameters that applies modules of Flax Linen. It is
      traced, and nothing is computed.
    params: Nested dict of arrays or of their shapes.
    layers: The paths of the layers to look for.

  Returns:
    The axes of the kernel of each of them.

  Raises:
    ValueError: If the function applies no layer to one of the kernels, or a
      layer of which the kernel's axes are not known or not the last ones.
  """
  flat = traverse_util.flatten_dict(params)
  met: dict[Path, tuple[Axes, tuple[int, ...]]] = {}

  def intercept(next_fn, args, kwargs, context):
    module = context.module
    if is_call_with(mark, context):
      kernel = array_of(module.get_variable('params', 'kernel'))
      met[module.path] = axes_of(module), kernel.shape
    return next_fn(*args, **kwargs)

  # A copy of a kernel marks its layer, and is sliced as the kernel is. Its name
  # and the function are new, so that JAX traces again what it traced before.
  mark = f'mark_{uuid.uuid4().hex}'
  marks = {(*layer, mark): flat[*layer, 'kernel'] for layer in layers}
  marked = traverse_util.unflatten_dict({**flat, **marks})
  with nn.intercept_methods(intercept):
    jax.eval_shape(lambda marked: call(marked), marked)

  found, missed = {}, []
  for layer in layers:
    match = [value for path, value in met.items() if is_same(layer, path)]
    if not match:
      missed.append('/'.join((*layer, 'kernel')))
      continue
    found[layer], seen = match[0]
    shape = array_of(flat[*layer, 'kernel']).shape
    if shape[len(shape) - len(seen) :] != seen:
      raise ValueError(
        f'{"/".join(layer)!r} has a kernel of shape {shape}, of which a layer '
        f'sees {seen}: what stacks layers must be the first axis. Use '
        "variable_axes={'params': 0} in nn.scan, or change the rules so that "
        'they leave it out.'
      )
  if missed:
    raise ValueError(
      f'The function applies no layer of Flax Linen to the kernels {missed}: '
      'adapters there would be ignored. Give one that applies the whole model '
      'by Module.apply, or change the rules so that they leave these out.'
    )
  return found


def is_call_with(name: str, context: nn.module.InterceptorContext) -> bool:
  """Whether a layer's call is intercepted that has a parameter so named."""
  module = context.module
  return (
    context.method_name == '__call__'
    and module.scope is not None
    and module.has_variable('params', name)
  )


def adapted_layers(tree: Any) -> set[Path]:
  """Paths of the layers with adapters, in any tree with nested dicts in it."""
  paths = (
    tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  )
  return {path[:-1] for path in paths if path[-1:] == ('lora_a',)}
