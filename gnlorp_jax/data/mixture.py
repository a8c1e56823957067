"""Texts of several named sources, whose rows are kept apart.

A mixture is named by ``NAME=SPEC`` joined by commas, such as
``wiki=wiki.jsonl,code=src/``; each SPEC is one of `sources`, and those of one
name are one source. Documents of different sources never share a row.

Shape suffixes: S sources.
"""

import re
from typing import NamedTuple

from gnlorp_jax.data.text import TokenFile

_NAMED = re.compile(r'\s*(?P<name>[A-Za-z][\w-]*)=(?P<spec>.+)')


class Mixture(NamedTuple):
  """Token files by source.

  Attributes:
    names: Names of the sources, each once.
    files: Their tokens, in that order.
  """

  names: tuple[str, ...]
  files: tuple[TokenFile, ...]

  def sizes(self, seq_len: int) -> tuple[int, ...]:
    """Rows of `seq_len` tokens that each source has."""
    return tuple(file.num_sequences(seq_len) for file in self.files)


def parse(source: str) -> dict[str, str]:
  """The sources that a text names, by name.

  Args:
    source: ``NAME=SPEC`` joined by commas, or a source without names.

  Returns:
    What `sources` takes, by name; empty where there are no names.

  Raises:
    ValueError: If only some are named.

  Examples:
    >>> parse('wiki=a.txt,code=src/,wiki=b.txt')
    {'wiki': 'a.txt,b.txt', 'code': 'src/'}
    >>> parse('a.txt,b.txt')
    {}
  """
  specs = source.split(',')
  named = [_NAMED.fullmatch(spec) for spec in specs]
  if not any(named):
    return {}
  found: dict[str, list[str]] = {}
  for spec, match in zip(specs, named, strict=True):
    if match is None:
      raise ValueError(
        f'Of the sources {source!r} some have a name and {spec.strip()!r} has '
        'none: each needs one, NAME=SPEC, and those of one name are one source.'
      )
    found.setdefault(match['name'], []).append(match['spec'].strip())
  return {name: ','.join(parts) for name, parts in found.items()}


def without_names(source: str) -> str:
  """All sources that a text names, as one."""
  return ','.join(parse(source).values()) or source
