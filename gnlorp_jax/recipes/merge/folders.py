"""The folders of a merge: which tensors they hold, by the base's names."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gnlorp_jax.compose import parameters
from gnlorp_jax.models import hf, hf_tensors, peft
from gnlorp_jax.models.hf_tensors import Tensor

_HEAD = re.compile(r'(^|\.)(classifier|score|qa_outputs|lm_head)\.')
LM_HEAD = 'lm_head.weight'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
  """A model of a merge.

  Attributes:
    label: What the merge calls it.
    path: Where it is.
    config: Its config.json; of adapters, none.
    tensors: Its tensors by the names that the base has for them; of adapters,
      those that they change, in the shape of the base's.
    own_name: The name in its files of a name of the base.
    is_adapter: Whether it holds what is added to the base's tensors.
    get: Gives the values of a tensor by the base's name.
  """

  label: str
  path: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, Tensor]
  own_name: Callable[[str], str]
  is_adapter: bool
  get: Callable[[str], np.ndarray]

  @property
  def heads(self) -> dict[str, Tensor]:
    """Its tensors that are heads; adapters have none of their own."""
    if self.is_adapter:
      return {}
    return {n: t for n, t in self.tensors.items() if is_head(n)}

  @property
  def ties(self) -> bool:
    """Whether its head is its embedding."""
    return self.config.get('tie_word_embeddings', LM_HEAD not in self.tensors)

  def theta(self, name: str, base: np.ndarray) -> np.ndarray:
    """A tensor, float32.

    Args:
      name: Its name.
      base: The base's, float32.
    """
    if self.is_adapter:
      return base + self.tau(name, base)
    return self.get(name).astype(np.float32)

  def tau(self, name: str, base: np.ndarray) -> np.ndarray:
    """What tuning changed in a tensor, float32.

    Args:
      name: Its name.
      base: The base's, float32.
    """
    if self.is_adapter:
      return self.get(name) if name in self.tensors else np.zeros_like(base)
    tau = self.get(name).astype(np.float32)
    tau -= base
    return tau


def is_head(name: str) -> bool:
  """Whether a tensor belongs to a head, by its name."""
  return _HEAD.search(name) is not None


def open_base(name: str, stack: contextlib.ExitStack) -> Folder:
  """The model that all experts were tuned from.

  Args:
    name: Its folder, or hf:OWNER/NAME.
    stack: Closes its files.

  Raises:
    ValueError: If there is no such folder, or a file is damaged.
  """
  path = _path('base', name)
  if (path / peft.CONFIG).is_file():
    raise ValueError(
      f'--base {name} holds an adapter, which is no model. Name the model that '
      'it was trained on.'
    )
  opened = hf_tensors.open_tensors(path, stack)
  return Folder(
    label='base',
    path=path,
    config=hf.load_config(path),
    tensors=opened.by_name,
    own_name=lambda name: name,
    is_adapter=False,
    get=opened.read,
  )


def open_experts(
  names: Sequence[str], base: Folder, stack: contextlib.ExitStack
) -> list[Folder]:
  """The tuned models.

  Args:
    names: Their folders, or hf:OWNER/NAME.
    base: What they were tuned from.
    stack: Closes their files.

  Raises:
    ValueError: If there is no such folder, it is named twice or is the base, or
      a file is damaged.
  """
  paths = [_path('experts', name) for name in names]
  for index, path in enumerate(paths):
    same = [base.path, *paths[:index]]
    if path.resolve() in [other.resolve() for other in same]:
      raise ValueError(
        f'--experts names {names[index]} a second time, or the base: a base '
        'that is no expert changes nothing but the number that an average is '
        'divided by. To count an expert twice use --weights.'
      )
  return [
    _open_expert(path, label, base, stack)
    for path, label in zip(paths, labels(paths), strict=True)
  ]


def labels(paths: Sequence[pathlib.Path]) -> list[str]:
  """Names of folders that tell them apart: as many of their parts as needed."""
  absolute = [path.absolute().parts for path in paths]
  depth = 1
  while len({parts[-depth:] for parts in absolute}) < len(paths):
    depth += 1
  return ['_'.join(parts[-depth:]).strip('/_') for parts in absolute]


def _open_expert(
  path: pathlib.Path, label: str, base: Folder, stack: contextlib.ExitStack
) -> Folder:
  if (path / peft.CONFIG).is_file():
    products = peft.open_products(path, stack)
    own_name = _naming(base.tensors, products)
    names = {own_name(name): name for name in base.tensors}
    return Folder(
      label=label,
      path=path,
      config={},
      tensors={
        names.get(own, own): Tensor(own, product.shape, 'F32')
        for own, product in products.items()
      },
      own_name=own_name,
      is_adapter=True,
      get=lambda name: products[own_name(name)].read(),
    )
  opened = hf_tensors.open_tensors(path, stack)
  own_name = _naming(base.tensors, opened.by_name)
  names = {own_name(name): name for name in base.tensors}
  return Folder(
    label=label,
    path=path,
    config=hf.load_config(path),
    tensors={names.get(own, own): t for own, t in opened.by_name.items()},
    own_name=own_name,
    is_adapter=False,
    get=lambda name: opened.read(own_name(name)),
  )


def _naming(base: Iterable[str], theirs: Iterable[str]) -> Callable[[str], str]:
  """How a folder calls the tensors of the base.

  A model without a head, such as RobertaModel, has names without the prefix
  that it gets in a model with one: `encoder.` and `roberta.encoder.`.
  """
  ours = [name for name in base if not is_head(name)]
  others = [name for name in theirs if not is_head(name)]
  if set(ours) & set(others):
    return lambda name: name
  for other in others:
    for name in ours:
      if other.endswith(f'.{name}'):
        prefix = other.removesuffix(name)
        return lambda name: name if is_head(name) else prefix + name
      if name.endswith(f'.{other}'):
        prefix = name.removesuffix(other)
        return lambda name: name.removeprefix(prefix)
  return lambda name: name


def _path(option: str, name: str) -> pathlib.Path:
  path = pathlib.Path(parameters.folder(name)).expanduser()
  if not any((path / file).is_file() for file in ('config.json', peft.CONFIG)):
    raise ValueError(
      f'--{option} {name} is no Hugging Face folder: it holds neither '
      f'config.json nor {peft.CONFIG}.'
    )
  return path
