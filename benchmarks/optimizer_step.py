"""Times the optimizer step alone, of this package and of its peers, on CPUs.

The weights are those of the attention and MLP layers of LLaMA-60M (8 layers,
25.3M weights, float32) with gradients of a decaying spectrum plus noise. A step
is `update` and `apply_updates` in one jitted function with weights and state
donated; for PyTorch, `optimizer.step()`. This package's optimizers get one
stack [layers, in, out] per kernel, as a scan over layers leaves it. The peers
get one matrix per layer: `optax.contrib.galore` would leave a stack unprojected
without saying so. (It compresses the longer axis of a matrix, the others the
shorter; the products are as large either way, its moments are smaller.)

  python -m benchmarks.optimizer_step --minutes 60
  python -m benchmarks.optimizer_step --methods 'gradnormlorp*' '*galore*'

The machine should have nothing else to do: the threads of PyTorch wait for each
other at every operation, so that one core lost costs them many times its share.

All methods run in one process, in turns of a few steps, so that a machine that
slows down slows them all. The turns go on until every method has made as many
counted steps as lie between two refreshes, and then to the end of --minutes.
Methods of one framework and layout share one set of weights, which they update
in turn; all states together take some GB.

What the columns mean:
  median      median over the turns of a turn's median step; in brackets the
              quartiles over the turns
  / NAME      median over the rounds of turns of the ratio to NAME's median in
              the same round
  worst       the worst step, in medians of its turn. A step's place in the
              refresh interval decides what work it has; of the visits of a
              place the fastest counts, so that what the machine does beside is
              left out after two visits (the number of visits is given)
  max         the same without leaving anything out
  refresh     what refreshes add to the mean step: the steps that refresh, less
              the median of the turn's others. Where no step or every step
              refreshes, mean less median, which for AdamW shows the noise
  first       the first step, which fits all bases
  compile     tracing and compiling the step
  floor       bare products that project the gradients and expand the result,
              plus one elementwise pass over gradients and weights: what no
              projecting optimizer can save. It has the stacks of this package's
              optimizers; floor-layers has one matrix per layer, as the peers
"""

import os

# As in train_lm.py: OpenBLAS's threads would fight with those of XLA. PyTorch
# has a LAPACK of its own and keeps all its threads.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import datetime
import fnmatch
import functools
import importlib
import importlib.metadata
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks import methods, record
from gnlorp_jax.optim import inspect

RESULTS = pathlib.Path('benchmarks/results/optimizer_step.json')
MOMENT_BITS = (32, 8, 4)
PEERS = ('optax-galore', 'galore-torch')
RATE = 1e-6  # So small that weights, which are shared, stay what they are.
SCALE = 0.25
GRADIENTS = 3  # Different ones, used in turn.
BUSY = 0.25  # Load per core above which figures are in doubt.
# Where a refresh's cost is from.
DIRECT = 'steps with a refresh'
INDIRECT = 'mean less median'


class Sizes(NamedTuple):
  """What is optimized, and how often bases are refreshed."""

  layers: int = 8
  hidden: int = 512
  intermediate: int = 1376
  rank: int = 128
  gap: int = 200  # steps between two refreshes of a basis

  @property
  def kernels(self) -> dict[str, tuple[int, int]]:
    """Input and output size of the kernels of one layer."""
    d, f = self.hidden, self.intermediate
    attention = {f'{name}_proj': (d, d) for name in 'qkvo'}
    mlp = {'gate_proj': (d, f), 'up_proj': (d, f), 'down_proj': (f, d)}
    return attention | mlp


