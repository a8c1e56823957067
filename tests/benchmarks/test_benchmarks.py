<<<<<<< HEAD
"""The benchmarks on tiny weights: options, and a comparison."""

import json
=======
"""The benchmarks on tiny weights: options, and counted bytes."""
>>>>>>> bench-a

import pytest

from benchmarks.common import methods
<<<<<<< HEAD
from benchmarks.train import finetune_step
=======
from benchmarks.scaling import state_bytes
>>>>>>> bench-a


def test_options_that_a_method_lacks():
  with pytest.raises(methods.AbsentError, match='^adamw has no option side$'):
    methods.build('adamw', {'side': 'both'}, learning_rate=1.0)
  methods.build('adamw', {'side': 'short'}, learning_rate=1.0, rank=4)
  with pytest.raises(methods.AbsentError) as error:
    methods.build('galore', {'side': 'up'}, learning_rate=1.0)
  assert str(error.value).startswith(
    "galore refuses {'side': 'up'}: Unknown side 'up'; expected one of"
  )


<<<<<<< HEAD
def test_fine_tuning_beside_pytorch_computes_the_same(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  output = tmp_path / 'speed.json'
  arguments = ['--rounds', '2', '--turn', '2', '--dropout', '0.0']
  monkeypatch.setattr(
    'sys.argv', ['finetune_step', *arguments, '--output', str(output)]
  )
  finetune_step.main()
  (row,) = json.loads(output.read_text())['rows']
  assert row['loss_difference'] < 1e-4
  low, middle, high = row['ratio']
  assert 0 < low <= middle <= high
  assert [len(turns) for turns in row['seconds'].values()] == [2, 2]
=======
SHAPES = jax.eval_shape(
  lambda: {
    'embed': {'embedding': jnp.zeros((40, 16), jnp.bfloat16)},
    'dense': {'kernel': jnp.zeros((2, 16, 24), jnp.bfloat16)},
    'norm': {'scale': jnp.zeros(16, jnp.bfloat16)},
  }
)


def count(alias, **changes):
  known = {
    **{'embeddings': 'full', 'rank': 4, 'side': 'short'},
    **{'moment_bits': None, 'basis_bits': None},
  }
  return state_bytes.row(alias, known | changes, SHAPES)


def test_state_bytes_of_a_tiny_model():
  full = 2 * 4 * (40 * 16 + 16)
  known = count('galore')
  assert known['moments_bytes'] == full + 2 * 4 * (2 * 24 * 4)
  assert known['bases_bytes'] == 4 * (2 * 16 * 4)
  known = count('galore', side='both')
  assert known['moments_bytes'] == full + 2 * 4 * (2 * 4 * 4)
  assert known['bases_bytes'] == 4 * (2 * 16 * 4 + 2 * 24 * 4)
  known = count('galore', embeddings='projected')
  assert known['moments_bytes'] == 2 * 4 * (2 * 24 * 4 + 40 * 4 + 16)
  assert known['bases_bytes'] == 4 * (2 * 16 * 4 + 16 * 4)
  known = count('gradnormlorp')
  assert known['moments_bytes'] == full + 2 * 4 * (2 * 24 * 4 + 2 * 24)
  parts = ('moments', 'bases', 'other')
  assert known['bytes'] == sum(known[f'{part}_bytes'] for part in parts)
  adam = 2 * 2 * (40 * 16 + 2 * 16 * 24 + 16)
  assert state_bytes.baseline(SHAPES) == adam
  assert known['saving'] == pytest.approx(1 - known['bytes'] / adam)


def test_every_setting_that_exists_has_a_row():
  saved = []
  rows, absent = state_bytes.benchmark(
    ['gradnormlorp', 'adamw'], SHAPES, lambda *found: saved.append(len(found))
  )
  assert len(saved) == len(rows) + len(absent)
  assert {known['method'] for known in rows} == {'gradnormlorp', 'adamw'}
  assert {known['rank'] for known in rows if known['method'] == 'adamw'} == {
    None
  }
  for known in rows:
    speaks_of_it = (
      known['method'] == 'gradnormlorp' and known['moment_bits'] == 8
    )
    assert (known['reaches_paper'] is not None) == speaks_of_it
  text = state_bytes.table(rows)
  assert text.count('rank 512') == 1 and '| adamw | full |' in text


def test_the_paper_is_reached_in_bold():
  known = count('gradnormlorp') | {'moment_bits': 8, 'rank': 256}
  known |= {'saving': 0.9, 'bytes': 2_700_000_000, 'reaches_paper': True}
  assert '**2.70 GB, 90.0%**' in state_bytes.table([known])


def test_the_yardstick_is_the_published_one():
  assert state_bytes.baseline(state_bytes.shapes_of('7b')) == 4 * 6_738_415_616
>>>>>>> bench-a
