r"""Gives commands bad flags and damaged files, and asks how they end.

  python -m tests.campaign.inputs --count 1000
  python -m tests.campaign.inputs --count 50 --only weights --seed 3

Every input is made by chance from one that is right: a flag of any field with a
value that may not fit; a file of text or conversations, the folder of a model,
a configuration or a checkpoint with bytes that are cut, turned over, exchanged
or gone. A command has to end by itself: with a message and the exit status of a
user's mistake, or well, because what was bad did not matter. Faults are
tracebacks, crashes, hangs, an end without a word, settings of NaN or infinity
that were taken, a loss that is not a number, and a damaged run that ends with
other weights than the whole one.
"""

import argparse
import collections
import contextlib
import gzip
import importlib
import io
import json
import math
import os
import pathlib
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.campaign.configurations import (
  CONFIGURATIONS,
  OUTPUT,
  ROOT,
  write_inputs,
)

TIMEOUT = 300.0  # Seconds of an input.
AT_ONCE = 40  # Inputs of a process, before another takes over.
GOOD = ('refused', 'ran')

_LOG = 'worker.log'  # What a process says beside its answers.

_NO_NUMBERS = ('nan', 'inf', '-inf')
_VALUES = (
  *_NO_NUMBERS,
  *('-1', '0', '1e99', '-1e-9', '100000000000', '1.5', '', 'x', 'None'),
  *('True', '[]', '../..', '/dev/null', 'ß\x7f', '1,,2'),
)
# What a number may be, and some that it may not.
_NUMBERS = (
  *_NO_NUMBERS,
  *('-1', '0', '1', '2', '3', '7', '64', '0.5', '0.999', '1.5', '-0.1'),
  *('1e-30', '1e-9', '1e30', '1e99', '1000000', '4294967296', '100000000000'),
)
# Options that say where to write and what to read, or print and end.
_OTHERS = ('--help', '--config', '--run-dir', '--out', '--model', '--base')


class Input(NamedTuple):
  """A command and what is bad about it.

  Attributes:
    what: A line that says what is bad.
    module: Whose ``main`` is called.
    words: The command line.
    weights: What the exported weights must be, if the command runs at all.
    is_number: Whether a number must not be NaN or infinite.
  """

  what: str
  module: str
  words: list[str]
  weights: bytes | None = None
  is_number: bool = False


def command(
  name: str, root: pathlib.Path, folder: pathlib.Path
) -> tuple[str, list[str]]:
  """Module and words of a configuration that writes into a folder."""
  words = CONFIGURATIONS[name].command(root)[1:-1]
  words = [str(folder / w) if w == 'cache' else w for w in words]
  if words[0] == '-m':
    return words[1], [*words[2:], str(folder / OUTPUT)]
  module = pathlib.PurePath(words[0]).stem
  return module, [*words[1:], str(folder / OUTPUT)]


# What is bad.


def flags(
  root: pathlib.Path, folder: pathlib.Path, rng: random.Random
) -> Input:
  """A field of the settings with a value that may not fit."""
  name = rng.choice(list(CONFIGURATIONS))
  module, words = command(name, root, folder)
  options = _options(module)
  numbers = [name for name, kind in options.items() if kind in _NUMBER_KINDS]
  # Most of the rest is a choice among words, and refused by its name.
  is_number = rng.random() < 0.75
  option = rng.choice(numbers if is_number else sorted(options))
  values = _NUMBERS if is_number else _VALUES
  if options[option].endswith('INT'):  # Others are refused by their look.
    values = [value for value in values if value.lstrip('-').isdigit()]
  value = rng.choice(values)
  return Input(
    f'{name}: {option} {value!r}',
    module,
    [*words, option, value],
    is_number=value in _NO_NUMBERS,
  )


_NUMBER_KINDS = ('INT', 'FLOAT', '{None}|INT', '{None}|FLOAT')
_options_of: dict[str, dict[str, str]] = {}


