"""Which weights are meant, whatever they are called and wherever they lie?"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from gnlorp_jax.compose import parameters
from gnlorp_jax.data import hub
from gnlorp_jax.disk import fingerprint


def of_weights(
  settings: dict[str, Any], places: Mapping[str, str | None]
) -> dict[str, Any]:
  """Settings of which a resumed run compares weights by what they hold.

  Args:
    settings: What `fixed_settings` returned.
    places: Folders, names of the hub or of presets, or None, by the names of
      settings; those that `settings` lacks do not matter.

  Returns:
    The settings, with what `of_place` returns in place of these.
  """
  found = {n: of_place(place) for n, place in places.items() if n in settings}
  return settings | found


@functools.cache
def of_place(place: str | None) -> str | None:
  """A name for weights that follows from what they are.

  Args:
    place: A folder of a model or of adapters, whose files are read whole, a
      name of the hub, a preset or None.

  Returns:
    A folder's fingerprint; a name of the hub with its commit; others as they
    are.
  """
  if hub.is_hub(place) or not parameters.is_folder(place):
    return parameters.pinned(place)
  folder = pathlib.Path(place)
  files = [*folder.glob('*.safetensors'), folder / 'adapter_config.json']
  found = fingerprint.of_files([path for path in files if path.is_file()])
  return f'folder with the fingerprint {found}'
