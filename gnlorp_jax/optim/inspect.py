"""What an optimizer state holds: bytes, refreshes, subspaces; and a dry run.

Everything is read from the state itself, so it works for any optimizer that
contains the parts of this package, inside a user's own `optax.chain` too.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.ldadam import LDAdamState
from gnlorp_jax.optim.parts import labels
from gnlorp_jax.optim.parts.nonfinite import SkipNonfiniteState
from gnlorp_jax.optim.parts.plain import (
  arrays,
  content,
  is_box,
  keys_and_children,
  path_name,
  plain,
)
from gnlorp_jax.optim.parts.state_axes import Owned, places
from gnlorp_jax.optim.projections.base import Basis
from gnlorp_jax.optim.quantized.moments import MIN_SIZE, MOMENT_FIELDS
from gnlorp_jax.optim.subspace.low_rank import LowRankState
from gnlorp_jax.optim.subspace.sides import Subspace

_logger = logging.getLogger(__name__)

# Fields of optimizer states, and what a person calls them.
_COMPONENTS = {
  **dict.fromkeys(('mu', 'nu', 'trace', 'row', 'col'), 'moments'),
  'basis': 'bases',
  'error': 'errors',
}


def _bytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _contents(state: optax.OptState) -> optax.OptState:
  """A state without the boxes that its arrays may lie in."""
  return jax.tree.map(content, state, is_leaf=is_box)


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree (or of their shapes)."""
  return sum(map(_bytes, jax.tree.leaves(tree)))


def state_bytes(opt_state: optax.OptState) -> dict[str, int]:
  """Bytes of an optimizer state by component.

  Args:
    opt_state: A state, or its shapes from `jax.eval_shape`.

  Returns:
    Bytes of ``moments``, ``bases``, ``errors`` (buffers of error feedback) and
    ``other`` (counts, statistics).
  """
  total = {'moments': 0, 'bases': 0, 'errors': 0, 'other': 0}
  for path, leaf in jax.tree_util.tree_leaves_with_path(_contents(opt_state)):
    fields = [getattr(key, 'name', None) for key in path]
    component = next(
      (_COMPONENTS[f] for f in fields if f in _COMPONENTS), 'other'
    )
    total[component] += _bytes(leaf)
  return total


def _states_of(opt_state: optax.OptState, *kind: type) -> Iterator[Any]:
  for node in jax.tree.leaves(
    _contents(opt_state), is_leaf=lambda node: isinstance(node, kind)
  ):
    if isinstance(node, kind):
      yield node


def skipped_steps(opt_state: optax.OptState) -> jax.Array:
  """Steps left out for gradients that were not finite, int32."""
  states = _states_of(opt_state, SkipNonfiniteState)
  return sum((s.skipped for s in states), start=jnp.zeros([], jnp.int32))


class SubspaceStats(NamedTuple):
  """What the last refreshes of one kernel did, averaged over its stack."""

  refreshes: jax.Array  # float32 [], refreshes of a matrix so far
  overlap: jax.Array  # float32 [], of the last two subspaces, in [0, 1]
  energy: jax.Array  # float32 [], share of the gradient captured, in [0, 1]
  saved_refreshes: jax.Array  # float32 [], of a matrix, left out by laziness


def subspace_stats(opt_state: optax.OptState) -> dict[str, SubspaceStats]:
  """Refreshes, overlap and captured energy of every projected kernel.

  All of it was computed at the refreshes, inside the step: reading them costs
  nothing, and the function may be jitted.

  Args:
    opt_state: A state that holds `LowRankState`s or `LDAdamState`s.

  Returns:
    The statistics by parameter path. Overlap is ``|Q_old^T Q_new|^2 / r`` (at a
    first refresh Q_old is the random start), energy ``|G Q|^2 / |G|^2``.
  """
  return {
    name: SubspaceStats(
      refreshes=jnp.mean(subspace.refresh_count, dtype=jnp.float32),
      overlap=jnp.mean(subspace.overlap),
      energy=jnp.mean(subspace.energy),
      saved_refreshes=jnp.mean(subspace.lazy.saved, dtype=jnp.float32)
      if subspace.lazy
      else jnp.zeros([], jnp.float32),
    )
    for name, subspace in subspaces(opt_state).items()
  }


