"""Which parameter an array of a state belongs to, and along which axes.

States hold trees like that of the parameters, with an array, a record of
arrays (a subspace, a quantised array) or nothing in the place of each. They are
found by their structure, whatever the parameters are called.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from gnlorp_jax.optim.parts.kernel_axes import MatrixAxes
from gnlorp_jax.optim.parts.plain import keys_and_children


class Owned(NamedTuple):
  """An array of a state."""

  owner: int | None  # number of its parameter; None of one that is of no one
  outer: tuple[str, ...]  # fields on the way to the tree like the parameters
  inner: tuple[str, ...]  # fields from there on
  leaf: Any  # None where a tree like the parameters has None for one


def owned(state: optax.OptState, params: optax.Params) -> list[Owned]:
  """The arrays of a state with the parameters that they belong to.

  Args:
    state: A state, or its shapes.
    params: The plain tree of parameters that it was made for.

  Returns:
    In the order of the state's leaves; parameters are numbered in the order of
    theirs.
  """
  return [place for place in places(state, params) if place.leaf is not None]


def places(state: optax.OptState, params: optax.Params) -> list[Owned]:
  """As `owned`, and the places of parameters for which a state keeps no array.

  They tell which parameters a method without memory moves.
  """
  structure: Any = jax.tree.structure(params)
  if structure.num_leaves == 0:
    return [Owned(None, (), (), leaf) for leaf in jax.tree.leaves(state)]
  numbers = structure.unflatten(range(structure.num_leaves))
  return list(_search(state, numbers, ()))


def _search(node: Any, numbers: Any, outer: tuple[str, ...]) -> Iterator[Owned]:
  """All arrays below a node, which is no part of a tree like `numbers`."""
  if not jax.tree_util.all_leaves([numbers]) and _is_like(node, numbers):
    yield from _within(node, numbers, outer)
    return
  children = keys_and_children(node)
  if children is None:
    # One array for parameters: all that has its fields belongs to it.
    single = isinstance(numbers, int) and bool(set(outer) & set(_OF_PARAMETERS))
    yield Owned(numbers if single else None, outer, outer, node)
    return
  for key, child in children:
    yield from _search(child, numbers, (*outer, _text(key)))


# Fields that hold trees like the parameters.
_OF_PARAMETERS = (
  *('mu', 'nu', 'trace', 'row', 'col', 'subspace', 'recovery', 'error'),
  'v_norm',
)


def _is_like(node: Any, numbers: Any) -> bool:
  """Whether a node has the containers of the parameters, or masks."""
  if isinstance(node, optax.MaskedNode):
    return True
  if isinstance(numbers, int):
    return _is_of_a_parameter(node)
  if type(node) is not type(numbers):
    return False
  ours, theirs = keys_and_children(node), keys_and_children(numbers)
  if not ours or not theirs or [k for k, _ in ours] != [k for k, _ in theirs]:
    return not ours and not theirs
  return all(
    _is_like(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True)
  )


def _is_of_a_parameter(node: Any) -> bool:
  """Whether a node may be in the place of a parameter: no optimizer's state."""
  if isinstance(node, dict | list | optax.EmptyState):
    return False
  if not isinstance(node, tuple):
    return True
  fields = getattr(node, '_fields', None)
  if fields is None:
    return not node
  return not {'count', 'inner_state', 'inner_states', 'mu', 'trace'} & {*fields}


