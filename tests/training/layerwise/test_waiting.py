"""Projected gradients that wait, and are summed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.training import layerwise, parameters, state


def projected_by_hand(toy, tx, k, clip, frozen):
  """Sums projected gradients of the whole model, without the engine."""

  def loss(params, batch):
    return toy.whole_loss(parameters.join(params, frozen), batch)

  grad_fn = jax.grad(loss, has_aux=True)

  @jax.jit
  def train_step(now, batch):
    params, opt = now.params, now.opt_state
    total, weight_sum = None, 0.0
    for number in range(k):
      rows = jax.tree.map(lambda x, n=number: x[n::k], batch)
      grads, weights = grad_fn(params, rows)
      new, opt = tx.project(grads, opt, params, due=number == 0)
      total = new if total is None else jax.tree.map(jnp.add, total, new)
      weight_sum += weights
    projected = jax.tree.map(lambda x: x / weight_sum, total)
    norm = optax.tree.norm(projected)
    factor = 1.0 if clip is None else jnp.minimum(1.0, clip / norm)
    projected = jax.tree.map(lambda x: x * factor, projected)
    updates, opt = tx.apply(projected, opt, params)
    params = optax.apply_updates(params, updates)
    return state.TrainState(now.step + 1, now.skipped, params, opt), {
      'grad_norm': norm
    }

  return train_step


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'clip', 'parts', 'meshes'),
  [
    # On one device none are summed over devices.
    ('gradnormlorp', 6.0, 'in_part', [(1, 1), (2, 2)]),
    ('galore_adafactor', None, 'all', [(4, 1)]),
    ('vlorp', 4.0, 'in_part', [(4, 1)]),
  ],
)
def test_projected_gradients_are_summed_over_batches_and_devices(
  toy, name, clip, parts, meshes
):
  params = toy.in_part() if parts == 'in_part' else (toy.init(), {})
  expected = by_hand(toy, name, clip, params)
  for mesh in meshes:
    check_projected(toy, name, clip, mesh, params, expected)


K = 2  # Micro-batches.


def by_hand(toy, name, clip, params):
  trained, frozen = params
  tx = toy.optimizer(name)
  train_step = projected_by_hand(toy, tx, K, clip, frozen)
  now = state.from_params(trained, tx, toy.mesh_of(1))
  seen = []
  for number in range(toy.STEPS):
    now, metrics = train_step(now, toy.make_batch(number))
    seen.append(jax.device_get((now, metrics)))
  if clip is not None:
    assert clip < max(metrics['grad_norm'] for _, metrics in seen)
  return seen


def check_projected(toy, name, clip, mesh, params, expected):
  trained, frozen = params
  tx, mesh = toy.optimizer(name), toy.mesh_of(*mesh)
  found = toy.trajectory(
    lambda params: layerwise.make_train_step(
      toy.PIECES,
      tx,
      parameters.plain(params, frozen),
      num_micro_batches=K,
      clip_global_norm=clip,
      accumulate='projected',
      mesh=mesh,
    ),
    tx,
    mesh,
    params=trained,
    frozen=frozen,
  )
  toy.assert_equal(found, expected)


def test_optimizers_that_need_the_gradient_are_not_summed_projected(toy):
  for name in ('apollo', 'fira', 'ldadam', 'adamw'):
    with pytest.raises(ValueError) as error:
      layerwise.make_train_step(
        toy.PIECES,
        toy.optimizer(name),
        parameters.plain(toy.init()),
        accumulate='projected',
      )
    assert str(error.value) == (
      "accumulate='projected' keeps nothing of a gradient but its projection, "
      "and this optimizer needs all of it. Use accumulate='gradient'."
    )


def test_moments_that_a_refresh_leaves_keep_their_codes(toy):
  # The largest entry of a block is negative: encoded anew it would shrink.
  tx = optim.quantize_moments(
    optim.galore(
      1e-2, moments_on_refresh='rotate', skip_nonfinite=False, **toy.LOW_RANK
    ),
    4,
    min_size=64,
  )

  def kernels(seed):
    return {'up': toy.init(seed)['layers']['up']}

  params = kernels(0)
  now = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  for number in range(3):
    grads = kernels(number + 1)
    _, now = update(grads, now, params)
  _, same = jax.jit(tx.project, static_argnames='due')(
    grads, now, params, due=False
  )
  jax.tree.map(np.testing.assert_array_equal, same, now)
