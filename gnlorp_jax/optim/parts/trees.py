"""Trees of records, and records of trees."""

from typing import Any

import jax


def record_of_trees(tree: Any, record: Any) -> Any:
  """Takes a tree of records apart, field by field.

  Its inverse is ``jax.tree.map(record, *fields)``.

  Args:
    tree: Pytree with an instance of `record` in the place of every leaf. It may
      have none, as where `optax.tree.map_params` asks.
    record: A NamedTuple class.

  Returns:
    One `record`, in whose fields are trees of what the records had there.

  Examples:
    >>> from typing import NamedTuple
    >>> Point = NamedTuple('Point', [('x', int), ('y', int)])
    >>> record_of_trees({'a': Point(1, 2), 'b': Point(3, 4)}, Point)
    Point(x={'a': 1, 'b': 3}, y={'a': 2, 'b': 4})
  """

  def field_of_all(name: str) -> Any:
    return jax.tree.map(
      lambda node: getattr(node, name),
      tree,
      is_leaf=lambda node: isinstance(node, record),
    )

  return record(*map(field_of_all, record._fields))
