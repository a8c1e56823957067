"""The weights, gradients and optimizers that `benchmarks.step` times.

This package's optimizers get one stack [layers, in, out] per kernel, as a scan
over layers leaves it. The peers get one matrix per layer:
`optax.contrib.galore` would leave a stack unprojected without saying so. (It
compresses the longer axis of a matrix, the others the shorter; the products are
as large either way, its moments are smaller.)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.common import methods, peers, programs, turns
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect

RATE = 1e-6  # So small that weights, which are shared, stay what they are.
MEMORY = 20e9  # Bytes that a case may take on a CPU.
# Ranks of the models in the GaLore protocol, arXiv:2403.03507, table 2.
MODEL_RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512}


def kernels_of(shape: str) -> dict[str, tuple[int, ...]]:
  """Shapes of kernels by name, ``[layers, in, out]`` or ``[in, out]``.

  Args:
    shape: ``INxOUT`` for one matrix, or a model of `llama.PRESETS` for the
      kernels of its attention and MLP layers.

  Raises:
    ValueError: If it names neither.
  """
  if shape in llama.PRESETS:
    model = llama.PRESETS[shape]
    layers, d, f = model.num_layers, model.hidden_size, model.intermediate_size
    shapes = {f'{name}_proj': (layers, d, d) for name in 'qkvo'}
    shapes |= {f'{name}_proj': (layers, d, f) for name in ('gate', 'up')}
    return shapes | {'down_proj': (layers, f, d)}
  n_in, _, n_out = shape.partition('x')
  if not (n_in.isdecimal() and n_out.isdecimal() and int(n_in) * int(n_out)):
    raise ValueError(
      f'No shape {shape!r}: give INxOUT, such as 4096x11008, or one of '
      + ', '.join(llama.PRESETS)
      + '.'
    )
  return {'matrix': (int(n_in), int(n_out))}


class Case(NamedTuple):
  """What is optimized, and how."""

  shape: str
  dtype: str
  rank: int
  gap: int  # Steps between two refreshes of a basis.

  def __str__(self) -> str:
    return f'{self.shape} {self.dtype} rank {self.rank}'

  @property
  def kernels(self) -> dict[str, tuple[int, ...]]:
    """As `kernels_of`."""
    return kernels_of(self.shape)

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights, and of a set of gradients."""
    weights = sum(map(math.prod, self.kernels.values()))
    return weights * jnp.dtype(self.dtype).itemsize

  @property
  def factoring(self) -> int:
    """What exact SVDs of all matrices cost, but for a constant."""
    return sum(math.prod(x) * min(x[-2:]) for x in self.kernels.values())


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
      cases.append(Case(shape, dtypes[j], rank, gap))
  return list(dict.fromkeys(cases))


