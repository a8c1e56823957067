"""Finding, cutting and writing back what belongs to one parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlorp_jax.training.layerwise.slices import (
  KEPT,
  WHOLE,
  Cut,
  StateSlices,
  only_changed,
  same_arrays,
)

PARAMS = {
  'head': {'kernel': jnp.arange(8.0).reshape(2, 4)},
  'layers': {'a': {'kernel': jnp.arange(24.0).reshape(4, 2, 3)}},
}
PATH = ('layers', 'a', 'kernel')


def test_parts_are_cut_and_written_along_the_first_axis():
  stack = np.arange(12).reshape(6, 2)
  cut = Cut(jnp.int32(1), 3)
  np.testing.assert_array_equal(cut.at({'x': stack})['x'], stack[2:4])
  new = {'x': jnp.zeros((2, 2), int), 'y': KEPT}
  written = cut.put({'x': jnp.asarray(stack), 'y': jnp.asarray(stack)}, new)
  np.testing.assert_array_equal(written['x'][2:4], 0)
  np.testing.assert_array_equal(written['x'][:2], stack[:2])
  np.testing.assert_array_equal(written['y'], stack)


def test_the_whole_is_a_part():
  assert WHOLE.at(PARAMS) is PARAMS
  new = jax.tree.map(lambda x: x + 1, PARAMS)
  jax.tree.map(np.testing.assert_array_equal, WHOLE.put(PARAMS, new), new)


def test_a_state_is_taken_apart_and_put_together():
  slices = StateSlices(frozenset(PARAMS))
  state = optax.adam(1.0).init(PARAMS)
  cut = Cut(2, 4)
  param_state = slices.take(state, PATH, cut)
  assert param_state[0].mu == {
    'layers': {'a': {'kernel': param_state[0].mu['layers']['a']['kernel']}}
  }
  assert param_state[0].mu['layers']['a']['kernel'].shape == (1, 2, 3)
  assert param_state[0].count is state[0].count

  new = jax.tree.map(lambda x: x + 1, param_state)
  after = slices.put(state, PATH, new, cut)
  kernel = np.asarray(after[0].mu['layers']['a']['kernel'])
  np.testing.assert_array_equal(kernel[2], 1)
  np.testing.assert_array_equal(np.delete(kernel, 2, axis=0), 0)
  assert after[0].count == 0  # Shared: it waits for the end of the step.
  shared = slices.shared(after, new)
  assert shared == [new[0].count]
  assert slices.put_shared(after, shared, jnp.bool_(True))[0].count == 1
  assert slices.put_shared(after, shared, jnp.bool_(False))[0].count == 0


def test_what_is_the_same_is_not_written():
  old = {'moved': jnp.ones(2), 'stays': jnp.zeros(2)}
  new = {**old, 'moved': jnp.zeros(2)}
  same = same_arrays(new, old)
  assert same == [False, True]
  assert only_changed(new, same)['stays'] is KEPT