def _options(module: str) -> dict[str, str]:
  """The long options of a command and what they take, as its help says."""
  if module not in _options_of:
    text = subprocess.run(
      [sys.executable, '-m', module, '--help', 'all'],
      cwd=ROOT,
      env=os.environ | {'COLUMNS': '200'},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    found = re.findall(r'(?<!\S)(--[a-z][a-z0-9.-]+)(?: (\S+))?', text)
    _options_of[module] = {
      name: kind for name, kind in sorted(found) if name not in _OTHERS
    }
  return _options_of[module]


def text(root: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> Input:
  """A damaged file to train a language model on."""
  module, words = command('language model', root, folder)
  suffix = rng.choice(['.txt', '.jsonl', '.jsonl', '.json.gz', '.parquet'])
  path = folder / f'text{suffix}'
  lines = (root / 'text.txt').read_text().splitlines()
  if suffix == '.parquet':
    # Who only tests the campaign need not have it.
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({'text': lines}), path)
  else:
    if 'json' in suffix:
      lines = [json.dumps({'text': line}) for line in lines]
    content = '\n'.join(lines).encode()
    path.write_bytes(gzip.compress(content) if '.gz' in suffix else content)
  what = damage(path, rng)
  words[words.index('--data.source') + 1] = str(path)
  return Input(f'{path.name}: {what}', module, words)


def conversations(
  root: pathlib.Path, folder: pathlib.Path, rng: random.Random
) -> Input:
  """A damaged file to fine-tune on."""
  module, words = command('conversations, packed, GaLore', root, folder)
  rows: list[dict[str, Any]] = [
    {
      'messages': [
        {'role': 'user', 'content': f'What is {i} and {i}?'},
        {'role': 'assistant', 'content': f'{2 * i}'},
      ]
    }
    for i in range(60)
  ]
  what = _exchange(rows[rng.randrange(60)], rng)
  path = folder / f'chats{rng.choice([".jsonl", ".json"])}'
  if path.suffix == '.json':
    path.write_text(json.dumps(rows))
  else:
    path.write_text('\n'.join(map(json.dumps, rows)))
  if rng.random() < 0.5:
    what += f', {damage(path, rng)}'
  words = [*words, '--data.source', str(path)]
  return Input(f'{path.name}: {what}', module, words)


def weights(
  root: pathlib.Path, folder: pathlib.Path, rng: random.Random
) -> Input:
  """A model with a damaged file."""
  module, words = command('conversations, LoRA on an 8-bit base', root, folder)
  shutil.copytree(root / 'model', folder / 'model')
  path = rng.choice(sorted((folder / 'model').iterdir()))
  if path.suffix == '.json' and rng.random() < 0.7:
    found = json.loads(path.read_text())
    what = _exchange(found, rng)
    path.write_text(json.dumps(found))
  else:
    what = damage(path, rng)
  words[words.index('--model') + 1] = str(folder / 'model')
  return Input(f'{path.name}: {what}', module, words)


_CONFIGURATION = """from gnlorp_jax import config as c

config = c.TrainConfig(
  steps=2,
  optim=c.OptimConfig(name='gradnormlorp', rank=2, learning_rate=0.01),
  data=c.DataConfig(seq_len=16),
)
"""


def configurations(
  root: pathlib.Path, folder: pathlib.Path, rng: random.Random
) -> Input:
  """A damaged configuration file."""
  module, words = command('language model', root, folder)
  path = folder / f'config{rng.choice([".py"] * 9 + [".yaml"])}'
  parts = re.split(r"('\w+'|\d[\d.]*|\w+)", _CONFIGURATION)
  values = [i for i, part in enumerate(parts) if re.match(r"\d|'", part)]
  words_at = range(1, len(parts), 2)
  at = rng.choice(values if rng.random() < 0.6 else words_at)
  new = rng.choice(
    ['', 'x', '1', '7', '0', '0.5', '1e30', 'None', 'float("nan")', '-1']
    + ['"', '(', '\t', '"adamw"', '"galore"', 'True', '[]', '10**12']
  )
  what = f'{parts[at]} became {new!r}'
  parts[at] = new
  path.write_text(''.join(parts))
  words = ['--config', str(path), *words]
  return Input(f'{path.name}: {what}', module, words)


def checkpoints(
  root: pathlib.Path, folder: pathlib.Path, rng: random.Random
) -> Input:
  """A run that ended, without its export and with damaged files."""
  module, words = command('language model', root, folder)
  whole = root / 'whole'
  if not whole.exists():
    _, right = command('language model', root, whole)
    script = [sys.executable, str(ROOT / f'{module}.py'), *right]
    environment = CONFIGURATIONS['language model'].environment(root)
    subprocess.run(script, env=environment, check=True, capture_output=True)
  expected = (whole / OUTPUT / 'hf/model.safetensors').read_bytes()
  shutil.copytree(whole / OUTPUT, folder / OUTPUT)
  shutil.rmtree(folder / OUTPUT / 'hf')
  files = [p for p in sorted((folder / OUTPUT).rglob('*')) if p.is_file()]
  told = []
  for path in rng.sample(files, rng.randint(1, 3)):
    name = path.relative_to(folder / OUTPUT)
    told.append(f'{name}: {damage(path, rng)}')
  return Input(', '.join(told), module, words, weights=expected)


KINDS: dict[str, Callable[..., Input]] = {
  'flags': flags,
  'text': text,
  'conversations': conversations,
  'weights': weights,
  'configurations': configurations,
  'checkpoints': checkpoints,
}


def damage(path: pathlib.Path, rng: random.Random) -> str:
  """Does something to a file; says what."""
  content = bytearray(path.read_bytes())
  at = rng.randrange(max(len(content), 1))
  what = rng.choice(
    ['cut', 'emptied', 'flipped', 'zeroed', 'gone', 'a folder', 'a FIFO']
    + ['other bytes', 'a dangling link', 'unreadable', 'a pointer of git-lfs']
  )
  if what == 'cut':
    path.write_bytes(content[:at])
  elif what == 'flipped':
    for _ in range(rng.randint(1, 8)):
      if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
  elif what == 'zeroed':
    path.write_bytes(content[:at] + bytes(len(content) - at))
  elif what == 'emptied':
    path.write_bytes(b'')
  elif what == 'other bytes':
    path.write_bytes(rng.randbytes(len(content)))
  elif what == 'unreadable':
    path.chmod(0)
  elif what == 'a pointer of git-lfs':
    path.write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
    )
  else:
    path.unlink()
    if what == 'a folder':
      path.mkdir()
    elif what == 'a FIFO':
      os.mkfifo(path)
    elif what == 'a dangling link':
      path.symlink_to('nowhere')
  return what