def stack(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Multiples of one random matrix of decaying spectrum plus noise.

  They are float32 ``[layers, in, out]``, ``[1, in, out]`` for one matrix.
  """
  random = np.random.default_rng(seed)
  n_in, n_out = shape[-2:]
  k = max(min(n_in, n_out) // 8, 1)
  left = random.standard_normal((n_in, k), np.float32)
  right = random.standard_normal((k, n_out), np.float32)
  strength = 1 / np.arange(1, k + 1, dtype=np.float32)
  noise = random.standard_normal((n_in, n_out), np.float32)
  matrix = 1e-2 * ((left * strength) @ right + np.float32(0.1) * noise)
  layers = math.prod(shape[:-2])
  return np.linspace(1, 2, layers, dtype=np.float32)[:, None, None] * matrix


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
    self.case, self.platform, self._limit = case, platform, limit
    self._held = 0
    self.weights: dict[str, Any] = {}  # By layout.
    self.gradients: dict[str, list[Any]] = {}
    several = (1 + turns.GRADIENTS) * case.weight_bytes
    self.inputs = turns.GRADIENTS if 3 * several < limit / 2 else 1

  def reserve(self, held: int, passing: int = 0) -> None:
    """Notes bytes that stay, and those needed for a while beside them.

    Raises:
      AbsentError: If both do not fit beside what others hold.
    """
    needed = self._held + held + passing
    if needed > self._limit:
      raise methods.AbsentError(
        f'would need {needed / 1e9:.1f} GB with those before it, weights and '
        f'gradients included; a case may take {self._limit / 1e9:.1f} GB'
      )
    self._held += held

  def load(self, layout: str) -> None:
    """Makes weights and gradients, unless they are there, undonated."""
    if layout not in self.gradients:
      self.reserve((1 + self.inputs) * self.case.weight_bytes)
      self.gradients[layout] = [
        self._arrange(100 * i, layout) for i in range(self.inputs)
      ]
      self.weights[layout] = self._arrange(1000, layout)
    leaves = jax.tree.leaves(self.weights[layout])
    if layout != 'torch' and any(leaf.is_deleted() for leaf in leaves):
      self.weights[layout] = self._arrange(1000, layout)

  def _arrange(self, seed: int, layout: str) -> Any:
    shapes, dtype = self.case.kernels, self.case.dtype
    stacks = {
      name: stack(x, seed + i) for i, (name, x) in enumerate(shapes.items())
    }
    if layout == 'stacked':
      return {
        name: {'kernel': jnp.array(x.reshape(shapes[name]), dtype)}
        for name, x in stacks.items()
      }
    matrices = {
      f'{name}_{i}': matrix
      for name, x in stacks.items()
      for i, matrix in enumerate(x)
    }
    if layout == 'layers':
      return {n: {'kernel': jnp.array(x, dtype)} for n, x in matrices.items()}
    torch = peers.module('torch')  # Its weights are [out, in].
    return [
      torch.from_numpy(np.ascontiguousarray(matrix.T)).to(
        self.platform, getattr(torch, dtype)
      )
      for matrix in matrices.values()
    ]


@jax.jit
def _recorded(state: Any) -> jax.Array:
  """Refreshes that a state of this package has counted; others have none."""
  stats = inspect.subspace_stats(state).values()
  return sum((s.refreshes for s in stats), start=jnp.zeros([]))


def _at_intervals(steps: int, gap: int) -> float:
  """Refreshes of GaLore, at steps 1, T + 1, 2T + 1, ..."""
  return -(-steps // gap)


class JaxMethod(turns.Method):
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
    data.load(layout)
    self._gradients = data.gradients[layout]
    weights = data.weights[layout]
    state = jax.eval_shape(init, weights)
    self._step, self.compile_s = programs.compiled(
      lambda: jax.jit(step, donate_argnums=(0, 1)).lower(
        weights, state, self._gradients[0]
      )
    )
    memory = programs.memory(self._step)
    self.peak_bytes = memory['total']
    self.state_bytes = inspect.tree_bytes(state)
    data.reserve(self.state_bytes, memory['total'] - memory['arguments'])
    self._state = jax.jit(init)(weights)

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    weights = self._data.weights
    try:
      weights[self._layout], self._state = jax.block_until_ready(
        self._step(weights[self._layout], self._state, self._gradients[index])
      )
    except Exception:
      self._data.load(self._layout)  # The others go on.
      raise

  def refreshes(self, steps: int) -> float:
    """As `turns.Method`; at intervals of `gap` if the state does not tell."""
    if self._gap is not None:
      return _at_intervals(steps, self._gap)
    return float(_recorded(self._state))


def transformation(
  data: Data,
  layout: str,
  tx: optax.GradientTransformation,
  gap: int | None = None,
) -> JaxMethod:
  """The step of an Optax optimizer; the arguments are those of `JaxMethod`."""

  def step(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, weights)
    return optax.apply_updates(weights, updates), state

  return JaxMethod(data, layout, tx.init, step, gap)


def ours(data: Data, name: str, guard: bool = False) -> JaxMethod:
  """An optimizer of this package, with the case's rank and interval."""
  tx = methods.build(
    *methods.OURS[name],
    learning_rate=RATE,
    rank=data.case.rank,
    update_proj_gap=data.case.gap,
    skip_nonfinite=guard,
  )
  return transformation(data, 'stacked', tx)


def optax_galore(data: Data) -> JaxMethod:
  """GaLore as Optax has it, with Adam inside."""
  rank, gap = data.case.rank, data.case.gap
  tx = optax.contrib.galore(RATE, rank, gap, peers.SCALE)
  return transformation(data, 'layers', tx, gap)


def floor(data: Data, layout: str) -> JaxMethod:
  """The products and the one pass that projecting costs at the least."""
  rank = data.case.rank
  if layout == 'layers' and 'matrix' in data.case.kernels:
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


class TorchMethod(peers.TorchMethod):
  """A PyTorch optimizer on one parameter per layer.

  Args:
    data: Weights and gradients.
    name: Key of `peers.TORCH`.
  """

  def __init__(self, data: Data, name: str):
    peers.torch_on(data.platform)
    data.load('torch')
    super().__init__(data.platform)
    case, parameter = data.case, self.torch.nn.Parameter
    self._gap, self._gradients = case.gap, data.gradients['torch']
    self._params = [parameter(w) for w in data.weights['torch']]
    setting = peers.Setting(RATE, case.rank, case.gap)
    self.optimizer = peers.TORCH[name](self._params, [], setting)
    self.held_bytes = 2 * case.weight_bytes  # Weights and gradients.
    # States come with the first step: at most two moments of all weights, and
    # what the decomposition of a matrix in float32 takes.
    largest = max(math.prod(shape[-2:]) for shape in case.kernels.values())
    data.reserve(2 * case.weight_bytes, 16 * largest)

  def take(self, index: int) -> None:
    """As `peers.TorchMethod`."""
    for param, grad in zip(self._params, self._gradients[index], strict=True):
      param.grad = grad
    self.optimizer.step()

  def refreshes(self, steps: int) -> float:
    """As `turns.Method`."""
    projects = any('rank' in g for g in self.optimizer.param_groups)
    return _at_intervals(steps, self._gap) if projects else 0


METHODS: dict[str, Callable[[Data], Any]] = {
  'floor': functools.partial(floor, layout='stacked'),
  **{name: functools.partial(ours, name=name) for name in methods.OURS},
  'gradnormlorp-guard': functools.partial(
    ours, name='gradnormlorp', guard=True
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
