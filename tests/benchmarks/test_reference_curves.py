"""The first steps of training curves recorded from PyTorch.

The whole curves, 300 steps each, are repeated by
`python -m benchmarks.reference_curves`. These steps lie in the warm-up; beyond
it test_methods_lm.py compares the schedule with its formula at a few steps.
"""

import json

import numpy as np
import pytest

from benchmarks.quality import protocol, reference_curves

pytestmark = [pytest.mark.slow, pytest.mark.fast_code]


@pytest.mark.parametrize(
  ('name', 'steps'),
  # The fewest steps in which a run learns something.
  [('adamw', 12), ('released', 8), ('galore', 8)],
)
def test_training_follows_the_recorded_losses(shared, name, steps):
  folder = shared / 'reference' / 'curves'
  recorded_name = reference_curves.RECORDED[name]
  recorded = json.loads((folder / f'{recorded_name}.json').read_text())
  method = reference_curves.METHODS[name]
  training = protocol.Training(method, protocol.read_tokens(folder))
  losses, _ = training.train(*method.rates, steps)
  expected = np.asarray(recorded['train_loss'][:steps])
  assert expected[-1] < expected[0] - 0.5  # It learned something to compare.
  # Twenty times the last digit of float32; at the first step they are equal.
  np.testing.assert_allclose(losses, expected, atol=2e-5, rtol=0)


def test_every_recorded_curve_has_a_test():
  assert set(reference_curves.RECORDED) == {'adamw', 'galore', 'released'}
