"""Where every array lives: the mesh, one rule table, and the batch.

The mesh has two axes. ``data`` repeats the state and splits the batch; ``fsdp``
splits both. Parameters and optimizer state get their shardings from the same
ordered rules, applied by the same code.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA_AXES = ('data', 'fsdp')

ShardingRule = Callable[[tuple[int, ...], Mesh], P]
Rules = Sequence[tuple[str, ShardingRule]]


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  *,
  devices: Sequence[jax.Device] | int | None = None,
) -> Mesh | AbstractMesh:
  """Arranges the devices as a mesh with the axes ``data`` and ``fsdp``.

  Args:
    data: Number of copies of the state, at least 1; -1 takes all devices that
      `fsdp` leaves.
    fsdp: Number of pieces each copy is split into, at least 1; -1 takes all
      devices that `data` leaves.
    devices: The devices to use; None means all, of every process. A number
      stands for devices that are not there: enough for shapes and shardings.

  Returns:
    A mesh of ``data * fsdp`` devices with automatic axes: under explicit axes
    the linear algebra of a subspace refresh cannot run on a sharded gradient.
    If the product is smaller than the number of devices, the first ones.

  Raises:
    ValueError: If the sizes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = devices if isinstance(devices, int) else len(devices)
  given = f'data={data}, fsdp={fsdp}'
  sizes = [data, fsdp]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f'{given} is no mesh: sizes must be at least 1, and only one of them may '
      'be -1, the rest of the devices.'
    )
  known = math.prod(size for size in sizes if size != -1)
  if count % known:
    raise ValueError(
      f'{given} does not fit {count} devices: the product of the sizes must '
      f'divide {count}.'
    )
  shape = tuple(count // known if size == -1 else size for size in sizes)
  axis_types = (AxisType.Auto, AxisType.Auto)
  if isinstance(devices, int):
    return AbstractMesh(shape, DATA_AXES, axis_types=axis_types)
  return jax.make_mesh(
    shape,
    DATA_AXES,
    axis_types=axis_types,
    devices=devices[: math.prod(shape)],
  )


def replicate(shape: tuple[int, ...], mesh: Mesh) -> P:
  """The rule that keeps a whole copy of an array on every device."""
  del shape, mesh
  return P()


def shard_largest_axis(axis_name: str, min_size: int = 2**14) -> ShardingRule:
  """A rule that splits the larger of the last two axes of an array.

  The optimizer projects along the shorter axis of a matrix. Splitting the
  longer one keeps projecting and projecting back free of communication, and
  moments ``[*, m, r]`` are split along the same axis by the same rule.

  Args:
    axis_name: Mesh axis to split over.
    min_size: Arrays of fewer elements are replicated: gathering them would
      cost more than holding them.

  Returns:
    A rule. It picks the larger of the last two axes among those that the mesh
    axis divides, the last one at a tie, and replicates where it divides none.
    Leading axes, where the layers are stacked, stay whole.

  Note:
    A stack of vectors ``[L, d]`` looks like a matrix. Its layers are split only
    where the mesh axis divides L and not d; a rule of its own prevents that.
  """

  def rule(shape, mesh):
    pieces = mesh.shape[axis_name]
    candidates = [
      axis for axis in range(len(shape))[-2:] if shape[axis] % pieces == 0
    ]
    if pieces == 1 or math.prod(shape) < min_size or not candidates:
      return P()
    largest = max(candidates, key=lambda axis: (shape[axis], axis))
    return P(*(axis_name if a == largest else None for a in range(len(shape))))

  return rule


_DEFAULT_RULE = shard_largest_axis('fsdp')
DEFAULT_RULES: Rules = (('.*', _DEFAULT_RULE),)


def path_string(path: tuple[Any, ...]) -> str:
  """The path of a leaf as text, for example ``'params/blocks/kernel'``."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def infer_shardings(
  abstract_tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> Any:
  """Gives every array of a tree its sharding, by the first rule that matches.

  Args:
    abstract_tree: Pytree of arrays or `jax.ShapeDtypeStruct`.
    mesh: The mesh that the rules split over.
    rules: Pairs of a regular expression, searched for in the '/'-joined path
      of a leaf, and a rule function ``(shape, mesh) -> PartitionSpec``.

  Returns:
    The same tree with a `NamedSharding` per leaf.

  Raises:
    ValueError: If no rule covers a leaf; all such leaves are named.
  """
  uncovered = []

  def assign(path, leaf):
    name = path_string(path)
    for pattern, rule in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, rule(leaf.shape, mesh))
    uncovered.append(name)

  shardings = jax.tree_util.tree_map_with_path(assign, abstract_tree)
  if uncovered:
    raise ValueError(
      f'No sharding rule covers {uncovered}; the rules are '
      f"{[pattern for pattern, _ in rules]}. End the table with ('.*', "
      'replicate).'
    )
  return shardings


def gather(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Whole copies, on every device, of the weights that are about to be used.

  Without this XLA may leave split weights where they are and send activations
  instead, which are many times larger. It is asked for where a layer is used,
  so that one layer at a time is whole.

  Args:
    tree: Pytree of arrays, weights of one layer or outside of the layers, or
      their codes.
    mesh: The mesh that they are split over by `DEFAULT_RULES`.

  Returns:
    The same values. Gradients come back as `split` lays them out.
  """
  # Once more as they are: XLA would gather the stack that they were cut from.
  return jax.tree.map(
    lambda x: (
      _gather(x, mesh)
      if jnp.issubdtype(x.dtype, jnp.inexact)
      else _constrain(x, P(), mesh)
    ),
    split(tree, mesh),
  )


def split(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Lays gradients of `gather`'s results out as the weights are.

  What devices have computed of them is then summed and split in one operation,
  a reduce-scatter.

  Args:
    tree: Pytree of arrays like that of `gather`.
    mesh: The mesh.

  Returns:
    The same values.
  """
  if mesh.shape['fsdp'] == 1:
    return tree
  return jax.tree.map(
    lambda x: _constrain(x, _DEFAULT_RULE(x.shape, mesh), mesh), tree
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, mesh: Mesh | AbstractMesh) -> jax.Array:
  return _constrain(x, P(), mesh)


_gather.defvjp(
  lambda x, mesh: (_constrain(x, P(), mesh), None),
  lambda mesh, _, grad: (split(grad, mesh),),
)


def _constrain(x: jax.Array, spec: P, mesh: Mesh | AbstractMesh) -> jax.Array:
  # Inside of `shard_map` the mesh of the context knows which axes are split.
  context = jax.sharding.get_abstract_mesh()
  of = mesh if context.empty else context
  return jax.lax.with_sharding_constraint(x, NamedSharding(of, spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading axis over every device of the mesh."""
  return NamedSharding(mesh, P(DATA_AXES))


def check_batch(batch_size: int, micro_batches: int, mesh: Mesh) -> None:
  """Checks that a batch splits evenly over micro-batches and devices.

  Args:
    batch_size: Sequences per step, all processes together.
    micro_batches: Pieces that a step works through one after the other.
    mesh: The mesh that each piece is split over.

  Raises:
    ValueError: If it does not; the text names the nearest sizes that do.
  """
  unit = mesh.size * micro_batches
  if batch_size > 0 and batch_size % unit == 0:
    return
  below = max(batch_size, 0) // unit * unit
  choices = ' or '.join(str(size) for size in (below, below + unit) if size)
  raise ValueError(
    f'batch_size={batch_size} cannot be split over data={mesh.shape["data"]}, '
    f'fsdp={mesh.shape["fsdp"]} and micro_batches={micro_batches}: it must be '
    f'a multiple of data*fsdp*micro_batches={unit}. Use {choices}.'
  )


def process_share(mesh: Mesh) -> tuple[int, int]:
  """Which part of every batch belongs to this process, and of how many.

  Args:
    mesh: The mesh. Its devices belong to one process after the other.

  Raises:
    ValueError: If they do not, or some processes have more of them.
  """
  if jax.process_count() == 1:
    return 0, 1
  owners = [device.process_index for device in mesh.devices.flat]
  runs = [(owner, len(list(of))) for owner, of in itertools.groupby(owners)]
  numbers = [owner for owner, _ in runs]
  if sorted(numbers) != list(range(jax.process_count())) or 1 != len(
    {size for _, size in runs}
  ):
    raise ValueError(
      f'The devices of a mesh of data={mesh.shape["data"]} and fsdp='
      f'{mesh.shape["fsdp"]} belong to processes {owners}: each of the '
      f'{jax.process_count()} processes needs as many, one beside the other. '
      'Let mesh.data and mesh.fsdp take all devices.'
    )
  return numbers.index(jax.process_index()), len(runs)


def put_batch(
  batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
  """Places a batch on the mesh, its leading axis split over all devices.

  Args:
    batch: The rows that belong to this process (`process_share`),
      ``[B / processes, ...]`` per array; with one process that is the whole
      batch.
    mesh: The mesh.
    batch_size: B, if it is to be checked.

  Returns:
    Global arrays ``[B, ...]``.

  Raises:
    ValueError: If the processes together have another number of rows.
  """
  sharding = batch_sharding(mesh)
  _, parts = process_share(mesh)
  for name, rows in batch.items():
    if batch_size is not None and len(rows) * parts != batch_size:
      raise ValueError(
        f'{name!r} has {len(rows)} rows in each of {parts} processes, and a '
        f'batch has {batch_size} in all: each process gives its own rows only.'
      )
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }
