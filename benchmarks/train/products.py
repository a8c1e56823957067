"""The bare matrix products of a training step, by XLA and by PyTorch.

They are timed by themselves, in turns: what a step cannot go below with the
products of either. The attention's own are not among them.
"""

import collections
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import harness, methods, peers
from gnlorp_jax.models import llama


def measure(
  config: llama.LlamaConfig, tokens: int, rounds: int = 5
) -> dict[str, Any]:
  """Seconds and GFLOP/s of a step's bare products in float32, on a CPU.

  They are those of XLA, of PyTorch if it is installed, and of each product; of
  `rounds` the fastest counts.
  """
  c, sizes = config, collections.Counter[tuple[int, int]]()
  sizes[c.hidden_size, c.hidden_size] += 2 * c.num_layers
  sizes[c.hidden_size, c.kv_heads * c.head_size] += 2 * c.num_layers
  sizes[c.hidden_size, c.intermediate_size] += 2 * c.num_layers
  sizes[c.intermediate_size, c.hidden_size] += c.num_layers
  sizes[c.hidden_size, c.vocab_size] += 1
  found = []
  for (n_in, n_out), count in sizes.items():
    times = _time_products(tokens, n_in, n_out, rounds)
    found.append({'in': n_in, 'out': n_out, 'count': count, 'seconds': times})
  flops = 6 * tokens * sum(math.prod(s) * n for s, n in sizes.items())
  total: dict[str, Any] = {'products': found}
  for name in found[0]['seconds']:
    seconds = sum(x['count'] * sum(x['seconds'][name]) for x in found)
    total[name] = {'seconds': seconds, 'gflops': flops / seconds / 1e9}
  return total


def _time_products(
  tokens: int, n_in: int, n_out: int, rounds: int
) -> dict[str, list[float]]:
  """Fastest times of ``x w``, ``y w'`` and ``x' y`` by each framework."""
  random = np.random.default_rng(0)
  shapes = ((tokens, n_in), (n_in, n_out), (tokens, n_out))
  arrays = [random.standard_normal(shape, np.float32) for shape in shapes]
  on_jax = tuple(map(jnp.asarray, arrays))
  jitted = [
    jax.jit(lambda x, w, y: x @ w),
    jax.jit(lambda x, w, y: y @ w.T),
    # As models.layers.dot_general has it.
    jax.jit(lambda x, w, y: x.T @ y if n_in <= n_out else (y.T @ x).T),
  ]
  calls: dict[str, list[Callable[[], Any]]] = {
    'xla': [lambda f=f: jax.block_until_ready(f(*on_jax)) for f in jitted]
  }
  try:
    torch = peers.module('torch')
    torch.set_num_threads(harness.cores())
    # torch.nn.Linear keeps its weight [out, in].
    x, w, y = map(torch.from_numpy, (arrays[0], arrays[1].T.copy(), arrays[2]))
    calls['torch'] = [lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x]
  except methods.AbsentError:
    pass
  best = {name: [math.inf] * 3 for name in calls}
  for _ in range(rounds + 1):  # The first one warms up.
    for name, functions in calls.items():
      time.sleep(0.02)
      for i, function in enumerate(functions):
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        best[name][i] = min(best[name][i], seconds)
  return best
