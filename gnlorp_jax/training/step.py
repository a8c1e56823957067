"""One training step, and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training import sharding
from gnlorp_jax.training.state import TrainState, shardings

Batch = dict[str, jax.Array]
# (params, batch, *constants) -> (loss_sum, weight_sum); most have no constants.
LossFn = Callable[..., tuple[jax.Array, jax.Array]]
Metrics = dict[str, jax.Array]


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  num_micro_batches: int = 1,
  clip_global_norm: float | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Builds the function that takes one optimizer step.

  The gradient is that of the weighted mean loss over the whole batch, ``sum_i
  w_i l_i / sum_i w_i``. Micro-batches add up the gradients of the numerator, in
  float32, and divide once: they save memory and change nothing else, however
  unevenly the weights are spread over them.

  A step whose gradient has a norm that is not finite is left out: parameters
  and optimizer state stay, and `TrainState.skipped` counts it. The `lax.cond`
  spans the update and its addition; a guard inside `tx` would have to hold all
  updates at once, so give a `tx` without one.

  Args:
    loss_fn: Maps parameters and a batch to the weighted sum of the losses and
      the sum of the weights, float32 scalars. What it takes beyond these two,
      such as frozen weights, is neither differentiated nor changed.
    tx: The optimizer. It receives gradients in the dtypes of the parameters,
      as `jax.grad` gives them. Its updates may be float32 where parameters are
      not: their sum is rounded once.
    num_micro_batches: Pieces the batch is worked through in, one after the
      other; must divide the batch size.
    clip_global_norm: Gradients are scaled down to this global norm before `tx`
      sees them; None does not clip.

  Returns:
    A pure function ``(state, batch, *constants) -> (state, metrics)``; the
    constants are those of `loss_fn`. Metrics are float32 scalars: ``loss`` (the
    weighted mean), ``weight_sum``, and the global norms ``grad_norm`` (before
    clipping), ``update_norm`` (as `tx` returns it) and ``weight_norm`` (of the
    new parameters), and ``skipped_steps``, int32. A batch whose weights are all
    0 has loss 0 and gradient 0.

  Raises:
    ValueError: If `num_micro_batches` is less than 1.
  """
  if num_micro_batches < 1:
    raise ValueError(
      f'num_micro_batches={num_micro_batches} must be at least 1.'
    )
  accumulate = _accumulator(
    jax.value_and_grad(loss_fn, has_aux=True), num_micro_batches
  )

  def train_step(state, batch, *constants):
    (loss_sum, weight_sum), grad_sums = accumulate(
      state.params, batch, *constants
    )
    divisor = jnp.where(weight_sum > 0, weight_sum, 1)
    grads = jax.tree.map(
      lambda g, p: (g.astype(jnp.float32) / divisor).astype(p.dtype),
      grad_sums,
      state.params,
    )
    grad_norm = _global_norm(grads)
    if clip_global_norm is not None:
      clip = optax.clip_by_global_norm(clip_global_norm)
      grads, _ = clip.update(grads, clip.init(grads))

    def update():
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      return params, opt_state, _global_norm(updates)

    def skip():
      return state.params, state.opt_state, jnp.zeros((), jnp.float32)

    is_finite = jnp.isfinite(grad_norm)
    params, opt_state, update_norm = jax.lax.cond(is_finite, update, skip)
    skipped = state.skipped + jnp.where(is_finite, 0, 1)
    metrics = {
      'loss': loss_sum / divisor,
      'weight_sum': weight_sum,
      'grad_norm': grad_norm,
      'update_norm': update_norm,
      'weight_norm': _global_norm(params),
      'skipped_steps': skipped,
    }
    return TrainState(state.step + 1, skipped, params, opt_state), metrics

  return train_step


def jit_train_step(
  train_step: Callable[..., tuple[TrainState, Metrics]],
  state: TrainState,
  mesh: jax.sharding.Mesh,
  *constants: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Compiles a training step for a mesh.

  Args:
    train_step: What `make_train_step` returned.
    state: A state in its shardings, real or abstract.
    mesh: The mesh of those shardings; batches come from `put_batch`.
    *constants: What the step takes beyond state and batch, in its shardings,
      real or abstract.

  Returns:
    The compiled step. It donates the state: the old one's memory becomes the
    new one's, and the old one must not be used again. Constants stay.
  """
  state_shardings = shardings(state)
  return jax.jit(
    train_step,
    in_shardings=(
      state_shardings,
      sharding.batch_sharding(mesh),
      *map(shardings, constants),
    ),
    out_shardings=(state_shardings, NamedSharding(mesh, P())),
    donate_argnums=0,
  )


def jit_eval_step(
  eval_step: Callable[..., Any],
  params: Any,
  mesh: jax.sharding.Mesh,
  *constants: Any,
) -> Callable[..., Any]:
  """Compiles an evaluation step for a mesh; nothing is donated.

  Args:
    eval_step: A function of parameters, a batch and constants. Of a loss it
      returns the sum and the sum of weights: add both up over the batches and
      divide once, for the mean of the batches' means is another number where
      their weights differ.
    params: Parameters in their shardings, real or abstract.
    mesh: The mesh of those shardings; batches come from `put_batch`.
    *constants: As in `jit_train_step`.

  Returns:
    The compiled step; what it returns is whole on every device.
  """
  return jax.jit(
    eval_step,
    in_shardings=(
      shardings(params),
      sharding.batch_sharding(mesh),
      *map(shardings, constants),
    ),
    out_shardings=NamedSharding(mesh, P()),
  )


def _accumulator(value_and_grad, num_micro_batches):
  """Sums values and gradients over the micro-batches of a batch."""
  if num_micro_batches == 1:
    return value_and_grad

  def accumulate(params, batch, *constants):
    def add(total, micro_batch):
      return jax.tree.map(
        jnp.add, total, value_and_grad(params, micro_batch, *constants)
      ), None

    zero = jnp.zeros((), jnp.float32)
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    micro_batches = split_rows(batch, num_micro_batches)
    total, _ = jax.lax.scan(add, ((zero, zero), grads), micro_batches)
    return total

  return accumulate


def dropout_key(batch: Batch) -> jax.Array:
  """The random key for the dropout of a batch or micro-batch.

  Args:
    batch: Holds `seeds`, uint32 ``[B]``, of which the first decides: distinct
      ones give micro-batches and steps keys of their own, and a resumed run
      those of the whole one.

  Returns:
    A key.
  """
  return jax.random.fold_in(jax.random.key(0), batch['seeds'][0])


def split_rows(batch: Batch, num_micro_batches: int) -> Batch:
  """Cuts ``[B, ...]`` into ``[K, B/K, ...]``, micro-batch k taking rows k::K.

  Rows that lie on one device stay there: every device contributes to every
  micro-batch, and nothing is sent.

  Args:
    batch: Arrays ``[B, ...]``.
    num_micro_batches: K.

  Returns:
    Arrays ``[K, B/K, ...]``.

  Raises:
    ValueError: If K does not divide B.
  """

  def split(rows: jax.Array) -> jax.Array:
    per_micro_batch, rest = divmod(rows.shape[0], num_micro_batches)
    if rest:
      raise ValueError(
        f'A batch of {rows.shape[0]} rows cannot be split into '
        f'num_micro_batches={num_micro_batches}: it must be a multiple.'
      )
    shape = (per_micro_batch, num_micro_batches, *rows.shape[1:])
    return jnp.moveaxis(rows.reshape(shape), 1, 0)

  return jax.tree.map(split, batch)


def _global_norm(tree):
  """Euclidean norm of all entries, summed in float32."""
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
