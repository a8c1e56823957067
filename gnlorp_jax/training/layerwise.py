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

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, LossFn, Metrics, split_rows

Accumulate = Literal['gradient', 'projected']
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# The top-level key of the parameters that are stacked [L, ...].
LAYERS = 'layers'


class Pieces(NamedTuple):
  """A model in pieces.

  `embed` and `loss` do without ``params['layers']``.

  Attributes:
    embed: Maps (params, a batch) to x ``[B, T, D]``.
    block: Maps (one layer's slice of ``params['layers']``, x) to x.
    loss: Maps (params, x after the last block, a batch) to the weighted sum of
      the losses and the sum of the weights, float32 scalars.
    embed_keys: The top-level keys of `params` that `embed` reads.
  """

  embed: Callable[[Any, Batch], jax.Array]
  block: Callable[[Any, jax.Array], jax.Array]
  loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]
  embed_keys: tuple[str, ...]


class Storage(NamedTuple):
  """How the parameters of the layers are stored.

  Attributes:
    load: Maps a stored tree to the arrays that blocks compute with.
    load_exact: The same with every digit, to add updates to.
    store: ``store(new, old, step, layer)``: stores new values as `old`, a slice
      of one layer, is; `step` and `layer` are int32, for random numbers.
  """

  load: Callable[[Any], Any]
  load_exact: Callable[[Any], Any]
  store: Callable[[Any, Any, jax.Array, jax.Array], Any]


def _as_it_is(tree: Any) -> Any:
  return tree


def _cast_like(new: Any, old: Any, step: jax.Array, layer: jax.Array) -> Any:
  del step, layer
  return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


PLAIN = Storage(_as_it_is, _as_it_is, _cast_like)


def make_loss_fn(pieces: Pieces, storage: Storage = PLAIN) -> LossFn:
  """The loss whose gradient the training step takes, for evaluation.

  Args:
    pieces: The model.
    storage: How the parameters of the layers are stored; one layer is loaded
      at a time.

  Returns:
    Maps parameters and a batch to the weighted sum of the losses and the sum of
    the weights.
  """

  def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
      return pieces.block(storage.load(layer), x_BTD), None

    around = _around(params)
    x_BTD, _ = jax.lax.scan(body, pieces.embed(around, batch), params[LAYERS])
    return pieces.loss(around, x_BTD, batch)

  return loss_fn


