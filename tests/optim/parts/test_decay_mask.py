"""Weight decay where a mask says so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim

PARAMS = {
  'embed': {'embedding': jnp.ones((8, 4))},
  'layers': {
    'LayerNorm_0': {'scale': jnp.ones(4), 'bias': jnp.ones(4)},
    'ln_1': {'weight': jnp.ones(4)},
    'up': {'kernel': jnp.ones((4, 8)), 'bias': jnp.ones(8)},
    'linear': {'w': jnp.ones((4, 8)), 'b': jnp.ones(8)},
    'input_norm': {'weight': jnp.ones(4)},
    'bn1': {'scale': jnp.ones(4)},
    'scale': {'kernel': jnp.ones((4, 4))},
    'b': {'kernel': jnp.ones((4, 4))},
    'denormalizer': {'kernel': jnp.ones((4, 4))},
  },
}


def test_norms_and_biases_are_spared_by_their_names():
  found = optim.spare_norms_and_biases(PARAMS)
  assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, decays in jax.tree_util.tree_leaves_with_path(found)
    if decays
  }
  assert decayed == {
    'embed/embedding',
    'layers/up/kernel',
    'layers/linear/w',
    'layers/scale/kernel',
    'layers/b/kernel',
    'layers/denormalizer/kernel',
  }


MASKS = {
  'function': optim.spare_norms_and_biases,
  'tree': optim.spare_norms_and_biases(PARAMS),
  'prefix': {'embed': True, 'layers': False},
}


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('name', ['adamw', 'galore', 'gradnormlorp'])
def test_zero_gradients_leave_the_decay(name, mask):
  tx = getattr(optim, name)(
    0.1, weight_decay=0.5, weight_decay_mask=MASKS[mask]
  )
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = jax.jit(lambda p: tx.update(zeros, tx.init(p), p))(PARAMS)
  decays = MASKS[mask] if mask != 'function' else MASKS['tree']
  if mask == 'prefix':
    decays = {
      key: jax.tree.map(lambda _, d=decays[key]: d, tree)
      for key, tree in PARAMS.items()
    }
  jax.tree.map(
    lambda u, decays: np.testing.assert_allclose(
      u, -0.05 if decays else 0, rtol=1e-5
    ),
    updates,
    decays,
  )


@pytest.mark.parametrize(
  ('mask', 'text'),
  [
    ({'embed': True}, 'weight_decay_mask must be a tree like the parameters'),
    (
      [('kernel', True)],
      'weight_decay_mask must be a tree like the parameters',
    ),
    (
      {'embed': 'yes', 'layers': False},
      "weight_decay_mask has 'yes' for 'embed/embedding': it must be True or",
    ),
  ],
)
def test_masks_that_do_not_fit_are_errors_at_init(mask, text):
  tx = optim.galore(0.1, weight_decay_mask=mask)
  with pytest.raises(ValueError, match=text):
    tx.init(PARAMS)


def test_states_of_a_masked_optimizer_are_mapped_over():
  tx = optim.galore(0.1, weight_decay=0.5, weight_decay_mask=MASKS['tree'])
  state = jax.jit(tx.init)(PARAMS)
  same = optax.tree.map_params(tx, lambda x: x, state)
  jax.tree.map(np.testing.assert_array_equal, same, state)
