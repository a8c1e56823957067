"""Plans LLaMA-7B on one card in several forms: what each one's step takes.

Rank 1024, sequences of 256 tokens, embedding and head full-rank, compiled for
an H100 by XLA's own GPU compiler, without a GPU. It needs the extra ``cuda``.

  python -m benchmarks.plan_7b

takes a quarter of a minute to a minute per row.
"""

import contextlib
import datetime
import io
import json
import pathlib
import sys
from typing import Any

from benchmarks import record
from gnlorp_jax.plan import accelerators
from gnlorp_jax.plan.__main__ import main as plan_main

RESULTS = pathlib.Path('benchmarks/results/plan_7b.json')
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
  lines = [
    '| run | weights | moments | bases | block inputs | temporaries | peak |',
    '|---|---|---|---|---|---|---|',
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
  if not accelerators.compiler_is_installed():
    sys.exit("This needs XLA's GPU compiler: pip install 'gnlorp_jax[cuda]'.")
  rows: dict[str, Any] = {}
  for name, options in ROWS.items():
    rows[name] = planned(options)
    sys.stdout.write(f'{name}: {rows[name]["peak"] / 2**30:.2f} GiB\n')
    sys.stdout.flush()
    record.write_json(
      RESULTS,
      {
        'command': 'python -m benchmarks.plan_7b',
        'commit': record.commit(),
        'date': datetime.date.today().isoformat(),
        'device': DEVICE,
        'rows': rows,
      },
    )
  sys.stdout.write(table(rows) + '\n')


if __name__ == '__main__':
  main()
