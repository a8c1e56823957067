r"""Writes three plain texts of other kinds, each to train on and to score.

`python` are the modules of Python's standard library, `wikipedia` articles, and
`dialogue` conversations, a line for each message. Of Python and dialogue every
tenth file or conversation is held out; Wikipedia's files are given.

  python -m benchmarks.quality.texts --wikipedia 'TRAIN*.json.gz' VALIDATION \
    --dialogue CHAT.json,CHAT.jsonl --output runs/texts

The folder then holds python_train.txt, python_scored.txt, and so on, of at most
--characters each.
"""

import argparse
import pathlib
from collections.abc import Iterable

from benchmarks.common import harness
from gnlorp_jax.data import chat, sources


def _alternate(texts: Iterable[str]) -> tuple[list[str], list[str]]:
  """All but every tenth text, and every tenth."""
  both = list(texts)
  kept = [text for i, text in enumerate(both) if i % 10 != 9]
  return kept, both[9::10]


def python() -> tuple[list[str], list[str]]:
  """Modules of the standard library."""
  return _alternate(sources.documents('stdlib'))


def dialogue(files: str) -> tuple[list[str], list[str]]:
  """Conversations as text, each message behind the role of who says it."""
  return _alternate(
    '\n'.join(f'{m.role}: {m.content}' for m in conversation.messages) + '\n'
    for source in chat.read(files)
    for conversation in source.conversations
  )


def wikipedia(train: str, validation: str) -> tuple[Iterable[str], ...]:
  """The articles of two sources."""
  return tuple(sources.documents(part) for part in (train, validation))


def beginning(texts: Iterable[str], most: int) -> str:
  """Texts in a row, of at most so many characters in all."""
  found, length = [], 0
  for text in texts:
    if length >= most:
      break
    found.append(text)
    length += len(text)
  return '\n\n'.join(found)[:most]


def main() -> None:
  """Writes all of them."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--wikipedia', nargs=2, required=True, metavar=('TRAIN', 'VALIDATION'))
  add('--dialogue', required=True, metavar='FILES', help="as train_sft's data")
  add('--characters', type=harness.positive, default=3_000_000)
  add('--output', type=pathlib.Path, default=pathlib.Path('runs/texts'))
  args: argparse.Namespace = parser.parse_args()
  args.output.mkdir(parents=True, exist_ok=True)
  for name, parts in (
    ('python', python()),
    ('wikipedia', wikipedia(*args.wikipedia)),
    ('dialogue', dialogue(args.dialogue)),
  ):
    for part, texts in zip(('train', 'scored'), parts, strict=True):
      (args.output / f'{name}_{part}.txt').write_text(
        beginning(texts, args.characters), encoding='utf-8'
      )


if __name__ == '__main__':
  main()
