"""The weights, gradients and optimizers that benchmarks/step.py times.

This package's optimizers get one stack [layers, in, out] per kernel, as a scan
over layers leaves it. The peers get one matrix per layer:
`optax.contrib.galore` would leave a stack unprojected without saying so. (It
compresses the longer axis of a matrix, the others the shorter; the products are
as large either way, its moments are smaller.)
"""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.common import harness, methods, peers, turns
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect

MOMENT_BITS = (32, 8, 4)
RATE = 1e-6  # So small that weights, which are shared, stay what they are.
MEMORY = 20e9  # Bytes that a case may take on a CPU.
# Ranks of the models in the GaLore protocol, arXiv:2403.03507, table 2.
MODEL_RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512}


class FullError(methods.AbsentError):
  """A method does not fit beside what the memory holds."""


class Kernel(NamedTuple):
  """A matrix, or a stack of them: one per layer."""

  layers: int | None
  n_in: int
  n_out: int

  @property
  def shape(self) -> tuple[int, ...]:
    """``[layers, in, out]``, or ``[in, out]``."""
    stack = () if self.layers is None else (self.layers,)
    return (*stack, self.n_in, self.n_out)


def kernels_of(shape: str) -> dict[str, Kernel]:
  """The kernels that a shape names.

  Args:
    shape: ``INxOUT`` for one matrix, or a model of `llama.PRESETS` for the
      kernels of its attention and MLP layers.

  Returns:
    Kernels by name.

  Raises:
    ValueError: If it names neither.
  """
  if shape in llama.PRESETS:
    model = llama.PRESETS[shape]
    layers, d, f = model.num_layers, model.hidden_size, model.intermediate_size
    sizes = {f'{name}_proj': (d, d) for name in 'qkvo'}
    sizes |= {'gate_proj': (d, f), 'up_proj': (d, f), 'down_proj': (f, d)}
    return {name: Kernel(layers, *size) for name, size in sizes.items()}
  n_in, _, n_out = shape.partition('x')
  if not (n_in.isdecimal() and n_out.isdecimal() and int(n_in) * int(n_out)):
    raise ValueError(
      f'No shape {shape!r}: give INxOUT, such as 4096x11008, or one of '
      + ', '.join(llama.PRESETS)
      + '.'
    )
  return {'matrix': Kernel(None, int(n_in), int(n_out))}