def _exchange(tree: Any, rng: random.Random) -> str:
  """Puts something else in some place of a tree of JSON; says what."""
  trail = []
  while True:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    trail.append(str(key))
    if not isinstance(tree[key], dict | list) or not tree[key]:
      break
    if rng.random() < 0.3:
      break
    tree = tree[key]
  new = rng.choice([None, -1, 0, 1e30, '', 'x', [], {}, True, [[[]]], 3.5])
  tree[key] = new
  return f'{".".join(trail)} became {new!r}'


# How a command ends.


def run(given: Input) -> tuple[str, str]:
  """Calls a command in this process.

  Returns:
    How it ended, one of `GOOD` or a fault, and its last words.
  """
  said = io.StringIO()
  status: Any = 0
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
      status = importlib.import_module(given.module).main(given.words) or 0
    except SystemExit as error:
      status = error.code or 0
      if isinstance(status, str):
        said.write(status)
    except BaseException:
      return 'traceback', traceback.format_exc()[-1500:]
  words = said.getvalue()[-1500:]
  if status:
    return ('refused' if words.strip() else 'without a word'), words
  if given.is_number:
    return 'took what is no number', words
  return _judge(given), words


def _judge(given: Input) -> str:
  """Whether what a command left is right."""
  folder = pathlib.Path(given.words[given.words.index('--run-dir') + 1])
  if given.weights is not None:
    found = (folder / 'hf/model.safetensors').read_bytes()
    return 'ran' if found == given.weights else 'other weights'
  for path in folder.rglob('metrics.jsonl'):
    for row in map(json.loads, path.read_text().splitlines()):
      losses = [v for name, v in row.items() if name.endswith('/loss')]
      if not all(x is not None and math.isfinite(x) for x in losses):
        return 'a loss that is no number'
  return 'ran'


