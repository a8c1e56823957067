"""Projected gradients that wait, and are summed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.training import layerwise, parameters, state


def projected_by_hand(toy, tx, k, clip, frozen=None):
  """Sums projected gradients of the whole model, without the engine."""

  def loss(params, batch):
    return toy.whole_loss(parameters.join(params, frozen or {}), batch)

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


@pytest.mark.parametrize(
  ('name', 'clip', 'k', 'mesh'),
  [
    ('gradnormlorp', 6.0, 2, (1, 1)),
    ('gradnormlorp', 6.0, 2, (4, 1)),
    ('gradnormlorp', None, 1, (2, 2)),
    ('galore_adafactor', None, 2, (4, 1)),
    ('vlorp', 6.0, 2, (4, 1)),
  ],
)
def test_projected_gradients_are_summed_over_batches_and_devices(
  toy, name, clip, k, mesh
):
  check_projected(toy, name, clip, k, toy.mesh_of(*mesh))


@pytest.mark.parametrize('mesh', [(1, 1), (2, 2)])
def test_projected_gradients_are_summed_beside_frozen_weights(toy, mesh):
  trained = toy.init(jax.random.key(0))
  frozen = {'embed': trained.pop('embed')}
  frozen['layers'] = {'down': trained['layers'].pop('down')}
  args = 'gradnormlorp', 6.0, 2, toy.mesh_of(*mesh)
  check_projected(toy, *args, trained, frozen)


def check_projected(toy, name, clip, k, mesh, trained=None, frozen=None):
  trained = toy.init(jax.random.key(0)) if trained is None else trained
  tx = toy.optimizer(name)
  found = toy.trajectory(
    lambda params: layerwise.make_train_step(
      toy.PIECES,
      tx,
      parameters.plain(params, frozen),
      num_micro_batches=k,
      clip_global_norm=clip,
      accumulate='projected',
      mesh=mesh,
    ),
    tx,
    mesh,
    params=trained,
    frozen=frozen,
  )
  by_hand = projected_by_hand(toy, tx, k, clip, frozen)
  now = state.from_params(trained, tx, toy.mesh_of(1))
  expected = []
  for number in range(toy.STEPS):
    now, metrics = by_hand(now, toy.make_batch(number))
    expected.append(jax.device_get((now, metrics)))
  if clip is not None:
    assert clip < max(metrics['grad_norm'] for _, metrics in expected)
  toy.assert_equal(found, expected)


def test_optimizers_that_need_the_gradient_are_not_summed_projected(toy):
  for name in ('apollo', 'fira', 'ldadam', 'adamw'):
    with pytest.raises(ValueError) as error:
      layerwise.make_train_step(
        toy.PIECES,
        toy.optimizer(name),
        parameters.plain(toy.init(jax.random.key(0))),
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
  params = toy.init(jax.random.key(0))
  now = tx.init(params)
  for number in range(3):
    grads = jax.grad(toy.whole_loss, has_aux=True)(
      params, toy.make_batch(number)
    )[0]
    _, now = tx.update(grads, now, params)
  _, same = jax.jit(tx.project, static_argnames='due')(
    grads, now, params, due=False
  )
  jax.tree.map(np.testing.assert_array_equal, same, now)