def make_train_step(
  pieces: Pieces,
  tx: optax.GradientTransformation,
  params: Any,
  *,
  num_micro_batches: int = 1,
  clip_global_norm: float | None = None,
  accumulate: Accumulate = 'gradient',
  mesh: Mesh | None = None,
  storage: Storage = PLAIN,
  offload: bool = False,
) -> TrainStep:
  """Builds the function that takes one optimizer step, layer by layer.

  Parameters, state and trajectory are those of `step.make_train_step` with `tx`
  behind `optax.clip_by_global_norm`. `tx` must treat every matrix of a stack by
  itself, as all optimizers of this package do.

  With ``accumulate='gradient'`` a layer's gradient is summed over the
  micro-batches before the optimizer sees it: they change nothing but the memory
  inside of a block, and the inputs of the blocks are kept for the whole batch.
  The norm that is clipped is that of all gradients. If `tx` comes in two halves
  (`optim.split`), what its projection leaves of the gradients waits for that
  norm; otherwise the backward pass runs twice.

  With ``accumulate='projected'`` one micro-batch after the other goes through
  the whole model, and what the projection leaves is summed: over them, and over
  the axis ``data`` of `mesh`, so that nothing else crosses devices but the
  gradients that a basis is refitted to. These are the first micro-batch's,
  summed over the devices. The norm that is clipped is that of what is left:
  projected gradients, those of magnitudes, and those of parameters that are not
  projected.

  A step whose gradients are not finite is left out and counted. Where layers
  are updated at once, those behind the first bad gradient have moved already;
  where they wait, some bases may have been refitted.

  Args:
    pieces: The model.
    tx: The optimizer, without clipping and without a guard of its own.
    params: Shapes and dtypes of the parameters, a dict whose ``layers`` are
      stacked ``[L, ...]``.
    num_micro_batches: Pieces of the batch; must divide the batch size.
    clip_global_norm: The largest norm; None does not clip.
    accumulate: ``gradient`` or ``projected``.
    mesh: The mesh, where ``projected`` should sum over its axis ``data``.
    storage: How the parameters of the layers are stored.
    offload: Keeps the inputs of the blocks in the host's memory.

  Returns:
    A pure function ``(state, batch) -> (state, metrics)`` with the metrics of
    `step.make_train_step`, of which ``grad_norm`` is the norm that is clipped.

  Raises:
    ValueError: If `num_micro_batches` is less than 1, if `params` has no
      stacked layers, if ``projected`` meets an optimizer that needs the whole
      gradient, or if the optimizer's state cannot be cut into layers.
  """
  if num_micro_batches < 1:
    raise ValueError(
      f'num_micro_batches={num_micro_batches} must be at least 1.'
    )
  comes_in_halves = hasattr(tx, 'project')
  if accumulate == 'projected' and not comes_in_halves:
    raise ValueError(
      "accumulate='projected' keeps nothing of a gradient but its projection, "
      "and this optimizer needs all of it. Use accumulate='gradient'."
    )
  engine = _Engine(
    pieces=pieces,
    tx=tx if comes_in_halves else optax.with_extra_args_support(tx),
    keys=frozenset(params),
    num_layers=_count_layers(params),
    storage=storage,
    offload=offload,
  )
  _check_state(engine, params)
  if accumulate == 'projected':
    return _projected_step(engine, num_micro_batches, clip_global_norm, mesh)
  if clip_global_norm is not None and comes_in_halves:
    return _waiting_step(engine, num_micro_batches, clip_global_norm)
  return _immediate_step(engine, num_micro_batches, clip_global_norm)


# Parts and slices of trees.


def _around(tree: dict[str, Any]) -> dict[str, Any]:
  """A dict of parameters without the layers."""
  return {key: node for key, node in tree.items() if key != LAYERS}


def _has_layers(node: Any) -> bool:
  return isinstance(node, dict) and LAYERS in node


