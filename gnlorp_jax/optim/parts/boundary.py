"""Where an optimizer meets the trees and the mesh of a user.

Inside, parameters are plain trees of arrays on a mesh that the compiler fills
in. Outside they may be boxed (Flax's `nn.Partitioned`, the variables of NNX),
lie in modules and states of any kind, and on a mesh with explicit shardings.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from gnlorp_jax.optim.parts.kernel_axes import (
  DimensionNumbers,
  KernelAxes,
  MatrixAxes,
  dimension_numbers,
  matrix_axes,
)
from gnlorp_jax.optim.parts.plain import (
  arrays,
  boxed,
  content,
  is_box,
  path_name,
  plain,
  restore,
)
from gnlorp_jax.optim.parts.restored import check_no_codes
from gnlorp_jax.optim.parts.split import SplitTransformation, split
from gnlorp_jax.optim.parts.state_axes import Named, axis_names

P: Any = jax.sharding.PartitionSpec

# From plain parameters to the matrix that each of them is seen as, if any.
AxesFn = Callable[[Any], list[MatrixAxes | None]]


def as_they_are(params: Any) -> list[MatrixAxes | None]:
  """Of a transformation that sees all parameters in the shape they have."""
  return [None] * len(jax.tree.leaves(params))


def for_any_tree(
  inner: optax.GradientTransformation, axes_fn: AxesFn = as_they_are
) -> optax.GradientTransformationExtraArgs:
  """Shows `inner` plain trees, and the caller's trees to the caller.

  * Parameters and gradients lose their boxes and become dictionaries, lists and
    tuples; updates have the nodes and boxes of the gradients.
  * Boxes that name axes come back around the arrays of the state, with the
    names of the axes that an array has in common with its parameter, so that
    `nn.get_partition_spec` and its kin find shardings for them.
  * On a mesh with explicit axes, `inner` runs on automatic ones; states are
    sharded as the same names say.

  Args:
    inner: The transformation. If it is split, its halves are handed through as
      they are: they take plain trees on automatic meshes. On explicit meshes
      its `init` may be given zeros in place of the parameters.
    axes_fn: Which parameters `inner` sees as what matrices, see
      `axes_by_rules`; by default it sees all of them as they are.

  Returns:
    The wrapped transformation.

  Raises:
    ValueError: At `init`, if a leaf is no array, or a complex one; at `update`,
      if the state has codes in the place of arrays.

  Examples:
    >>> tx = for_any_tree(optax.adam(1e-3))
    >>> params = [jnp.ones((4, 2)), 1.0]
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state[0].mu[0].shape
    (4, 2)
  """
  inner_tx = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> optax.OptState:
    simple = arrays(plain(params))
    _check_real(simple)
    if _explicit_mesh(simple) is None:
      state = inner_tx.init(simple)
    else:
      state = _init_on_automatic_mesh(inner_tx.init, simple, axes_fn)
    return _box_state(state, params, simple, axes_fn)

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    grads = arrays(plain(updates))
    simple = None if params is None else arrays(plain(params))
    contents = jax.tree.map(content, state, is_leaf=is_box)
    check_no_codes(contents)
    update = inner_tx.update
    mesh = _explicit_mesh(grads)
    if mesh is not None:
      like = grads if simple is None else simple
      specs = jax.tree.map(_spec, (like, contents))
      update = _update_on_automatic_mesh(update, specs)
    new, new_state = update(grads, contents, simple, **extra_args)
    return restore(new, updates), _boxed_like(state, new_state)

  if isinstance(inner, SplitTransformation):
    return split(init_fn, inner.project_fn, inner.apply, update_fn)
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def axes_by_rules(
  kernel_axes: KernelAxes = (),
  weight_dimension_numbers: DimensionNumbers | None = None,
  label_fn: Callable[[Any], Any] | None = None,
) -> AxesFn:
  """The axes of parameters as `with_kernel_axes` sees them.

  Args:
    kernel_axes: Its rules.
    weight_dimension_numbers: Its dimension numbers.
    label_fn: From parameters to their labels, where it is shown those labelled
      ``low_rank`` alone; None where it is shown all.
  """

  def axes_fn(params: Any) -> list[MatrixAxes | None]:
    numbers = None
    if weight_dimension_numbers is not None:
      numbers = dimension_numbers(params, weight_dimension_numbers)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shown = [True] * len(leaves)
    if label_fn is not None:
      shown = [one == 'low_rank' for one in jax.tree.leaves(label_fn(params))]
    return [
      matrix_axes(path_name(path), leaf.shape, kernel_axes, numbers)
      if is_shown and len(leaf.shape) > 1
      else None
      for (path, leaf), is_shown in zip(leaves, shown, strict=True)
    ]

  return axes_fn


def _check_real(params: Any) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      raise ValueError(
        f'Parameter {path_name(path)!r} is {leaf.dtype}: moments and subspaces '
        'are real. Wrap the optimizer in '
        'optax.contrib.split_real_and_imaginary, which shows it two arrays.'
      )


# Boxes.


def _box_names(box: Any) -> tuple[Any, ...] | None:
  """The names of axes that a box holds; None if it holds none."""
  names = getattr(box, 'names', None)
  if hasattr(box, 'get_metadata'):
    metadata = box.get_metadata()
    names = metadata.get('optimizer_sharding') or metadata.get('out_sharding')
  return tuple(names) if isinstance(names, tuple | list | P) else None


def _renamed(box: Any, value: Any, names: tuple[Any, ...]) -> Any:
  """A box like another one around an array whose axes have other names."""
  if hasattr(box, 'get_metadata'):
    new = boxed(box, value)
    metadata = {**box.get_metadata(), 'out_sharding': names}
    metadata.pop('optimizer_sharding', None)
    new.set_metadata(metadata)
    return new
  return dataclasses.replace(box, value=value, names=names)


def _box_state(
  state: optax.OptState, params: Any, simple: Any, axes_fn: AxesFn
) -> optax.OptState:
  """A state with boxes for arrays of parameters whose boxes name axes."""
  tree = plain(params, is_leaf=is_box)
  # A box may be empty, as where another optimizer has the parameter.
  boxes = [
    box
    for box in jax.tree.leaves(tree, is_leaf=is_box)
    for _ in jax.tree.leaves(box)
  ]
  names = [_box_names(box) for box in boxes]
  if not any(names):
    return state
  found = axis_names(state, simple, _named(simple, names, axes_fn))
  structure: Any
  leaves, structure = jax.tree.flatten(state)
  return structure.unflatten(
    leaf if entry is None else _renamed(boxes[entry[0]], leaf, entry[1])
    for leaf, entry in zip(leaves, found, strict=True)
  )


def _named(
  params: Any, names: list[tuple[Any, ...] | None], axes_fn: AxesFn
) -> list[Named | None]:
  """The parameters with names for their axes, as many as they have."""

  def one(
    leaf: jax.Array, given: tuple[Any, ...] | None, axes: MatrixAxes | None
  ) -> Named | None:
    if given is None:
      return None
    return Named(leaf.shape, (*given, *(None,) * leaf.ndim)[: leaf.ndim], axes)

  leaves = jax.tree.leaves(params)
  axes = axes_fn(params)
  return [one(*of) for of in zip(leaves, names, axes, strict=True)]


def _boxed_like(state: optax.OptState, new: optax.OptState) -> optax.OptState:
  """A new state in the boxes of the old one."""
  structure: Any
  boxes, structure = jax.tree.flatten(state, is_leaf=is_box)
  if not any(map(is_box, boxes)):
    return new
  values = structure.flatten_up_to(new)
  return structure.unflatten(map(boxed, boxes, values))


# Meshes.


def _explicit_mesh(tree: Any) -> Any:
  """The mesh of arrays whose types say how they are sharded; None if none."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      mesh = jax.typeof(leaf).sharding.mesh
      if AxisType.Explicit in mesh.axis_types:
        return mesh
  return None


