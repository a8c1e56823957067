"""A language model of a Hugging Face folder: checked first, then read."""

import dataclasses
import json
import pathlib
from types import ModuleType
from typing import Any, NamedTuple

import jax

from gnlorp_jax import models
from gnlorp_jax.compose import adaptation, memory, parameters
from gnlorp_jax.data import hub
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.data.files import nearest_file
from gnlorp_jax.models import adapters, hf
from gnlorp_jax.models.interface import Dtype, Model


class Found(NamedTuple):
  """What a folder holds, before its weights are read.

  Attributes:
    folder: Where it is on this machine.
    family: The module of the model's family.
    model: The model.
    tokenizer: Its tokenizer.
    adapter: Folder of the adapters that the model uses, if any.
  """

  folder: pathlib.Path
  family: ModuleType
  model: Model
  tokenizer: tokenizers.Tokenizer
  adapter: str | None = None

  def read(self) -> Any:
    """The model's parameters, with its adapters, on the first device.

    Raises:
      ValueError: If they have no room, a file is damaged, or the adapters are
        of another model.
    """
    shapes = jax.eval_shape(self.model.init, jax.random.key(0))
    memory.check(shapes)
    arrays = {} if self.adapter is None else self._read_adapter(shapes)
    params = hf.load_params(
      self.folder,
      self.family.HF_TENSORS,
      shapes,
      unread=self.family.HF_UNREAD,
    )
    return adapters.combine(params, arrays)

  def _read_adapter(self, shapes: Any) -> Any:
    architecture = self.model.config
    config = adaptation.peft_config(self.adapter, architecture)
    like = jax.eval_shape(
      lambda params: adapters.init(config, params, jax.random.key(0)), shapes
    )
    return adaptation.read_peft(self.adapter, architecture, like)


def check_name(name: str, usage: str, *, takes_adapter: bool = False) -> None:
  """Checks what can be known of a name before anything is loaded.

  Args:
    name: What the first word of a command names, or an empty text.
    usage: How the command is called.
    takes_adapter: Whether it has the option ``--adapter``.

  Raises:
    ValueError: If it is neither a Hugging Face folder nor a name of the hub.
  """
  if not name:
    raise ValueError(
      f'No model is named. Begin with its Hugging Face folder: {usage}'
    )
  folder = pathlib.Path(name).expanduser()
  if hub.is_hub(name) or (folder / 'config.json').is_file():
    return
  if (folder / 'hf' / 'config.json').is_file():
    raise ValueError(
      f'{name} is the directory of a run, whose model is in it: '
      f'{usage.replace("FOLDER", str(folder / "hf"))}'
    )
  for adapter in (folder, folder / 'adapter'):
    file = adapter / 'adapter_config.json'
    if file.is_file():
      base = _base_of(file) or 'FOLDER'
      fix = (
        'Name the model that they were trained beside first: '
        f'{usage.replace("FOLDER", base)} --adapter {adapter}'
        if takes_adapter
        else "Finish the run with export='merged' and name its hf/."
      )
      raise ValueError(f'{name} holds adapters alone. {fix}')
  raise ValueError(
    f'{name} is no Hugging Face folder: it holds no config.json. '
    'Name the hf/ of a run, what save_pretrained wrote, or hf:OWNER/NAME.'
    f'{nearest_file(folder)}'
  )


def _base_of(file: pathlib.Path) -> str | None:
  """The model that a PEFT folder names, if its file can be read."""
  try:
    return json.loads(file.read_bytes()).get('base_model_name_or_path')
  except (OSError, ValueError, AttributeError):
    return None


def find(
  name: str,
  *,
  dtype: Dtype,
  tokenizer: str | None = None,
  adapter: str | None = None,
) -> Found:
  """Finds a language model and its tokenizer.

  Args:
    name: Its folder, or hf:OWNER/NAME of the hub, from where it is downloaded
      unless it is there.
    dtype: Of the weights and of the arithmetic.
    tokenizer: Folder or file of a tokenizer; None is that of the folder.
    adapter: Folder of PEFT with adapters of the model; None uses none.

  Raises:
    ValueError: If the folder holds no language model of a known family, or no
      tokenizer, or one of another model, or there are no such adapters.
  """
  folder = pathlib.Path(parameters.folder(name)).expanduser()
  hf_config = hf.load_config(folder)
  family = models.family_of(hf_config)
  architecture = dataclasses.replace(
    family.config_from_hf(hf_config), param_dtype=dtype, compute_dtype=dtype
  )
  found = tokenizers.load(tokenizer or name)
  if found.vocab_size > architecture.vocab_size:
    raise ValueError(
      f'The tokenizer has ids up to {found.vocab_size - 1}, the model has '
      f'{architecture.vocab_size} tokens. Name the tokenizer that the model '
      'was trained with by --tokenizer.'
    )
  model = family.make(architecture)
  if model.extend is None:
    raise ValueError(
      f'{name} holds a {architecture.model_type}, which sees the whole of a '
      'text and continues none. Name a causal language model.'
    )
  if adapter is not None:
    adapter = str(pathlib.Path(adapter).expanduser())
    config = adaptation.peft_config(adapter, architecture)
    model = adapters.adapt(config, model)
  return Found(folder, family, model, found, adapter)