def _at(tree: Any, layer: jax.Array) -> Any:
  """The slice ``[1, ...]`` of every array."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1), tree)


def _put(tree: Any, new: Any, layer: jax.Array) -> Any:
  """Writes slices ``[1, ...]`` into their stacks."""
  return jax.tree.map(
    lambda x, n: jax.lax.dynamic_update_slice_in_dim(x, n, layer, 0), tree, new
  )


def _state_at(state: Any, layer: jax.Array) -> Any:
  """The state of one layer, of an optimizer of the layers alone."""
  return jax.tree.map(
    lambda node: _at(node, layer) if _has_layers(node) else node,
    state,
    is_leaf=_has_layers,
  )


def _put_state(state: Any, new: Any, old: Any, layer: jax.Array) -> Any:
  """Writes it back; what the layers share stays as it was.

  So does what is the very slice that was read, `old`. XLA would not see that,
  and on CPUs copy the stack to write it.
  """

  def put(stack: jax.Array, n: jax.Array, o: jax.Array) -> jax.Array:
    return stack if n is o else _put(stack, n, layer)

  return jax.tree.map(
    lambda node, n, o: (
      jax.tree.map(put, node, n, o) if _has_layers(node) else node
    ),
    state,
    new,
    old,
    is_leaf=_has_layers,
  )


def _with_untouched(
  act: Callable[[Any, Any], tuple[Any, Any]], new: Any, old: Any, params: Any
) -> Any:
  """A new state, with the arrays of `old` that `act` does not touch."""

  def touched(old: Any, params: Any) -> Any:
    _, new = act(old, params)
    return jax.tree.map(lambda n, o: None if n is o else n, new, old)

  return jax.tree.map(
    lambda is_touched, n, o: o if is_touched is None else n,
    jax.eval_shape(touched, old, params),
    new,
    old,
    is_leaf=lambda x: x is None,
  )


# Numbers.


def _squares(tree: Any) -> jax.Array:
  """Sum of the squares of all entries, float32."""
  return sum(
    (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)),
    jnp.float32(0),
  )


def _divide(sums: Any, divisor: jax.Array, like: Any) -> Any:
  return jax.tree.map(
    lambda g, p: (g.astype(jnp.float32) / divisor).astype(p.dtype), sums, like
  )


def _scale(tree: Any, factor: jax.Array) -> Any:
  return jax.tree.map(lambda g: (g * factor).astype(g.dtype), tree)


def _add(tree: Any, other: Any) -> Any:
  return jax.tree.map(jnp.add, tree, other)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _divisor(weight_sum: jax.Array) -> jax.Array:
  return jnp.where(weight_sum > 0, weight_sum, 1)


def _clip_factor(norm: jax.Array, clip: float | None) -> jax.Array:
  if clip is None:
    return jnp.float32(1)
  return jnp.where(norm < clip, 1, clip / norm)


def _each(fn: Callable[[Any], Any], xs_K: Any) -> Any:
  """``fn`` of every micro-batch, one after the other."""
  if len(jax.tree.leaves(xs_K)[0]) == 1:
    y = fn(jax.tree.map(lambda x: x[0], xs_K))
    return jax.tree.map(lambda x: x[None], y)
  return jax.lax.map(fn, xs_K)


def _sum_each(fn: Callable[..., tuple[Any, Any]], *xs_K: Any) -> Any:
  """``fn(*xs) -> (summand, y)``: the float32 sum, and all y ``[K, ...]``."""
  first = jax.tree.map(lambda x: x[0], xs_K)
  if len(jax.tree.leaves(xs_K)[0]) == 1:
    total, y = fn(*first)
    return total, jax.tree.map(lambda x: x[None], y)

  def add(total: Any, xs: Any) -> tuple[Any, Any]:
    summand, y = fn(*xs)
    return _add(total, summand), y

  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(fn, *first)[0]
  )
  return jax.lax.scan(add, zero, xs_K)


# The passes.


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
  """What every pass needs, and the passes through the model."""

  pieces: Pieces
  tx: Any
  keys: frozenset[str]  # of the parameters
  num_layers: int
  storage: Storage
  offload: bool

  def is_params(self, node: Any) -> bool:
    """Whether a node of a state holds something for all parameters."""
    return isinstance(node, dict) and frozenset(node) == self.keys

  def part(self, state: Any, keys: Any) -> Any:
    """The state of an optimizer of some parameters alone."""
    return jax.tree.map(
      lambda node: {k: node[k] for k in keys} if self.is_params(node) else node,
      state,
      is_leaf=self.is_params,
    )

  def join(self, parts: list[Any], old: Any, finite: jax.Array) -> Any:
    """The state of all parameters; the last part brings what they share."""

    def merge(before: Any, *nodes: Any) -> Any:
      if self.is_params(before):
        return {key: value for node in nodes for key, value in node.items()}
      return jnp.where(finite, nodes[-1], before)

    return jax.tree.map(merge, old, *parts, is_leaf=self.is_params)

  def forward(self, params: Any, batch_K: Batch) -> tuple[jax.Array, jax.Array]:
    """Inputs of all blocks ``[L, K, B, T, D]``, and the last one's output."""

    def body(x_KBTD: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
      layer = self.storage.load(layer)
      y_KBTD = _each(lambda x_BTD: self.pieces.block(layer, x_BTD), x_KBTD)
      if self.offload:
        x_KBTD = jax.device_put(x_KBTD, jax.memory.Space.Host)
      return y_KBTD, x_KBTD

    around = _around(params)
    x_KBTD = _each(lambda batch: self.pieces.embed(around, batch), batch_K)
    x_KBTD, saved_LKBTD = jax.lax.scan(body, x_KBTD, params[LAYERS])
    return saved_LKBTD, x_KBTD

  def head(
    self, params: Any, x_KBTD: jax.Array, batch_K: Batch
  ) -> tuple[tuple[jax.Array, jax.Array], Any, jax.Array]:
    """Sums of losses and weights, gradients around the layers, that of x."""
    around = _around(params)
    grad_fn = jax.value_and_grad(self.pieces.loss, argnums=(0, 1), has_aux=True)

    def one(x_BTD: jax.Array, batch: Batch) -> tuple[Any, jax.Array]:
      sums, (grads, dx_BTD) = grad_fn(around, x_BTD, batch)
      return (sums, grads), dx_BTD

    (sums, grads), dx_KBTD = _sum_each(one, x_KBTD, batch_K)
    return sums, grads, dx_KBTD

  def embedding(self, params: Any, batch_K: Batch, dx_KBTD: jax.Array) -> Any:
    """Gradients of what the embedding reads."""
    used = {key: params[key] for key in self.pieces.embed_keys}

    def one(dx_BTD: jax.Array, batch: Batch) -> tuple[Any, None]:
      _, pull_back = jax.vjp(lambda used: self.pieces.embed(used, batch), used)
      (grads,) = pull_back(dx_BTD)
      return grads, None

    grads, _ = _sum_each(one, dx_KBTD, batch_K)
    return grads

  def block(
    self, layer: Any, x_KBTD: jax.Array, dy_KBTD: jax.Array, divisor: jax.Array
  ) -> tuple[Any, jax.Array]:
    """Gradients of a slice of one layer, divided, and that of its input."""
    loaded = jax.tree.map(lambda w: w[0], self.storage.load(layer))

    def one(x_BTD: jax.Array, dy_BTD: jax.Array) -> tuple[Any, jax.Array]:
      _, pull_back = jax.vjp(self.pieces.block, loaded, x_BTD)
      return pull_back(dy_BTD)

    sums, dx_KBTD = _sum_each(one, x_KBTD, dy_KBTD)
    grads = _divide(sums, divisor, loaded)
    return jax.tree.map(lambda g: g[None], grads), dx_KBTD

  def backward(
    self,
    visit: Callable[[jax.Array, Any, Any], Any],
    carry: Any,
    saved_LKBTD: jax.Array,
    dx_KBTD: jax.Array,
    divisor: jax.Array,
  ) -> tuple[Any, jax.Array]:
    """Shows every layer's gradient to ``visit(layer, grads, carry)``.

    The first element of the carry are the stacked parameters.
    """

    def body(i: jax.Array, loop: tuple[Any, jax.Array]) -> Any:
      carry, dy_KBTD = loop
      layer = self.num_layers - 1 - i
      x_KBTD = _at(saved_LKBTD, layer)[0]
      if self.offload:
        x_KBTD = jax.device_put(x_KBTD, jax.memory.Space.Device)
      grads, dx_KBTD = self.block(
        _at(carry[0], layer), x_KBTD, dy_KBTD, divisor
      )
      return visit(layer, {LAYERS: grads}, carry), dx_KBTD

    return jax.lax.fori_loop(0, self.num_layers, body, (carry, dx_KBTD))

  def move(
    self, old: Any, updates: Any, sums: _Sums
  ) -> tuple[dict[str, Any], _Sums]:
    """Adds updates to parameters, and their squares to the sums."""
    new = _where(sums.finite, optax.apply_updates(old, updates), old)
    return new, sums._replace(
      update=sums.update + _squares(updates), weight=sums.weight + _squares(new)
    )

  def move_layer(
    self,
    act: Callable[[Any, Any], tuple[Any, Any]],
    layer: jax.Array,
    step: jax.Array,
    carry: tuple[Any, Any, _Sums],
  ) -> tuple[Any, Any, _Sums]:
    """Writes what ``act(state, params)`` makes of a layer into the stacks."""
    layers, opt, sums = carry
    old, old_opt = _at(layers, layer), _state_at(opt, layer)
    start = {LAYERS: self.storage.load_exact(old)}

    # In the branches of a condition, because then all that is read is read
    # before anything is written: XLA on CPUs copies a stack where it is not.
    def take() -> Any:
      updates, new_opt = act(old_opt, start)
      moved = jax.tree.map(
        lambda p, u: p.astype(jnp.float32) + u, start, updates
      )
      new = self.storage.store(moved[LAYERS], old, step, layer)
      return new, new_opt, _squares(updates), _squares(moved)

    def leave() -> Any:
      return old, old_opt, jnp.zeros((), jnp.float32), _squares(start)

    new, new_opt, update, weight = jax.lax.cond(sums.finite, take, leave)
    new_opt = _with_untouched(act, new_opt, old_opt, start)
    sums = sums._replace(
      update=sums.update + update, weight=sums.weight + weight
    )
    return (
      _put(layers, new, layer),
      _put_state(opt, new_opt, old_opt, layer),
      sums,
    )


def _finish(
  state: TrainState,
  params: dict[str, Any],
  opt_state: Any,
  sums: _Sums,
  loss_sum: jax.Array,
  weight_sum: jax.Array,
) -> tuple[TrainState, Metrics]:
  """The new state and the metrics of a step."""
  skipped = state.skipped + jnp.where(sums.finite, 0, 1)
  metrics = {
    'loss': loss_sum / _divisor(weight_sum),
    'weight_sum': weight_sum,
    'grad_norm': jnp.sqrt(sums.grad),
    'update_norm': jnp.where(sums.finite, jnp.sqrt(sums.update), 0),
    'weight_norm': jnp.sqrt(sums.weight),
    'skipped_steps': skipped,
  }
  return TrainState(state.step + 1, skipped, params, opt_state), metrics


# At once.


def _immediate_step(
  engine: _Engine, num_micro_batches: int, clip: float | None
) -> TrainStep:
  tx = engine.tx
  late = engine.pieces.embed_keys
  early = tuple(sorted(engine.keys - {LAYERS, *late}))

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    batch_K = split_rows(batch, num_micro_batches)
    params, opt = state.params, state.opt_state
    saved_LKBTD, x_KBTD = engine.forward(params, batch_K)
    (loss_sum, weight_sum), head_grads, dx_KBTD = engine.head(
      params, x_KBTD, batch_K
    )
    divisor = _divisor(weight_sum)

    def embed_grads(dx_KBTD: jax.Array) -> Any:
      """Gradients of the embedding, with what the head adds to a tied one."""
      read = engine.embedding(params, batch_K, dx_KBTD)
      return _add({key: head_grads[key] for key in late}, read)

    factor, finite = jnp.float32(1), jnp.isfinite(loss_sum)
    if clip is not None:
      (_, squares), last_dx = engine.backward(
        lambda layer, grads, carry: (carry[0], carry[1] + _squares(grads)),
        (params[LAYERS], jnp.float32(0)),
        *(saved_LKBTD, dx_KBTD, divisor),
      )
      grads = {**head_grads, **embed_grads(last_dx)}
      norm = jnp.sqrt(squares + _squares(_divide(grads, divisor, grads)))
      factor, finite = _clip_factor(norm, clip), jnp.isfinite(norm)

    def see(grads: Any, sums: _Sums) -> tuple[Any, _Sums]:
      """Gradients as the optimizer receives them, after they were counted."""
      squares = _squares(grads)
      sums = sums._replace(
        grad=sums.grad + squares, finite=sums.finite & jnp.isfinite(squares)
      )
      return grads if clip is None else _scale(grads, factor), sums

    def move_around(grad_sums: Any, sums: _Sums) -> tuple[Any, Any, _Sums]:
      """Parameters around the layers and their state after the step."""
      old = {key: params[key] for key in grad_sums}
      old_opt = engine.part(opt, grad_sums)
      grads, sums = see(_divide(grad_sums, divisor, old), sums)
      updates, new_opt = tx.update(grads, old_opt, old)
      new, sums = engine.move(old, updates, sums)
      return new, _where(sums.finite, new_opt, old_opt), sums

    sums = _no_sums(finite)
    early_params, early_opt, sums = move_around(
      {key: head_grads[key] for key in early}, sums
    )
    # What the head needs is let go before the layers begin.
    dx_KBTD, early_params = jax.lax.optimization_barrier(
      (dx_KBTD, early_params)
    )

    def visit(layer: jax.Array, grads: Any, carry: Any) -> Any:
      layers, layers_opt, sums = carry
      grads, sums = see(grads, sums)
      return engine.move_layer(
        lambda mine, start: tx.update(grads, mine, start, first=layer),
        *(layer, state.step, (layers, layers_opt, sums)),
      )

    carry = params[LAYERS], engine.part(opt, (LAYERS,)), sums
    (layers, layers_opt, sums), dx_KBTD = engine.backward(
      visit, carry, saved_LKBTD, dx_KBTD, divisor
    )
    late_params, late_opt, sums = move_around(embed_grads(dx_KBTD), sums)
    return _finish(
      state,
      {**early_params, LAYERS: layers, **late_params},
      engine.join([early_opt, layers_opt, late_opt], opt, sums.finite),
      *(sums, loss_sum, weight_sum),
    )

  return train_step


# Waiting.


class _Waiting(NamedTuple):
  """What the first half of a step leaves for the second."""

  layers: Any  # what projecting leaves of their gradients, [L, 1, ...]
  around: Any  # the same of the parameters around them
  opt: Any  # the optimizer's state, with the bases of this step
  loss_sum: jax.Array  # float32 []
  weight_sum: jax.Array  # float32 []
  squares: jax.Array  # float32 [], of the gradients before projecting


def _nothing(engine: _Engine, params: Any, opt: Any, dtype: Any) -> _Waiting:
  """Zeros to add to; a dtype of None is that of what is added."""

  def projected(part: Any, keys: Any) -> Any:
    return engine.tx.project(part, engine.part(opt, keys), part)[0]

  def small() -> tuple[Any, Any]:
    around = _around(params)
    first = _at({LAYERS: engine.storage.load(params[LAYERS])}, jnp.int32(0))
    mine = _state_at(engine.part(opt, (LAYERS,)), jnp.int32(0))
    return (
      engine.tx.project(first, mine, first)[0],
      projected(around, tuple(around)),
    )

  layers, around = jax.eval_shape(small)
  zero = jnp.zeros((), jnp.float32)
  return _Waiting(
    jax.tree.map(
      lambda x: jnp.zeros((engine.num_layers, *x.shape), dtype or x.dtype),
      layers,
    ),
    jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), around),
    *(opt, zero, zero, zero),
  )


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
  saved_LKBTD, x_KBTD = engine.forward(params, batch_K)
  (loss_sum, weight_sum), grads, dx_KBTD = engine.head(params, x_KBTD, batch_K)
  divide_by = divisor(weight_sum)

  def visit(layer: jax.Array, grads: Any, carry: Any) -> Any:
    layers, opt, small_L, squares = carry
    start = {LAYERS: engine.storage.load_exact(_at(layers, layer))}
    old = _state_at(opt, layer)
    small, mine = engine.tx.project(grads, old, start, **look)
    total = jax.tree.map(
      lambda x_L, x: _at(x_L, layer) + x[None].astype(x_L.dtype), small_L, small
    )
    return (
      layers,
      _put_state(opt, mine, old, layer),
      _put(small_L, total, layer),
      squares + _squares(grads),
    )

  carry = (
    params[LAYERS],
    engine.part(waiting.opt, (LAYERS,)),
    *(waiting.layers, waiting.squares),
  )
  (_, layers_opt, layers, squares), dx_KBTD = engine.backward(
    visit, carry, saved_LKBTD, dx_KBTD, divide_by
  )
  around = _around(params)
  read = engine.embedding(params, batch_K, dx_KBTD)
  grads = {**grads, **_add({key: grads[key] for key in read}, read)}
  grads = _divide(grads, divide_by, around)
  small, around_opt = engine.tx.project(
    grads, engine.part(waiting.opt, around), around, **look
  )
  return _Waiting(
    layers,
    jax.tree.map(lambda t, x: t + x.astype(t.dtype), waiting.around, small),
    engine.join([layers_opt, around_opt], waiting.opt, jnp.bool_(True)),
    waiting.loss_sum + loss_sum,
    waiting.weight_sum + weight_sum,
    squares + _squares(grads),
  )


