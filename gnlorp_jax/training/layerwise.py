"""One training step, layer by layer: one block's gradient exists at a time.

The forward pass keeps the input of every block. The backward pass goes through
the blocks from the last to the first, computes a block afresh from its input,
and is done with its gradient before it goes on. There are two ways to be done:

  at once  The optimizer updates the block's slice of parameters and state.
           Where gradients are clipped, a backward pass before it measures them.
  waiting  The optimizer projects the gradient. What that leaves of all blocks
           is kept, summed over micro-batches and devices, clipped, and then the
           second half of the step goes through the blocks.

Shape suffixes in this file:
  L     layers
  K     micro-batches
  B, T  sequences of a micro-batch, positions
  D     features
A slice of one layer keeps its first axis, of length 1.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training.passes import (
  LAYERS,
  PLAIN,
  Passes,
  Pieces,
  Storage,
  add_trees,
  divide,
  drop_axis,
  without_layers,
)
from gnlorp_jax.training.slices import (
  WHOLE,
  Cut,
  Path,
  StateSlices,
  handed_on,
  leaf_at,
  nest,
  replace_leaf,
  to_write,
)
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, Metrics, split_rows

Accumulate = Literal['gradient', 'projected']
Clipping = Literal['waiting', 'recompute']
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# Elements of a large matrix that are updated at once; a few arrays of this size
# exist then, in float32.
ROW_BLOCK = 2**22
# The parts hold a multiple of as many, the largest block of quantised moments.
ROW_ALIGN = 256


def make_train_step(
  pieces: Pieces,
  tx: optax.GradientTransformation,
  params: Any,
  *,
  num_micro_batches: int = 1,
  clip_global_norm: float | None = None,
  clipping: Clipping = 'waiting',
  accumulate: Accumulate = 'gradient',
  mesh: Mesh | None = None,
  storage: Storage = PLAIN,
  offload: bool = False,
  row_blocks: bool = False,
) -> TrainStep:
  """Builds the function that takes one optimizer step, layer by layer.

  Parameters, state and trajectory are those of `step.make_train_step` with `tx`
  behind `optax.clip_by_global_norm`. `tx` must treat every matrix of a stack by
  itself, as all optimizers of this package do.

  With ``accumulate='gradient'`` a layer's gradient is summed over the
  micro-batches before the optimizer sees it: they change nothing but the memory
  inside of a block, and the inputs of the blocks are kept for the whole batch.
  The norm that is clipped is that of all gradients. With
  ``clipping='waiting'``, what the projection leaves of the gradients waits for
  that norm; with ``recompute``, and where `tx` does not come in two halves
  (`optim.split`), a first backward pass measures it: more time, less memory.

  With ``accumulate='projected'`` one micro-batch after the other goes through
  the whole model, and what the projection leaves is summed: over them, and over
  the axis ``data`` of `mesh`, so that nothing else crosses devices but the
  gradients that a basis is refitted to. These are the first micro-batch's,
  summed over the devices; where they are zero the basis stays. The norm that is
  clipped is that of what is left: projected gradients, those of magnitudes, and
  those of parameters that are not projected.

  A step whose gradients are not finite is left out and counted. Where layers
  are updated at once, what was visited before the first bad gradient has moved
  already, and ``update_norm`` tells by how much; where they wait, refreshes
  that were due have taken place, with all they do to moments and intervals.

  Args:
    pieces: The model.
    tx: The optimizer, without clipping and without a guard of its own. It is
      shown one parameter at a time, in a dict without the others: labels must
      be given as rules over paths, not as a tree.
    params: Shapes and dtypes of the parameters, a dict whose ``layers`` are
      stacked ``[L, ...]``.
    num_micro_batches: Pieces of the batch; must divide the batch size.
    clip_global_norm: The largest norm; None does not clip.
    clipping: ``waiting`` or ``recompute``, of ``accumulate='gradient'``.
    accumulate: ``gradient`` or ``projected``.
    mesh: The mesh, where ``projected`` should sum over its axis ``data``.
    storage: How the parameters of the layers are stored.
    offload: Keeps the inputs of the blocks in the host's memory.
    row_blocks: Updates large matrices around the layers some rows at a time,
      where the optimizer's state can be cut and the number of rows has a
      divisor that suits; `tx` must then act on them element by element, as Adam
      does.

  Returns:
    A pure function ``(state, batch) -> (state, metrics)`` with the metrics of
    `step.make_train_step`, of which ``grad_norm`` is the norm that is clipped,
    and ``weight_norm`` that of the parameters before they are stored.

  Raises:
    ValueError: If `num_micro_batches` is less than 1, if `params` has no
      stacked layers, if ``projected`` meets an optimizer that needs the whole
      gradient, or if the optimizer's state cannot be cut into layers.
  """
  if num_micro_batches < 1:
    raise ValueError(
      f'num_micro_batches={num_micro_batches} must be at least 1.'
    )
  _check_choice('accumulate', accumulate, get_args(Accumulate))
  _check_choice('clipping', clipping, get_args(Clipping))
  comes_in_halves = hasattr(tx, 'project')
  if accumulate == 'projected' and not comes_in_halves:
    raise ValueError(
      "accumulate='projected' keeps nothing of a gradient but its projection, "
      "and this optimizer needs all of it. Use accumulate='gradient'."
    )
  num_layers = _count_layers(params)
  paths = traverse_util.flatten_dict(params)
  engine = _Engine(
    passes=Passes(pieces, storage, num_layers, offload),
    tx=tx if comes_in_halves else optax.with_extra_args_support(tx),
    slices=StateSlices(frozenset(params)),
    layer_paths=tuple(sorted(p for p in paths if p[0] == LAYERS)),
    around_paths=tuple(p for p in paths if p[0] != LAYERS),
    row_blocks={},
  )
  _check_layers(engine, params)
  if row_blocks:
    counts = _count_row_blocks(engine, params)
    engine = engine._replace(row_blocks=counts)
  if accumulate == 'projected':
    return _projected_step(engine, num_micro_batches, clip_global_norm, mesh)
  if gradients_wait(tx, clip_global_norm, clipping, accumulate):
    return _waiting_step(engine, num_micro_batches, clip_global_norm)
  return _immediate_step(engine, num_micro_batches, clip_global_norm)


def gradients_wait(
  tx: optax.GradientTransformation,
  clip_global_norm: float | None,
  clipping: Clipping,
  accumulate: Accumulate,
) -> bool:
  """Whether a step keeps what projecting leaves of all layers' gradients.

  The arguments are those of `make_train_step`.
  """
  clips = clip_global_norm is not None and clipping == 'waiting'
  return accumulate == 'projected' or (clips and hasattr(tx, 'project'))


# Numbers.


def _squares(tree: Any) -> jax.Array:
  """Sum of the squares of all entries, float32."""
  return sum(
    (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)),
    jnp.float32(0),
  )


def _scale(tree: Any, factor: jax.Array) -> Any:
  return jax.tree.map(lambda g: (g * factor).astype(g.dtype), tree)


def _divisor(weight_sum: jax.Array) -> jax.Array:
  return jnp.where(weight_sum > 0, weight_sum, 1)


def _clip_factor(norm: jax.Array, clip: float | None) -> jax.Array:
  if clip is None:
    return jnp.float32(1)
  return jnp.where(norm < clip, 1, clip / norm)


# Moving a parameter.


class _Sums(NamedTuple):
  """What a step adds up on its way."""

  grad: jax.Array  # float32 [], squares of the gradients
  update: jax.Array  # float32 [], squares of the updates
  weight: jax.Array  # float32 [], squares of the new parameters
  finite: jax.Array  # bool [], no gradient so far held a NaN or an infinity


def _no_sums(finite: jax.Array) -> _Sums:
  zero = jnp.zeros((), jnp.float32)
  return _Sums(zero, zero, zero, finite)


class _Engine(NamedTuple):
  """What every step needs, and how it moves a parameter."""

  passes: Passes
  tx: Any
  slices: StateSlices
  layer_paths: tuple[Path, ...]
  around_paths: tuple[Path, ...]
  row_blocks: dict[Path, int]  # of parameters that are updated part by part

  def move(
    self,
    act: Callable[[Any, Any, jax.Array | int], tuple[Any, Any]],
    path: Path,
    cut: Cut,
    step: jax.Array,
    carry: tuple[Any, Any, _Sums],
  ) -> tuple[tuple[Any, Any, _Sums], Any]:
    """Writes what ``act(state, params, first)`` makes of a parameter.

    Or of a part of one, which starts at `first` on the first axis.

    Returns:
      The carry (parameters, state, sums), and the new state of this part alone.
    """
    params, opt, sums = carry
    stored = leaf_at(params, path)
    old, mine = cut.at(stored), self.slices.own(opt, path, cut)
    start = self.passes.storage.load_exact(old)
    first = cut.index * (start.shape[0] if start.ndim else 1)
    # Which arrays `act` only hands on; known when `take` has been traced.
    kept: list[bool] = []

    # In the branches of a condition, because then all that is read is read
    # before anything is written: XLA on CPUs copies a stack where it is not.
    def take() -> Any:
      updates, new_mine = act(mine, nest(path, start), first)
      kept[:] = handed_on(new_mine, mine)
      update = leaf_at(updates, path)
      moved = start.astype(jnp.float32) + update
      new = self.passes.storage.store(
        nest(path, moved), nest(path, old), step, first
      )
      # As leaves: a part of a quantised array is of another type.
      return jax.tree.leaves((new, new_mine)), _squares(update), _squares(moved)

    def leave() -> Any:
      return jax.tree.leaves((old, mine)), jnp.float32(0), _squares(start)

    leaves, update, weight = jax.lax.cond(sums.finite, take, leave)
    new, new_mine = jax.tree.unflatten(jax.tree.structure((old, mine)), leaves)
    sums = sums._replace(
      update=sums.update + update, weight=sums.weight + weight
    )
    written = to_write(new_mine, kept)
    params = replace_leaf(params, path, cut.put(stored, new))
    return (
      params,
      self.slices.put_own(opt, path, written, cut),
      sums,
    ), new_mine

  def move_rows(
    self,
    act_on: Callable[[Any], Callable[..., tuple[Any, Any]]],
    path: Path,
    grad: Any,
    step: jax.Array,
    carry: tuple[Any, Any, _Sums],
  ) -> tuple[tuple[Any, Any, _Sums], Any]:
    """`move` of a parameter around the layers, part by part if it is large.

    ``act_on(part)`` makes `act` of the same part of `grad`.
    """
    count = self.row_blocks.get(path, 1)

    def body(index: jax.Array | int, carry: Any) -> Any:
      cut = Cut(index, count)
      return self.move(act_on(cut.at(grad)), path, cut, step, carry)

    if count > 1:
      carry = jax.lax.fori_loop(
        0, count - 1, lambda i, carry: body(i, carry)[0], carry
      )
    return body(count - 1, carry)


def _finish(
  state: TrainState,
  carry: tuple[Any, Any, _Sums],
  mine: Any,
  engine: _Engine,
  loss_sum: jax.Array,
  weight_sum: jax.Array,
) -> tuple[TrainState, Metrics]:
  """The new state and the metrics; `mine` is the last parameter's state."""
  params, opt, sums = carry
  opt = engine.slices.put_shared(opt, mine, sums.finite)
  skipped = state.skipped + jnp.where(sums.finite, 0, 1)
  metrics = {
    'loss': loss_sum / _divisor(weight_sum),
    'weight_sum': weight_sum,
    'grad_norm': jnp.sqrt(sums.grad),
    'update_norm': jnp.sqrt(sums.update),
    'weight_norm': jnp.sqrt(sums.weight),
    'skipped_steps': skipped,
  }
  return TrainState(state.step + 1, skipped, params, opt), metrics