def saved_refreshes(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Refreshes that laziness left out, for each layer of each kernel.

  Args:
    opt_state: A state of an optimizer with `lazy_refresh`.

  Returns:
    int32 ``[*]``, one count per matrix of a stack, by parameter path; kernels
    whose interval is fixed are left out.
  """
  return {
    name: subspace.lazy.saved
    for name, subspace in subspaces(opt_state).items()
    if subspace.lazy is not None
  }


def subspaces(opt_state: optax.OptState) -> dict[str, Subspace]:
  """The subspace of every projected kernel by the kernel's path.

  Args:
    opt_state: A state that holds `LowRankState`s or `LDAdamState`s.

  Returns:
    Bases by compressed axis, and what the last refresh found.
  """
  return {
    path_name(path): subspace
    for state in _states_of(opt_state, LowRankState, LDAdamState)
    for path, subspace in jax.tree_util.tree_leaves_with_path(
      state.subspace, is_leaf=lambda node: isinstance(node, Subspace)
    )
  }


def _rank(basis: Basis) -> int:
  """A basis says its rank, or else the shape of its last array ends with it."""
  if hasattr(basis, 'rank'):
    return basis.rank
  # Also a quantised array, which holds others, has the shape it stands for.
  arrays = jax.tree.leaves(basis, is_leaf=lambda x: hasattr(x, 'shape'))
  return arrays[-1].shape[-1]


class ReportRow(NamedTuple):
  """What an optimizer does with one parameter."""

  name: str
  shape: tuple[int, ...]
  label: str
  rank: int | None  # None where nothing is projected
  side: str  # compressed axes: 'in', 'out', 'in+out' or ''
  state_bytes: int
  adamw_bytes: int  # two float32 moments
  reason: str


def report(
  params: optax.Params,
  tx: optax.GradientTransformation,
  param_labels: labels.ParamLabels | None = None,
) -> list[ReportRow]:
  """Dry run: what `tx` would do with every parameter, and why.

  Nothing is allocated: only shapes are computed. Projected parameters whose
  state is larger than AdamW's would be are logged as a warning.

  Args:
    params: Parameters, or their shapes.
    tx: An alias of this package, or a chain or partition that holds one.
    param_labels: The labels `tx` was built with, from which the reasons follow.

  Returns:
    One row per parameter, in the order of the plain tree. `format_report` makes
    a table of them. The label of a parameter that an optimizer of another
    package has is ``other``.

  Raises:
    ValueError: As `labels.assign`, and if `param_labels` are seen not to be
      those of `tx`.
  """
  shapes = jax.eval_shape(lambda: arrays(plain(params)))
  opt_state = _contents(jax.eval_shape(tx.init, params))
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  held: list[list[Owned]] = [[] for _ in paths]
  others = _has_other_optimizers(opt_state)
  for array in _of_labels(places(opt_state, shapes), others):
    if array.owner is not None:
      held[array.owner].append(array)
  assigned = _assigned(shapes, held, param_labels, others)
  projected = subspaces(opt_state)
  few_bits = any(_in_few_bits(found) for found in held)
  rows = []
  for (path, leaf), found, assignment in zip(
    paths, held, assigned, strict=True
  ):
    name, size = path_name(path), math.prod(leaf.shape)
    subspace = projected.get(name)
    label, reason = assignment
    if label != 'other':
      label, reason = _seen(
        name, size, _treatment(found), assignment, param_labels
      )
    rank = None
    if subspace is not None:
      rank = min(map(_rank, subspace.basis.values()))
      if rank >= _shorter_axis(subspace, size):
        reason += '; rank fills the shorter axis: nothing is compressed there'
    if few_bits and size >= MIN_SIZE:
      reason += _why_float32(found)
    rows.append(
      ReportRow(
        name=name,
        shape=leaf.shape,
        label=label,
        rank=rank,
        side='+'.join(subspace.basis) if subspace else '',
        state_bytes=tree_bytes([array.leaf for array in found]),
        adamw_bytes=8 * size,
        reason=reason,
      )
    )
  _warn_of_large_states(rows)
  return rows


def _seen(
  name: str,
  size: int,
  treatment: str | None,
  assignment: labels.Assignment,
  param_labels: labels.ParamLabels | None,
) -> labels.Assignment:
  """An assignment; where labels are defaults, as the state shows it."""
  # An array without elements has no state, whatever its label.
  shown = treatment or ('frozen' if size else assignment.label)
  if shown == assignment.label:
    return assignment
  if param_labels is not None:
    raise ValueError(
      f'param_labels call {name!r} {assignment.label!r}, but tx treats it '
      'otherwise. Give report() the param_labels that tx was built with.'
    )
  if treatment is None:
    return labels.Assignment(shown, 'no state: so the options of tx, or a mask')
  return labels.Assignment(shown, 'by the options of tx')


def _moments(found: list[Owned]) -> list[Owned]:
  """The arrays of a parameter's moments."""
  return [
    array
    for array in found
    if array.leaf is not None and {*MOMENT_FIELDS} & {*array.outer}
  ]


def _in_few_bits(found: list[Owned]) -> bool:
  """Whether moments of a parameter are codes."""
  return any('codes' in array.inner for array in _moments(found))


def _why_float32(found: list[Owned]) -> str:
  """Why moments of a parameter are no codes, where those of others are."""
  shapes = [array.leaf.shape for array in _moments(found)]
  if not shapes or _in_few_bits(found):
    return ''
  matrix = max((shape[-2:] for shape in shapes), key=math.prod)
  if math.prod(matrix) >= MIN_SIZE:
    return '; moments stay float32 by name or rule, see moment_bits'
  return (
    f'; moments stay float32: matrices of {"x".join(map(str, matrix))} have '
    f'fewer than {MIN_SIZE} elements'
  )


def _shorter_axis(subspace: Subspace, size: int) -> int:
  """The shorter axis of the matrices that a parameter is seen as."""
  first, *_ = subspace.basis.values()
  length = getattr(first, 'length', getattr(first, 'n', None))
  if length is None:
    # Also a quantised array, which holds others, has the shape it stands for.
    length = jax.tree.leaves(first, is_leaf=lambda x: hasattr(x, 'shape'))[
      0
    ].shape[-2]
  stack = math.prod(subspace.overlap.shape)
  return min(length, size // (stack * length))


def _of_labels(arrays: list[Owned], others: bool) -> list[Owned]:
  """The arrays of an alias, without those of links around it.

  Where there are other optimizers, theirs too, of what the alias does not have.
  """
  of_alias = [a for a in arrays if {'low_rank', 'full'} & {*a.outer}]
  if not of_alias:
    return arrays
  known = {array.owner for array in of_alias}
  return of_alias + [a for a in arrays if others and a.owner not in known]


def _treatment(found: list[Owned]) -> str | None:
  """The label under which an alias holds arrays; ``other`` if none does."""
  if not found:
    return None
  fields = {field for array in found for field in array.outer}
  return next((one for one in ('low_rank', 'full') if one in fields), 'other')


def _has_other_optimizers(opt_state: optax.OptState) -> bool:
  """Whether a partition has parts that are none of this package's labels."""
  return any(
    not set(state.inner_states) <= set(labels.LABELS)
    for state in _partitions(opt_state)
  )


def _partitions(node: Any) -> Iterator[Any]:
  """All states of partitions, those within others too."""
  if isinstance(node, optax.PartitionState):
    yield node
  for _, child in keys_and_children(node) or ():
    yield from _partitions(child)


def _assigned(
  shapes: optax.Params,
  held: list[list[Owned]],
  param_labels: labels.ParamLabels | None,
  others: bool,
) -> list[labels.Assignment]:
  """Label and reason of every parameter, in the order of the leaves."""
  is_other = [
    _treatment(found) == 'other' or (others and not found) for found in held
  ]
  structure: Any = jax.tree.structure(shapes)
  seen = structure.unflatten(
    optax.MaskedNode() if other else leaf
    for other, leaf in zip(is_other, jax.tree.leaves(shapes), strict=True)
  )
  found = labels.assign(seen, param_labels, is_part=any(is_other))
  reasons = iter(
    jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, labels.Assignment))
  )
  elsewhere = labels.Assignment(
    'other',
    'another part of the partition, or frozen'
    if others
    else 'tx holds no optimizer of this package',
  )
  return [elsewhere if other else next(reasons) for other in is_other]


