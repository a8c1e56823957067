"""What the build of the site does beside writing pages.

It checks the reference: every public name stands in exactly one page of
`docs/reference`, and has a docstring; otherwise the build ends with the names.
It checks the links of what was written, those in the pages of programs too,
and that no page tells where the checkout lies on the machine that built it.
And it writes the tables of settings, whose texts stand under their fields,
where tools that read docstrings of modules do not find them.
"""

import dataclasses
import html.parser
import inspect
import pathlib
import re
import urllib.parse
from typing import Any

_CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
_REFERENCE = pathlib.Path(__file__).parent / 'reference'
_SETTINGS = 'reference/config.md'
_BLOCK = re.compile(r'^::: gnlorp_jax\.(\S+)$', re.MULTILINE)


def on_pre_build(config: Any) -> None:
  """Ends the build where the reference is not complete."""
  import mkdocs.exceptions

  del config
  if found := faults():
    raise mkdocs.exceptions.PluginError('\n'.join(found))


def on_post_build(config: Any) -> None:
  """Ends the build where a link leads nowhere or a page names the checkout."""
  import mkdocs.exceptions

  site = pathlib.Path(config['site_dir'])
  if found := broken_links(site) + named_checkout(site):
    raise mkdocs.exceptions.PluginError('\n'.join(found))


class _Page(html.parser.HTMLParser):
  """The links of a page, what it loads, the places that links may name."""

  def __init__(self, text: str):
    super().__init__()
    self.links: list[str] = []
    self.fetched: list[str] = []
    self.places: set[str | None] = set()
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: Any) -> None:
    """Notes what a tag links to, and what it is called."""
    found = dict(attrs)
    self.places |= {found.get('id'), found.get('name')}
    named = [
      found[key] for key in ('href', 'src') if found.get(key) is not None
    ]
    self.links += named
    if tag in ('script', 'img', 'link') and found.get('rel') != 'canonical':
      self.fetched += named


def broken_links(site: pathlib.Path) -> list[str]:
  """The links between pages of a site that lead to no page or place.

  Pages of programs are linked by their names in the site, which nothing but
  this checks. So are pages that would load anything from elsewhere.
  """
  pages = {
    path: _Page(path.read_text(encoding='utf-8'))
    for path in sorted(site.rglob('*.html'))
    if path.name != '404.html'  # Its links begin at the root of a server.
  }
  found = []
  for path, page in pages.items():
    found += [
      f'{path.relative_to(site)}: {link} is fetched from elsewhere'
      for link in page.fetched
      if urllib.parse.urlsplit(link).netloc
    ]
    for link in page.links:
      parts = urllib.parse.urlsplit(link)
      if parts.scheme or parts.netloc:
        continue
      target = path
      if parts.path:
        target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
      is_there = target.exists()
      if target in pages and parts.fragment:
        is_there = urllib.parse.unquote(parts.fragment) in pages[target].places
      if not is_there:
        found.append(f'{path.relative_to(site)}: {link} leads nowhere')
  return found


def named_checkout(
  site: pathlib.Path, checkout: pathlib.Path = _CHECKOUT
) -> list[str]:
  """The pages of a site that hold the absolute path of the checkout.

  They would show every reader a folder of the machine that built them.
  """
  return [
    f'{path.relative_to(site)}: names the checkout, {checkout}'
    for path in sorted(site.rglob('*.html'))
    if str(checkout) in path.read_text(encoding='utf-8')
  ]


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
  from gnlorp_jax.compose.command_help import doc

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
    f'{kind.__name__}.{field.name}': doc(kind, field.name)
    for kind in settings()
    for field in dataclasses.fields(kind)
  }
  return found + [f'{n} has no docstring' for n in texts if not texts[n]]


def _documented(value: Any) -> bool:
  return bool(inspect.getdoc(value))