# At once.


def _immediate_step(
  engine: _Engine, num_micro_batches: int, clip: float | None
) -> TrainStep:
  tx = engine.tx
  late = [
    p for p in engine.around_paths if p[0] in engine.passes.pieces.embed_keys
  ]
  early = [p for p in engine.around_paths if p not in late]

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    batch_K = split_rows(batch, num_micro_batches)
    params = state.params
    saved_LKBTD, x_KBTD = engine.passes.forward(params, batch_K)
    (loss_sum, weight_sum), head_grads, dx_KBTD = engine.passes.head(
      params, x_KBTD, batch_K
    )
    divisor = _divisor(weight_sum)

    def embed_grads(dx_KBTD: jax.Array) -> Any:
      """Gradients of the embedding, with what the head adds to a tied one."""
      read = engine.passes.embedding(params, batch_K, dx_KBTD)
      return add_trees({key: head_grads[key] for key in read}, read)

    factor, finite = jnp.float32(1), jnp.isfinite(loss_sum)
    if clip is not None:
      (_, squares), last_dx = engine.passes.backward(
        lambda layer, grads, carry: (carry[0], carry[1] + _squares(grads)),
        (params, jnp.float32(0)),
        *(saved_LKBTD, dx_KBTD, divisor),
      )
      grads = {**head_grads, **embed_grads(last_dx)}
      norm = jnp.sqrt(squares + _squares(divide(grads, divisor, grads)))
      factor, finite = _clip_factor(norm, clip), jnp.isfinite(norm)

    def see(grad: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
      """A gradient as the optimizer receives it, after it was counted."""
      params, opt, sums = carry
      squares = _squares(grad)
      sums = sums._replace(
        grad=sums.grad + squares, finite=sums.finite & jnp.isfinite(squares)
      )
      return _scale(grad, factor), (params, opt, sums)

    def update(path: Path, grad: jax.Array) -> Any:
      """What moves a parameter, or a part of one, by its gradient."""
      return lambda mine, start, first: tx.update(
        nest(path, grad), mine, start, first=first
      )

    def move_around(paths: list[Path], grad_sums: Any, carry: Any) -> Any:
      mine = None
      for path in paths:
        like = leaf_at(params, path)
        grad = divide(leaf_at(grad_sums, path), divisor, like)
        grad, carry = see(grad, carry)
        carry, mine = engine.move_rows(
          functools.partial(update, path), path, grad, state.step, carry
        )
      return carry, mine

    def visit(layer: jax.Array, grads: dict[Path, Any], carry: Any) -> Any:
      cut = Cut(layer, engine.passes.num_layers)

      def move(path: Path, grad: jax.Array, carry: Any) -> Any:
        grad, carry = see(grad, carry)
        carry, _ = engine.move(update(path, grad), path, cut, state.step, carry)
        return carry

      return _one_by_one(engine.layer_paths, grads, carry, move)

    carry = params, state.opt_state, _no_sums(finite)
    carry, before = move_around(early, head_grads, carry)
    # What the head needs is let go before the layers begin.
    dx_KBTD, carry = jax.lax.optimization_barrier((dx_KBTD, carry))
    carry, dx_KBTD = engine.passes.backward(
      visit, carry, saved_LKBTD, dx_KBTD, divisor
    )
    carry, mine = move_around(late, embed_grads(dx_KBTD), carry)
    mine = before if mine is None else mine
    return _finish(state, carry, mine, engine, loss_sum, weight_sum)

  return train_step


def _one_by_one(
  paths: tuple[Path, ...],
  grads: dict[Path, jax.Array],
  carry: Any,
  move: Callable[[Path, jax.Array, Any], Any],
) -> Any:
  """``move(path, grad, carry)`` for each path, one after the other.

  Each begins when the one before has ended: what they need would exist at the
  same time otherwise.
  """
  for path in paths:
    grad, carry = jax.lax.optimization_barrier((grads[path], carry))
    carry = move(path, grad, carry)
  return carry


# Waiting.


class _Waiting(NamedTuple):
  """What the first half of a step leaves for the second."""

  small: dict[Path, Any]  # of the gradients; for a layer's, [L, 1, ...]
  opt: Any  # the optimizer's state, with the bases of this step
  loss_sum: jax.Array  # float32 []
  weight_sum: jax.Array  # float32 []
  squares: jax.Array  # float32 [], of the gradients before projecting


def _nothing(engine: _Engine, params: Any, opt: Any, dtype: Any) -> _Waiting:
  """Zeros to add to; a dtype of None is that of what is added."""

  def projected(path: Path) -> Any:
    stored = leaf_at(params, path)
    is_layer = path in engine.layer_paths
    cut = Cut(0, engine.passes.num_layers) if is_layer else WHOLE
    grad = nest(path, engine.passes.storage.load(cut.at(stored)))
    small, _ = engine.tx.project(grad, engine.slices.own(opt, path, cut), grad)
    return small

  def zeros(path: Path) -> Any:
    stack = (engine.passes.num_layers,) if path in engine.layer_paths else ()
    return jax.tree.map(
      lambda x: jnp.zeros((*stack, *x.shape), dtype or x.dtype),
      jax.eval_shape(lambda: projected(path)),
    )

  zero = jnp.zeros((), jnp.float32)
  paths = (*engine.layer_paths, *engine.around_paths)
  return _Waiting({path: zeros(path) for path in paths}, opt, zero, zero, zero)


def _project(
  engine: _Engine,
  params: Any,
  waiting: _Waiting,
  batch_K: Batch,
  divisor: Callable[[jax.Array], jax.Array],
  **look: Any,
) -> _Waiting:
  """Adds the projected gradients of a batch to those that wait.

  `divisor` maps the sum of the batch's weights to what gradients are divided
  by; `look` is `SplitTransformation.project`'s.
  """
  saved_LKBTD, x_KBTD = engine.passes.forward(params, batch_K)
  (loss_sum, weight_sum), grads, dx_KBTD = engine.passes.head(
    params, x_KBTD, batch_K
  )
  divide_by = divisor(weight_sum)

  def project(path: Path, grad: jax.Array, carry: Any, cut: Cut) -> Any:
    params, opt, small, squares = carry
    start = engine.passes.storage.load_exact(cut.at(leaf_at(params, path)))
    old = engine.slices.own(opt, path, cut)
    new, mine = engine.tx.project(
      nest(path, grad), old, nest(path, start), **look
    )
    waits = cut.at(small[path])
    if path in engine.layer_paths:
      new = jax.tree.map(lambda x: x[None], new)
    total = jax.tree.map(lambda t, x: t + x.astype(t.dtype), waits, new)
    small = {**small, path: cut.put(small[path], total)}
    opt = engine.slices.put_own(
      opt, path, to_write(mine, handed_on(mine, old)), cut
    )
    return params, opt, small, squares + _squares(grad)

  def visit(layer: jax.Array, grads: dict[Path, Any], carry: Any) -> Any:
    cut = Cut(layer, engine.passes.num_layers)
    return _one_by_one(
      engine.layer_paths,
      *(grads, carry, lambda *args: project(*args, cut)),
    )

  carry = params, waiting.opt, waiting.small, waiting.squares
  carry, dx_KBTD = engine.passes.backward(
    visit, carry, saved_LKBTD, dx_KBTD, divide_by
  )
  read = engine.passes.embedding(params, batch_K, dx_KBTD)
  grads = {**grads, **add_trees({key: grads[key] for key in read}, read)}
  grads = divide(grads, divide_by, without_layers(params))
  for path in engine.around_paths:
    carry = project(path, leaf_at(grads, path), carry, WHOLE)
  _, opt, small, squares = carry
  return _Waiting(
    small,
    opt,
    waiting.loss_sum + loss_sum,
    waiting.weight_sum + weight_sum,
    squares,
  )


def _apply(
  engine: _Engine,
  state: TrainState,
  waiting: _Waiting,
  norm: jax.Array,
  factor: jax.Array,
) -> tuple[TrainState, Metrics]:
  """The second half: acts on what has waited, times a factor."""
  tx, small = engine.tx, waiting.small

  def apply(small: Any) -> Any:
    """What moves a parameter, or a part of one, by what has waited."""
    return lambda mine, start, first: tx.apply(
      _scale(small, factor), mine, start, first=first
    )

  def body(layer: jax.Array, carry: Any) -> Any:
    cut = Cut(layer, engine.passes.num_layers)
    for path in engine.layer_paths:
      act = apply(drop_axis(cut.at(small[path])))
      carry, _ = engine.move(act, path, cut, state.step, carry)
    return carry

  sums = _no_sums(jnp.isfinite(norm))._replace(grad=jnp.square(norm))
  carry = jax.lax.fori_loop(
    0, engine.passes.num_layers, body, (state.params, waiting.opt, sums)
  )
  mine = None
  for path in engine.around_paths:
    carry, mine = engine.move_rows(apply, path, small[path], state.step, carry)
  return _finish(
    state, carry, mine, engine, waiting.loss_sum, waiting.weight_sum
  )


def _waiting_step(
  engine: _Engine, num_micro_batches: int, clip: float
) -> TrainStep:
  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    batch_K = split_rows(batch, num_micro_batches)
    waiting = _nothing(engine, state.params, state.opt_state, dtype=None)
    waiting = _project(engine, state.params, waiting, batch_K, _divisor)
    norm = jnp.sqrt(waiting.squares)
    return _apply(engine, state, waiting, norm, _clip_factor(norm, clip))

  return train_step


def _projected_step(
  engine: _Engine,
  num_micro_batches: int,
  clip: float | None,
  mesh: Mesh | None,
) -> TrainStep:
  def accumulate(
    params: Any, opt: Any, batch: Batch, total: Callable[[Any], Any]
  ) -> _Waiting:
    batch_K = split_rows(batch, num_micro_batches)

    def add(waiting: _Waiting, xs: Any) -> tuple[_Waiting, None]:
      number, micro_batch = xs
      waiting = _project(
        engine,
        params,
        waiting,
        jax.tree.map(lambda x: x[None], micro_batch),
        lambda weight_sum: jnp.float32(1),
        due=number == 0,
        total=total,
      )
      return waiting, None

    waiting = _nothing(engine, params, opt, dtype=jnp.float32)
    numbers = jnp.arange(num_micro_batches)
    waiting, _ = jax.lax.scan(add, waiting, (numbers, batch_K))
    return waiting._replace(
      small=total(waiting.small),
      loss_sum=total(waiting.loss_sum),
      weight_sum=total(waiting.weight_sum),
    )

  def on_devices(params: Any, opt: Any, batch: Batch) -> _Waiting:
    if mesh is None or mesh.shape['data'] == 1:
      return accumulate(params, opt, batch, lambda x: x)
    return jax.shard_map(
      lambda *args: accumulate(*args, lambda x: jax.lax.psum(x, 'data')),
      mesh=mesh,
      in_specs=(P(), P(), P('data')),
      out_specs=P(),
      axis_names={'data'},
      # Bases are equal on all devices because they are fitted to a sum; the
      # check cannot know.
      check_vma=False,
    )(params, opt, batch)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    waiting = on_devices(state.params, state.opt_state, batch)
    divisor = _divisor(waiting.weight_sum)
    norm = jnp.sqrt(_squares(waiting.small)) / divisor
    factor = _clip_factor(norm, clip) / divisor
    return _apply(engine, state, waiting, norm, factor)

  return train_step


# Checks.


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f'{name}={value!r} must be one of {choices}.')


