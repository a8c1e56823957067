"""The packages that the benchmarks compare with, as their users install them.

PyTorch's optimizers are built from two groups of parameters, those that a
low-rank method projects and the others, and one `Setting` for all of them; none
decays weights, whatever its default. What
is not installed, or has no kernel for the device, is an `AbsentError` with the
reason.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.common.methods import AbsentError

SCALE = 0.25


class Setting(NamedTuple):
  """What a comparison fixes for all optimizers."""

  learning_rate: float
  rank: int
  gap: int  # Steps between two refreshes of a basis.


def module(name: str) -> Any:
  """A package that need not be installed.

  Raises:
    AbsentError: If it cannot be imported.
  """
  try:
    return importlib.import_module(name)
  except (ImportError, OSError, RuntimeError) as error:
    raise AbsentError(f'not installed: {error}') from error


def _groups(
  low: list[Any], full: list[Any], setting: Setting, **options: Any
) -> list[dict[str, Any]]:
  projected = {
    **{'params': low, 'rank': setting.rank, 'update_proj_gap': setting.gap},
    **options,
  }
  return [projected] + ([{'params': full}] if full else [])


def _torch_adamw(low, full, setting):
  adamw = module('torch').optim.AdamW
  return adamw(low + full, setting.learning_rate, weight_decay=0)


def _torch_adamw_fused(low, full, setting):
  adamw = module('torch').optim.AdamW
  return adamw(low + full, setting.learning_rate, weight_decay=0, fused=True)


def _galore(low, full, setting):
  groups = _groups(low, full, setting, scale=SCALE, proj_type='std')
  return module('galore_torch').GaLoreAdamW(
    groups, lr=setting.learning_rate, no_deprecation_warning=True
  )


def _galore_8bit(low, full, setting):
  if not module('torch').cuda.is_available():
    raise AbsentError('its step waits for CUDA, which PyTorch does not find')
  groups = _groups(low, full, setting, scale=SCALE, proj_type='std')
  return module('galore_torch').GaLoreAdamW8bit(
    groups, lr=setting.learning_rate
  )


def _apollo(low, full, setting):
  groups = _groups(
    *(low, full, setting),
    **{'proj': 'random', 'scale_type': 'channel', 'scale': 1.0},
    proj_type='std',
  )
  return module('apollo_torch').APOLLOAdamW(groups, lr=setting.learning_rate)


def _apollo_mini(low, full, setting):
  groups = _groups(
    *(low, full, setting._replace(rank=1)),
    **{'proj': 'random', 'scale_type': 'tensor', 'scale': 128.0},
    proj_type='std',
  )
  return module('apollo_torch').APOLLOAdamW(groups, lr=setting.learning_rate)


def _bnb_adam8bit(low, full, setting):
  optim = module('bitsandbytes').optim
  return optim.AdamW8bit(low + full, lr=setting.learning_rate, weight_decay=0)


TORCH: dict[str, Callable[[list[Any], list[Any], Setting], Any]] = {
  'galore-torch': _galore,
  'galore-torch-8bit': _galore_8bit,
  'apollo-torch': _apollo,
  'apollo-torch-mini': _apollo_mini,
  'bitsandbytes-adamw8bit': _bnb_adam8bit,
  'torch-adamw': _torch_adamw,
  'torch-adamw-fused': _torch_adamw_fused,
}
"""Name: the optimizer of (projected parameters, the others, setting)."""


def torch_state_bytes(optimizer: Any) -> int:
  """Bytes of all tensors of a PyTorch optimizer's state, bases included.

  There are none before the first step.
  """
  torch = module('torch')

  def count(node: Any) -> int:
    if torch.is_tensor(node):
      return node.numel() * node.element_size()
    if isinstance(node, dict):
      return sum(map(count, node.values()))
    if isinstance(node, (list, tuple)):
      return sum(map(count, node))
    basis = getattr(node, 'ortho_matrix', None)  # of a projector
    return 0 if basis is None else count(basis)

  return sum(map(count, optimizer.state.values()))
