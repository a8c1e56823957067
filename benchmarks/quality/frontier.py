r"""Which optimizer ends lowest, for the bytes of its state.

The training of `benchmarks.quality` at five times its length: width and depth
of LLaMA-20m with a vocabulary of 4096, a million tokens of English Wikipedia,
float32 parameters and states and all else in bfloat16.
Peak learning rates lie on a grid of factor 2, which grows until the best has
neighbours on both sides; then the best runs with three seeds that had no part
in choosing it. All optimizers see the same tokens in the same order.

  python -m benchmarks.quality.frontier --data 'wikipedia_en/*train*' \
    --validation 'wikipedia_en/*validation*'

It takes about ten hours on two cores, goes on where it stopped, and can be
shared by two processes as `benchmarks.quality` can.

The second table compares seed by seed, as a seed decides the initial weights
and the order of the data: the mean of the differences of the eval losses, and
the half width of its 95 % interval by Student's t. Left out are `frugal`,
`subtrack` and `sinkgd`, which are near `galore`, `fira` and `racs`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.common.tables import NOTHING, markdown
from benchmarks.quality import measure, runs
from benchmarks.quality.measure import Method
from gnlorp_jax.models import llama

PROTOCOL = {
  'size': '20m',
  'vocab': 4096,
  'compute_dtype': 'bfloat16',
  'steps': 2000,
  'gap': 200,
  'eval_batches': 60,
  'extend': 4,
  'seeds': 4,  # The first chooses.
}


def _method(name: str, rate: float, **options: Any) -> Method:
  """An optimizer, and the rate in the middle of its first three."""
  return Method({'name': name, **options}, (rate, rate / 2, rate * 2))


def _bits(bits: int) -> dict[str, int]:
  return {'moment_bits': bits, 'basis_bits': bits}


METHODS = {
  'adamw': _method('adamw', 2e-3),
  'adamw, b2 0.95': _method('adamw', 2e-3, b2=0.95),
  'adamw, b2 0.99': _method('adamw', 2e-3, b2=0.99),
  'muon': _method('muon', 2e-3),
  'galore': _method('galore', 5e-3),
  'fira': _method('fira', 5e-3),
  'apollo': _method('apollo', 5e-3),
  # The published scale is a quarter of the width.
  'apollo_mini': _method('apollo_mini', 5e-3, scale=64.0),
  'ldadam': _method('ldadam', 5e-3),
  'dct_adamw': _method('dct_adamw', 2.5e-3),
  'q_galore': _method('q_galore', 5e-3),
  'gradnormlorp': _method('gradnormlorp', 5e-3),
  'gradnormlorp, 8 bits': _method('gradnormlorp', 5e-3, **_bits(8)),
  'gradnormlorp, 4 bits': _method('gradnormlorp', 5e-3, **_bits(4)),
  'alice0': _method('alice0', 1e-2),
  'alice': _method('alice', 1e-2),
  'scale': _method('scale', 2e-3),
  'racs': _method('racs', 2e-2),
  # Weight normalisation beside what recovers the rest of a gradient.
  'fira, weight norm': _method('fira', 5e-3, weight_norm=True),
  'alice0, weight norm': _method('alice0', 1e-2, weight_norm=True),
  'apollo, weight norm': _method('apollo', 5e-3, weight_norm=True),
  'ldadam, weight norm': _method('ldadam', 5e-3, weight_norm=True),
}
COMPARED_TO = ('galore', 'adamw')


def paired(rows: Sequence[runs.Row]) -> str:
  """A Markdown row per method: its losses less those of two others."""
  winners = runs.chosen(rows)
  losses = {
    name: {row['seed']: runs.final(row) for row in found}
    for name, found in winners.items()
  }
  lines = [
    [
      name,
      *(
        NOTHING
        if name == other
        else _difference(losses[name], losses.get(other, {}))
        for other in COMPARED_TO
      ),
    ]
    for name in winners
  ]
  return markdown(
    ['optimizer', *(f'less {name}' for name in COMPARED_TO)], lines
  )


def _difference(losses: dict[int, float], others: dict[int, float]) -> str:
  """Mean of the differences by seed and half its 95 % interval, as text."""
  differences = [
    loss - others[seed] for seed, loss in losses.items() if seed in others
  ]
  if len(differences) < 2:
    return NOTHING
  error = scipy.stats.sem(differences)
  half = scipy.stats.t.ppf(0.975, len(differences) - 1) * error
  text = f'{np.mean(differences):+.4f} ± {half:.4f}'
  return f'{text} ({len(differences)} seeds)'


COMPARISON = runs.Comparison('frontier')
PAGE, plots = runs.PAGE, COMPARISON.plots


def tables() -> dict[str, str]:
  """The recorded runs as tables of the page."""
  _, rows = runs.read(COMPARISON.results)
  return COMPARISON.tables() | {'frontier_paired': paired(rows)}


def main(
  arguments: list[str] | None = None, model: llama.LlamaConfig | None = None
) -> None:
  """Runs what is missing, then reports; one of several processes only runs."""
  command = measure.parser(__doc__, COMPARISON, METHODS)
  command.set_defaults(**PROTOCOL)
  measure.compare(command, arguments, model, COMPARISON, METHODS)


if __name__ == '__main__':
  main()
