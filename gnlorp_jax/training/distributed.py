"""Several processes that train one model: the one place that is about them.

`jax.distributed` joins the processes and moves arrays between their devices.
What they tell each other besides (errors, results, what must be equal) goes as
text through JAX's coordination service, where a process may wait for another
for hours without keeping a device busy.

In a program that was never joined every function here does what one process
needs: nothing.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training import sharding

Value = TypeVar('Value')

_ABSENT = '(absent)'
# Who failed waits so many seconds for others to hear of it; who waits for
# another to tokenise a large text does not give up.
_FAREWELL = 20.0
_POLL_MS = 1000  # Python honours signals in between.
_numbers = itertools.count()


class SharedError(ValueError):
  """What went wrong in one process or more, raised in all of them."""


class LostProcessError(RuntimeError):
  """Another process ended, or cannot be reached."""


class SharedExit(SystemExit):
  """The end that all processes of a run agreed on."""


def is_joined() -> bool:
  """Whether this is one of several processes."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that writes files: 0, or the only one."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


# What processes tell each other.


def _exchange(said: dict[str, Any], seconds: float = math.inf) -> list[Any]:
  """What each process said, in their order; an error of any is one of all."""
  # As Orbax does: what jax offers itself would keep devices busy.
  client = jax._src.distributed.global_state.client
  number, index = next(_numbers), jax.process_index()
  end = time.monotonic() + seconds
  try:
    client.key_value_set(f'gnlorp_jax/{number}/{index}', json.dumps(said))
    heard = [
      json.loads(_wait(client, f'gnlorp_jax/{number}/{other}', end))
      for other in range(jax.process_count())
    ]
    if number:  # All have read it, or they would not have come here.
      client.key_value_delete(f'gnlorp_jax/{number - 1}/{index}')
  except jax.errors.JaxRuntimeError as error:
    raise lost(error) from None
  errors = {
    i: words['error'] for i, words in enumerate(heard) if words['error']
  }
  if not errors:
    return [words['value'] for words in heard]
  texts = list(dict.fromkeys(errors.values()))
  if len(errors) == len(heard) and len(texts) == 1:
    raise SharedError(texts[0])
  raise SharedError(
    ' '.join(f'Process {i}: {text}' for i, text in errors.items())
  )


def _wait(client: Any, key: str, end: float) -> str:
  """The value of a key, as soon as it is there."""
  while True:
    try:
      return client.blocking_key_value_get(key, _POLL_MS)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error) or time.monotonic() > end:
        raise


def exchange(value: Any) -> list[Any]:
  """Tells all processes a value, and waits for theirs.

  Args:
    value: Anything that JSON can hold.

  Returns:
    The values of all, in the order of the processes.

  Raises:
    SharedError: If a process failed instead (`shared_errors`).
    LostProcessError: If one ended.
  """
  if not is_joined():
    return [value]
  return _exchange({'value': value, 'error': None})


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
  """Makes a user's mistake, or a failure to read or write, one of all.

  Whoever meets a ValueError or an OSError tells it where the others wait for it
  next: in `exchange` and what is made of it, or at the end of this context.

  Raises:
    SharedError: In every process, if any met one.
  """
  try:
    yield
  except SharedError:
    raise
  except (ValueError, OSError) as error:
    if is_joined():
      # Where the others never come, they notice that this process is gone.
      with contextlib.suppress(LostProcessError):
        _exchange({'value': None, 'error': str(error)}, _FAREWELL)
    raise
  exchange(None)


def from_first(make: Callable[[], Value]) -> Value:
  """What process 0 makes, in all of them, which wait for it.

  Args:
    make: Called in process 0 alone; with several processes what it returns is
      sent as JSON, which makes lists of tuples.

  Raises:
    SharedError: In every process, if `make` raises a ValueError or an OSError.
  """
  if not is_joined():
    return make()
  with shared_errors():
    value = exchange(make() if is_first() else None)[0]
  return value


@contextlib.contextmanager
def of_first(
  make: Callable[[], contextlib.AbstractContextManager[Any]], other: Any
) -> Iterator[Any]:
  """What process 0 alone has in a context, which others pass by.

  Args:
    make: Makes the context, called in process 0 alone; the others wait until
      it is entered.
    other: What the others have.

  Yields:
    What the context yields; `other` in other processes.

  Raises:
    SharedError: In every process, if to enter it raises a ValueError or an
      OSError.
  """
  with contextlib.ExitStack() as stack:
    with shared_errors():
      made = stack.enter_context(make()) if is_first() else other
    yield made


