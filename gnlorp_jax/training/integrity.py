"""Proof that what is read is what was written.

A description lists every array of a state with its shape, dtype and checksum.
A sealed record is JSON that carries a checksum of itself.
"""

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gnlorp_jax.training import distributed
from gnlorp_jax.training.sharding import path_string

VERSION = 1
"""Of the form of sealed records."""


class DamagedError(Exception):
  """What was read is not what was written."""


class OtherVersionError(ValueError):
  """A record was written by a program that writes another form."""


@contextlib.contextmanager
def damage_of_all() -> Iterator[None]:
  """Makes damage that one process met that of all: they must go on alike.

  Raises:
    DamagedError: In every process, if any met it.
  """
  damage = None
  try:
    yield
  except DamagedError as error:
    damage = str(error)
    if not distributed.is_joined():
      raise
  found = [text for text in distributed.exchange(damage) if text is not None]
  if found:
    raise DamagedError(found[0])


def describe(state: Any) -> dict[str, dict[str, Any]]:
  """Shape, dtype and checksum of every array of a state, by its path.

  Args:
    state: Pytree of arrays, of at most 32 bits per entry.

  Returns:
    What `describe_types` returns, with an integer ``checksum`` per array.
  """
  checksums = jax.tree.leaves(jax.device_get(_checksums(state)))
  return {
    path: entry | {'checksum': int(value)}
    for (path, entry), value in zip(
      describe_types(state).items(), checksums, strict=True
    )
  }


def describe_types(state: Any) -> dict[str, dict[str, Any]]:
  """Shape and dtype of every array of a state, by its path.

  Args:
    state: Pytree of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    For example ``{'params/kernel': {'shape': [3, 4], 'dtype': 'float32'}}``.
  """
  return {
    path_string(path): {'shape': list(x.shape), 'dtype': str(x.dtype)}
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


def check_same_types(
  saved: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]
) -> None:
  """Checks that two descriptions agree in paths, shapes and dtypes.

  Raises:
    ValueError: If they do not; every array that differs is listed.
  """
  missing = sorted(expected.keys() - saved.keys())
  extra = sorted(saved.keys() - expected.keys())
  different = [
    f'{path}: {_type_text(saved[path])} != {_type_text(expected[path])}'
    for path in sorted(saved.keys() & expected.keys())
    if _type_text(saved[path]) != _type_text(expected[path])
  ]
  if missing or extra or different:
    raise ValueError(
      f'Missing: {missing}. Extra: {extra}. Different: {different}.'
    )


def check_contents(state: Any, saved: dict[str, dict[str, Any]]) -> None:
  """Checks that the arrays of a state are, bit for bit, the described ones.

  Raises:
    DamagedError: If they are not.
  """
  found = describe(state)
  wrong = [path for path in found if found[path] != saved[path]]
  if wrong:
    raise DamagedError(f'the checksum does not fit the contents of {wrong}')


def checksum(x: jax.Array) -> jax.Array:
  """Checksum of an array's bits that does not depend on its sharding.

  Each entry's bits are mixed with its position, and the results are summed
  modulo 2**32. Mixing is a bijection: a change of one entry never goes unseen,
  any other change does with a chance of 2**-32. The array is read where it
  lies; nothing is copied or gathered.

  Args:
    x: Array of any shape: bool, integers or floats of at most 32 bits, or PRNG
      keys.

  Returns:
    uint32 scalar.

  References:
    The mixing is the finaliser of MurmurHash3 (Appleby, 2011).
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position = position * jnp.uint32(size) + index
  word = x.astype(jnp.uint32) + position * jnp.uint32(0x9E3779B9)
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)


def seal(record: dict[str, Any]) -> dict[str, Any]:
  """Adds a checksum to a copy of a record, as JSON will return it."""
  content = json.loads(json.dumps(record))
  return {'version': VERSION, 'content': content, 'crc32': _crc32(content)}


def unseal(sealed: Any, fields: Iterable[str] = ()) -> dict[str, Any]:
  """The record that was sealed.

  Args:
    sealed: What `seal` made; a record without a version is of the first.
    fields: Fields that it must have.

  Raises:
    DamagedError: If its checksum does not fit, or it is none.
    OtherVersionError: If it is of another version.
  """
  if not isinstance(sealed, dict) or not {'content', 'crc32'} <= sealed.keys():
    raise DamagedError(f'no sealed record, but {str(sealed)[:40]!r}')
  version = sealed.get('version', 1)
  if version != VERSION:
    raise OtherVersionError(
      f'The record is of version {version!r}, and this program reads version '
      f'{VERSION}. Use the gnlorp_jax that wrote it, or another run directory.'
    )
  content = sealed['content']
  if _crc32(content) != sealed['crc32']:
    raise DamagedError('the checksum does not fit the record')
  missing = [name for name in fields if name not in content]
  if not isinstance(content, dict) or missing:
    raise DamagedError(f'the record lacks the fields {missing}')
  return content


@jax.jit
def _checksums(state):
  # Some of it may lie in the memory of the host.
  on_devices = jax.device_put(state, jax.memory.Space.Device)
  return jax.tree.map(checksum, on_devices)


def _crc32(content):
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _type_text(entry):
  return f'{entry["dtype"]}{entry["shape"]}'
