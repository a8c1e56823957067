"""Which adapters a run has, and how they go from and to folders of PEFT."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax import models
from gnlorp_jax.compose.settings import AdapterOptions
from gnlorp_jax.data import hub
from gnlorp_jax.models import adapters, hf, peft
from gnlorp_jax.models.decoder_config import DecoderConfig


def adapter_config(
  options: AdapterOptions, architecture: models.Config
) -> adapters.AdapterConfig | None:
  """The adapters that are asked for, or those in the folder to start from.

  Args:
    options: What is asked for.
    architecture: The model's.

  Returns:
    Their configuration; None trains the model's own weights.

  Raises:
    ValueError: If the folder cannot be read, or holds others than are asked
      for.
  """
  if options.kind is None:
    if options.init_from is not None:
      raise ValueError(
        f'adapter.init_from={options.init_from!r} needs adapter.kind: lora or '
        'dora, as the adapters there are.'
      )
    for name in ('restart_every', 'train_others'):
      if getattr(options, name) is not None:
        raise ValueError(
          f'adapter.{name}={getattr(options, name)} needs adapters: give '
          "adapter.kind, such as 'lora'."
        )
    return None
  given = {
    field.name: getattr(options, field.name)
    for field in dataclasses.fields(adapters.AdapterConfig)
    if getattr(options, field.name) is not None
  }
  if options.init_from is None:
    return adapters.AdapterConfig(**given)
  found = peft_config(options.init_from, architecture)
  for name, value in given.items():
    has = getattr(found, name)
    if name != 'dropout' and value not in (
      has,
      getattr(AdapterOptions(), name),
    ):
      raise ValueError(
        f'adapter.{name}={value!r} is asked for, and the adapters in '
        f'{options.init_from} have {has!r}. '
        + (f'Give adapter.kind={has!r}.' if name == 'kind' else 'Leave it out.')
      )
  return dataclasses.replace(found, dropout=given.get('dropout', 0.0))


def export_peft(
  folder: pathlib.Path,
  trained: Any,
  frozen: Any,
  adapter: adapters.AdapterConfig | None,
  architecture: models.Config,
  *,
  base: str | None,
) -> None:
  """Writes the adapters of a run as a folder of PEFT.

  Args:
    folder: The folder, which is absent or empty.
    trained: The parameters that train, as `Parameters.trained`.
    frozen: Those that do not, adapters that label rules freeze among them.
    adapter: The configuration of the adapters.
    architecture: The model's, of a decoder.
    base: What the run started from (`init_from`): a folder or a name of the
      hub; of random weights none is named.

  Raises:
    ValueError: If the run has no adapters, trains other weights too, or has
      adapters that PEFT has not.
  """
  if adapter is None:
    raise ValueError(
      'The run has no adapters, so that there is nothing to write for PEFT. '
      'Export the model.'
    )
  flat = traverse_util.flatten_dict(trained)
  others = ['/'.join(path) for path in flat if path[-1] not in adapters.NAMES]
  if others:
    raise ValueError(
      f'{others} train beside the adapters, and a folder of PEFT has no place '
      'for them. Export the merged model.'
    )
  arrays = {
    path: leaf
    for path, leaf in (flat | traverse_util.flatten_dict(frozen)).items()
    if path[-1] in adapters.NAMES
  }
  name, revision = None, None
  if hub.is_hub(base):
    name, _, revision = base.removeprefix(hub.PREFIX).partition('@')
  elif base is not None and pathlib.Path(base).is_dir():
    name = str(pathlib.Path(base).resolve())
  peft.export(
    folder,
    adapter,
    traverse_util.unflatten_dict(arrays),
    _decoder_table(architecture),
    base=name,
    revision=revision or None,
  )


def peft_config(
  folder: str, architecture: models.Config
) -> adapters.AdapterConfig:
  """The configuration of the adapters in a folder of PEFT.

  Args:
    folder: The folder.
    architecture: The model's that they are for.

  Raises:
    ValueError: If there is no such folder, the model is no decoder, or as of
      `peft.read_config`.
  """
  if not pathlib.Path(folder).is_dir():
    raise ValueError(
      f'adapter.init_from={folder!r} is no folder. Name one that '
      'save_pretrained of peft wrote, or the adapter/ of a run.'
    )
  return peft.read_config(folder, _decoder_table(architecture))


def read_peft(folder: str, architecture: models.Config, like: Any) -> Any:
  """The adapters in a folder of PEFT.

  Args:
    folder: The folder.
    architecture: The model's that they are for.
    like: Nested dict with the shapes and dtypes of the model's adapters, of the
      configuration in the folder.

  Returns:
    A nested dict of arrays like them.

  Raises:
    ValueError: If shapes differ, or as of `peft.read`.
  """
  flat = traverse_util.flatten_dict(
    peft.read(folder, _decoder_table(architecture))[1]
  )
  wanted = traverse_util.flatten_dict(like)
  shapes = {
    '/'.join(path): (flat[path].shape, leaf.shape)
    for path, leaf in wanted.items()
    if flat[path].shape != leaf.shape
  }
  if shapes:
    raise ValueError(
      f'The adapters in {folder} are of another model. Shapes there and here: '
      f'{shapes}.'
    )
  return traverse_util.unflatten_dict(
    {path: jnp.array(flat[path], leaf.dtype) for path, leaf in wanted.items()}
  )


def _decoder_table(architecture: models.Config) -> hf.Table:
  """The tensors of a decoder."""
  if not isinstance(architecture, DecoderConfig):
    raise ValueError(
      'Folders of PEFT are read and written of decoders alone, and this is '
      f'{architecture.model_type!r}. Export or name a merged model.'
    )
  return models.family(architecture).HF_TENSORS
