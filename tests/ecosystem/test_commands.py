"""Every command that README, docs and files show is one its program reads.

Commands are taken from blocks of shell in pages, and from the texts at the head
of programs, configurations and benchmarks. Each is parsed by the program that
it names, which checks its options and their values; what it would do is not
done.
"""

import argparse
import importlib
import pathlib
import re
import shlex
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = ('gnlorp_jax', 'benchmarks', 'tests.campaign')
SCRIPTS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
  'scripts'
]
ENDS = ('&', '&&', ';', '|', '<', '>')
ABSENT = (
  'is no Hugging Face folder',
  'there is no adapter_config.json in it',
  'is neither in the cache',
)


def written():
  """Where commands stand, and the lines of each such place."""
  for page in (
    *ROOT.glob('*.md'),
    *(ROOT / 'docs').rglob('*.md'),
    *(ROOT / 'docs').rglob('*.py'),
  ):
    text = re.sub('^# ?', '', page.read_text(), flags=re.MULTILINE)
    if page.suffix == '.md':
      text = page.read_text()
    for block in re.findall('```bash\n(.*?)```', text, re.DOTALL):
      if not block.startswith('git checkout'):  # Of programs that are gone.
        yield page, block
  for program in (
    *ROOT.glob('*.py'),
    *(ROOT / 'configs').glob('*.py'),
    *(ROOT / 'gnlorp_jax').glob('*.py'),
    *(ROOT / 'gnlorp_jax' / 'plan').glob('*.py'),
    *(ROOT / 'benchmarks').rglob('*.py'),
  ):
    found = re.match('r?"""(.*?)"""', program.read_text(), re.DOTALL)
    # A command goes on in lines that are indented further than it.
    text = re.sub(r'\s*\\*\n {4,}(?=\S)', ' ', found[1] if found else '')
    start = r"  (?:\w+='|(?:\w+=\S+ |nice |taskset \S+ \S+ )*python )"
    lines = [line for line in text.splitlines() if re.match(start, line)]
    yield program, '\n'.join(line.strip() for line in lines)


def commands():
  """Pairs of a module and the words that it is given, with where they stand."""
  for place, block in written():
    block = block.replace('\\\n', ' ').replace('$i', '0')  # Of a shell's loop.
    for name, value in re.findall("^(\\w+)='(.*?)'$", block, re.MULTILINE):
      block = block.replace(f'${name}', value)
    for line in block.splitlines():
      words = shlex.split(line, comments=True)
      words = [w for w in words if w not in ('...', 'OPTIONS')]
      for number, word in enumerate(words):
        module = None
        if word == '-m' and words[number + 1].startswith(PROGRAMS):
          module, rest = words[number + 1], words[number + 2 :]
        elif re.fullmatch(r'(?:\S*/)?train_\w+\.py', word):
          module = f'gnlorp_jax.{pathlib.Path(word).stem}'
          rest = words[number + 1 :]
        elif word in SCRIPTS:
          module = SCRIPTS[word].partition(':')[0].removesuffix('.__main__')
          rest = words[number + 1 :]
        if module is None:
          continue
        end = [n for n, w in enumerate(rest) if w in ENDS]
        yield place.relative_to(ROOT), module, rest[: end[0] if end else None]
        break


class Parsed(Exception):  # noqa: N818  # No error: the way out of a program.
  """A benchmark has read its command line."""


def read(module, words, monkeypatch):
  """Lets a program read its words, and nothing more."""
  path = ROOT / module.replace('.', '/')
  name = f'{module}.__main__' if path.is_dir() else module
  if module.startswith('gnlorp_jax'):
    program = importlib.import_module(name)
    if module == 'gnlorp_jax.plan':
      return program.parse(words)
    return program.parse(words, '')
  original = argparse.ArgumentParser.parse_args

  def parse_args(self, args=None, namespace=None):
    original(self, words, namespace)
    raise Parsed

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
  if path.is_dir():
    source = (path / '__main__.py').read_text()
    name = re.search(r'^from (\S+) import main', source, re.MULTILINE)[1]
  with pytest.raises(Parsed):
    importlib.import_module(name).main()


@pytest.mark.parametrize(
  ('place', 'module', 'words'),
  [
    pytest.param(*found, id=f'{found[0]}-{number}')
    for number, found in enumerate(commands())
  ],
)
def test_a_command_that_is_shown_is_read(
  place, module, words, monkeypatch, tmp_path
):
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  merging = (ROOT / 'docs' / 'merging.md').read_text()
  (found,) = re.findall('```yaml\n(.*?)```', merging, re.DOTALL)
  (tmp_path / 'merge.yaml').write_text(found)
  monkeypatch.chdir(tmp_path)
  try:
    read(module, words, monkeypatch)
  except ValueError as error:
    # Models that it names are not here, which some programs notice by then.
    assert any(text in str(error) for text in ABSENT), error
  except SystemExit as end:  # It prints something, such as --print-completion.
    assert end.code == 0


def test_commands_are_found_wherever_they_stand():
  found = [(str(place), module) for place, module, _ in commands()]
  for expected in (
    ('README.md', 'gnlorp_jax.train_lm'),
    ('docs/tutorials/chat.py', 'gnlorp_jax.chat'),
    ('docs/results/scaling.md', 'benchmarks.plan_7b'),
    ('configs/llama_7b_16gb.py', 'gnlorp_jax.plan'),
    ('gnlorp_jax/merge.py', 'gnlorp_jax.merge'),
    ('benchmarks/quality/methods_lm.py', 'benchmarks.methods_lm'),
  ):
    assert expected in found
