"""How much that was compiled is kept?"""

import logging
import pathlib

import jax

_logger = logging.getLogger(__name__)

_MAPS = pathlib.Path('/proc/self/maps')
_LIMIT = pathlib.Path('/proc/sys/vm/max_map_count')
# The rest is for what the next program adds, some thousands at most.
_SHARE = 0.5


def bound() -> bool:
  """Forgets what was compiled where it takes half of the memory maps.

  Linux lets a process have 65,530 of them, unless set otherwise, and a compiled
  program takes dozens. Functions stay: what is called again compiles again.
  Systems that tell no limit have none.

  Returns:
    Whether it was forgotten.
  """
  try:
    limit = int(_LIMIT.read_text())
    with _MAPS.open('rb') as file:
      count = sum(1 for _ in file)
  except (OSError, ValueError):
    return False
  if count < _SHARE * limit:
    return False
  jax.clear_caches()
  _logger.info(
    'What was compiled took %d of %d memory maps, and is forgotten.',
    *(count, limit),
  )
  return True
