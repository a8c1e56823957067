"""Plans models of 7B on one card in several forms: what each one's step takes.

Rank 1024, sequences of 256 tokens, embedding and head full-rank, compiled for
an H100 by XLA's own GPU compiler, without a GPU. It needs the extra ``cuda``.

  python -m benchmarks.plan_7b
  python -m benchmarks.plan_7b adapters today

Of LLaMA-7B, `weights` plans training, `adapters` adapters on frozen weights, 4
sequences of 1024 tokens, and `drawn layers` some layers at a time beside other
methods, rank 128, 16 sequences of 512 tokens in four micro-batches. `today`
plans the training of newer models. The table is in GiB; what no other column
has is in `temporaries`.
"""

import contextlib
import functools
import io
import json
import math
import pathlib
import sys

import jax

from benchmarks import report
from benchmarks.common import cases, harness
from benchmarks.common.tables import markdown
from gnlorp_jax.disk import extras
from gnlorp_jax.plan import accelerators
from gnlorp_jax.plan.__main__ import main as plan_main

RESULTS = pathlib.Path('benchmarks/results/plan_7b.json')
PAGE = pathlib.Path('docs/results/scaling.md')
DEVICE = 'h100'
BF16 = '--config configs/llama_7b_24gb.py'
INT8 = '--config configs/llama_7b_16gb.py'
CLIP = '--optim.clip-global-norm 1.0 --step.clipping'
ADAPTER = (
  '--config configs/llama_7b.py --step.mode layerwise --batch-size 4 '
  '--data.seq-len 1024 --adapter.rank 16 --adapter.kind'
)
LORA = f'{ADAPTER} lora --optim.name adamw'
DRAWN = (
  '--config configs/llama_7b.py --step.mode layerwise --batch-size 16 '
  '--data.seq-len 512 --loss-chunk-tokens 1024 --optim.rank 128 '
  '--micro-batches 4 --optim.clip-global-norm None'
)
ADAMW = f'{DRAWN} --optim.name adamw'
TODAY = {
  'Llama 3.1 8B': 'llama-3.1-8b',
  'Qwen 2.5 7B': 'qwen2.5-7b',
}
PARTS: dict[str, dict[str, str]] = {
  'weights': {
    'whole step, bfloat16': (
      '--config configs/llama_7b.py --optim.basis-bits 8'
    ),
    'bfloat16': BF16,
    'bfloat16, 4-bit bases': f'{BF16} --optim.basis-bits 4',
    'bfloat16, clipped, waiting': f'{BF16} {CLIP} waiting',
    'bfloat16, clipped, recomputed': f'{BF16} {CLIP} recompute',
    'INT8': INT8,
    'INT8, inputs on the host': f'{INT8} --step.offload',
    'INT8, one sequence': f'{INT8} --batch-size 1',
    'INT8, one sequence, 4-bit moments': (
      f'{INT8} --batch-size 1 --optim.moment-bits 4'
    ),
  },
  'adapters': {
    'LoRA, bfloat16 base': LORA,
    'LoRA, INT8 base': f'{LORA} --step.weight-bits 8',
    'GradNormLoRP adapters, INT8 base': (
      f'{ADAPTER} gradnormlorp --optim.name galore --optim.rank 8 '
      '--step.weight-bits 8'
    ),
  },
  'drawn layers': {
    'OwLore, 5 layers': (
      f'{DRAWN} --optim.name galore --sampling.draw uniform '
      '--sampling.layers 5 --sampling.every 50'
    ),
    'LISA, 2 layers': f'{ADAMW} --sampling.method lisa',
    'LISA, 2 layers, 32-bit moments': (
      f'{ADAMW} --sampling.method lisa --optim.moment-bits 32'
    ),
    'BAdam, 1 layer': f'{ADAMW} --sampling.method badam',
    'LoRA, rank 16': f'{ADAMW} --adapter.kind lora --adapter.rank 16',
    'GaLore': f'{DRAWN} --optim.name galore',
    'GradNormLoRP': DRAWN,
  },
  'today': {
    f'{name}, {kind}': f'{options} --init-from {preset}'
    for name, preset in TODAY.items()
    for kind, options in {
      'bfloat16': BF16,
      'INT8': INT8,
      'INT8, one sequence': f'{INT8} --batch-size 1',
    }.items()
  },
}
"""What is planned, and the options of `gnlorp_jax.plan`."""


def _planned(options: str) -> cases.Row:
  """Components and peak of a plan, bytes."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    plan_main([*options.split(), '--device', DEVICE, '--json', '-'])
  found = json.loads(output.getvalue())
  names = ('components', 'peak', 'xla', 'versions')
  return {'options': options, **{name: found[name] for name in names}}


def table(rows: list[cases.Row]) -> str:
  """The rows in GiB, as Markdown."""
  names = ['frozen_weights', 'weights', 'moments', 'bases', 'saved_activations']
  rows = [row for row in rows if 'absent' not in row]
  if not any('frozen_weights' in row['components'] for row in rows):
    names.remove('frozen_weights')
  lines = []
  for row in rows:
    sizes = [row['components'].get(name, 0) for name in names]
    sizes += [row['peak'] - sum(sizes), row['peak']]
    lines.append([row['run'], *(f'{size / 2**30:.2f}' for size in sizes)])
  *held, _ = (name.replace('_', ' ') for name in names)
  return markdown(['run', *held, 'block inputs', 'temporaries', 'peak'], lines)


def tables() -> dict[str, str]:
  """The tables of the page."""
  found = cases.load(RESULTS)
  return {f'plan of 7b, {part}': table(found[part]['rows']) for part in found}


def main() -> None:
  """Plans every row, and writes them as they come."""
  parser = harness.parser(__doc__)
  cases.add_parts(parser, PARTS)
  harness.add_arguments(parser, RESULTS, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('scaling.plan_7b')
    return
  if not accelerators.compiler_is_installed():
    sys.exit(f"This needs XLA's GPU compiler: {extras.install('cuda')}.")
  jax.config.update('jax_platforms', 'cpu')
  for part in args.names or PARTS:
    chosen = [
      cases.Case({'run': run}, functools.partial(_planned, options))
      for run, options in PARTS[part].items()
    ]
    clock = harness.Clock(math.inf)
    found = cases.measure(part, chosen, args.output, clock, device=DEVICE)
    rows = found[part]['rows']
    sys.stdout.write(table(rows) + '\n' + cases.absent(rows))


if __name__ == '__main__':
  main()
