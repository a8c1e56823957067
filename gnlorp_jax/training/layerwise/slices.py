"""One parameter at a time: its part of an optimizer's state, and slices.

A state holds trees shaped like the parameters (moments, bases, ...) among what
all parameters share (counts). The state of one parameter is the subtree at its
path in each of those trees.
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


def same_arrays(new: Any, old: Any) -> list[bool]:
  """Which arrays of a state are the very arrays of the state before."""
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  return [n is o for n, o in pairs]


def only_changed(new: Any, is_same: list[bool]) -> Any:
  """A state to write, `KEPT` in place of what is there already."""
  leaves, treedef = jax.tree.flatten(new)
  return treedef.unflatten(
    KEPT if same else leaf for leaf, same in zip(leaves, is_same, strict=True)
  )


class StateSlices(NamedTuple):
  """Finds what belongs to a parameter in an optimizer's state."""

  keys: frozenset[str]  # of the dict of all parameters

  def is_params(self, node: Any) -> bool:
    """Whether a node of a state holds something for all parameters."""
    return isinstance(node, dict) and frozenset(node) == self.keys

  def take(self, opt: Any, path: Path, cut: Cut = WHOLE) -> Any:
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

  def put(self, opt: Any, path: Path, new: Any, cut: Cut = WHOLE) -> Any:
    """Writes a parameter's state back; the shared state stays as it is."""

    def write(node: Any, param_node: Any) -> Any:
      if not self.is_params(node):
        return node
      return replace_leaf(
        node, path, cut.put(leaf_at(node, path), leaf_at(param_node, path))
      )

    return jax.tree.map(write, opt, new, is_leaf=self.is_params)

  def only(self, opt: Any, keys: frozenset[str]) -> Any:
    """The state of the parameters under some of the top-level keys."""

    def take(node: Any) -> Any:
      if not self.is_params(node):
        return node
      return {key: child for key, child in node.items() if key in keys}

    return jax.tree.map(take, opt, is_leaf=self.is_params)

  def shared(self, opt: Any, param_state: Any) -> list[jax.Array]:
    """What all parameters share, as it is in the state of one of them."""
    nodes, treedef = jax.tree.flatten(opt, is_leaf=self.is_params)
    pairs = zip(nodes, treedef.flatten_up_to(param_state), strict=True)
    return [leaf for node, leaf in pairs if not self.is_params(node)]

  def put_shared(
    self, opt: Any, new: list[jax.Array], finite: jax.Array
  ) -> Any:
    """Writes what all parameters share, where the step was finite."""
    leaves, treedef = jax.tree.flatten(opt, is_leaf=self.is_params)
    values = iter(new)
    return treedef.unflatten(
      leaf if self.is_params(leaf) else jnp.where(finite, next(values), leaf)
      for leaf in leaves
    )
