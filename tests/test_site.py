"""The site: every public name is in its reference, every page in its menu."""

import importlib.util
import pathlib
import re
import runpy

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'


@pytest.fixture
def hooks():
  path = DOCS / 'site_hooks.py'
  spec = importlib.util.spec_from_file_location('site_hooks', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_reference_holds_every_public_name_once(hooks):
  assert hooks.faults() == []


def test_a_name_that_is_missing_or_twice_or_undocumented_ends_the_build(
  hooks, tmp_path, monkeypatch
):
  for page in (DOCS / 'reference').glob('*.md'):
    text = page.read_text().replace('::: gnlorp_jax.optim.fira\n', '')
    (tmp_path / page.name).write_text(text)
  (tmp_path / 'more.md').write_text('::: gnlorp_jax.optim.galore\n')
  monkeypatch.setattr(hooks, '_REFERENCE', tmp_path)
  monkeypatch.setattr(hooks, '_documented', lambda value: False)
  found = hooks.faults()
  assert 'fira is 0 times in docs/reference, not once' in found
  assert 'galore is 2 times in docs/reference, not once' in found
  assert 'racs has no docstring' in found


def test_links_that_lead_nowhere_end_the_build(hooks, tmp_path):
  (tmp_path / 'inner').mkdir()
  (tmp_path / 'a.html').write_text(
    '<h1 id="top"></h1><a href="inner/b.html#here"></a><a href="#top"></a>'
    '<a href="https://example.org/x#y"></a><a href="inner/b.html#gone"></a>'
    '<img src="no.png"><a href="#nowhere"></a>'
    '<script src="https://example.org/a.js"></script>'
  )
  (tmp_path / 'inner' / 'b.html').write_text(
    '<a name="here"></a><a href="../a.html"></a><a href="../../a/"></a>'
  )
  assert hooks.broken_links(tmp_path) == [
    'a.html: https://example.org/a.js is fetched from elsewhere',
    'a.html: inner/b.html#gone leads nowhere',
    'a.html: no.png leads nowhere',
    'a.html: #nowhere leads nowhere',
    'inner/b.html: ../../a/ leads nowhere',
  ]


def test_a_page_that_names_the_checkout_ends_the_build(hooks, tmp_path):
  (tmp_path / 'a.html').write_text('<code>/home/me/clone/a.py</code>')
  (tmp_path / 'b.html').write_text('<code>clone/a.py</code>')
  assert hooks.named_checkout(tmp_path, pathlib.Path('/home/me/clone')) == [
    'a.html: names the checkout, /home/me/clone'
  ]
  assert hooks.named_checkout(tmp_path) == []


def test_every_page_is_in_the_menu():
  menu = (ROOT / 'mkdocs.yml').read_text().partition('\nnav:\n')[2]
  config = (ROOT / 'mkdocs.yml').read_text()
  left_out = config.partition('exclude_docs: |\n')[2].partition('\ntheme')[0]
  pages = {
    str(path.relative_to(DOCS))
    for path in DOCS.rglob('*')
    if path.suffix in ('.md', '.py') and path.name not in left_out.split()
  }
  assert set(re.findall(r'[\w/.-]+\.(?:md|py)', menu)) == pages


@pytest.mark.slow
@pytest.mark.parametrize(
  'page', ['tutorials/own_loop.py', 'concepts/projection.py']
)
def test_a_page_that_is_a_program_runs(page):
  pytest.importorskip('equinox')
  # A program of a user may let ranks be promoted, as JAX does by default.
  with jax.numpy_rank_promotion('allow'):
    names = runpy.run_path(str(DOCS / page))
  if 'loss' in names:
    assert float(names['loss']) < 0.1  # At the start 0.9.
    assert all(jax.tree.leaves(names['same']))  # Resumed as uninterrupted.
