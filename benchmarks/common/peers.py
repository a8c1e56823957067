"""The packages that the benchmarks compare with, as their users install them.

PyTorch's optimizers are built from two groups of parameters, those that a
low-rank method projects and the others. None decays weights. What is not
installed, or has no kernel for the device, is an `AbsentError`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import optax.contrib

from benchmarks.common import harness, turns
from benchmarks.common.methods import AbsentError

SCALE = 0.25


class Setting(NamedTuple):
  """What a comparison fixes for all optimizers."""

  learning_rate: float
  rank: int
  gap: int  # Steps between two refreshes of a basis.


def module(name: str) -> Any:
  """A package that need not be installed, which is an AbsentError."""
  try:
    return importlib.import_module(name)
  except (ImportError, OSError, RuntimeError) as error:
    raise AbsentError(f'not installed: {error}') from error


def torch_on(platform: str) -> Any:
  """PyTorch, where it can use ``cpu`` or ``cuda``; else an AbsentError."""
  torch = module('torch')
  if platform == 'cuda' and not torch.cuda.is_available():
    raise AbsentError('PyTorch was built without CUDA, or finds no GPU')
  return torch


def _groups(
  low: list[Any], full: list[Any], setting: Setting, **options: Any
) -> list[dict[str, Any]]:
  projected = {
    **{'params': low, 'rank': setting.rank, 'update_proj_gap': setting.gap},
    **{'proj_type': 'std', **options},
  }
  return [projected] + ([{'params': full}] if full else [])


def _torch_adamw(low, full, setting, **options):
  adamw = module('torch').optim.AdamW
  return adamw(low + full, setting.learning_rate, weight_decay=0, **options)


def _galore(low, full, setting):
  return module('galore_torch').GaLoreAdamW(
    _groups(low, full, setting, scale=SCALE),
    **{'lr': setting.learning_rate, 'no_deprecation_warning': True},
  )


def _galore_8bit(low, full, setting):
  if not module('torch').cuda.is_available():
    raise AbsentError('its step waits for CUDA, which PyTorch does not find')
  groups = _groups(low, full, setting, scale=SCALE)
  return module('galore_torch').GaLoreAdamW8bit(
    groups, lr=setting.learning_rate
  )


def _apollo(low, full, setting, scale_type='channel', scale=1.0):
  options = {'proj': 'random', 'scale_type': scale_type, 'scale': scale}
  groups = _groups(low, full, setting, **options)
  return module('apollo_torch').APOLLOAdamW(groups, lr=setting.learning_rate)


def _apollo_mini(low, full, setting):
  return _apollo(low, full, setting._replace(rank=1), 'tensor', 128.0)


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
  'torch-adamw-fused': lambda *given: _torch_adamw(*given, fused=True),
}
"""Name: the optimizer of (projected parameters, the others, setting)."""

OPTAX: dict[str, Callable[[Setting], optax.GradientTransformation]] = {
  'optax-adamw': lambda given: optax.adamw(given[0], weight_decay=0),
  'optax-galore': lambda given: optax.contrib.galore(*given, SCALE),
  'optax-adafactor': lambda given: optax.adafactor(given[0]),
}
"""Name: Optax's own optimizer of a setting. GaLore projects no stack."""


class TorchMethod(turns.Method):
  """Steps on ``cpu`` or ``cuda``; a subclass sets the optimizer and takes them.

  On a GPU `peak_bytes` is the most that its first two steps had allocated,
  before another method was built.
  """

  optimizer: Any
  held_bytes = 0  # What was there before and counts as this method's.

  def __init__(self, platform: str):
    self.torch = torch = torch_on(platform)
    self.platform = platform
    self._taken = 0
    torch.set_num_threads(harness.cores())
    if platform == 'cuda':
      torch.set_float32_matmul_precision('high')  # As JAX does there.
      torch.cuda.reset_peak_memory_stats()
      self._before = torch.cuda.memory_allocated()

  @property
  def state_bytes(self) -> int:
    """Bytes of the optimizer's state; there is none before the first step."""
    return torch_state_bytes(self.optimizer)

  def take(self, index: int) -> None:
    """One step with gradient or batch `index`."""
    raise NotImplementedError

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    self.take(index)
    if self.platform == 'cuda':
      self.torch.cuda.synchronize()
      self._taken += 1
      if self._taken <= 2:
        most = self.torch.cuda.max_memory_allocated()
        self.peak_bytes = most - self._before + self.held_bytes


class TorchTraining(TorchMethod):
  """Whole training steps with PyTorch; a subclass has the loss of a batch."""

  def __init__(self, platform: str):
    super().__init__(platform)
    self.losses: list[float] = []

  def loss_of(self, index: int) -> Any:
    """The loss of batch `index`, a tensor with a gradient."""
    raise NotImplementedError

  def take(self, index: int) -> None:
    """As `TorchMethod`."""
    loss = self.loss_of(index)
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad()
    self.losses.append(float(loss.detach()))  # Waits for the device.
    self.loss = self.losses[0]


def torch_state_bytes(optimizer: Any) -> int:
  """Bytes of all tensors of a PyTorch optimizer's state, bases included."""
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


def release() -> None:
  """Gives back GPU memory that PyTorch keeps without need, where it is."""
  try:
    module('torch').cuda.empty_cache()
  except AbsentError:
    pass
