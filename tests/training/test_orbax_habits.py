"""What Orbax does beside saving; what is on the disk when: test_checkpoint."""

import gc
import logging
import sys

import pytest

from gnlorp_jax.training import orbax_habits


class Complains:
  """Raises where nobody can catch it."""

  def __del__(self):
    raise RuntimeError


def test_complaints_are_unheard_for_a_while(monkeypatch):
  heard = []
  monkeypatch.setattr(sys, 'unraisablehook', heard.append)
  with orbax_habits.unheard_complaints():
    Complains()
    gc.collect()
  assert not heard
  Complains()
  gc.collect()
  assert len(heard) == 1


@pytest.mark.parametrize(
  ('path', 'level', 'kept'),
  [
    ('/a/orbax/b.py', logging.INFO, False),
    ('/a/orbax/b.py', logging.ERROR, False),
    ('/a/orbax/b.py', logging.WARNING, True),
    ('/a/orbax_like/b.py', logging.INFO, True),
  ],
)
def test_warnings_of_orbax_alone_are_told(path, level, kept):
  record = logging.LogRecord('absl', level, path, 1, '', (), None)
  assert orbax_habits.keep_log_record(record) == kept


def test_waiting_for_a_save_is_not_told():
  text = 'Waiting for previous save to complete took %f seconds. If this'
  record = logging.LogRecord(
    'absl', logging.WARNING, '/a/orbax/b.py', 1, text, (0.5,), None
  )
  assert not orbax_habits.keep_log_record(record)