def work(root: pathlib.Path, seed: int, first: int, kinds: list[str]) -> None:
  """Goes through inputs, and writes a line of JSON of each."""
  answers = os.fdopen(os.dup(1), 'w')
  for number in range(first, first + AT_ONCE):
    rng = random.Random(f'{seed} {number}')
    kind = kinds[number % len(kinds)]
    folder = root / f'{number:05d}'
    folder.mkdir()
    given = KINDS[kind](root, folder, rng)
    begun = {'number': number, 'kind': kind, 'what': given.what}
    answers.write(json.dumps(begun) + '\n')
    answers.flush()
    end, words = run(given)
    answers.write(json.dumps(begun | {'end': end, 'words': words}) + '\n')
    answers.flush()
    shutil.rmtree(folder, ignore_errors=True)


def campaign(
  count: int, seed: int, kinds: list[str], root: pathlib.Path
) -> dict[str, Any]:
  """Goes through inputs, in processes that take over from each other.

  Returns:
    How often commands ended in which way, and the faults.
  """
  write_inputs(root)
  ends: collections.Counter[str] = collections.Counter()
  faults, number = [], 0
  while number < count:
    first = number
    for row in _rows_of_a_process(root, seed, number, kinds):
      number = row['number'] + 1
      ends[f'{row["kind"]}: {row["end"]}'] += 1
      if row['end'] not in GOOD:
        faults.append(row)
        say(f'{row["number"]} {row["kind"]}, {row["what"]}: {row["end"]}')
        say(row['words'])
      if number >= count:
        break
    if number == first:  # It would be for ever.
      words = (root / _LOG).read_text(errors='replace')[-1500:]
      raise RuntimeError(f'No input {number} could be made: {words}')
  return {'seed': seed, 'ends': dict(sorted(ends.items())), 'faults': faults}


def _rows_of_a_process(
  root: pathlib.Path, seed: int, first: int, kinds: list[str]
) -> Any:
  """What a worker tells, and what became of it at last."""
  words = [sys.executable, '-m', 'tests.campaign.inputs', '--worker']
  words += [str(root), str(seed), str(first), *kinds]
  with (root / _LOG).open('w') as log:
    process = subprocess.Popen(
      words,
      cwd=ROOT,
      env=CONFIGURATIONS['language model'].environment(root),
      stdout=subprocess.PIPE,
      stderr=log,
      stdin=subprocess.DEVNULL,
      bufsize=0,
    )
  assert process.stdout is not None
  begun, rest = None, b''
  try:
    while True:
      ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
      got = process.stdout.read(1 << 16) if ready else None
      if not got:
        if begun is not None:
          end = 'crash' if ready else 'hang'
          yield begun | {'end': end, 'words': ''}
        return
      *lines, rest = (rest + got).split(b'\n')
      for row in map(json.loads, lines):
        begun = None if 'end' in row else row
        if begun is None:
          yield row
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def say(words: str) -> None:
  """Writes a line at once."""
  sys.stdout.write(f'{words}\n')
  sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
  """Runs a campaign; returns 1 if there were faults."""
  words = sys.argv[1:] if arguments is None else arguments
  if words[:1] == ['--worker']:
    root, seed, first, *kinds = words[1:]
    work(pathlib.Path(root), int(seed), int(first), kinds)
    return 0
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--count', type=int, default=100, help='default: %(default)s')
  add('--only', nargs='+', choices=KINDS, default=[*KINDS])
  add('--seed', type=int, default=0)
  add('--output', type=pathlib.Path, help='a JSON file of what was found')
  args = parser.parse_args(words)
  with tempfile.TemporaryDirectory(prefix='campaign') as folder:
    root = pathlib.Path(folder).resolve()
    found = campaign(args.count, args.seed, args.only, root)
  text = json.dumps(found, indent=2)
  if args.output:
    args.output.write_text(f'{text}\n')
  say(text)
  return 1 if found['faults'] else 0


if __name__ == '__main__':
  sys.exit(main())
