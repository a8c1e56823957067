"""What a projection method is: four pure functions on one orientation.

Shape suffixes in this package:
  M, N  the two axes of a gradient, turned so that the basis lives on N
  R     rank of the subspace, R <= min(M, N)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Any pytree whose leaves all carry the leading (stacking) axes of the
# gradient: orthonormal columns, indices, packed integers, a seed.
Basis = Any


class Projection(NamedTuple):
  """A family of subspaces of the gradients of one matrix.

  Every function takes any number of leading axes and treats each matrix of the
  stack by itself. `project` is linear in the gradient and `project_back` linear
  in the coordinates, so gradients may be summed after projecting.

  Attributes:
    init: ``init(shape, rank) -> basis``: a valid basis for gradients of `shape`
      ``[*, m, n]`` before any gradient was seen.
    refresh: ``refresh(grad_MN, basis, count) -> basis``: the basis fitted to a
      gradient, starting from the last one; `count` is the number of updates
      before this one, int32. The gradient comes in float32, finite, scaled to a
      largest entry of 1; it may have any rank, or be zero.
    project: ``project(grad_MN, basis) -> low_MR``: coordinates, float32.
    project_back: ``project_back(low_MR, basis) -> update_MN``: the way back,
      float32.
  """

  init: Callable[[tuple[int, ...], int], Basis]
  refresh: Callable[[jax.Array, Basis, jax.Array], Basis]
  project: Callable[[jax.Array, Basis], jax.Array]
  project_back: Callable[[jax.Array, Basis], jax.Array]
