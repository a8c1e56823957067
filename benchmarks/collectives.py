"""Counts what a data-parallel training step sends between devices.

  python -m benchmarks.collectives

compiles the steps of a LLaMA of width 512, 8 layers, rank 64, vocabulary 4096,
float32, batch 16 x 128 in two micro-batches, for 4 and 8 forced CPU devices
along the axis `data`, and reads the collectives in the optimized program.
Nothing runs. Bytes are those of the arrays that are summed, times the turns of
the loops around them. `refreshes`: those in loops of unknown length or in
conditionals. They sum the gradients that a basis is refitted to; their bytes
are those of one turn of every such loop. A turn refits one matrix, and in most
steps no loop turns.
"""

import os

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import math
import pathlib
import sys
from typing import Any

import jax

from benchmarks import harness, layerwise_step, record
from gnlorp_jax import build
from gnlorp_jax.collectives import collectives

DEVICES = (4, 8)
RESULTS = pathlib.Path('benchmarks/results/collectives.json')
SIZES = {'hidden': 512, 'layers': 8, 'rank': 64, 'batch_size': 16}
METHODS: dict[str, dict[str, Any]] = {
  'gradnormlorp': {},
  'galore': {'name': 'galore'},
}
STEPS: dict[str, dict[str, Any]] = {
  'whole': {'mode': 'whole'},
  'layerwise, gradient': {'mode': 'layerwise'},
  'layerwise, projected': {'mode': 'layerwise', 'accumulate': 'projected'},
}


def row(method: str, step: str, devices: int) -> dict[str, Any]:
  """The collectives of one step on a number of devices."""
  run = layerwise_step.settings(
    **{**SIZES, **METHODS[method], **STEPS[step]},
    micro_batches=2,
    clip_global_norm=None,
  )
  program = build.program(run, jax.devices()[:devices])
  text = layerwise_step.compile_step(program).as_text()
  found = collectives(text)
  certain = [
    c for c in found if c.bytes_per_step is not None and not c.conditionals
  ]
  refreshes = [c for c in found if c not in certain]
  params = jax.tree.leaves(program.abstract_state.params)
  return {
    **{'method': method, 'step': step, 'devices': devices},
    'parameter_bytes': sum(p.size * p.dtype.itemsize for p in params),
    'bytes_per_step': sum(c.bytes_per_step for c in certain),
    'refresh_bytes': sum(
      c.instructions * c.bytes_each * math.prod(n or 1 for n in c.loops)
      for c in refreshes
    ),
    'collectives': [c._asdict() for c in found],
  }


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  lines = [
    '| method | step | devices | MB per step | of the parameters '
    '| refreshes, MB |',
    '|---|---|---|---|---|---|',
  ]
  for known in rows:
    sent, size = known['bytes_per_step'], known['parameter_bytes']
    lines.append(
      f'| {known["method"]} | {known["step"]} | {known["devices"]} '
      f'| {sent / 1e6:.1f} | {sent / size:.2f} '
      f'| {known["refresh_bytes"] / 1e6:.1f} |'
    )
  return '\n'.join(lines) + '\n'


def main() -> None:
  """Compiles, and writes the JSON file and the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--devices', type=int, nargs='+', default=DEVICES)
  parser.add_argument('--methods', nargs='+', choices=METHODS, default=METHODS)
  args = parser.parse_args()
  header = {'sizes': SIZES, **harness.environment()}
  rows: list[dict[str, Any]] = []
  for method in args.methods:
    for devices in args.devices:
      for step in STEPS:
        rows.append(row(method, step, devices))
        record.write_json(args.output, {**header, 'rows': rows})
        harness.progress(f'{method}, {step}, {devices} devices')
  sys.stdout.write(table(rows))


if __name__ == '__main__':
  main()
