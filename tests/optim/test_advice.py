"""Which optimizers fit a budget, in which order, and what is said of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from gnlorp_jax import optim, recommend
from gnlorp_jax.optim import advice, inspect

PARAMS = {
  'embed': {'embedding': jnp.ones((300, 32), jnp.bfloat16)},
  'layers': {'up': {'kernel': jnp.ones((2, 32, 300), jnp.bfloat16)}},
  'norm': {'scale': jnp.ones(32, jnp.bfloat16)},
}
NUMBER = 300 * 32 + 2 * 32 * 300 + 32
ALL = 2**40  # More than any of them takes.


def a_row(name, loss, deviation, seeds=2, **fields):
  default = {
    **{'optimizer': name, 'options': {}, 'of_width': {}},
    **{'name': name, 'loss': loss, 'deviation': deviation, 'seeds': seeds},
    **{'rates': (5e-4, 1e-3, 2e-3), 'learning_rate': 1e-3},
  }
  return advice.Row(**{**default, **fields})


@pytest.fixture(scope='module')
def everything():
  return recommend(PARAMS, ALL)


def test_nothing_is_warned_of(caplog):
  recommend(PARAMS, ALL)
  assert not caplog.messages


def test_bytes_are_those_of_real_arrays(everything):
  assert {a.name for a in everything} == {r.name for r in advice.record().rows}
  for found in everything:
    tx = getattr(optim, found.optimizer)(found.learning_rate, **found.options)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(PARAMS)))
    assert found.need == 2 * 2 * NUMBER + state, found.name
    assert found.bytes['weights'] == found.bytes['gradients'] == 2 * NUMBER
    # A quarter of the width, as where it was measured.
    assert found.options.get('rank', 8) == 8


def test_bits_are_those_of_embeddings_too(everything):
  (found,) = (a for a in everything if a.options.get('basis_bits') == 8)
  assert found.options['moment_bits'] == (('.*', 8),)
  tx = getattr(optim, found.optimizer)(1e-3, **found.options)
  rows = {row.name: row for row in inspect.report(PARAMS, tx)}
  row = rows['embed/embedding']
  assert row.state_bytes < 0.3 * row.adamw_bytes


def test_more_memory_never_advises_worse(monkeypatch):
  # As measured, and with noise by which all but one of them are tied.
  measured = advice.record()
  noisy = [dataclasses.replace(row, deviation=0.1) for row in measured.rows]
  for record in (
    measured,
    dataclasses.replace(measured, rows=tuple(noisy)),
  ):
    monkeypatch.setattr(advice, 'record', lambda record=record: record)
    found = recommend(PARAMS, ALL)
    needs = sorted(one.need for one in found)
    best = []
    for budget in sorted({size + more for size in needs for more in (0, 1)}):
      fitting = recommend(PARAMS, budget)
      assert {a.name for a in fitting} == {
        a.name for a in found if a.need <= budget
      }
      assert [(a.place, a.need) for a in fitting] == sorted(
        (a.place, a.need) for a in fitting
      )
      best.append(fitting[0].loss)
    assert best == sorted(best, reverse=True)


def test_nothing_fits_one_byte_below_the_smallest(everything):
  least = min(everything, key=lambda found: found.need)
  assert [a.name for a in recommend(PARAMS, least.need)] == [least.name]
  with pytest.raises(ValueError) as error:
    recommend(PARAMS, least.need - 1)
  text = str(error.value)
  assert text.startswith(f'Nothing fits budget_bytes={least.need - 1} (')
  assert f'the smallest need is {least.need} bytes, of {least.name!r}' in text
  assert re.search(r'\(weights \d+.*, gradients \d+.*, moments \d+', text)
  assert text.endswith(
    'Raise the budget, keep the parameters in bfloat16, or train layer by '
    'layer, with weights in 8 bits: python -m gnlorp_jax.plan --budget says '
    'what that takes.'
  )


def test_activations_count_where_they_are_given(everything):
  least = min(everything, key=lambda found: found.need)
  (found,) = recommend(PARAMS, least.need + 1000, activation_bytes=1000)
  assert found.bytes['activations'] == found.need - least.need == 1000
  message = r'^activation_bytes must be in \[0, inf\), got -1'
  with pytest.raises(ValueError, match=message):
    recommend(PARAMS, ALL, activation_bytes=-1)


def test_kernels_of_several_axes_and_trees_without_kernels():
  heads = {'query': {'kernel': jax.ShapeDtypeStruct((64, 4, 8), 'float32')}}
  with pytest.raises(ValueError) as error:
    recommend(heads, ALL)
  assert str(error.value) == (
    'No parameter is labelled low_rank, so nothing is known about how '
    'optimizers would do. Give param_labels; report() tells why each parameter '
    'has its label.'
  )
  found = recommend(
    heads,
    ALL,
    param_labels=[('query', 'low_rank')],
    kernel_axes=[('query', 1, 2)],
  )
  # The shorter axis is the 4 x 8 heads.
  assert {a.options['rank'] for a in found if 'rank' in a.options} == {8}


def test_options_follow_the_width():
  row = a_row(
    'apollo_mini', 5.0, 0.1, of_width={'scale': 0.25}, options={'b2': 0.9}
  )
  assert row.at_width(1000) == {'scale': 250, 'b2': 0.9}
  ranked = a_row('q_galore', 5.0, 0.1, of_width={'rank': 0.25})
  assert advice.arguments(ranked, 3) == {
    'rank': 1,
    # Its default are moments of 8 bits.
    'moment_bits': (('.*', 8),),
  }


def test_places_are_shared_within_two_standard_errors():
  # The standard error of each is 0.01, of a difference 0.01414.
  rows = [
    a_row(name, loss, 0.01 * 2**0.5)
    for name, loss in (
      ('muon', 5.0),
      ('galore', 5.028),
      ('fira', 5.029),  # Tied with galore, not with the first of its place.
      ('adamw', 5.2),
    )
  ]
  record = dataclasses.replace(advice.record(), rows=tuple(rows))
  assert record.places == (1, 1, 3, 4)
  assert advice.are_tied(rows[1], rows[2])


def test_grounds_say_what_the_advice_rests_on(everything):
  record = dataclasses.replace(
    advice.record(),
    **{'source': 'a.json', 'model': '20m', 'parameters': 5_000_000},
    **{'dtype': 'float32', 'compute_dtype': 'float32'},
    **{'steps': 400, 'tokens': 200_000},
    rows=(a_row('muon', 5.0, 0.1, 3), a_row('adamw', 5.1, 0.1, 2)),
  )
  text = (
    'Losses are those of a.json: LLaMA-20m with 5.0 million parameters in '
    'float32, 0.2 million tokens in 400 whole steps, 2 to 3 seeds.'
  )
  assert record.grounds(5_000_000) == text
  in_bfloat16 = dataclasses.replace(record, compute_dtype='bfloat16')
  assert 'float32 (computed in bfloat16), 0.2' in in_bfloat16.grounds(1)
  assert record.grounds(60_000_000) == (
    f'{text} This model has 60.0 million parameters, 12 times as many: that '
    'the order is the same is an extrapolation.'
  )
  assert everything[0].grounds == advice.record().grounds(NUMBER)


def test_grounds_say_whose_best_rate_is_at_an_edge_of_those_tried():
  low, high = {'rates': (1e-3, 2e-3)}, {'rates': (5e-4, 1e-3)}
  between = a_row('galore', 5.0, 0.1)
  assert between.edge is None
  rows = (
    a_row('muon', 5.0, 0.1, **low),
    between,
    a_row('fira', 5.1, 0.1, **high),
    a_row('adamw', 5.2, 0.1, rates=(1e-3,)),
  )
  record = dataclasses.replace(advice.record(), rows=rows)
  beyond = 'ones may be better, and the order of the optimizers another.'
  assert record.grounds(1).endswith(
    ' seeds. The best rate of muon, adamw was the lowest that was tried: lower '
    f'{beyond} The best rate of fira was the highest that was tried: higher '
    f'{beyond}'
  )
  record = dataclasses.replace(record, rows=rows[::3])
  assert record.grounds(1).endswith(
    ' seeds. The best rate of every optimizer was the lowest that was tried: '
    f'lower {beyond}'
  )
