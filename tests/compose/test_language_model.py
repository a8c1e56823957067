"""What recipes of language models share around their training."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.compose import language_model
from gnlorp_jax.training import sharding
from gnlorp_jax.training.interrupt import Interrupted, StopRequest


@pytest.mark.parametrize(
  ('found', 'best', 'expected'),
  [
    (1.0, 2.0, True),
    (2.0, 1.0, False),
    (1.0, 1.0, False),
    (1.0, None, True),
    (None, 1.0, False),
    (None, None, False),
  ],
)
def test_lower_validation_loss_is_better(found, best, expected):
  assert language_model.is_better({'loss': found}, {'loss': best}) == expected


def program():
  """One that sums products, as far as an evaluation knows."""
  return types.SimpleNamespace(
    mesh=sharding.make_mesh(1, 1, devices=jax.devices()[:1]),
    eval_step=lambda trained, batch, frozen: (
      jnp.sum(trained * frozen * batch['inputs']),
      jnp.float32(len(batch['inputs'])),
    ),
  )


def test_evaluation_sums_over_batches():
  batches = [{'inputs': np.full(size, size, np.float32)} for size in (3, 2, 1)]
  sums = language_model.evaluate(program(), iter(batches), 2.0, 0.5)
  assert sums.dtype == np.float64
  np.testing.assert_array_equal(sums, [9 + 4 + 1, 6])


def test_signal_ends_an_evaluation_between_two_batches():
  seen = []

  def batches(stop):
    for number in range(9):
      seen.append(number)
      if number == 3:
        stop.received = 15
      yield {'inputs': np.zeros(2, np.float32)}

  with StopRequest() as stop, pytest.raises(Interrupted):
    language_model.evaluate(program(), batches(stop), 1.0, 1.0)
  assert seen == [0, 1, 2, 3]


def test_signal_ends_the_questions_of_an_evaluation(monkeypatch):
  def evaluate_tasks(*args, progress, **options):
    progress(1, 3)
    stop.received = 15
    progress(2, 3)

  monkeypatch.setattr(language_model.scores, 'evaluate_tasks', evaluate_tasks)
  held = types.SimpleNamespace(join=lambda trained, frozen: trained)
  asked = types.SimpleNamespace(model=None, parameters=held)
  with StopRequest() as stop, pytest.raises(Interrupted):
    language_model.ask(asked, {}, {}, None, [], 2)