def _within(node: Any, numbers: Any, outer: tuple[str, ...]) -> Iterator[Owned]:
  """The arrays of a tree like the parameters."""
  if isinstance(node, optax.MaskedNode):
    return
  if isinstance(numbers, int):
    if node is None:
      yield Owned(numbers, outer, (), None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(node):
      yield Owned(numbers, outer, tuple(map(_text, path)), leaf)
    return
  ours, theirs = keys_and_children(node), keys_and_children(numbers)
  for (_, child), (_, number) in zip(ours or (), theirs or (), strict=True):
    yield from _within(child, number, outer)


def _text(key: Any) -> str:
  """The name of a field; '' for what is no field."""
  found = getattr(key, 'name', getattr(key, 'key', ''))
  return found if isinstance(found, str) else ''


class Named(NamedTuple):
  """A parameter whose axes have names, such as those of a mesh."""

  shape: tuple[int, ...]
  names: tuple[Any, ...]  # one for each axis, None for those without
  axes: MatrixAxes | None  # as what matrix it is projected, if it is


def axis_names(
  state: optax.OptState, params: optax.Params, named: list[Named | None]
) -> list[tuple[int, tuple[Any, ...]] | None]:
  """The names of the axes of every array of a state.

  An axis that an array has in common with its parameter keeps its name; the
  axis of a rank, of blocks or of a queue has none.

  Args:
    state: A state, or its shapes.
    params: The plain tree of parameters that it was made for.
    named: Every parameter's names, in the order of the leaves; None where it
      has none.

  Returns:
    In the order of the state's leaves, the number of the parameter and the
    names by axis; None for arrays that belong to no parameter or to one without
    names.
  """
  found = owned(state, params)
  compressed: dict[int, set[str]] = {}
  for array in found:
    if array.owner is not None and 'basis' in array.inner:
      compressed.setdefault(array.owner, set()).add(_basis_side(array))
  return [
    None
    if array.owner is None or (parameter := named[array.owner]) is None
    else (
      array.owner,
      _names(array, parameter, compressed.get(array.owner, set())),
    )
    for array in found
  ]


def _basis_side(array: Owned) -> str:
  """Which axis, ``in`` or ``out``, the basis that an array is part of has."""
  return array.inner[array.inner.index('basis') + 1]


def _names(
  array: Owned, parameter: Named, compressed: set[str]
) -> tuple[Any, ...]:
  shape, ndim = array.leaf.shape, len(parameter.shape)
  axes = parameter.axes
  if axes is not None and axes.order == tuple(range(ndim)):
    # A matrix as it is, unless its axes are merged.
    axes = axes if axes.shape(parameter.shape) != parameter.shape else None
  in_subspace = bool(compressed) and not {'magnitude', 'v_norm'} & {
    *array.outer
  }
  if axes is None and not in_subspace and shape == parameter.shape:
    return parameter.names
  if ndim < 2:
    return (None,) * len(shape)
  order = tuple(range(ndim))
  axes = axes or MatrixAxes(order[:-2], order[-2:-1], order[-1:])
  *stack, n_in, n_out = axes.shape(parameter.shape)
  if shape[: len(stack)] != tuple(stack):
    return (None,) * len(shape)
  lengths = shape[len(stack) :]
  sizes = {'in': n_in, 'out': n_out}
  names = {
    'in': _merged(parameter, axes.inputs),
    'out': _merged(parameter, axes.outputs),
  }
  roles = _roles(array, len(lengths), compressed if in_subspace else set())
  return tuple(parameter.names[axis] for axis in axes.stack) + tuple(
    # Of granular coordinates each row is several, one after the other.
    names[role] if role and length and length % sizes[role] == 0 else None
    for role, length in zip(roles, lengths, strict=True)
  )


def _merged(parameter: Named, axes: tuple[int, ...]) -> Any:
  """The name of several axes as one: that of the first if it alone has one."""
  first, *others = (parameter.names[axis] for axis in axes)
  return first if not any(others) else None


def _roles(
  array: Owned, ndim: int, compressed: set[str]
) -> tuple[str | None, ...]:
  """What the axes behind the stacking ones are: ``in``, ``out`` or neither."""
  nothing = (None,) * ndim
  other = {'in': 'out', 'out': 'in'}
  # The axis along which rows of coordinates lie; None where there is none.
  kept: str | None = 'in'
  if compressed:
    kept = other[min(compressed)] if len(compressed) == 1 else None
  if array.inner[-1:] in (('scale',), ('zero',)):
    return nothing
  if ndim == 1 and kept is not None:
    side = {'row': kept, 'col': other[kept]}
    return (next((side[f] for f in side if f in _fields(array)), None),)
  if ndim != 2:
    return nothing
  if 'basis' in array.inner:
    return (_basis_side(array), None)
  if 'error' in array.outer:
    # In few bits it is [out, in].
    return ('out', 'in') if array.inner else ('in', 'out')
  return (kept, None) if compressed else ('in', 'out')


def _fields(array: Owned) -> set[str]:
  return {*array.outer, *array.inner}