def _apply(
  engine: _Engine,
  state: TrainState,
  waiting: _Waiting,
  norm: jax.Array,
  factor: jax.Array,
) -> tuple[TrainState, Metrics]:
  """The second half: acts on what has waited, times a factor."""
  params, opt, tx = state.params, waiting.opt, engine.tx
  sums = _no_sums(jnp.isfinite(norm))._replace(grad=jnp.square(norm))

  def body(layer: jax.Array, carry: Any) -> Any:
    small = jax.tree.map(lambda x: x[0], _at(waiting.layers, layer))
    small = _scale(small, factor)
    return engine.move_layer(
      lambda mine, start: tx.apply(small, mine, start, first=layer),
      *(layer, state.step, carry),
    )

  carry = params[LAYERS], engine.part(opt, (LAYERS,)), sums
  layers, layers_opt, sums = jax.lax.fori_loop(
    0, engine.num_layers, body, carry
  )
  old = _around(params)
  old_opt = engine.part(opt, old)
  updates, new_opt = tx.apply(_scale(waiting.around, factor), old_opt, old)
  new, sums = engine.move(old, updates, sums)
  new_opt = _where(sums.finite, new_opt, old_opt)
  return _finish(
    state,
    {**new, LAYERS: layers},
    engine.join([layers_opt, new_opt], opt, sums.finite),
    *(sums, waiting.loss_sum, waiting.weight_sum),
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
      layers=total(waiting.layers),
      around=total(waiting.around),
      loss_sum=total(waiting.loss_sum),
      weight_sum=total(waiting.weight_sum),
    )

  def on_devices(params: Any, opt: Any, batch: Batch) -> _Waiting:
    if mesh is None or mesh.shape['data'] == 1:
      return accumulate(params, opt, batch, _as_it_is)
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
    small = waiting.layers, waiting.around
    norm = jnp.sqrt(_squares(small)) / divisor
    factor = _clip_factor(norm, clip) / divisor
    return _apply(engine, state, waiting, norm, factor)

  return train_step


