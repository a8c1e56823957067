"""The weights, gradients and optimizers that `benchmarks.step` times.

This package's optimizers get one stack [layers, in, out] per kernel, as a scan
over layers leaves it; the peers one matrix per layer, as Optax's GaLore
projects no stack. (It compresses the longer axis of a matrix, the others the
shorter; the products are as large either way, its moments are smaller.)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import methods, peers, programs, turns
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect

RATE = 1e-6  # So small that weights, which are shared, stay what they are.
MEMORY = 20e9  # Bytes that a case may take on a CPU.
# Ranks of the models in the GaLore protocol, arXiv:2403.03507, table 2.
MODEL_RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512}


def kernels_of(shape: str) -> dict[str, tuple[int, ...]]:
  """Shapes of kernels by name: of ``INxOUT``, or of a model's layers.

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
      f'{", ".join(llama.PRESETS)}.'
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
      model, rank = llama.PRESETS.get(shape), ranks[i]
      if model is not None:
        rank = MODEL_RANKS.get(shape, model.hidden_size // 4)
      cases.append(Case(shape, dtypes[j], rank, gap))
  return list(dict.fromkeys(cases))


def _stack(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Multiples of a random matrix of decaying spectrum plus noise, float32.

  They are ``[layers, in, out]``, ``[1, in, out]`` for one matrix.
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

  The weights of a layout are one set: jitted steps donate them, so each method
  puts back what it received updated. Large cases have one set of gradients
  instead of `turns.GRADIENTS`.

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
      name: _stack(x, seed + i) for i, (name, x) in enumerate(shapes.items())
    }
    if layout == 'stacked':
      named = {name: x.reshape(shapes[name]) for name, x in stacks.items()}
    else:
      named = {
        f'{name}_{i}': matrix
        for name, matrices in stacks.items()
        for i, matrix in enumerate(matrices)
      }
    if layout != 'torch':
      return {n: {'kernel': jnp.array(x, dtype)} for n, x in named.items()}
    torch = peers.module('torch')  # Its weights are [out, in].
    like = {'device': self.platform, 'dtype': getattr(torch, dtype)}
    return [
      torch.from_numpy(np.ascontiguousarray(matrix.T)).to(**like)
      for matrix in named.values()
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
  """The jitted step of an Optax optimizer on weights of a layout.

  `gap` is the refresh interval of one whose state does not count refreshes.
  """

  def __init__(
    self,
    data: Data,
    layout: str,
    tx: optax.GradientTransformation,
    gap: int | None = None,
  ):
    self._data, self._layout, self._gap = data, layout, gap
    data.load(layout)
    self._gradients = data.gradients[layout]
    weights = data.weights[layout]
    state = jax.eval_shape(tx.init, weights)

    def step(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
      updates, state = tx.update(gradients, state, weights)
      return optax.apply_updates(weights, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    self._step, self.compile_s = programs.compiled(
      lambda: jitted.lower(weights, state, self._gradients[0])
    )
    memory = programs.memory(self._step)
    self.peak_bytes = memory['total']
    self.state_bytes = inspect.tree_bytes(state)
    data.reserve(self.state_bytes, memory['total'] - memory['arguments'])
    self._state = jax.jit(tx.init)(weights)

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


def _setting(case: Case) -> peers.Setting:
  return peers.Setting(RATE, case.rank, case.gap)


def _ours(data: Data, name: str) -> JaxMethod:
  tx = methods.ours(name, _setting(data.case), skip_nonfinite=False)
  return JaxMethod(data, 'stacked', tx)


def _optax(data: Data, name: str) -> JaxMethod:
  gap = data.case.gap if name == 'optax-galore' else None
  tx = peers.OPTAX[name](_setting(data.case))
  return JaxMethod(data, 'layers', tx, gap)


def _floor(data: Data, layout: str) -> JaxMethod:
  """The products and the one pass that projecting costs at the least."""
  rank = data.case.rank
  if layout == 'layers' and 'matrix' in data.case.kernels:
    raise methods.AbsentError('one matrix is no stack: see floor')

  def basis(w: jax.Array) -> jax.Array:
    *stack, n_in, n_out = w.shape
    n = min(n_in, n_out)
    shape = (*stack, n, min(rank, n))
    return jax.random.normal(jax.random.key(0), shape) / n**0.5

  def leaf(grad_IO: jax.Array, basis_NR: jax.Array) -> jax.Array:
    if grad_IO.shape[-2] <= grad_IO.shape[-1]:
      low_RO = jnp.einsum('...io,...ir->...ro', grad_IO, basis_NR)
      update_IO = jnp.einsum('...ro,...ir->...io', low_RO, basis_NR)
    else:
      low_IR = jnp.einsum('...io,...or->...ir', grad_IO, basis_NR)
      update_IO = jnp.einsum('...ir,...or->...io', low_IR, basis_NR)
    return -RATE * (update_IO + grad_IO)

  tx = optax.GradientTransformation(
    lambda weights: jax.tree.map(basis, weights),
    lambda grads, bases, _: (jax.tree.map(leaf, grads, bases), bases),
  )
  return JaxMethod(data, layout, tx)


class TorchMethod(peers.TorchMethod):
  """An optimizer of `peers.TORCH` on one parameter per layer."""

  def __init__(self, data: Data, name: str):
    peers.torch_on(data.platform)
    data.load('torch')
    super().__init__(data.platform)
    case, parameter = data.case, self.torch.nn.Parameter
    self._gap, self._gradients = case.gap, data.gradients['torch']
    self._params = [parameter(w) for w in data.weights['torch']]
    self.optimizer = peers.TORCH[name](self._params, [], _setting(case))
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
  'floor': partial(_floor, layout='stacked'),
  **{name: partial(_ours, name=name) for name in methods.OURS},
  'floor-layers': partial(_floor, layout='layers'),
  **{name: partial(_optax, name=name) for name in peers.OPTAX},
  **{name: partial(TorchMethod, name=name) for name in peers.TORCH},
}
"""Name: what builds the method from weights and gradients."""
