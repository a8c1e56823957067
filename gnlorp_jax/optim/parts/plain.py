"""Parameters of any library as plain trees, and back.

A plain tree has dictionaries, lists, tuples and arrays alone. What others put
around them takes other names into the paths (``/value``) or cannot hold what an
optimizer keeps in the place of an array.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp


def path_name(path: tuple[Any, ...]) -> str:
  """A key path as text: ``layers/attn/q_proj/kernel``."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def keys_and_children(node: Any) -> list[tuple[Any, Any]] | None:
  """Keys and children of a node; None for a leaf."""
  found = jax.tree_util.tree_flatten_with_path(
    node, is_leaf=lambda x: x is not node
  )[0]
  if any(not path for path, _ in found):
    return None
  return [(path[0], child) for path, child in found]


def _children(node: Any) -> list[tuple[Any, Any]]:
  return keys_and_children(node) or []


def is_box(node: Any) -> bool:
  """Whether a node is metadata around one child, which it calls ``value``.

  Flax's `nn.Partitioned` and its kin, and the variables of NNX, are such boxes.
  """
  if isinstance(node, dict | list | tuple):
    return False
  children = keys_and_children(node)
  if children is None or len(children) != 1:
    return False
  ((key, _),) = children
  return isinstance(key, jax.tree_util.GetAttrKey) and key.name == 'value'


def content(node: Any) -> Any:
  """What a box holds; anything else is its own content."""
  while is_box(node):
    [(_, node)] = _children(node)
  return node


def boxed(box: Any, value: Any) -> Any:
  """Another value in boxes like these."""
  if not is_box(box):
    return value
  [(_, inner)] = _children(box)
  structure: Any = jax.tree.structure(box, is_leaf=lambda x: x is not box)
  return structure.unflatten([boxed(inner, value)])


def plain(tree: Any, is_leaf: Any = None) -> Any:
  """A tree without boxes, of dictionaries, lists and tuples alone.

  Args:
    tree: Any pytree. Nodes with names for their children, such as dataclasses,
      modules of Equinox and states of NNX, become dictionaries; nodes that
      number them become lists. Nodes without children stay what they are.
    is_leaf: As in `jax.tree.map`.

  Returns:
    The tree; its leaves are the same objects.
  """
  if is_leaf is not None and is_leaf(tree):
    return tree
  node = content(tree)
  if is_leaf is not None and is_leaf(node):
    return node
  children = _children(node)
  if not children:
    return node
  inner = [plain(child, is_leaf) for _, child in children]
  if isinstance(node, tuple):
    named = hasattr(node, '_fields')
    return type(node)(*inner) if named else tuple(inner)
  names = [_name(key) for key, _ in children]
  if None in names:
    return inner
  return dict(zip(names, inner, strict=True))


def _name(key: Any) -> Any:
  """What a node calls a child; None where it numbers them."""
  if isinstance(key, jax.tree_util.GetAttrKey):
    return key.name
  return key.key if isinstance(key, jax.tree_util.DictKey) else None


def is_function(given: Any) -> TypeGuard[Callable[..., Any]]:
  """Whether something is a function of parameters, and not a tree like them.

  Modules of Equinox are trees that can be called.
  """
  return callable(given) and jax.tree_util.all_leaves([given])


def broadcast_prefix(option: str, tree: Any, params: Any) -> Any:
  """A tree of one value for each parameter, of a tree or a prefix of one.

  Args:
    option: What the tree was given as.
    tree: A tree like the parameters; a value stands for all below it.
    params: The plain tree of parameters.

  Raises:
    ValueError: If the structures differ.
  """
  try:
    return jax.tree.map(
      lambda value, part: jax.tree.map(lambda _: value, part),
      plain(tree),
      params,
    )
  except (ValueError, TypeError) as error:
    raise ValueError(
      f'{option} must be a tree like the parameters, or a prefix of it, with '
      f'one value for each: got {tree!r} for parameters of the structure '
      f'{jax.tree.structure(params)}.'
    ) from error


def restore(plain_tree: Any, like: Any) -> Any:
  """The leaves of a plain tree in the nodes and boxes of another one.

  Args:
    plain_tree: A tree of the structure of ``plain(like)``.
    like: Any pytree.

  Returns:
    A tree of the structure of `like`.
  """
  structure: Any = jax.tree.structure(like)
  positions = structure.unflatten(range(structure.num_leaves))
  leaves = [None] * structure.num_leaves
  order = jax.tree.leaves(plain(positions))
  for position, leaf in zip(order, jax.tree.leaves(plain_tree), strict=True):
    leaves[position] = leaf
  return structure.unflatten(leaves)


def arrays(tree: Any) -> Any:
  """A plain tree with arrays for the numbers of Python.

  Raises:
    ValueError: If a leaf is neither an array nor a number.
  """

  def array(path: Any, leaf: Any) -> Any:
    if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype'):
      return leaf
    if isinstance(leaf, bool | int | float | complex):
      return jnp.asarray(leaf)
    raise ValueError(
      f'{path_name(path)!r} is a {type(leaf).__name__}, not an array: an '
      'optimizer takes arrays alone. Filter the parameters, such as by '
      'equinox.filter(model, equinox.is_inexact_array).'
    )

  return jax.tree_util.tree_map_with_path(array, tree)
