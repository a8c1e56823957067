"""What the build of the site does beside writing pages.

It checks the reference: every public name stands in exactly one page of
`docs/reference`, and has a docstring; otherwise the build ends with the names.
And it writes the tables of settings, whose texts stand under their fields,
where tools that read docstrings of modules do not find them.
"""

import dataclasses
import inspect
import pathlib
import re
from typing import Any

_REFERENCE = pathlib.Path(__file__).parent / 'reference'
_SETTINGS = 'reference/config.md'
_BLOCK = re.compile(r'^::: gnlorp_jax\.(\S+)$', re.MULTILINE)


def on_pre_build(config: Any) -> None:
  """Ends the build where the reference is not complete."""
  import mkdocs.exceptions

  del config
  if found := faults():
    raise mkdocs.exceptions.PluginError('\n'.join(found))


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
  """Adds the tables of settings to their page."""
  if page.file.src_uri != _SETTINGS:
    return markdown
  return '\n\n'.join([markdown, *map(table_of, settings())])


def settings() -> list[type]:
  """The settings of the programs, and behind them every group within."""
  from gnlorp_jax.config import SftConfig, TrainConfig
  from gnlorp_jax.recipes.glue.settings import GlueConfig

  found: list[type] = [TrainConfig, SftConfig, GlueConfig]
  for kind in found:  # Grows as it is gone through.
    groups = [type(field.default) for field in dataclasses.fields(kind)]
    found += [
      group
      for group in dict.fromkeys(groups)
      if dataclasses.is_dataclass(group) and group not in found
    ]
  return found


def table_of(kind: type) -> str:
  """A heading, what the class says of itself, and a row for every field."""
  from gnlorp_jax.compose.command_help import doc

  rows = [
    f'| `{field.name}` | {_default(field)} | {_cell(doc(kind, field.name))} |'
    for field in dataclasses.fields(kind)
  ]
  says = (inspect.getdoc(kind) or '').partition('\n\n')[0]
  head = f'## {kind.__name__}\n\n{says}\n'
  return '\n'.join([head, '| field | default | |', '|---|---|---|', *rows])


def _default(field: Any) -> str:
  value = field.default
  if dataclasses.is_dataclass(value):
    return f'[{type(value).__name__}](#{type(value).__name__.lower()})'
  return f'`{value!r}`'


def _cell(text: str) -> str:
  """Text for a cell: what would be a mark of a table or of HTML is not."""
  return text.replace('|', r'\|').replace('<', '&lt;').replace('*', r'\*')


def faults() -> list[str]:
  """What is missing in the reference, twice in it, or without a docstring."""
  from gnlorp_jax import config, optim, plan

  public = {
    name: getattr(module, name)
    for module in (optim, plan)
    for name in module.__all__
  } | {name: getattr(config, name) for name in ('load', 'parse')}
  pages = ''.join(page.read_text() for page in sorted(_REFERENCE.glob('*.md')))
  shown = [block.rpartition('.')[2] for block in _BLOCK.findall(pages)]
  found = [
    f'{name} is {shown.count(name)} times in docs/reference, not once'
    for name in public
    if shown.count(name) != 1
  ]
  texts = {name: _documented(value) for name, value in public.items()}
  texts |= {
    f'{kind.__name__}.{field.name}': _field_text(kind, field.name)
    for kind in settings()
    for field in dataclasses.fields(kind)
  }
  return found + [f'{n} has no docstring' for n in texts if not texts[n]]


def _field_text(kind: type, name: str) -> str:
  from gnlorp_jax.compose.command_help import doc

  return doc(kind, name)


def _documented(value: Any) -> bool:
  return bool(inspect.getdoc(value))
