"""One parameter at a time: it, its part of an optimizer's state, and slices.

A state holds trees shaped like the parameters (moments, bases, ...) among what
all parameters share (counts). What belongs to one parameter is the subtree at
its path in each of those trees.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

Path = tuple[str, ...]


def leaf_at(tree: Any, path: Path) -> Any:
  """The subtree at a path."""
  for key in path:
    tree = tree[key]
  return tree


def nest(path: Path, leaf: Any) -> dict[str, Any]:
  """A tree of one parameter alone."""
  return traverse_util.unflatten_dict({path: leaf})


def replace_leaf(tree: Any, path: Path, leaf: Any) -> Any:
  """A tree with another leaf."""
  if not path:
    return leaf
  return {**tree, path[0]: replace_leaf(tree[path[0]], path[1:], leaf)}


# In place of an array that stays as it is.
KEPT = object()


class Cut(NamedTuple):
  """A part along the first axis of all arrays that belong to a parameter."""

  index: jax.Array | int  # which part
  count: int  # of how many

  def at(self, tree: Any) -> Any:
    """The part of every array; all of it where there is one part."""

    def slice_of(x: jax.Array) -> jax.Array:
      rows = x.shape[0] // self.count
      return jax.lax.dynamic_slice_in_dim(x, self.index * rows, rows)

    return tree if self.count == 1 else jax.tree.map(slice_of, tree)

  def put(self, tree: Any, new: Any) -> Any:
    """Writes the part `new` into every array, but for those `KEPT`."""

    def write(x: jax.Array, n: Any) -> jax.Array:
      if n is KEPT:
        return x
      if self.count == 1:
        return n
      rows = x.shape[0] // self.count
      return jax.lax.dynamic_update_slice_in_dim(x, n, self.index * rows, 0)

    # Leaf by leaf: a part of a quantised array is of another type.
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
      write(*pair) for pair in zip(leaves, jax.tree.leaves(new), strict=True)
    )


WHOLE = Cut(0, 1)


def handed_on(new: Any, old: Any) -> list[bool]:
  """Which arrays of a state are handed on as they were."""
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  return [n is o for n, o in pairs]


def to_write(new: Any, same: list[bool]) -> Any:
  """A state to write, without what is there already."""
  leaves, treedef = jax.tree.flatten(new)
  return treedef.unflatten(
    KEPT if kept else leaf for leaf, kept in zip(leaves, same, strict=True)
  )


class StateSlices(NamedTuple):
  """Finds what belongs to a parameter in an optimizer's state."""

  keys: frozenset[str]  # of the dict of all parameters

  def is_params(self, node: Any) -> bool:
    """Whether a node of a state holds something for all parameters."""
    return isinstance(node, dict) and frozenset(node) == self.keys

  def own(self, opt: Any, path: Path, cut: Cut = WHOLE) -> Any:
    """The state of an optimizer of one parameter, or of a part of it, alone."""
    return jax.tree.map(
      lambda node: (
        nest(path, cut.at(leaf_at(node, path)))
        if self.is_params(node)
        else node
      ),
      opt,
      is_leaf=self.is_params,
    )

  def put_own(self, opt: Any, path: Path, new: Any, cut: Cut = WHOLE) -> Any:
    """Writes it back; what all parameters share stays as it is."""

    def put(node: Any, mine: Any) -> Any:
      if not self.is_params(node):
        return node
      return replace_leaf(
        node, path, cut.put(leaf_at(node, path), leaf_at(mine, path))
      )

    return jax.tree.map(put, opt, new, is_leaf=self.is_params)

  def put_shared(self, opt: Any, new: Any, finite: jax.Array) -> Any:
    """Takes over what all parameters share from the state of one."""
    return jax.tree.map(
      lambda node, mine: (
        node if self.is_params(node) else jnp.where(finite, mine, node)
      ),
      opt,
      new,
      is_leaf=self.is_params,
    )
