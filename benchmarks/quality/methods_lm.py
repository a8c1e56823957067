"""Trains the same small LLaMA with every optimizer of the library.

The protocol is that of `reference_curves` (the same weights, 300 batches and
schedule; rank 32, refresh every 60 steps, no clipping), with each optimizer as
the library's defaults make it and its learning rate tuned over three values.
Results go to a JSON file after every run; runs it holds already are not
repeated. The table and the plot come at the end, or from `--report`: the best
peak rate of each optimizer, the eval loss and perplexity there, the optimizer's
state, and the eval loss at every rate (`tuning`).

On two cores, two processes of one thread each finish more runs per hour than
one process of two threads:

  curves='--reference ../shared/reference/curves'
  taskset -c 0 python -m benchmarks.methods_lm $curves --process 1/2 &
  taskset -c 1 python -m benchmarks.methods_lm $curves --process 2/2 & wait
  python -m benchmarks.methods_lm --report
"""

import functools
from collections.abc import Callable
from typing import Any

import optax

from benchmarks.common import methods
from benchmarks.quality import protocol, runs
from gnlorp_jax import optim
from gnlorp_jax.models import llama

COMPARISON = runs.Comparison('methods_lm')
PAGE, tables, plots = runs.PAGE, COMPARISON.tables, COMPARISON.plots


def method(
  alias: Callable[..., optax.GradientTransformation],
  rates: tuple[float, ...],
  **options: Any,
) -> protocol.Method:
  """An optimizer of the library; its guard is that of the training step."""
  options = methods.bits_of_all_moments(alias, options)
  make = functools.partial(alias, skip_nonfinite=False, **options)
  return protocol.Method(make, rates)


low_rank = functools.partial(method, **protocol.LOW_RANK)

# Random pieces of a quarter of an axis, eight coordinates each: as many
# coordinates as rank 32 has.
pieces = functools.partial(method, rank=8, granularity=4, update_proj_gap=60)

METHODS = {
  'gradnormlorp': low_rank(optim.gradnormlorp, (1e-2, 2e-2, 5e-3)),
  'gradnormlorp, 8 bits': low_rank(
    optim.gradnormlorp, (1e-2, 2e-2, 5e-3), moment_bits=8, basis_bits=8
  ),
  'gradnormlorp, 4 bits': low_rank(
    optim.gradnormlorp, (1e-2, 5e-3, 2e-2), moment_bits=4, basis_bits=4
  ),
  'gradnormlorp, both sides': low_rank(
    optim.gradnormlorp, (1e-2, 2e-2, 5e-3), side='both'
  ),
  'gradnormlorp, rotated': low_rank(
    optim.gradnormlorp, (1e-2, 2e-2, 5e-3), moments_on_refresh='rotate'
  ),
  'galore': low_rank(optim.galore, (1e-2, 5e-3, 2.5e-3)),
  'galore, 8 bits': low_rank(optim.galore, (1e-2, 5e-3, 2.5e-3), moment_bits=8),
  'q_galore': low_rank(optim.q_galore, (1e-2, 5e-3, 2.5e-3)),
  'galore_adafactor': low_rank(optim.galore_adafactor, (1e-2, 5e-3, 2e-2)),
  'dct_adamw': method(optim.dct_adamw, (5e-3, 2e-3, 1e-3), rank=32),
  'dct_adamw, errors in 8 bits': method(
    optim.dct_adamw, (5e-3, 2e-3, 1e-3), rank=32, error_bits=8
  ),
  'vlorp': pieces(optim.vlorp, (1e-2, 5e-3, 2.5e-3), scale=0.25),
  'projfactor': pieces(optim.projfactor, (5e-3, 2e-3, 1e-3)),
  'apollo': method(
    optim.apollo, (1e-2, 5e-3, 2.5e-3), rank=32, update_proj_gap=60
  ),
  # The published scale is a quarter of the width.
  'apollo_mini': method(
    optim.apollo_mini, (1e-2, 5e-3, 2.5e-3), update_proj_gap=60, scale=32
  ),
  'fira': low_rank(optim.fira, (1e-2, 5e-3, 2.5e-3)),
  'ldadam': method(optim.ldadam, (5e-3, 2e-3, 1e-2), rank=32),
  'adamw': method(optim.adamw, (2e-3, 1e-3, 4e-3)),
}


def main(
  arguments: list[str] | None = None,
  config: llama.LlamaConfig = protocol.CONFIG,
) -> None:
  """Runs what is missing, then reports; one of several processes only runs."""
  protocol.main(__doc__, COMPARISON, METHODS, config, arguments)


if __name__ == '__main__':
  main()