def _count_layers(params: Any) -> int:
  """L, the common first axis of ``params['layers']``."""
  if not isinstance(params, dict) or LAYERS not in params or len(params) < 2:
    raise ValueError(
      f'Parameters must be a dict with the key {LAYERS!r}, stacked [L, ...], '
      f'and others, to be trained layer by layer; got {sorted(params)}.'
    )
  lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(params[LAYERS])}
  if len(lengths) != 1 or lengths == {()}:
    raise ValueError(
      f'All arrays of params[{LAYERS!r}] must be stacked along one first axis, '
      f'[L, ...]; the first axes are {sorted(lengths)}.'
    )
  ((length,),) = lengths
  return length


def _can_be_cut(engine: _Engine, params: Any, path: Path, count: int) -> bool:
  """Whether a part of a parameter's state is the state of a part."""

  def shapes(part: Cut, cut: Cut) -> list[tuple[int, ...]]:
    """Of what an optimizer of a part keeps of it, after it was cut."""

    def own(params: Any) -> Any:
      layers = engine.passes.storage.load_exact(params[LAYERS])
      leaf = engine.passes.storage.load_exact(leaf_at(params, path))
      tree = replace_leaf({**params, LAYERS: layers}, path, part.at(leaf))
      state = engine.tx.init(tree)
      nodes = filter(
        engine.slices.is_params,
        jax.tree.leaves(state, is_leaf=engine.slices.is_params),
      )
      return [cut.at(leaf_at(node, path)) for node in nodes]

    return [x.shape for x in jax.tree.leaves(jax.eval_shape(own, params))]

  # The optimizer has warned of what there is to warn of.
  logging.disable(logging.WARNING)
  try:
    whole = shapes(WHOLE, WHOLE)
    if any(not shape or shape[0] % count for shape in whole):
      return False
    cut = Cut(0, count)
    return shapes(WHOLE, cut) == shapes(cut, WHOLE)
  finally:
    logging.disable(logging.NOTSET)


def _check_layers(engine: _Engine, params: Any) -> None:
  """Checks that the optimizer's state can be cut into layers."""
  stuck = [
    '/'.join(path)
    for path in engine.layer_paths
    if not _can_be_cut(engine, params, path, engine.passes.num_layers)
  ]
  if stuck:
    raise ValueError(
      f'The optimizer keeps something of {stuck} that cannot be cut into '
      'layers, such as the moments of stacked vectors quantised in one piece. '
      "Name vectors 'scale' or 'bias', or train in whole steps."
    )


def _count_row_blocks(engine: _Engine, params: Any) -> dict[Path, int]:
  """Large matrices around the layers, and into how many parts to cut them."""
  counts = {}
  for path in engine.around_paths:
    leaf = leaf_at(params, path)
    fewest = -(-leaf.size // ROW_BLOCK)
    if leaf.ndim != 2 or fewest == 1:
      continue
    for count in range(fewest, 4 * fewest):
      # No block of a quantised array may be cut.
      fits = leaf.shape[0] % count == 0 and leaf.size // count % ROW_ALIGN == 0
      if fits and _can_be_cut(engine, params, path, count):
        counts[path] = count
        break
  return counts
