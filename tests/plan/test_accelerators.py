"""GPUs that are described, and what of their memory a run may use."""

import re

import pytest

from gnlorp_jax.plan import accelerators


def test_usable_memory_is_the_share_that_jax_is_given():
  for gpu in accelerators.ACCELERATORS.values():
    assert gpu.usable == int(gpu.fraction * gpu.memory)
    rest = gpu.memory - gpu.usable
    # All but the reserve, to a percent.
    assert 0 <= rest - accelerators.RESERVED <= 0.01 * gpu.memory


def test_cards_have_a_little_less_memory_than_their_boxes_say():
  for gpu in accelerators.ACCELERATORS.values():
    (number,) = re.findall(r', (\d+) GB$', gpu.description)
    assert 0.96 < gpu.memory / (int(number) * 2**30) < 1


def test_described_devices_are_of_the_kind_that_is_asked_for(wheels):
  for gpu in accelerators.ACCELERATORS.values():
    (device,) = accelerators.described_devices(gpu, 1)
    assert device.device_kind == gpu.description
    major, minor = gpu.compute_capability
    assert device.compute_capability == f'{major}.{minor}'
    assert device.core_count == gpu.cores


def test_machines_hold_equal_parts_of_the_devices():
  h100 = accelerators.ACCELERATORS['h100']
  with pytest.raises(ValueError) as error:
    accelerators.described_devices(h100, 10, machines=4)
  assert str(error.value) == (
    '10 devices cannot be divided among 4 machines: use a multiple of 4.'
  )
