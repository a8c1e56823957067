"""The comparison of full training, adapters, and adapters that restart."""

import dataclasses
import json
import sys

import pytest

from benchmarks.common import record
from benchmarks.quality import relora


def row(method, start, seed, rate, loss):
  return {
    'method': method,
    'start': start,
    'seed': seed,
    'rate': rate,
    'eval_loss': loss,
    'trained_parameters': 1_500_000,
    'state_bytes': 3 * 2**20,
  }


ROWS = [
  row('full', 'at random', 0, 0.002, 4.0),
  row('full', 'at random', 0, 0.004, None),
  row('full', 'at random', 1, 0.002, 4.2),
  row('relora', 'warm', 0, 0.008, 4.5),
]


def test_table_has_the_best_rate_and_deviations_over_seeds(tmp_path):
  record.write(tmp_path / 'r.json', {'settings': {}, 'rows': ROWS})
  assert relora.tables(tmp_path / 'r.json')['relora'] == (
    '| method | start | peak rate | eval loss | perplexity | seeds | trained, '
    'millions | state, MiB | tuning |\n'
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n'
    '| full | at random | 0.002 | 4.1000 ± 0.1414 | 60.3 | 2 | 1.50 | 3.0 | '
    '0.002: 4.0000, 0.004: inf |\n'
    '| relora | warm | 0.008 | 4.5000 ± 0.0000 | 90.0 | 1 | 1.50 | 3.0 | '
    '0.008: 4.5000 |\n'
  )


def test_what_is_there_is_not_repeated():
  rates = (0.002, 0.004, 0.001)
  full = relora.of(ROWS, 'full', 'at random')
  assert relora.missing(full, rates, 0) == [0.001]
  assert relora.missing(full, rates, 1) == []
  assert relora.missing(full, rates, 2) == [0.002]
  assert relora.missing([], rates, 0) == list(rates)


@pytest.mark.parametrize(
  ('losses', 'expected'),
  [
    ({1e-3: 4.0, 2e-3: 3.0, 4e-3: 3.5}, []),
    ({1e-3: 4.0, 2e-3: 3.0}, [4e-3]),
    ({1e-3: 3.0, 2e-3: None}, [5e-4]),
    ({1e-3: 3.0}, [2e-3]),  # That is given.
  ],
)
def test_rates_go_on_until_the_best_is_not_at_an_end(losses, expected):
  rows = [
    {'seed': 0, 'rate': rate, 'eval_loss': loss}
    for rate, loss in losses.items()
  ]
  assert relora.missing(rows, (1e-3, 2e-3), 0) == expected


def test_rates_are_those_that_are_given():
  found = relora.rates_of(['lora=1e-3,2e-3'])
  assert found == relora.METHODS | {'lora': (1e-3, 2e-3)}
  with pytest.raises(ValueError) as error:
    relora.rates_of(['dora=1'])
  assert str(error.value) == (
    "'dora=1' names none of ['full', 'lora', 'relora']."
  )


def test_a_file_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
  file = tmp_path / 'r.json'
  record.write(file, {'settings': {'steps': 7}, 'environment': {}, 'rows': []})
  monkeypatch.setattr(sys, 'argv', ['relora', '--output', str(file)])
  with pytest.raises(SystemExit):
    relora.main()
  assert "holds runs of {'steps': 7}." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
def test_runs_of_a_seed_see_the_same_tokens(tmp_path, monkeypatch):
  """A small run of all: what is left of the data after a warm start follows."""
  text = tmp_path / 'text.txt'
  text.write_text(' '.join(f'word{i % 37} of{i % 11}' for i in range(4000)))
  monkeypatch.setenv('HOME', str(tmp_path))
  tiny = relora.llama.LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    max_seq_len=16,
  )

  def preset(size, vocab_size, compute_dtype):
    del size, vocab_size
    return dataclasses.replace(tiny, compute_dtype=compute_dtype)

  monkeypatch.setattr(relora.llama, 'preset', preset)
  file = tmp_path / 'r.json'
  words = [
    *('relora', '--data', str(text), '--runs', str(tmp_path / 'runs')),
    *('--output', str(file), '--steps', '8', '--batch-size', '2'),
    *('--seq-len', '16', '--rank', '2', '--restart-every', '2'),
    *('--eval-batches', '1', '--seeds', '1', '--vocab', '300', '--rates'),
    *('full=0.01', 'lora=0.01', 'relora=0.01'),
  ]
  monkeypatch.setattr(sys, 'argv', words)
  seen = []
  steps = relora.loop.steps

  def watching(*args, **options):
    seen.append([])
    for taken in steps(*args, **options):
      seen[-1].append(taken.batch['inputs'].tolist())
      yield taken

  monkeypatch.setattr(relora.loop, 'steps', watching)
  relora.main()
  rows = record.read(file)['rows']
  assert [(r['method'], r['start']) for r in rows] == [
    (method, start) for start in relora.STARTS for method in relora.METHODS
  ]
  assert all(row['eval_loss'] for row in rows)
  *scratch, warm, full, lora, restarting = seen
  assert len(scratch) == 3 and scratch[0] == scratch[1] == scratch[2]
  assert warm == scratch[0][:2]
  assert full == lora == restarting == scratch[0][2:]
  # Nothing is left to run.
  before = file.read_text()
  relora.main()
  assert len(seen) == 7
  assert json.loads(before)['rows'] == record.read(file)['rows']
