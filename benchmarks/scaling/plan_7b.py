"""Plans LLaMA-7B on one card in several forms: what each one's step takes.

Rank 1024, sequences of 256 tokens, embedding and head full-rank, compiled for
an H100 by XLA's own GPU compiler, without a GPU. It needs the extra ``cuda``.

  python -m benchmarks.plan_7b
  python -m benchmarks.plan_7b --adapters

The second plans adapters on frozen weights, 4 sequences of 1024 tokens. They
take a quarter of a minute to a minute per row.
"""

import argparse
import contextlib
import datetime
import io
import json
import pathlib
import sys
from typing import Any

from benchmarks.common import record
from gnlorp_jax.plan import accelerators
from gnlorp_jax.plan.__main__ import main as plan_main

RESULTS = pathlib.Path('benchmarks/results')
DEVICE = 'h100'
WHOLE = ['--config', 'configs/llama_7b.py', '--optim.basis-bits', '8']
BF16 = ['--config', 'configs/llama_7b_24gb.py']
INT8 = ['--config', 'configs/llama_7b_16gb.py']
CLIP = ['--optim.clip-global-norm', '1.0', '--step.clipping']
ONE = ['--batch-size', '1']
ROWS: dict[str, list[str]] = {
  'whole step, bfloat16': WHOLE,
  'bfloat16': BF16,
  'bfloat16, 4-bit bases': [*BF16, '--optim.basis-bits', '4'],
  'bfloat16, clipped, waiting': [*BF16, *CLIP, 'waiting'],
  'bfloat16, clipped, recomputed': [*BF16, *CLIP, 'recompute'],
  'INT8': INT8,
  'INT8, inputs on the host': [*INT8, '--step.offload'],
  'INT8, one sequence': [*INT8, *ONE],
  'INT8, one sequence, 4-bit moments': [
    *INT8,
    *ONE,
    '--optim.moment-bits',
    '4',
  ],
}
"""What is planned, and the options of `gnlorp_jax.plan`."""
ADAPTER = [
  *('--config', 'configs/llama_7b.py', '--step.mode', 'layerwise'),
  *('--batch-size', '4', '--data.seq-len', '1024', '--adapter.rank', '16'),
]
LORA = [*ADAPTER, '--adapter.kind', 'lora', '--optim.name', 'adamw']
ON_INT8 = ['--step.weight-bits', '8']
ADAPTER_ROWS: dict[str, list[str]] = {
  'LoRA, bfloat16 base': LORA,
  'LoRA, INT8 base': [*LORA, *ON_INT8],
  'GradNormLoRP adapters, INT8 base': [
    *(*ADAPTER, '--adapter.kind', 'gradnormlorp', '--optim.name', 'galore'),
    *('--optim.rank', '8'),
    *ON_INT8,
  ],
}
"""The same with adapters of rank 16 beside frozen kernels."""


def planned(options: list[str]) -> dict[str, Any]:
  """Components and peak of a plan, bytes."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    plan_main([*options, '--device', DEVICE, '--json', '-'])
  found = json.loads(output.getvalue())
  return {
    'options': options,
    'components': found['components'],
    'peak': found['peak'],
    'xla': found['xla'],
    'versions': found['versions'],
  }


def table(rows: dict[str, Any]) -> str:
  """The rows in GiB, as Markdown."""
  columns = ('weights', 'moments', 'bases', 'saved_activations', 'temporaries')
  heads = ('weights', 'moments', 'bases', 'block inputs', 'temporaries')
  if any('frozen_weights' in row['components'] for row in rows.values()):
    columns = ('frozen_weights', *columns)
    heads = ('frozen weights', *heads)
  lines = [
    f'| run | {" | ".join(heads)} | peak |',
    '|---' * (len(heads) + 2) + '|',
  ]
  for name, row in rows.items():
    parts = row['components']
    sizes = [parts.get(column, 0) for column in columns]
    sizes[-1] = row['peak'] - sum(sizes[:-1])
    cells = [f'{size / 2**30:.2f}' for size in (*sizes, row['peak'])]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  """Plans every row, and writes them as they come."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--adapters', action='store_true', help='plan adapters on frozen weights'
  )
  adapters = parser.parse_args().adapters
  name = 'plan_7b_adapters' if adapters else 'plan_7b'
  if not accelerators.compiler_is_installed():
    sys.exit("This needs XLA's GPU compiler: pip install 'gnlorp_jax[cuda]'.")
  rows: dict[str, Any] = {}
  for row, options in (ADAPTER_ROWS if adapters else ROWS).items():
    rows[row] = planned(options)
    sys.stdout.write(f'{row}: {rows[row]["peak"] / 2**30:.2f} GiB\n')
    sys.stdout.flush()
    record.write(
      RESULTS / f'{name}.json',
      {
        'command': 'python -m benchmarks.plan_7b' + ' --adapters' * adapters,
        'commit': record.commit(),
        'date': datetime.date.today().isoformat(),
        'device': DEVICE,
        'rows': rows,
      },
    )
  sys.stdout.write(table(rows) + '\n')


if __name__ == '__main__':
  main()
