"""GPUs that are described, and what of their memory a run may use."""

import pytest

from gnlorp_jax.plan import accelerators


def test_usable_memory_is_the_share_that_jax_is_given():
  for gpu in accelerators.ACCELERATORS.values():
    assert gpu.usable == int(gpu.fraction * gpu.memory)
    rest = gpu.memory - gpu.usable
    # All but the reserve, to a percent.
    assert 0 <= rest - accelerators.RESERVED <= 0.01 * gpu.memory


def test_machines_hold_equal_parts_of_the_devices():
  h100 = accelerators.ACCELERATORS['h100']
  with pytest.raises(ValueError) as error:
    accelerators.described_devices(h100, 10, machines=4)
  assert str(error.value) == (
    '10 devices cannot be divided among 4 machines: use a multiple of 4.'
  )
