"""Steps over bad gradients change nothing but their count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim.parts.nonfinite import skip_nonfinite


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_bad_step_is_left_out_and_counted(bad):
  params = {'a': jnp.ones(3), 'b': jnp.ones((2, 2))}
  tx = skip_nonfinite(optax.adam(0.1))
  update = jax.jit(tx.update)
  _, state = update(params, tx.init(params), params)
  grads = {**params, 'b': params['b'].at[0, 1].set(bad)}
  updates, after = update(grads, state, params)
  assert all(not u.any() for u in jax.tree.leaves(updates))
  jax.tree.map(
    np.testing.assert_array_equal, after.inner_state, state.inner_state
  )
  assert (int(state.skipped), int(after.skipped)) == (0, 1)
  resumed, _ = update(params, after, params)
  expected, _ = update(params, state, params)
  jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_updates_may_have_another_dtype_than_gradients():
  grads = jnp.ones(3, jnp.bfloat16)
  to_float32 = optax.stateless(
    lambda updates, _: optax.tree.cast(updates, jnp.float32)
  )
  tx = skip_nonfinite(to_float32)
  updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
  assert updates.dtype == jnp.float32
