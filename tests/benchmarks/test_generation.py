"""The comparison of writing with a cache and without."""

import numpy as np

from benchmarks.common import record
from benchmarks.train import generation
from gnlorp_jax.models import llama


def test_both_ways_write_the_same_tokens(monkeypatch):
  tiny = llama.LlamaConfig(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    max_seq_len=64,
    initializer_std=0.1,
  )
  monkeypatch.setattr(llama, 'preset', lambda name, **fields: tiny)
  row = generation.measure('tiny', 6, 2)
  assert row['same_tokens'] is True
  assert {way: len(x) for way, x in row['seconds'].items()} == {
    'with': 2,
    'without': 2,
  }
  assert np.all(np.array(list(row['seconds'].values())) > 0)


def test_table_has_speeds_and_the_ratio_of_rounds(tmp_path):
  row = {
    'size': '9m',
    'num_tokens': 100,
    'same_tokens': True,
    'seconds': {'with': [1.0, 2.0, 1.0], 'without': [20.0, 20.0, 10.0]},
  }
  record.write(tmp_path / 'r.json', {'environment': {}, 'rows': [row]})
  assert generation.tables(tmp_path / 'r.json')['generation'] == (
    '| preset | tokens/s, cache | without | ratio | same tokens |\n'
    '| --- | --- | --- | --- | --- |\n'
    '| 9m | 100.0 | 5.0 | 10.0 [10.0, 20.0] | yes |\n'
  )