class Case(NamedTuple):
  """What is optimized, and how."""

  shape: str
  dtype: str
  rank: int
  gap: int  # Steps between two refreshes of a basis.

  def __str__(self) -> str:
    return f'{self.shape} {self.dtype} rank {self.rank}'

  @property
  def kernels(self) -> dict[str, Kernel]:
    """As `kernels_of`."""
    return kernels_of(self.shape)

  @property
  def weights(self) -> int:
    """Number of weights."""
    return sum(math.prod(kernel.shape) for kernel in self.kernels.values())

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights, and of a set of gradients."""
    return self.weights * jnp.dtype(self.dtype).itemsize

  @property
  def factoring(self) -> int:
    """What exact SVDs of all matrices cost, but for a constant."""
    return sum(
      math.prod(kernel.shape) * min(kernel.n_in, kernel.n_out)
      for kernel in self.kernels.values()
    )


def make_cases(
  shapes: list[str], dtypes: list[str], ranks: list[int], gap: int
) -> list[Case]:
  """All cases, of most worth first: the earlier in their lists, the earlier.

  Models have one rank, that of the protocol or a quarter of their width.
  """
  places = [(i, j) for i in range(len(ranks)) for j in range(len(dtypes))]
  cases = []
  for i, j in sorted(places, key=lambda place: (sum(place), place[1])):
    for shape in shapes:
      rank = ranks[i]
      if shape in llama.PRESETS:
        width = llama.PRESETS[shape].hidden_size
        rank = MODEL_RANKS.get(shape, width // 4)
      case = Case(shape, dtypes[j], rank, gap)
      if case not in cases:
        cases.append(case)
  return cases


def gradient(kernel: Kernel, seed: int) -> np.ndarray:
  """A random matrix of decaying spectrum plus noise, ``[in, out]`` float32."""
  random = np.random.default_rng(seed)
  k = max(min(kernel.n_in, kernel.n_out) // 8, 1)
  left = random.standard_normal((kernel.n_in, k), np.float32)
  right = random.standard_normal((k, kernel.n_out), np.float32)
  strength = 1 / np.arange(1, k + 1, dtype=np.float32)
  noise = random.standard_normal((kernel.n_in, kernel.n_out), np.float32)
  return 1e-2 * ((left * strength) @ right + np.float32(0.1) * noise)


def memory_limit() -> float:
  """Bytes that a case may take: `MEMORY`, or what JAX may have of a GPU."""
  stats = jax.devices()[0].memory_stats()
  return stats['bytes_limit'] if stats else MEMORY


class Data:
  """Weights and gradients in the layout of each framework, made when asked.

  The weights of a layout are one mutable set: jitted steps donate them, so each
  method puts back what it received updated. One layer's matrix is drawn, the
  other layers have multiples of it. Of large cases there is one set of
  gradients instead of `turns.GRADIENTS`.

  Args:
    case: What is optimized.
    platform: Where PyTorch's tensors are, ``cpu`` or ``cuda``.
    limit: Bytes that weights, gradients and states may take together.
  """

  def __init__(self, case: Case, platform: str, limit: float):
    self.case, self.platform = case, platform
    self._limit = limit
    self._held = 0
    self._weights: dict[str, Any] = {}
    self._gradients: dict[str, list[Any]] = {}
    several = (1 + turns.GRADIENTS) * case.weight_bytes
    self.inputs = turns.GRADIENTS if 3 * several < limit / 2 else 1

  def reserve(self, held: int, passing: int = 0) -> None:
    """Notes what is about to be allocated.

    Args:
      held: Bytes that stay.
      passing: Bytes that are needed for a while beside them.

    Raises:
      FullError: If both do not fit.
    """
    needed = self._held + held + passing
    if needed > self._limit:
      raise FullError(
        f'would need {needed / 1e9:.1f} GB, weights and gradients included; '
        f'a case may take {self._limit / 1e9:.1f} GB'
      )
    self._held += held

  def _layout(self, layout: str) -> str:
    is_stack = any(k.layers is not None for k in self.case.kernels.values())
    return 'stacked' if layout == 'layers' and not is_stack else layout

  def _load(self, layout: str) -> None:
    if layout in self._gradients:
      return
    self.reserve((1 + self.inputs) * self.case.weight_bytes)
    self._weights[layout] = self._arrange(1000, layout)
    self._gradients[layout] = [
      self._arrange(100 * i, layout) for i in range(self.inputs)
    ]

  def _arrange(self, seed: int, layout: str) -> Any:
    dtype = self.case.dtype
    tree, tensors = {}, []
    for i, (name, kernel) in enumerate(self.case.kernels.items()):
      matrix = gradient(kernel, seed + i)
      strengths = np.linspace(1, 2, kernel.layers or 1, dtype=np.float32)
      if layout == 'stacked':
        stack = strengths[:, None, None] * matrix[None]
        tree[name] = {'kernel': jnp.array(stack.reshape(kernel.shape), dtype)}
        continue
      for layer, strength in enumerate(strengths):
        if layout == 'layers':
          array = jnp.array(strength * matrix, dtype)
          tree[f'{name}_{layer}'] = {'kernel': array}
          continue
        torch = peers.module('torch')  # Its weights are [out, in].
        tensor = torch.from_numpy(np.ascontiguousarray(strength * matrix.T))
        tensors.append(tensor.to(self.platform, getattr(torch, dtype)))
    return tree or tensors

  def weights(self, layout: str) -> Any:
    """The weights, as the last method left them."""
    self._load(self._layout(layout))
    return self._weights[self._layout(layout)]

  def put(self, layout: str, weights: Any) -> None:
    """Replaces the weights, which a jitted step has donated."""
    self._weights[self._layout(layout)] = weights

  def gradients(self, layout: str) -> list[Any]:
    """As many sets as `inputs`, of the layout of the weights."""
    self._load(self._layout(layout))
    return self._gradients[self._layout(layout)]

  def repair(self) -> None:
    """Makes weights anew that a step has donated before it failed."""
    for layout, weights in self._weights.items():
      if layout != 'torch' and any(
        leaf.is_deleted() for leaf in jax.tree.leaves(weights)
      ):
        self._weights[layout] = self._arrange(1000, layout)


@jax.jit
def _recorded(state: Any) -> jax.Array:
  """Refreshes that a state of this package has counted; others have none."""
  stats = inspect.subspace_stats(state).values()
  return sum((s.refreshes for s in stats), start=jnp.zeros([]))


def _at_intervals(steps: int, gap: int) -> float:
  """Refreshes of GaLore, at steps 1, T + 1, 2T + 1, ..."""
  return -(-steps // gap)


class StepMethod(turns.Method, Protocol):
  """A method, and what is known of it after its first step."""

  state_bytes: int
  compile_s: float | None
  peak_bytes: int | None

  def note_peak(self) -> None:
    """Reads the most that the device held, where the device tells."""


class JaxMethod:
  """A jitted step on weights of a layout.

  Args:
    data: Weights and gradients.
    layout: Theirs.
    init: The state for weights.
    step: Maps weights, state and gradients to new weights and state.
    gap: Its refresh interval, for one whose state does not count refreshes.
  """

  def __init__(
    self,
    data: Data,
    layout: str,
    init: Callable[[Any], Any],
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    gap: int | None = None,
  ):
    self._data, self._layout, self._gap = data, layout, gap
    self._gradients = data.gradients(layout)
    weights = data.weights(layout)
    state = jax.eval_shape(init, weights)
    start = time.perf_counter()
    self._step = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(weights, state, self._gradients[0])
      .compile()
    )
    self.compile_s: float | None = time.perf_counter() - start
    memory = self._step.memory_analysis()
    beside = (
      memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    self._arguments = memory.argument_size_in_bytes
    self.peak_bytes: int | None = self._arguments + beside
    self.state_bytes = inspect.tree_bytes(state)
    data.reserve(self.state_bytes, beside)
    self._state = jax.jit(init)(weights)
    self._before = jax.devices()[0].memory_stats()

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    weights, self._state = jax.block_until_ready(
      self._step(
        self._data.weights(self._layout), self._state, self._gradients[index]
      )
    )
    self._data.put(self._layout, weights)

  def refreshes(self, steps: int) -> float:
    """As `turns.Method`; at intervals of `gap` if the state does not tell."""
    if self._gap is not None:
      return _at_intervals(steps, self._gap)
    return float(_recorded(self._state))

  def note_peak(self) -> None:
    """Where steps raised the peak of the process, it replaces the compiler's.

    It cannot be set back: what is already held beside this method is taken off.
    """
    after = jax.devices()[0].memory_stats()
    if after and after['peak_bytes_in_use'] > self._before['peak_bytes_in_use']:
      beside = after['peak_bytes_in_use'] - self._before['bytes_in_use']
      self.peak_bytes = self._arguments + beside


def transformation(
  data: Data,
  layout: str,
  tx: optax.GradientTransformation,
  gap: int | None = None,
) -> JaxMethod:
  """The step of an Optax optimizer.

  Args:
    data: Weights and gradients.
    layout: Theirs.
    tx: The optimizer.
    gap: Its refresh interval, for one whose state does not count refreshes.
  """

  def step(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, weights)
    return optax.apply_updates(weights, updates), state

  return JaxMethod(data, layout, tx.init, step, gap)


def ours(data: Data, alias: str, bits: int, guard: bool) -> StepMethod:
  """An optimizer of this package, with the case's rank and interval."""
  tx = methods.build(
    alias,
    {'moment_bits': bits},
    learning_rate=RATE,
    rank=data.case.rank,
    update_proj_gap=data.case.gap,
    skip_nonfinite=guard,
  )
  return transformation(data, 'stacked', tx)


