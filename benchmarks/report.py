"""Writes the recorded figures into the pages of docs/results.

  python -m benchmarks.report               # all of them
  python -m benchmarks.report step          # those of a folder
  python -m benchmarks.report step.measure  # that of python -m benchmarks.step

Nothing is measured: the tables between the marks of a page, the pictures beside
it, and the rows that the package advises by, are made again from
benchmarks/results. Every benchmark does the same
for itself with --report. tests/benchmarks/test_pages.py compares the two.
"""

import importlib
from typing import Any

from benchmarks.common import cases, harness, pages

BENCHMARKS = (
  'quality.advice',
  'quality.document_mask',
  'quality.glue',
  'quality.int8_weights',
  'quality.measure',
  'quality.methods_lm',
  'quality.reference_curves',
  'quality.relora',
  'quality.sft',
  'refresh.measure',
  'scaling.measure',
  'scaling.merge_memory',
  'scaling.plan_7b',
  'scaling.state_bytes',
  'scaling.traffic',
  'step.layerwise_step',
  'step.measure',
  'step.sampled_step',
  'train.finetune_step',
  'train.generation',
  'train.measure',
  'train.sft_step',
)
"""Modules with recorded figures.

Each has a path PAGE, `tables`, which makes the tables of this page by name from
the recorded files, and if it has any, `plots`, which draws its pictures, and
`package`, which writes what the package ships of them.
"""


def load(name: str) -> Any:
  """The module of a benchmark, such as ``step.measure``."""
  return importlib.import_module(f'benchmarks.{name}')


def report(name: str) -> None:
  """Writes a benchmark's tables and its file of the package, and draws."""
  module = load(name)
  pages.write(module.PAGE, module.tables())
  for write in ('plots', 'package'):
    if hasattr(module, write):
      getattr(module, write)()


def main() -> None:
  """Reports what is named on the command line, or everything."""
  parser = harness.parser(__doc__)
  folders = dict.fromkeys(name.partition('.')[0] for name in BENCHMARKS)
  cases.add_parts(parser, (*folders, *BENCHMARKS), 'record')
  asked = parser.parse_args().names or BENCHMARKS
  for name in BENCHMARKS:
    if name in asked or name.partition('.')[0] in asked:
      harness.progress(f'Reporting {name}')
      report(name)


if __name__ == '__main__':
  main()