def _spec(leaf: Any) -> Any:
  """How an array is sharded by its type, a `PartitionSpec`."""
  return jax.typeof(leaf).sharding.spec if isinstance(leaf, jax.Array) else P()


def _init_on_automatic_mesh(
  init: Callable[[Any], optax.OptState], params: Any, axes_fn: AxesFn
) -> optax.OptState:
  """A fresh state, sharded as the parameters are, axis by axis."""
  mesh = _explicit_mesh(params)
  automatic = mesh.update_axis_types(
    dict.fromkeys(mesh.axis_names, AxisType.Auto)
  )
  with jax.sharding.use_abstract_mesh(automatic):
    # Of zeros, for their shapes: parameters would bring their shardings.
    blank = jax.eval_shape(
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    )
    state = jax.eval_shape(init, blank)
  if jax.sharding.get_abstract_mesh().empty and isinstance(
    jax.tree.leaves(params)[0], jax.core.Tracer
  ):
    # A function jitted outside the mesh, whose devices it does not know. Of the
    # optimizers here only tracked norms begin with values of the parameters,
    # and `pull_back` takes the kernel's own where it finds a norm of 0.
    return init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank))
  names: list[Any] = [tuple(_spec(leaf)) for leaf in jax.tree.leaves(params)]
  found = axis_names(state, blank, _named(params, names, axes_fn))

  def spec(leaf: Any, entry: Any) -> Any:
    if entry is None:
      return P()
    return P(
      *(
        name if _divides(mesh, name, length) else None
        for name, length in zip(entry[1], leaf.shape, strict=True)
      )
    )

  structure: Any
  leaves, structure = jax.tree.flatten(state)
  specs = structure.unflatten(map(spec, leaves, found))
  return _on_automatic_mesh(init, specs)(params)