def optax_galore(data: Data) -> StepMethod:
  """GaLore as Optax has it, with Adam inside."""
  rank, gap = data.case.rank, data.case.gap
  tx = optax.contrib.galore(RATE, rank, gap, peers.SCALE)
  return transformation(data, 'layers', tx, gap)


def floor(data: Data, layout: str) -> StepMethod:
  """The products and the one pass that projecting costs at the least."""
  rank = data.case.rank
  is_stack = any(k.layers is not None for k in data.case.kernels.values())
  if layout == 'layers' and not is_stack:
    raise methods.AbsentError('one matrix is no stack: see floor')

  def init(weights: Any) -> Any:
    def basis(w: jax.Array) -> jax.Array:
      *stack, n_in, n_out = w.shape
      n = min(n_in, n_out)
      shape = (*stack, n, min(rank, n))
      return jax.random.normal(jax.random.key(0), shape) / n**0.5

    return jax.tree.map(basis, weights)

  def leaf(w_IO: jax.Array, basis_NR: jax.Array, grad_IO: jax.Array) -> Any:
    if w_IO.shape[-2] <= w_IO.shape[-1]:
      low_RO = jnp.einsum('...io,...ir->...ro', grad_IO, basis_NR)
      update_IO = jnp.einsum('...ro,...ir->...io', low_RO, basis_NR)
    else:
      low_IR = jnp.einsum('...io,...or->...ir', grad_IO, basis_NR)
      update_IO = jnp.einsum('...ir,...or->...io', low_IR, basis_NR)
    return (w_IO - RATE * (update_IO + grad_IO)).astype(w_IO.dtype)

  def step(weights: Any, bases: Any, gradients: Any) -> tuple[Any, Any]:
    return jax.tree.map(leaf, weights, bases, gradients), bases

  return JaxMethod(data, layout, init, step)