def gradient(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Random matrices of decaying spectrum plus noise, ``shape``, float32."""
  random = np.random.default_rng(seed)
  *stack, n_in, n_out = shape
  k = max(min(n_in, n_out) // 8, 1)
  left = random.standard_normal((*stack, n_in, k), np.float32)
  right = random.standard_normal((*stack, k, n_out), np.float32)
  strength = 1 / np.arange(1, k + 1, dtype=np.float32)
  noise = random.standard_normal(shape, np.float32)
  return 1e-2 * ((left * strength) @ right + 0.1 * noise)


class Data:
  """Weights and gradients in the layout of each framework, made when asked.

  The weights of a layout are one mutable set: jitted steps donate them, so each
  method puts back what it received updated.
  """

  def __init__(self, sizes: Sizes):
    self.sizes = sizes
    self.weights: dict[str, Any] = {}
    self._gradients: dict[str, list[Any]] = {}

  def _draw(self, seed: int) -> dict[str, np.ndarray]:
    return {
      name: gradient((self.sizes.layers, *shape), seed + i)
      for i, (name, shape) in enumerate(self.sizes.kernels.items())
    }

  @staticmethod
  def _arrange(stacks: dict[str, np.ndarray], layout: str) -> Any:
    if layout == 'stacked':
      return {n: {'kernel': jnp.array(x)} for n, x in stacks.items()}
    if layout == 'layers':
      return {
        f'{n}_{i}': {'kernel': jnp.array(matrix)}
        for n, x in stacks.items()
        for i, matrix in enumerate(x)
      }
    torch = importlib.import_module('torch')  # Its weights are [out, in].
    return [
      torch.from_numpy(np.ascontiguousarray(matrix.T))
      for x in stacks.values()
      for matrix in x
    ]

  def gradients(self, layout: str) -> list[Any]:
    """`GRADIENTS` trees; also fills `weights`, with numbers of their size."""
    if layout not in self._gradients:
      self.weights[layout] = self._arrange(self._draw(1000), layout)
      self._gradients[layout] = [
        self._arrange(self._draw(100 * i), layout) for i in range(GRADIENTS)
      ]
    return self._gradients[layout]


class Method(Protocol):
  """An optimizer that was built, compiled and not yet used."""

  state_bytes: int
  compile_s: float | None

  def step(self, index: int) -> None:
    """One step with gradient `index`, finished when it returns."""

  def refreshes(self, steps: int) -> float:
    """Refreshes of all bases together in the `steps` steps so far."""


def _at_intervals(steps: int, gap: int) -> float:
  """Refreshes of GaLore, at steps 1, T + 1, 2T + 1, ..."""
  return -(-steps // gap)


@jax.jit
def _recorded(state: Any) -> jax.Array:
  """Refreshes that a state of this package has counted; others have none."""
  stats = inspect.subspace_stats(state).values()
  return sum((s.refreshes for s in stats), start=jnp.zeros([]))


class JaxMethod:
  """A jitted step on weights of `layout`.

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
    weights = data.weights[layout]
    self._state = init(weights)
    self.state_bytes = inspect.tree_bytes(self._state)
    start = time.perf_counter()
    self._step = (
      jax.jit(step, donate_argnums=(0, 1))
      .lower(weights, self._state, self._gradients[0])
      .compile()
    )
    self.compile_s: float | None = time.perf_counter() - start

  def step(self, index: int) -> None:
    """As `Method`."""
    weights = self._data.weights
    weights[self._layout], self._state = jax.block_until_ready(
      self._step(weights[self._layout], self._state, self._gradients[index])
    )

  def refreshes(self, steps: int) -> float:
    """As `Method`; at intervals of `gap` if the state does not tell."""
    if self._gap is not None:
      return _at_intervals(steps, self._gap)
    return float(_recorded(self._state))


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

  return JaxMethod(data, layout, jax.jit(tx.init), step, gap)


def ours(data: Data, alias: str, bits: int, guard: bool) -> Method:
  """An optimizer of this package, with the benchmark's rank and interval."""
  tx = methods.build(
    alias,
    {'moment_bits': bits},
    learning_rate=RATE,
    rank=data.sizes.rank,
    update_proj_gap=data.sizes.gap,
    skip_nonfinite=guard,
  )
  return transformation(data, 'stacked', tx)


def optax_galore(data: Data) -> Method:
  """GaLore as Optax has it, with Adam inside."""
  sizes = data.sizes
  tx = optax.contrib.galore(RATE, sizes.rank, sizes.gap, SCALE)
  return transformation(data, 'layers', tx, sizes.gap)


def floor(data: Data, layout: str) -> Method:
  """The products and the one pass that projecting costs at the least."""
  rank = data.sizes.rank

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
    return w_IO - RATE * (update_IO + grad_IO)

  def step(weights: Any, bases: Any, gradients: Any) -> tuple[Any, Any]:
    return jax.tree.map(leaf, weights, bases, gradients), bases

  return JaxMethod(data, layout, init, step)


class TorchMethod:
  """A PyTorch optimizer on one parameter per layer."""

  compile_s = None

  def __init__(self, data: Data, make: Callable[[Any, list[Any]], Any]):
    try:
      torch = importlib.import_module('torch')
      self._gradients = data.gradients('torch')
      self._params = [torch.nn.Parameter(w) for w in data.weights['torch']]
      self._optimizer = make(torch, self._params)
    except ImportError as error:
      raise methods.AbsentError(f'not installed: {error}') from error
    torch.set_num_threads(cores())
    self._is_tensor = torch.is_tensor
    self._gap = data.sizes.gap

  @property
  def state_bytes(self) -> int:
    """Bytes of all tensors; there are none before the first step."""
    return sum(map(self._bytes, self._optimizer.state.values()))

  def _bytes(self, node: Any) -> int:
    if self._is_tensor(node):
      return node.numel() * node.element_size()
    if isinstance(node, dict):
      return sum(map(self._bytes, node.values()))
    basis = getattr(node, 'ortho_matrix', None)  # of a projector
    return 0 if basis is None else self._bytes(basis)

  def step(self, index: int) -> None:
    """As `Method`."""
    for param, grad in zip(self._params, self._gradients[index], strict=True):
      param.grad = grad
    self._optimizer.step()

  def refreshes(self, steps: int) -> float:
    """As `Method`."""
    projects = any('rank' in g for g in self._optimizer.param_groups)
    return _at_intervals(steps, self._gap) if projects else 0


def torch_adamw(data: Data) -> Method:
  """PyTorch's own AdamW, as it comes."""
  return TorchMethod(data, lambda torch, p: torch.optim.AdamW(p, lr=RATE))


def galore_torch(data: Data) -> Method:
  """The published GaLore code."""
  sizes = data.sizes

  def make(torch: Any, params: list[Any]) -> Any:
    del torch
    group = {
      **{'params': params, 'rank': sizes.rank, 'update_proj_gap': sizes.gap},
      **{'scale': SCALE, 'proj_type': 'std'},
    }
    package = importlib.import_module('galore_torch')
    return package.GaLoreAdamW([group], lr=RATE, no_deprecation_warning=True)

  return TorchMethod(data, make)


def _our_methods() -> Iterator[tuple[str, Callable[[Data], Method]]]:
  for alias in methods.ALIASES:
    for bits in MOMENT_BITS:
      name = alias if bits == 32 else f'{alias}-{bits}bit'
      yield name, functools.partial(ours, alias=alias, bits=bits, guard=False)


METHODS: dict[str, Callable[[Data], Method]] = {
  'floor': functools.partial(floor, layout='stacked'),
  'floor-layers': functools.partial(floor, layout='layers'),
  'optax-galore': optax_galore,
  'galore-torch': galore_torch,
  'gradnormlorp-guard': functools.partial(
    ours, alias='gradnormlorp', bits=32, guard=True
  ),
  **dict(_our_methods()),
  'optax-adamw': lambda data: transformation(
    data, 'stacked', optax.adamw(RATE)
  ),
  'torch-adamw': torch_adamw,
}


class Turn(NamedTuple):
  """Consecutive steps of one method."""

  seconds: np.ndarray  # float64 [steps]
  refreshed: np.ndarray  # bool [steps]


class Racer:
  """A method with its counted steps, and its first one apart."""

  def __init__(self, name: str, method: Method):
    self.name, self.method, self.turns = name, method, list[Turn]()
    start = time.perf_counter()
    method.step(0)
    self.first_s = time.perf_counter() - start
    self.count = 1
    self.refreshes = method.refreshes(self.count)

  def turn(self, steps: int) -> None:
    """Takes and times some steps; what counts refreshes is not timed."""
    seconds, refreshed = [], []
    for _ in range(steps):
      start = time.perf_counter()
      self.method.step(self.count % GRADIENTS)
      seconds.append(time.perf_counter() - start)
      self.count += 1
      refreshes = self.method.refreshes(self.count)
      refreshed.append(refreshes != self.refreshes)
      self.refreshes = refreshes
    self.turns.append(Turn(np.array(seconds), np.array(refreshed)))


def refresh_cost(turns: list[Turn], gap: int) -> tuple[float, str]:
  """Seconds that refreshes add to the mean step, and how they were found.

  Each step is compared with its turn's median of the steps without a refresh;
  steps at the same place of the interval count by their median.
  """
  flags = np.concatenate([turn.refreshed for turn in turns])
  direct = bool(flags.any() and not flags.all())
  all_plain = np.concatenate([t.seconds[~t.refreshed] for t in turns])
  extra: dict[int, list[float]] = {}
  count = 1
  for seconds, refreshed in turns:
    plain = seconds
    if direct:  # A turn may consist of refreshes only.
      plain = all_plain if refreshed.all() else seconds[~refreshed]
    for t, hit in zip(seconds, refreshed, strict=True):
      if hit or not direct:
        extra.setdefault(count % gap, []).append(t - np.median(plain))
      count += 1
  mean = float(np.mean([np.median(x) for x in extra.values()]))
  if direct:
    return mean * float(flags.mean()), DIRECT
  return mean, INDIRECT


def worst_step(turns: list[Turn], gap: int) -> tuple[float, float, int]:
  """The worst place of the interval, the worst step, and the fewest visits.

  Both in medians of the step's turn.
  """
  places: dict[int, list[float]] = {}
  relative = np.concatenate([t.seconds / np.median(t.seconds) for t in turns])
  for count, value in enumerate(relative, start=1):
    places.setdefault(count % gap, []).append(float(value))
  worst = max(min(values) for values in places.values())
  return worst, float(relative.max()), min(map(len, places.values()))


def row(racer: Racer, gap: int) -> dict[str, Any]:
  """What is known of a method by now."""
  method = racer.method
  known: dict[str, Any] = {
    'method': racer.name,
    'state_bytes': method.state_bytes,
    'compile_s': method.compile_s,
    'first_step_s': racer.first_s,
    'steps': racer.count - 1,
  }
  if not racer.turns:
    return known
  medians = np.array([np.median(t.seconds) for t in racer.turns])
  worst, largest, visits = worst_step(racer.turns, gap)
  cost, source = refresh_cost(racer.turns, gap)
  return known | {
    'median_s': float(np.median(medians)),
    'quartiles_s': np.percentile(medians, [25, 75]).tolist(),
    'worst_per_median': worst,
    'max_per_median': largest,
    'visits': visits,
    'refresh_s_per_step': cost,
    'refresh_from': source,
    'refreshing_steps': float(
      np.mean(np.concatenate([t.refreshed for t in racer.turns]))
    ),
  }


def with_ratios(racers: list[Racer], gap: int) -> list[dict[str, Any]]:
  """The rows of all methods, with ratios to the floor and to the peers."""
  rows = [row(racer, gap) for racer in racers]
  pairs = zip(rows, racers, strict=True)
  by_name = {known['method']: (known, racer) for known, racer in pairs}
  for other in ('floor', *PEERS):
    other_row, other_racer = by_name.get(other, ({}, None))
    for known, racer in zip(rows, racers, strict=True):
      if 'median_s' not in known or 'median_s' not in other_row:
        continue
      ratios = [
        np.median(a.seconds) / np.median(b.seconds)
        for a, b in zip(racer.turns, other_racer.turns, strict=False)
      ]
      known[f'median_per_{other}'] = float(np.median(ratios))
      if other in PEERS and other_row['refresh_from'] == DIRECT:
        known[f'refresh_per_{other}'] = (
          known['refresh_s_per_step'] / other_row['refresh_s_per_step']
        )
  return rows


def benchmark(
  names: list[str],
  sizes: Sizes,
  minutes: float,
  turn: int,
  save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
  """Builds the methods, then lets them run in turns.

  Args:
    names: Keys of `METHODS`.
    sizes: Weights, rank and interval.
    minutes: Time for everything; every method makes `sizes.gap` steps anyway.
    turn: Steps in a row of one method.
    save: Called with all rows after each method built and each round.

  Returns:
    One row per name, in their order. A method that is absent has a row with
    the reason.
  """
  deadline = time.monotonic() + 60 * minutes
  data, racers = Data(sizes), list[Racer]()
  absent: dict[str, str] = {}

  def rows() -> list[dict[str, Any]]:
    found = {r['method']: r for r in with_ratios(racers, sizes.gap)}
    missing = {n: {'method': n, 'absent': why} for n, why in absent.items()}
    return [(found | missing)[n] for n in names if n in found or n in missing]

  for name in names:
    try:
      racers.append(Racer(name, METHODS[name](data)))
      progress(f'{name}: first step {racers[-1].first_s:.2f} s')
    except methods.AbsentError as error:
      absent[name] = str(error)
      progress(f'{name}: absent, {error}')
    save(rows())
  rounds = 0
  while racers and (rounds * turn < sizes.gap or time.monotonic() < deadline):
    # Another order each time: a method may suffer from the one before it.
    first = rounds * 7 % len(racers)
    for racer in racers[first:] + racers[:first]:
      # PyTorch's threads keep spinning for a while after their work.
      time.sleep(0.05)
      racer.turn(turn)
    rounds += 1
    save(rows())
    left = max(deadline - time.monotonic(), 0) / 60
    progress(f'round {rounds}, {rounds * turn} steps, {left:.1f} min left')
  return rows()


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0))


