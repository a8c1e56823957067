"""What the optimizers cost and what they are worth, a folder per question.

`common` has what all benchmarks share. `check` compares a short run with the
recorded figures, `report` writes these into the pages of docs/results.
"""

import os
import pathlib

# As in train_lm.py, and before jax is imported: OpenBLAS's threads would fight
# with those of XLA. PyTorch has a LAPACK of its own and keeps all its threads.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

# `python -m benchmarks.plan_7b` runs benchmarks/scaling/plan_7b.py: a command
# needs no name of a folder. Names of commands are unique among the folders.
__path__ += [
  str(pathlib.Path(__file__).with_name(name))
  for name in ('step', 'train', 'refresh', 'quality', 'scaling')
]