def in_turn(make: Callable[[], Value]) -> Value:
  """What each process makes, process 0 before all others.

  What it leaves in a cache on a shared disk the others find there; where no
  disk is shared, each fills its own.

  Args:
    make: Called once in every process.

  Raises:
    SharedError: In every process, if `make` raises a ValueError or an OSError
      in any.
  """
  if not is_joined():
    return make()
  with shared_errors():
    if is_first():
      value = make()
    exchange(None)
    if not is_first():
      value = make()
  return value


def check_same(what: str, values: Mapping[str, Any]) -> None:
  """Checks that all processes were given the same.

  Args:
    what: What the values are, for the error.
    values: By name, as JSON can hold them.

  Raises:
    SharedError: In every process, if any differ; all such are named.
  """
  if not is_joined():
    return
  texts = {n: json.dumps(v, sort_keys=True) for n, v in values.items()}
  all_texts = exchange(texts)
  first, differences = all_texts[0], []
  for name in sorted(set().union(*all_texts)):
    for index, others in enumerate(all_texts):
      found, here = (t.get(name, _ABSENT) for t in (first, others))
      if found != here:
        differences.append(
          f'{name} {_short(found)} in process 0, {_short(here)} in process '
          f'{index}'
        )
        break
  if differences:
    raise SharedError(
      f'Processes of one run differ in {what}: {"; ".join(differences)}. Start '
      'all with the same command, code and data.'
    )


def check_shared_folder(folder: pathlib.Path) -> None:
  """Checks that all processes see one folder, which is made.

  Args:
    folder: The folder of a run.

  Raises:
    SharedError: In every process, if any does not see what process 0 writes.
  """
  if not is_joined():
    return

  def write() -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'.shared-{secrets.token_hex(4)}'
    path.touch()
    return path.name

  name = from_first(write)
  try:
    with shared_errors():
      # Names that a file system of the network keeps for a while are read anew.
      seen = name in os.listdir(folder) if folder.is_dir() else False
      if not seen:
        raise ValueError(
          f'The run directory {folder} is not that of process 0: checkpoints '
          'are written by all processes together, so it must lie on a disk '
          'that all share.'
        )
  finally:
    if is_first():
      (folder / name).unlink()


def _short(text: str) -> str:
  return text if len(text) <= 80 else f'{text[:77]}...'


# Signals.


class Stop:
  """Makes a signal to one process one to all, at the same step.

  Every step has one number of each device, whose maximum is asked for while
  the next step runs: nobody waits for it.

  Args:
    mesh: The devices of the run.
  """

  def __init__(self, mesh: Mesh):
    self._asked: jax.Array | None = None
    self._mesh = mesh
    self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

  def agree(self, received: signal.Signals | None) -> signal.Signals | None:
    """The signal that some process had received by the last step, or None.

    Args:
      received: What this process received by now. A process by itself gets it
        back at once.
    """
    if not is_joined():
      return received
    count = len(self._mesh.local_devices)
    mine = np.full(count, received or 0, np.int32)
    before = 0 if self._asked is None else int(self._asked)
    self._asked = self._most(
      jax.make_array_from_process_local_data(
        sharding.batch_sharding(self._mesh), mine
      )
    )
    return signal.Signals(before) if before else None


def agree_now(received: signal.Signals | None) -> signal.Signals | None:
  """The signal that some process has received, or None; all wait for it."""
  most = max(exchange(int(received or 0)))
  return signal.Signals(most) if most else None


# The end.


def lost(error: Exception) -> LostProcessError:
  """The error of a process that waited for one that is gone."""
  return LostProcessError(
    'Another process of this run ended or cannot be reached '
    f'({first_line(error)}). Its own output says why. Checkpoints that were '
    'complete are untouched: the same command, in all processes, continues.'
  )


def is_alone(error: BaseException | None) -> bool:
  """Whether an error may be this process's own: the others may not have it."""
  return is_joined() and not (
    error is None or isinstance(error, SharedError | SharedExit)
  )


def leave(status: int) -> NoReturn:
  """Ends this process at once, without waiting for others as Python would.

  They may wait for this one in turn. What they notice is that it is gone.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def explained(error: BaseException) -> BaseException:
  """An error of the devices as what it most likely means among processes."""
  if not is_joined() or not isinstance(error, jax.errors.JaxRuntimeError):
    return error
  text = str(error)
  signs = ('Gloo', 'NCCL', 'nccl', 'Connection', 'coordination', 'heartbeat')
  return lost(error) if any(sign in text for sign in signs) else error


def first_line(error: BaseException) -> str:
  """The first line of an error, without the full stop."""
  return str(error).partition('\n')[0].strip().rstrip('.')
