import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training import integrity, sharding

DTYPES = ('float32', 'bfloat16', 'float16', 'int32', 'int8', 'uint8', 'bool')


def example(dtype):
  numbers = np.random.default_rng(0).integers(-100, 100, (6, 8, 4))
  return jnp.asarray(numbers).astype(dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_checksum_sees_any_flipped_bit(dtype):
  x = np.array(example(dtype))
  before = integrity.checksum(jnp.asarray(x))
  for bit in range(8 * x.itemsize if dtype != 'bool' else 1):
    flipped = x.copy()
    flipped.reshape(-1).view(np.uint8)[33 * x.itemsize + bit // 8] ^= (
      1 << bit % 8
    )
    assert integrity.checksum(jnp.asarray(flipped)) != before, bit


def test_checksum_sees_two_flipped_sign_bits():
  x = np.array(example('float32'))
  flipped = x.copy()
  flipped[0, 0, :2] *= -1
  assert integrity.checksum(jnp.asarray(flipped)) != integrity.checksum(
    jnp.asarray(x)
  )


def test_checksum_sees_swapped_entries():
  x = np.array(example('int32'))
  swapped = x.copy()
  swapped[0, 0, 0], swapped[3, 2, 1] = x[3, 2, 1], x[0, 0, 0]
  assert x[0, 0, 0] != x[3, 2, 1]
  assert integrity.checksum(jnp.asarray(swapped)) != integrity.checksum(
    jnp.asarray(x)
  )


@pytest.mark.parametrize('bits', [0x7FC00001, 0x7FC00002, 0x80000000])
def test_checksum_tells_nan_payloads_and_signed_zeros_apart(bits):
  x = np.zeros(4, np.uint32)
  other = x.copy()
  other[2] = bits
  first, second = (
    int(integrity.checksum(jnp.asarray(a.view(np.float32)))) for a in (x, other)
  )
  assert first != second


def test_checksum_does_not_depend_on_sharding():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
  expected = integrity.checksum(x)
  for axis in (0, 1):
    mesh = sharding.make_mesh(2, 2)
    spec = [None, None]
    spec[axis] = ('data', 'fsdp')
    split = jax.device_put(
      x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    assert integrity.checksum(split) == expected


def test_checksum_takes_random_keys():
  first, second = (integrity.checksum(jax.random.key(seed)) for seed in (0, 1))
  assert first != second


def test_changed_contents_are_named():
  state = {'a': jnp.ones(3), 'b': [jnp.ones(3)]}
  description = integrity.describe(state)
  integrity.check_contents(state, description)
  text = "the checksum does not fit the contents of ['b/0']"
  with pytest.raises(integrity.DamagedError, match=f'^{re.escape(text)}$'):
    integrity.check_contents(
      {'a': jnp.ones(3), 'b': [jnp.zeros(3)]}, description
    )


def test_types_that_differ_are_all_listed():
  saved = integrity.describe_types(
    {'a': jnp.ones(3), 'b': jnp.ones(3), 'c': jnp.ones(3), 'e': jnp.ones(3)}
  )
  expected = integrity.describe_types(
    {
      'a': jnp.ones(3),
      'b': jnp.ones((3, 1)),
      'd': jnp.ones(3),
      'e': jnp.ones(3, jnp.bfloat16),
    }
  )
  integrity.check_same_types(saved, saved)
  text = (
    "Missing: ['d']. Extra: ['c']. Different: ['b: float32[3] != float32[3, "
    "1]', 'e: float32[3] != bfloat16[3]']."
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    integrity.check_same_types(saved, expected)


def test_sealed_record_is_returned_as_json_holds_it():
  record = {'position': (1, 2), 5: 'five', 'rate': 0.1}
  expected = {'position': [1, 2], '5': 'five', 'rate': 0.1}
  assert integrity.unseal(integrity.seal(record)) == expected


def test_sealed_record_does_not_follow_later_changes():
  record = {'position': [1]}
  sealed = integrity.seal(record)
  record['position'].append(2)
  assert integrity.unseal(sealed) == {'position': [1]}


def test_changed_record_is_damaged():
  sealed = integrity.seal({'hidden_size': 128})
  sealed['content']['hidden_size'] = 129
  with pytest.raises(
    integrity.DamagedError, match='^the checksum does not fit the record$'
  ):
    integrity.unseal(sealed)


@pytest.mark.parametrize(
  'sealed', [None, [], {}, {'content': {}}, {'crc32': 0}, 'text']
)
def test_what_is_no_sealed_record_is_damaged(sealed):
  with pytest.raises(integrity.DamagedError, match='^no sealed record, but '):
    integrity.unseal(sealed)


def test_record_without_its_fields_is_damaged():
  sealed = integrity.seal({'a': 1})
  assert integrity.unseal(sealed, ('a',)) == {'a': 1}
  text = r"^the record lacks the fields \['b'\]$"
  with pytest.raises(integrity.DamagedError, match=text):
    integrity.unseal(sealed, ('a', 'b'))


def test_record_of_another_version_is_none_of_ours_and_not_damaged():
  sealed = integrity.seal({'a': 1})
  assert sealed['version'] == 1
  with pytest.raises(ValueError) as error:
    integrity.unseal(sealed | {'version': 2})
  assert str(error.value) == (
    'The record is of version 2, and this program reads version 1. Use the '
    'gnlorp_jax that wrote it, or another run directory.'
  )
  # Those of before the field are of the first.
  del sealed['version']
  assert integrity.unseal(sealed) == {'a': 1}
