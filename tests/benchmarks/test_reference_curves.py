"""The first steps of training curves recorded from PyTorch.

The whole curves, 300 steps each, are repeated by
`python -m benchmarks.reference_curves`.
"""

import json

import numpy as np
import pytest

from benchmarks.quality.reference_curves import METHODS, run

pytestmark = [pytest.mark.slow, pytest.mark.fast_code]


@pytest.mark.parametrize(
  ('name', 'steps', 'tolerance'),
  [
    # AdamW drifts as float32 rounding grows: 1e-5 by step 60, 6e-4 by 100.
    ('adamw', 100, 1e-3),
    # Both refresh at step 61, where signs of singular vectors are arbitrary.
    ('galore', 60, 1e-4),
    ('released', 60, 1e-3),
  ],
)
def test_training_follows_the_recorded_losses(shared, name, steps, tolerance):
  folder = shared / 'reference' / 'curves'
  recorded_name, tx = METHODS[name]
  recorded = json.loads((folder / f'{recorded_name}.json').read_text())
  with np.load(folder / 'tokens.npz') as archive:
    losses, _ = run(tx, archive['tokens'], steps)
  expected = np.asarray(recorded['train_loss'][:steps])
  assert expected[-1] < expected[0] - 2  # It learned something to compare.
  np.testing.assert_allclose(losses, expected, atol=tolerance, rtol=0)
