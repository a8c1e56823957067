"""Times how fast a LLaMA writes, with a cache of keys and values and without.

Both ways write the same greedy tokens behind a prompt of 16, in turns within
one process, compiled before they are timed. Without a cache every token costs
a forward pass over a buffer of the prompt and all new tokens, which is compiled
once; that is how samples were made before there was a cache.

  python -m benchmarks.train.generation

The table has a row for each preset: the median tokens per second of both ways,
and the ratio of a round, its median and range.
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, record
from benchmarks.common.tables import markdown
from gnlorp_jax.models import llama
from gnlorp_jax.models.generate import generate

PAGE = pathlib.Path('docs/results/train.md')
OUTPUT = pathlib.Path('benchmarks/results/generation.json')
PROMPT = 16
SIZES = ('9m', '60m')


@functools.partial(jax.jit, static_argnums=0)
def _extend(apply: Any, params: Any, buffer_S: jax.Array, length: jax.Array):
  token = apply(params, buffer_S[None])[0, length - 1].argmax()
  return buffer_S.at[length].set(token), length + 1


def without_cache(
  model: Any, params: Any, prompt_T: np.ndarray, num_tokens: int
) -> np.ndarray:
  """The greedy continuation, by whole forward passes."""
  buffer_S = np.zeros(PROMPT + num_tokens, np.int32)
  buffer_S[:PROMPT] = prompt_T
  length = np.int32(PROMPT)
  for _ in range(num_tokens):
    buffer_S, length = _extend(model.apply, params, buffer_S, length)
  return np.asarray(buffer_S)[PROMPT:]


def measure(size: str, num_tokens: int, rounds: int) -> dict[str, Any]:
  """A row of the table."""
  model = llama.make(llama.preset(size, initializer_std=0.1))
  params = model.init(jax.random.key(0))
  prompt_T = np.random.default_rng(0).integers(0, 32000, PROMPT)
  ways = {
    'with': lambda: generate(
      model, params, [prompt_T], num_tokens, temperature=0
    )[0],
    'without': lambda: without_cache(model, params, prompt_T, num_tokens),
  }
  written = [way() for way in ways.values()]
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for number in range(rounds):
    for name, way in ways.items():
      start = time.perf_counter()
      way()
      seconds[name].append(time.perf_counter() - start)
    harness.progress(f'{size}: round {number + 1} of {rounds}')
  return {
    'size': size,
    'num_tokens': num_tokens,
    'same_tokens': bool(np.array_equal(*written)),
    'seconds': seconds,
  }


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The table of the page."""
  lines = []
  for row in record.read(path)['rows']:
    speeds = {
      k: row['num_tokens'] / np.array(s) for k, s in row['seconds'].items()
    }
    ratios = speeds['with'] / speeds['without']
    lines.append(
      [
        row['size'],
        *(f'{np.median(speeds[way]):.1f}' for way in ('with', 'without')),
        f'{np.median(ratios):.1f} [{ratios.min():.1f}, {ratios.max():.1f}]',
        'yes' if row['same_tokens'] else 'no',
      ]
    )
  heads = ['preset', 'tokens/s, cache', 'without', 'ratio', 'same tokens']
  return {'generation': markdown(heads, lines)}


def main() -> None:
  """Measures; the table is that of `benchmarks.report`."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, OUTPUT, minutes=30)
  add = functools.partial(parser.add_argument, type=harness.positive)
  add('--tokens', default=256, help='new tokens (default: %(default)s)')
  add('--rounds', default=3, help='of both ways (default: %(default)s)')
  args: argparse.Namespace = parser.parse_args()
  if args.report:
    report.report('train.generation')
    return
  clock = harness.start(args)
  found = {'environment': harness.environment(), 'rows': []}
  for size in SIZES:
    if not clock.seconds_left:
      harness.progress(f'{size}: left out, the time is up.')
      continue
    found['rows'].append(measure(size, args.tokens, args.rounds))
    record.write(args.output, found)


if __name__ == '__main__':
  main()
