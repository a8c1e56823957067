"""The table and the picture."""

import io

import pytest
import rich.console
from matplotlib import figure

from gnlorp_jax.recipes.layer_scores import report

FOUND = {
  'model': 'a model',
  'kind': 'outliers',
  'threshold': 5.0,
  'scores': (0.25, 0.0),
  'all': {
    'outliers': {'3': [1.5, 0.5], '5': [0.25, 0.0], '40': [0.0, 0.0]},
    'weight_norm': [300.25, 2e6],
    'gradient_norm': [1e-9, 0.5],
    'hill': [2.5, 3.0],
  },
  'sequences': 3,
  'tokens': 48,
}


@pytest.mark.parametrize('width', [100, 20])
def test_the_table_has_a_row_for_each_layer(width):
  shown = io.StringIO()
  report.show(FOUND, rich.console.Console(file=shown, width=width))
  rows = [line.split() for line in shown.getvalue().splitlines()]
  head = ['layer', '%>3', '%>5', '%>40', 'norm', 'norm', 'hill', 'score']
  assert head in rows
  assert '0 1.5 0.25 0 300 1e-09 2.5 0.25'.split() in rows
  assert '1 0.5 0 0 2e+06 0.5 3 0'.split() in rows


@pytest.mark.parametrize(
  ('kind', 'line'),
  [
    ('outliers', 'score: outliers above 5; 3 sequences, 48 tokens.'),
    ('weight_norm', 'score: weight_norm; 3 sequences, 48 tokens.'),
    ('hill', 'score: 1 / hill; 3 sequences, 48 tokens.'),
  ],
)
def test_the_table_says_what_the_scores_are(kind, line):
  shown = io.StringIO()
  console = rich.console.Console(file=shown, width=100)
  report.show({**FOUND, 'kind': kind}, console)
  assert shown.getvalue().splitlines()[-1] == line


@pytest.fixture
def drawn(monkeypatch):
  """The panels of a picture, which is not drawn."""

  def draw(found):
    panels = []
    monkeypatch.setattr(
      figure.Figure, 'savefig', lambda self, *_, **__: panels.extend(self.axes)
    )
    report.plot('scores.png', found)
    return panels

  return draw


def test_the_picture_has_a_panel_for_each_kind(drawn):
  panels = drawn(FOUND)
  assert [len(axes.lines) for axes in panels] == [3, 1, 1, 1]
  assert panels[0].get_title(loc='left').endswith(': the scores')
  legend = [text.get_text() for text in panels[0].get_legend().get_texts()]
  assert legend == ['M = 3', 'M = 5', 'M = 40']
  # Curves are those of the numbers, and the scores have a colour of their own.
  assert list(panels[1].lines[0].get_ydata()) == [300.25, 2e6]
  colours = [line.get_color() for line in panels[0].lines]
  assert colours[1] not in (colours[0], colours[2])
  assert panels[1].get_ylim()[0] == 0


def test_the_picture_says_that_scores_are_one_over_alpha(drawn):
  (axes,) = drawn({**FOUND, 'kind': 'hill', 'all': {'hill': [2.5, 3.0]}})
  assert axes.get_title(loc='left').endswith(': the scores are 1 / alpha')