def progress(line: str) -> None:
  """Says on the standard error how far it is."""
  sys.stderr.write(line + '\n')
  sys.stderr.flush()


def environment() -> dict[str, Any]:
  """What the figures depend on beside the code."""
  packages = ('jax', 'optax', 'torch', 'galore-torch')
  versions = {}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  cpu = platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = [x for x in cpuinfo.read_text().splitlines() if 'model name' in x]
    cpu = lines[0].split(':')[1].strip() if lines else cpu
  return {
    'date': datetime.date.today().isoformat(),
    'commit': record.commit(),
    'cpu': cpu,
    'cores': cores(),
    'load_at_start': os.getloadavg()[0],
    'versions': versions,
  }


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  heads = [
    *('method', 'median, ms', '/ floor', *(f'/ {peer}' for peer in PEERS)),
    *('worst', 'max', 'visits', 'refresh, ms per step'),
    *(f'of {peer}' for peer in PEERS),
    *('first, s', 'compile, s', 'state, MB'),
  ]
  lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']

  def cell(known: dict[str, Any], key: str, form: str) -> str:
    value = known.get(key)
    return '-' if value is None else format(value, form)

  for known in rows:
    if 'median_s' in known:
      low, high = known['quartiles_s']
      cells = [
        known['method'],
        f'{1e3 * known["median_s"]:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})',
        cell(known, 'median_per_floor', '.2f'),
        *(cell(known, f'median_per_{peer}', '.2f') for peer in PEERS),
        cell(known, 'worst_per_median', '.2f'),
        cell(known, 'max_per_median', '.2f'),
        cell(known, 'visits', 'd'),
        f'{1e3 * known["refresh_s_per_step"]:.2f}',
        *(cell(known, f'refresh_per_{peer}', '.1%') for peer in PEERS),
        cell(known, 'first_step_s', '.2f'),
        cell(known, 'compile_s', '.1f'),
        f'{known["state_bytes"] / 1e6:.1f}',
      ]
      lines.append('| ' + ' | '.join(cells) + ' |')
  absent = [r for r in rows if 'absent' in r]
  lines += [''] + [f'* {r["method"]}: absent, {r["absent"]}' for r in absent]
  return '\n'.join(lines) + '\n'