# Checks.


def _count_layers(params: Any) -> int:
  """L, the common first axis of ``params['layers']``."""
  if not _has_layers(params):
    raise ValueError(
      f'Parameters must be a dict with the key {LAYERS!r}, stacked [L, ...], '
      f'to be trained layer by layer; got the keys {sorted(params)}.'
    )
  lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(params[LAYERS])}
  if len(lengths) != 1 or lengths == {()}:
    raise ValueError(
      f'All arrays of params[{LAYERS!r}] must be stacked along one first axis, '
      f'[L, ...]; the first axes are {sorted(lengths)}.'
    )
  ((length,),) = lengths
  return length


def _check_state(engine: _Engine, params: Any) -> None:
  """Checks that a slice of the state is the state of a slice."""

  def states(params: Any) -> tuple[Any, Any]:
    layers, first = engine.storage.load_exact(params[LAYERS]), jnp.int32(0)

    def state_of(layers: Any) -> Any:
      state = engine.tx.init({**params, LAYERS: layers})
      return engine.part(state, (LAYERS,))

    return _state_at(state_of(layers), first), state_of(_at(layers, first))

  sliced, single = jax.eval_shape(states, params)
  if jax.tree.structure(sliced) != jax.tree.structure(single) or [
    leaf.shape for leaf in jax.tree.leaves(sliced)
  ] != [leaf.shape for leaf in jax.tree.leaves(single)]:
    raise ValueError(
      'The optimizer keeps something that cannot be cut into layers, such as '
      'the moments of stacked vectors quantised in one piece. Name vectors '
      "'scale' or 'bias', or train in whole steps."
    )
