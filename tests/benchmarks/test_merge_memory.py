"""Memory of merges, measured and computed."""

import dataclasses

import pytest

from benchmarks.scaling import merge_memory
from gnlorp_jax.models import llama

# The embedding, 40 MiB in float32, is the largest tensor.
CONFIG = dataclasses.replace(
  llama.preset('9m'), vocab_size=40960, hidden_size=256, num_layers=1
)
LARGE = llama.preset('7b')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('folders')
  tensors = merge_memory.tensors_of(CONFIG)
  return root, [
    merge_memory.write(root / name, CONFIG, tensors, seed)
    for seed, name in enumerate(('base', '1', '2'))
  ][1:]


@pytest.mark.parametrize('method', ['average', 'ties'])
def test_a_merge_takes_what_a_dry_run_says(folders, method):
  root, experts = folders
  merge_memory.measure(root, method, experts, 1)  # Compiles.
  (root / f'out_{method}').rename(root / f'first_{method}')
  row = merge_memory.measure(root, method, experts, 1)
  computed = merge_memory.computed(CONFIG, method, 2)
  # Buffers of reading and writing, and what the allocator keeps.
  assert row['peak_bytes'] <= computed + 2**20 * 48
  assert row['peak_bytes'] >= 0.6 * computed


def test_memory_of_four_models_of_7b_is_a_few_copies_of_one_tensor():
  largest = 4 * 11008 * 4096  # Of those that are merged.
  embedding = 4 * 32000 * 4096
  for method in ('ties', 'dare', 'task_arithmetic'):
    found = merge_memory.computed(LARGE, method, 4)
    assert found == (4 + 5) * embedding
    # Three stacks of task vectors.
    assert found <= 3 * 4 * embedding
  assert merge_memory.computed(LARGE, 'doge', 4) == (4 + 20) * largest
  # TSV takes the average of embeddings.
  assert merge_memory.computed(LARGE, 'tsv', 4) == 6 * embedding