def _divides(mesh: Any, name: Any, length: int) -> bool:
  """Whether an axis can be divided evenly over axes of the mesh."""
  names = name if isinstance(name, tuple) else (name,)
  count = math.prod(mesh.shape[one] for one in names if one is not None)
  return length % count == 0


def _on_automatic_mesh(
  function: Callable[..., Any], specs: Any
) -> Callable[..., Any]:
  """A function of arrays that runs on automatic axes in place of explicit ones.

  Args:
    function: Takes and returns trees of arrays.
    specs: How its results are sharded.
  """

  def run(*args: Any) -> Any:
    mesh = _explicit_mesh(args)
    explicit = tuple(
      name
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind == AxisType.Explicit
    )
    with _in_mesh(args, mesh):
      return jax.sharding.auto_axes(
        function, axes=explicit, out_sharding=specs
      )(*args)

  return run


def _in_mesh(args: Any, mesh: Any) -> contextlib.AbstractContextManager[Any]:
  """The context of a mesh, where there is none yet."""
  if not jax.sharding.get_abstract_mesh().empty:
    return contextlib.nullcontext()
  for leaf in jax.tree.leaves(args):
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
      sharding.mesh, jax.sharding.Mesh
    ):
      return jax.set_mesh(sharding.mesh)
  return jax.sharding.use_abstract_mesh(mesh)


def _update_on_automatic_mesh(
  update: Callable[..., Any], specs: Any
) -> Callable[..., Any]:
  """The same for an `update`, whose other arguments may be anything."""

  def run(
    grads: Any, state: Any, params: Any, **extra_args: Any
  ) -> tuple[Any, Any]:
    structure: Any
    leaves, structure = jax.tree.flatten(extra_args)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def updated(grads: Any, state: Any, params: Any, given: Any) -> Any:
      others = iter(given)
      extra = structure.unflatten(
        next(others) if array else leaf
        for array, leaf in zip(is_array, leaves, strict=True)
      )
      return update(grads, state, params, **extra)

    given = [x for x, array in zip(leaves, is_array, strict=True) if array]
    return _on_automatic_mesh(updated, specs)(grads, state, params, given)

  return run
