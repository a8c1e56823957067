"""Measures the memory of merging folders of a LLaMA's shapes, random numbers.

Base and experts are written to a temporary folder in bfloat16, merged by every
method, and removed. While a method runs, the anonymous memory of the process is
read every few milliseconds; the pages of mapped files, which the system takes
back at will, are not in it. Beside it stands what `--dry-run` says: float32
copies of the largest tensor, computed from shapes alone. The same is computed
of LLaMA-7B.

  python -m benchmarks.scaling.merge_memory
  python -m benchmarks.scaling.merge_memory --layers 2 --methods ties doge

What was measured before, of other methods, layers or numbers of experts, stays
in the record.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import pathlib
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from benchmarks import report
from benchmarks.common import harness, record
from benchmarks.common.tables import markdown
from gnlorp_jax.models import hf_tensors, llama
from gnlorp_jax.models.hf_tensors import Tensor
from gnlorp_jax.recipes.merge import folders, plan, recipe
from gnlorp_jax.recipes.merge.settings import MergeConfig

OUTPUT = pathlib.Path('benchmarks/results/merge_memory.json')
PAGE = pathlib.Path('docs/results/merging.md')
METHODS = ('average', 'task_arithmetic', 'ties', 'dare', 'tsv', 'doge')
EVERY = 0.005  # Seconds between two readings.


def tensors_of(config: llama.LlamaConfig) -> list[Tensor]:
  """The tensors of a checkpoint of that configuration, bfloat16."""
  shapes = traverse_util.flatten_dict(
    jax.eval_shape(llama.make(config).init, jax.random.key(0)), sep='/'
  )
  found = []
  for path, template, is_turned in llama.HF_TENSORS:
    if path not in shapes:
      continue  # Or has had its row: this one names a copy.
    is_stack = '{layer}' in template
    shape = shapes.pop(path).shape
    count = shape[0] if is_stack else 1
    shape = shape[1:] if is_stack else shape
    shape = shape[::-1] if is_turned else shape
    for layer in range(count):
      found.append(Tensor(template.format(layer=layer), shape, 'BF16'))
  return found


def write(
  folder: pathlib.Path,
  config: llama.LlamaConfig,
  tensors: Sequence[Tensor],
  seed: int,
) -> str:
  """Writes a folder of random numbers, drawn tensor by tensor."""
  rng = np.random.default_rng(seed)

  def values(tensor: Tensor) -> np.ndarray:
    drawn = rng.standard_normal(tensor.shape, np.float32)
    return (np.float32(0.02) * drawn).astype(ml_dtypes.bfloat16)

  folder.mkdir(parents=True)
  hf_tensors.write(folder, tensors, values)
  text = json.dumps(llama.config_to_hf(config))
  (folder / 'config.json').write_text(text)
  return str(folder)


@contextlib.contextmanager
def anonymous_peak() -> Iterator[dict[str, int]]:
  """Watches the memory of this process, as Linux tells it.

  Yields:
    A dict that has, afterwards, ``bytes``: how much more the most was than
    there was at the start.
  """
  found, is_done = {'bytes': 0}, threading.Event()
  gc.collect()
  before = _anonymous()

  def watch() -> None:
    while not is_done.wait(EVERY):
      found['bytes'] = max(found['bytes'], _anonymous() - before)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield found
  finally:
    is_done.set()
    thread.join()


def _anonymous() -> int:
  status = pathlib.Path('/proc/self/status').read_text()
  (line,) = (x for x in status.splitlines() if x.startswith('RssAnon'))
  return 1024 * int(line.split()[1])


def configure(
  root: pathlib.Path, method: str, experts: Sequence[str]
) -> MergeConfig:
  """A merge; DOGE by its exact solver, whose memory is that of Adam's."""
  config = MergeConfig(
    base=str(root / 'base'),
    experts=tuple(experts),
    out=str(root / f'out_{method}'),
    method=method,
  )
  if method == 'doge':
    config = dataclasses.replace(config, steps=10)
  return config