# Of gradnormlorp: what is compared, and the most it may be.
GOALS = {
  'worst step, in medians': ('worst_per_median', 1.5),
  "refreshes, of optax.contrib.galore's": ('refresh_per_optax-galore', 0.05),
  "refreshes, of galore-torch's": ('refresh_per_galore-torch', 0.05),
  'median, in floors': ('median_per_floor', 1.3),
  "median, of optax.contrib.galore's": ('median_per_optax-galore', 1.0),
  "median, of galore-torch's": ('median_per_galore-torch', 1.0),
}


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """How `gradnormlorp` stands to each goal; `value` None: not measured."""
  ours_row = next((r for r in rows if r['method'] == 'gradnormlorp'), {})
  found = []
  for text, (key, most) in GOALS.items():
    value = ours_row.get(key)
    reached = None if value is None else value <= most
    found.append(
      {'goal': text, 'most': most, 'value': value, 'reached': reached}
    )
  return found


def goal_table(found: list[dict[str, Any]]) -> str:
  """The goals as a Markdown table."""
  lines = [
    '| goal of gradnormlorp | at most | measured | |',
    '|---|---|---|---|',
  ]
  words = {True: 'reached', False: 'missed', None: 'not measured'}
  for goal in found:
    value = '-' if goal['value'] is None else f'{goal["value"]:.3f}'
    lines.append(
      f'| {goal["goal"]} | {goal["most"]:g} | {value} '
      f'| {words[goal["reached"]]} |'
    )
  return '\n'.join(lines) + '\n'


