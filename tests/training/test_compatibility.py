import re

import pytest

from gnlorp_jax.training.compatibility import Since, check_compatible


def test_architecture_that_differs_lists_every_field():
  saved = {'hidden_size': 128, 'layers': 2, 'tied': True, 'axes': [1, 2]}
  check_compatible(saved, saved | {'axes': (1, 2)}, 'runs/a')
  current = {'hidden_size': 256, 'layers': 2, 'heads': 4, 'axes': [1, 2]}
  text = (
    'Checkpoint in runs/a was made with other settings: heads (absent) '
    '!= 4, hidden_size 128 != 256, tied True != (absent). Use another run '
    'directory or the same settings. To go on all the same, name what may '
    "differ: --accept 'heads,hidden_size,tied'."
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    check_compatible(saved, current, 'runs/a')


def test_what_is_accepted_may_differ_and_is_told(caplog):
  saved, current = {'text': 'a', 'rank': 2}, {'text': 'b', 'rank': 2}
  check_compatible(saved, current, 'runs/a', accepted=('text', 'unknown'))
  assert caplog.messages == [
    'Going on in runs/a with other settings, which were accepted: text a != b.'
  ]
  with pytest.raises(ValueError, match="--accept 'rank,text'.$"):
    check_compatible(saved, {'text': 'b'}, 'runs/a', accepted=('text',))


def test_a_setting_that_came_later_stood_at_its_default():
  """What a record lacks was done as the default has it, and no other way."""
  saved = {'rank': 4}
  since = Since(defaults={'bits': None, 'axes': (0, 1), 'rank': 8})
  current = saved | {'bits': None, 'axes': (0, 1)}
  check_compatible(saved, current, 'runs/a', since=since)
  with pytest.raises(ValueError, match=r'settings: bits \(absent\) != 8\. Use'):
    check_compatible(saved, current | {'bits': 8}, 'runs/a', since=since)
  # Only what is absent: here both runs say what they are.
  with pytest.raises(ValueError, match=r'settings: rank 4 != 8\. Use'):
    check_compatible(saved, current | {'rank': 8}, 'runs/a', since=since)
  # And nobody knows what a setting did that is no more.
  with pytest.raises(ValueError, match=r'settings: axes 3 != \(absent\)\. Use'):
    check_compatible({'axes': 3}, {}, 'runs/a', since=since)


def test_what_may_change_now_is_not_asked_of_older_records():
  since = Since(may_change=frozenset({'batch_size'}))
  check_compatible({'batch_size': 4}, {}, 'runs/a', since=since)
  with pytest.raises(ValueError, match='batch_size 4 != 8'):
    check_compatible({'batch_size': 4}, {'batch_size': 8}, 'a', since=since)