def measure(
  root: pathlib.Path, method: str, experts: Sequence[str], layers: int
) -> dict[str, Any]:
  """Merges, and tells what it took."""
  config = configure(root, method, experts)
  begin = time.perf_counter()
  with anonymous_peak() as peak:
    recipe.merge(config, _silent)
  return {
    'method': method,
    'experts': len(experts),
    'layers': layers,
    'seconds': round(time.perf_counter() - begin, 1),
    'peak_bytes': peak['bytes'],
  }


def computed(size: llama.LlamaConfig, method: str, experts: int) -> int:
  """What `--dry-run` would say of a model, from shapes alone."""
  tensors = {t.name: t for t in tensors_of(size)}
  folder = folders.Folder(
    label='base',
    path=pathlib.Path(),
    config={},
    tensors=tensors,
    own_name=str,
    is_adapter=False,
    get=lambda name: np.zeros(0),
  )
  config = MergeConfig(
    base='base', experts=tuple(map(str, range(experts))), method=method
  )
  return plan.peak_bytes(config, plan.make(config, folder, [folder] * experts))


@contextlib.contextmanager
def _silent(title: str) -> Iterator[Any]:
  yield lambda done, total: None


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The table of the page."""
  found = record.read(path)
  measured, large = llama.preset(found['size']), llama.preset('7b')
  rows = [
    [
      row['method'],
      str(row['experts']),
      str(row['layers']),
      f'{row["seconds"]:.0f}',
      f'{row["peak_bytes"] / 2**20:.0f}',
      f'{computed(measured, row["method"], row["experts"]) / 2**20:.0f}',
      f'{computed(large, row["method"], 4) / 2**30:.2f}',
    ]
    for row in found['rows']
  ]
  heads = ['method', 'experts', 'layers', 'seconds', 'peak, MiB']
  heads.append('computed, MiB')
  return {'merge_memory': markdown([*heads, '7B x 4, computed, GiB'], rows)}


def main() -> None:
  """Measures every method; the table is that of `benchmarks.report`."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--size', default='1b', help='preset of LLaMA (default: %(default)s)')
  add('--layers', type=harness.positive, help='so many of its layers')
  add('--experts', type=harness.positive, default=3)
  add('--methods', nargs='+', choices=METHODS, default=METHODS)
  where = 'folder to put the temporary one in'
  add('--folder', type=pathlib.Path, default=None, help=where)
  harness.add_arguments(parser, OUTPUT, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('scaling.merge_memory')
    return
  run(args)


def run(args: argparse.Namespace) -> None:
  """Writes the folders, measures, and removes them."""
  config = llama.preset(args.size)
  if args.layers is not None:
    config = dataclasses.replace(config, num_layers=args.layers)
  tensors, kept = tensors_of(config), _kept(args)
  with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
    root = pathlib.Path(temporary)
    write(root / 'base', config, tensors, 0)
    experts = [
      write(root / str(i), config, tensors, i)
      for i in range(1, args.experts + 1)
    ]
    for method in args.methods:
      row = measure(root, method, experts, config.num_layers)
      kept[_key(row)] = row
      peak = row['peak_bytes'] / 2**20
      harness.progress(f'{method}: {peak:.0f} MiB, {row["seconds"]} s')
      record.write(
        args.output,
        {
          'environment': harness.environment(),
          'size': args.size,
          'rows': list(kept.values()),
        },
      )


def _kept(args: argparse.Namespace) -> dict[tuple[Any, ...], dict[str, Any]]:
  """What was measured before of that size."""
  found = record.read(args.output) if args.output.exists() else {'rows': []}
  rows = found['rows'] if found.get('size') == args.size else []
  return {_key(row): row for row in rows}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
  return row['method'], row['experts'], row['layers']


if __name__ == '__main__':
  main()
