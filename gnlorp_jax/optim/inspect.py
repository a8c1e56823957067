"""What an optimizer state holds: bytes, refreshes, subspaces; and a dry run.

Everything is read from the state itself, so it works for any optimizer that
contains the parts of this package, inside a user's own `optax.chain` too.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.ldadam import LDAdamState
from gnlorp_jax.optim.parts import labels
from gnlorp_jax.optim.parts.nonfinite import SkipNonfiniteState
from gnlorp_jax.optim.projections.base import Basis
from gnlorp_jax.optim.subspace.low_rank import LowRankState
from gnlorp_jax.optim.subspace.sides import Subspace

# Fields of optimizer states, and what a person calls them.
_COMPONENTS = {
  **dict.fromkeys(('mu', 'nu', 'trace', 'row', 'col'), 'moments'),
  'basis': 'bases',
  'error': 'errors',
}


def _bytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


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
  for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
    fields = [getattr(key, 'name', None) for key in path]
    component = next(
      (_COMPONENTS[f] for f in fields if f in _COMPONENTS), 'other'
    )
    total[component] += _bytes(leaf)
  return total


def _states_of(opt_state: optax.OptState, *kind: type) -> Iterator[Any]:
  for node in jax.tree.leaves(
    opt_state, is_leaf=lambda node: isinstance(node, kind)
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
      else jnp.zeros([]),
    )
    for name, subspace in _subspaces(opt_state)
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
    for name, subspace in _subspaces(opt_state)
    if subspace.lazy is not None
  }


def _subspaces(opt_state: optax.OptState) -> Iterator[tuple[str, Subspace]]:
  """The subspace of every projected kernel, with the kernel's path."""
  for state in _states_of(opt_state, LowRankState, LDAdamState):
    for path, subspace in jax.tree_util.tree_leaves_with_path(
      state.subspace, is_leaf=lambda node: isinstance(node, Subspace)
    ):
      yield labels.path_name(path), subspace


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

  Nothing is allocated: only shapes are computed.

  Args:
    params: Parameters, or their shapes.
    tx: An alias of this package, or a chain that holds one.
    param_labels: The labels `tx` was built with.

  Returns:
    One row per parameter, in the order of the tree. `format_report` makes a
    table of them.

  Raises:
    ValueError: As `labels.assign`, and if the labels are seen not to be those
      of `tx`.
  """
  shapes = jax.eval_shape(lambda p: p, params)
  opt_state = jax.eval_shape(tx.init, shapes)
  held: dict[str, list[Any]] = {}
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  keys = {path: labels.path_name(path) for path, _ in paths}
  for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
    owner = _owner(path, keys)
    if owner is not None:
      held.setdefault(owner, []).append(leaf)
  subspaces = dict(_subspaces(opt_state))
  assigned = jax.tree.leaves(
    labels.assign(shapes, param_labels),
    is_leaf=lambda x: isinstance(x, labels.Assignment),
  )
  rows = []
  for (path, leaf), assignment in zip(paths, assigned, strict=True):
    name = keys[path]
    owned = held.get(name, [])
    bases = subspaces[name].basis if name in subspaces else {}
    label = assignment.label
    if (bases and label != 'low_rank') or bool(owned) == (label == 'frozen'):
      raise ValueError(
        f'param_labels call {name!r} {label!r}, but tx treats it otherwise. '
        'Give report() the param_labels that tx was built with.'
      )
    rank = min(map(_rank, bases.values()), default=None)
    reason = assignment.reason
    if rank is not None and rank >= min(leaf.shape[-2:]):
      reason += '; rank fills the shorter axis: nothing is compressed there'
    rows.append(
      ReportRow(
        name=name,
        shape=leaf.shape,
        label=label,
        rank=rank,
        side='+'.join(bases),
        state_bytes=tree_bytes(owned),
        adamw_bytes=8 * math.prod(leaf.shape),
        reason=reason,
      )
    )
  return rows


def _owner(path: tuple[Any, ...], keys: dict[Any, str]) -> str | None:
  """The parameter whose path stands inside the path of a state leaf."""
  best = None
  for key, name in keys.items():
    n = len(key)
    if any(path[i : i + n] == key for i in range(len(path) - n + 1)):
      if best is None or n > best[0]:
        best = (n, name)
  return best[1] if best else None


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
  saved = f'{abs(1 - total / adamw):.1%} {more_or_less} than AdamW'
  saved = saved if adamw else ''
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
