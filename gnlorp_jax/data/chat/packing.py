"""Which documents share a row."""

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Puts documents into rows: best fit, the longest first.

  Each goes into the fullest row that has room for it, the oldest of several.
  The result follows from the lengths alone.

  Args:
    lengths: Tokens of each document.
    capacity: Tokens of a row.

  Returns:
    Rows of indices into `lengths`, each of which is in one of them.

  Raises:
    ValueError: If a document is empty or longer than a row.

  Examples:
    >>> pack([3, 5, 2, 4], 8)
    [[1, 0], [3, 2]]
  """
  wrong = [n for n in lengths if not 1 <= n <= capacity]
  if wrong:
    raise ValueError(
      f'A document of {wrong[0]} tokens cannot be packed into rows of '
      f'{capacity}; lengths must be in [1, {capacity}].'
    )
  rows: list[list[int]] = []
  # Heaps of rows by how much room they have; bit r is set where one has room r.
  with_room: dict[int, list[int]] = {}
  rooms = 0
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    length = lengths[i]
    fitting = rooms >> length
    if fitting:
      room = length + (fitting & -fitting).bit_length() - 1
      row = heapq.heappop(with_room[room])
      if not with_room[room]:
        rooms ^= 1 << room
    else:
      room, row = capacity, len(rows)
      rows.append([])
    rows[row].append(i)
    left = room - length
    heapq.heappush(with_room.setdefault(left, []), row)
    rooms |= 1 << left
  return rows