class TorchMethod:
  """A PyTorch optimizer on one parameter per layer.

  Args:
    data: Weights and gradients.
    name: Key of `peers.TORCH`.
  """

  compile_s = None

  def __init__(self, data: Data, name: str):
    self._torch = torch = peers.module('torch')
    self._on_gpu = data.platform == 'cuda'
    if self._on_gpu and not torch.cuda.is_available():
      raise methods.AbsentError('this build of PyTorch finds no GPU')
    torch.set_num_threads(harness.cores())
    self._gap = data.case.gap
    self._gradients = data.gradients('torch')
    self._params = [torch.nn.Parameter(w) for w in data.weights('torch')]
    setting = peers.Setting(RATE, data.case.rank, data.case.gap)
    self._optimizer = peers.TORCH[name](self._params, [], setting)
    # States come with the first step: at most two moments of all weights, and
    # what the decomposition of a matrix in float32 takes.
    largest = max(k.n_in * k.n_out for k in data.case.kernels.values())
    data.reserve(2 * data.case.weight_bytes, 16 * largest)
    self._own = 2 * data.case.weight_bytes  # Weights and gradients.
    self.peak_bytes: int | None = None
    if self._on_gpu:
      torch.set_float32_matmul_precision('high')
      torch.cuda.reset_peak_memory_stats()
      self._before = torch.cuda.memory_allocated()

  @property
  def state_bytes(self) -> int:
    """Bytes of all tensors; there are none before the first step."""
    return peers.torch_state_bytes(self._optimizer)

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    for param, grad in zip(self._params, self._gradients[index], strict=True):
      param.grad = grad
    self._optimizer.step()
    if self._on_gpu:
      self._torch.cuda.synchronize()

  def refreshes(self, steps: int) -> float:
    """As `turns.Method`."""
    projects = any('rank' in g for g in self._optimizer.param_groups)
    return _at_intervals(steps, self._gap) if projects else 0

  def note_peak(self) -> None:
    """What PyTorch's allocator held at most; of CPUs nothing is known."""
    if self._on_gpu:
      most = self._torch.cuda.max_memory_allocated()
      self.peak_bytes = most - self._before + self._own


def release(platform: str) -> None:
  """Gives back the memory of methods and data that nothing refers to."""
  gc.collect()
  if platform == 'cuda':
    try:
      peers.module('torch').cuda.empty_cache()
    except methods.AbsentError:
      pass


def _our_methods() -> Iterator[tuple[str, Callable[[Data], StepMethod]]]:
  for alias in methods.ALIASES:
    for bits in MOMENT_BITS:
      name = alias if bits == 32 else f'{alias}-{bits}bit'
      yield name, functools.partial(ours, alias=alias, bits=bits, guard=False)


METHODS: dict[str, Callable[[Data], StepMethod]] = {
  'floor': functools.partial(floor, layout='stacked'),
  **dict(_our_methods()),
  'gradnormlorp-guard': functools.partial(
    ours, alias='gradnormlorp', bits=32, guard=True
  ),
  'floor-layers': functools.partial(floor, layout='layers'),
  'optax-galore': optax_galore,
  'optax-adamw': lambda data: transformation(
    data, 'layers', optax.adamw(RATE, weight_decay=0)
  ),
  'optax-adafactor': lambda data: transformation(
    data, 'layers', optax.adafactor(RATE)
  ),
  **{name: functools.partial(TorchMethod, name=name) for name in peers.TORCH},
}
"""Name: what builds the method from weights and gradients."""

# Of most worth first.
DEFAULT = (
  *('floor', 'gradnormlorp', 'galore-torch', 'optax-galore'),
  *(
    'gradnormlorp-8bit',
    'galore',
    'adamw',
    'torch-adamw',
    'torch-adamw-fused',
    'apollo',
  ),
  *('apollo-torch', 'fira', 'bitsandbytes-adamw8bit', 'optax-adamw'),
  *('optax-adafactor', 'floor-layers', 'galore-torch-8bit'),
)


def is_ours(name: str) -> bool:
  """Whether a method is one of this package's optimizers."""
  return name in dict(_our_methods()) or name == 'gradnormlorp-guard'