def _warn_of_large_states(rows: list[ReportRow]) -> None:
  large = [
    f'{row.name!r} {list(row.shape)}'
    for row in rows
    if row.label == 'low_rank' and row.state_bytes > row.adamw_bytes
  ]
  if large:
    _logger.warning(
      'The low-rank states of %s are larger than those of AdamW would be: rank '
      'is too high for these shapes, or they are not the stacks of matrices '
      "[*, in, out] they are taken for. Label them 'full', or give kernel_axes "
      'or weight_dimension_numbers.',
      ', '.join(large),
    )


def format_report(rows: list[ReportRow]) -> str:
  """The rows as an aligned table with totals, for a terminal."""
  cells = [
    ('parameter', 'shape', 'label', 'rank', 'side', 'state', 'AdamW', 'why')
  ]
  cells += [
    (
      row.name,
      'x'.join(map(str, row.shape)) or 'scalar',
      row.label,
      str(row.rank or '-'),
      row.side or '-',
      format_bytes(row.state_bytes),
      format_bytes(row.adamw_bytes),
      row.reason,
    )
    for row in rows
  ]
  total = sum(row.state_bytes for row in rows)
  adamw = sum(row.adamw_bytes for row in rows)
  more_or_less = 'less' if total <= adamw else 'more'
  saved = ''
  if adamw:
    saved = f'{abs(1 - total / adamw):.1%} {more_or_less} than AdamW'
  sums = (format_bytes(total), format_bytes(adamw), saved)
  cells.append(('total', '', '', '', '', *sums))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    for row in cells
  )


def format_bytes(count: float) -> str:
  """Bytes for a person: ``512 B``, ``1.5 KiB``, ``2.0 MiB``, ..."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.0f} B' if unit == 'B' else f'{count:.1f} {unit}'
    count /= 1024
  return f'{count:.1f} TiB'
