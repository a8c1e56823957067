"""Repeats training curves recorded from PyTorch, and prints the differences.

A small LLaMA (hidden 128, 4 layers, vocabulary 32000) takes 300 steps on the
same tokens from the same weights as the recorded runs of torch AdamW,
galore-torch and the public release of GradNormLoRP; `gradnormlorp` in its exact
form runs on the same protocol.

  python -m benchmarks.reference_curves --reference ../shared/reference/curves

takes about ten minutes on two CPU cores. `--methods` picks some of the runs,
which are taken again each time. The table:

  eval loss   after the last step
  recorded    PyTorch's
  difference  of the two
  to step 60  the largest difference of the training loss up to this step
"""

import functools
import pathlib

import numpy as np

from benchmarks.common import record
from benchmarks.common.tables import markdown, number
from benchmarks.quality import protocol, runs
from gnlorp_jax import optim
from gnlorp_jax.models import llama

UP_TO = ('60', '100', '300')  # Steps, as keys of JSON.
LOW_RANK = protocol.LOW_RANK
# SVD of every matrix at the same step, as the recorded code does.
EXACT, POWER = (
  {
    'projection': optim.projections.get('svd', solver=solver),
    'spread_refreshes': False,
  }
  for solver in ('exact', 'power')
)
RECORDED = {
  'adamw': 'adamw_seed0',
  'galore': 'galore_adamw_seed0',
  'released': 'gradnormlorp_released_seed0',
}


def differences(
  name: str, trained: protocol.Trained, folder: pathlib.Path
) -> runs.Row:
  """How far a run is from the recorded one, if there is one as long."""
  if name not in RECORDED or len(trained.losses) != protocol.STEPS:
    return {}
  recorded = record.read(folder / f'{RECORDED[name]}.json')
  gap = np.abs(trained.losses - recorded['train_loss'])
  return {
    'recorded_eval_loss': recorded['eval_loss'],
    'largest_difference': {n: float(gap[: int(n)].max()) for n in UP_TO},
  }


METHODS = {
  name: protocol.Method(
    functools.partial(alias, **options),
    (2e-3 if name == 'adamw' else 1e-2,),
    describe=functools.partial(differences, name),
  )
  for name, alias, options in (
    ('adamw', optim.adamw, {}),
    ('galore', optim.galore, {**LOW_RANK, **EXACT}),
    ('released', optim.released_gradnormlorp, LOW_RANK),
    ('gradnormlorp_exact', optim.gradnormlorp, {**LOW_RANK, **EXACT}),
    ('gradnormlorp_power', optim.gradnormlorp, {**LOW_RANK, **POWER}),
    ('gradnormlorp_default', optim.gradnormlorp, LOW_RANK),
  )
}


def table(rows: list[runs.Row]) -> str:
  """A Markdown row per run."""
  heads = ['optimizer', 'peak rate', 'eval loss', 'recorded', 'difference']
  heads += [f'training loss to step {n}' for n in UP_TO]
  by_name = {row['method']: row for row in rows}
  lines = []
  for name in METHODS:
    if (row := by_name.get(name)) is None:
      continue
    theirs, gaps = row.get('recorded_eval_loss'), row.get('largest_difference')
    is_known = theirs is not None and row['outcome'] == 'trained'
    lines.append(
      [
        name,
        f'{row["learning_rate"]:g}',
        runs.ended(row),
        number(theirs, '.4f'),
        number(runs.final(row) - theirs if is_known else None, '+.4f'),
        *(number(gaps and gaps[n], '.1e').replace('e-0', 'e-') for n in UP_TO),
      ]
    )
  return markdown(heads, lines)


COMPARISON = runs.Comparison('reference_curves', table, plot=None, repeats=True)
PAGE, tables = runs.PAGE, COMPARISON.tables


def main(
  arguments: list[str] | None = None,
  config: llama.LlamaConfig = protocol.CONFIG,
) -> None:
  """Repeats the runs and reports them."""
  protocol.main(__doc__, COMPARISON, METHODS, config, arguments)


if __name__ == '__main__':
  main()