def select(patterns: list[str]) -> list[str]:
  """Names of `METHODS` that a shell-style pattern fits, in their order.

  Raises:
    ValueError: If a pattern fits none.
  """
  for pattern in patterns:
    if not fnmatch.filter(METHODS, pattern):
      raise ValueError(
        f'No method is called {pattern!r}; there are {", ".join(METHODS)}.'
      )
  return [
    name
    for name in METHODS
    if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
  ]


def main() -> None:
  """Measures, and writes the JSON file and the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--minutes',
    type=float,
    default=60,
    help='time for everything; each method makes one interval of steps anyway '
    '(default: %(default)s)',
  )
  add(
    '--methods',
    nargs='+',
    default=['*'],
    metavar='NAME',
    help='names or patterns as of a shell, quoted (default: all): '
    + ', '.join(METHODS),
  )
  add(
    '--turn',
    type=int,
    default=20,
    help='steps in a row of one method (default: %(default)s)',
  )
  for field, text in {
    'layers': 'number of layers',
    'hidden': 'width of the residual stream',
    'intermediate': 'width inside the MLP',
    'rank': 'rank of the subspaces',
    'gap': 'steps between two refreshes of a basis',
  }.items():
    add(
      f'--{field}',
      type=int,
      default=Sizes._field_defaults[field],
      help=f'{text} (default: %(default)s)',
    )
  add(
    '--output',
    type=pathlib.Path,
    default=RESULTS,
    help='JSON file, written after every round (default: %(default)s)',
  )
  args = parser.parse_args()
  try:
    names = select(args.methods)
  except ValueError as error:
    parser.error(str(error))
  sizes = Sizes(*(getattr(args, field) for field in Sizes._fields))
  header = {'environment': environment(), 'sizes': sizes._asdict()}
  load = header['environment']['load_at_start']
  if load > BUSY * cores():
    progress(
      f'Warning: the load is {load:.1f} before anything is measured. Other '
      'processes slow some methods more than others; stop them, or take the '
      'figures for indications.'
    )

  def save(rows: list[dict[str, Any]]) -> None:
    found = {**header, 'rows': rows, 'goals': goals(rows)}
    record.write_json(args.output, found)

  rows = benchmark(names, sizes, args.minutes, args.turn, save)
  sys.stdout.write(table(rows) + '\n' + goal_table(goals(rows)))


if __name__ == '__main__':
  main()
