"""The recorded fine-tuning runs, which `train_glue.py` made."""

import pathlib

from benchmarks.common import record
from benchmarks.common.tables import markdown
from gnlorp_jax.recipes.glue import table

PAGE = pathlib.Path('docs/results/glue.md')
RESULTS = {
  name: pathlib.Path(f'benchmarks/results/{name}.json')
  for name in ('glue_tiny', 'sst2_tiny')
}


def tables() -> dict[str, str]:
  """The tables of the page, as the recipe makes them."""
  return {
    name: markdown(*table.columns(table.tabulate(record.read(path)['rows'])))
    for name, path in RESULTS.items()
  }


def plots() -> None:
  """Draws the runs on all tasks, as the recipe does."""
  rows = record.read(RESULTS['glue_tiny'])['rows']
  table.plot(rows, PAGE.with_name('glue_tiny.png'))
