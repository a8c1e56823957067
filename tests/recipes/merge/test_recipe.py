"""Folders in, one folder out."""

import json
import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gnlorp_jax.recipes.merge import report
from tests.merging import golden
from tests.recipes.merge import small_folders
from tests.recipes.merge.small_folders import merge, read, write

METHODS = ('average', 'task_arithmetic', 'ties', 'dare', 'tsv', 'doge')


def actions(found):
  return {row['name']: row['action'] for row in found['tensors']}


@pytest.mark.parametrize('variant', golden.VARIANTS)
def test_folders_of_the_oracle_merge_as_it_does(tmp_path, variant):
  def whole(tensors):
    return {n: np.array(x, np.float32) for n, x in tensors.items()}

  base = write(tmp_path / 'base', whole(golden.base()))
  experts = [
    write(tmp_path / str(i), whole(golden.expert(i))) for i in range(3)
  ]
  fields = dict(golden.VARIANTS[variant])
  merge(tmp_path / 'out', base, experts, method='doge', eta=0.07, **fields)
  found, arrays = read(tmp_path / 'out'), golden.arrays()
  assert found.keys() == golden.base().keys()
  for name, merged in found.items():
    wanted = arrays.get(f'{variant}/merged/{name}', golden.base()[name])
    moved = np.linalg.norm(wanted - golden.base()[name])
    # Adam takes whole steps along gradients that are zero but for rounding.
    error = np.linalg.norm(merged - wanted)
    tolerance = 1e-4 if variant == 'steps10' else 2e-3
    if name not in golden.MATRICES:
      assert error < 1e-6
    else:
      assert error < tolerance * moved


def test_average_of_equal_folders_is_that_folder(tmp_path, trio):
  base, experts = trio
  tensors = read(experts[0])
  tensors['norm.scale'] = tensors['norm.scale'].astype(ml_dtypes.bfloat16)
  tensors['layers.0.q.bias'] = np.arange(8) / 3  # float64
  a, b = (write(tmp_path / f'same{i}', tensors) for i in range(2))
  found = merge(tmp_path / 'out', a_base(tmp_path, tensors), [a, b])
  path = tmp_path / 'out' / 'model.safetensors'
  for name, array in safetensors.numpy.load_file(path).items():
    assert array.dtype == tensors[name].dtype
    assert array.tobytes() == tensors[name].tobytes()
  assert {row['result'] for row in found['tensors']} == {'equal in all experts'}


def a_base(tmp_path, tensors):
  return write(
    tmp_path / 'zeros', {n: np.zeros_like(x) for n, x in tensors.items()}
  )


def test_average_is_the_weighted_mean(tmp_path, trio):
  base, experts = trio
  merge(tmp_path / 'out', base, experts, weights=(1.0, 2.0, 1.0))
  a, b, c = map(read, experts)
  for name, merged in read(tmp_path / 'out').items():
    wanted = (a[name] + 2 * b[name] + c[name]) / 4
    np.testing.assert_allclose(merged, wanted, atol=1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_unchanged_experts_leave_the_base_bit_by_bit(tmp_path, trio, method):
  base, _ = trio
  copies = [write(tmp_path / f'copy{i}', read(base)) for i in range(2)]
  merge(tmp_path / 'out', base, copies, method=method)
  before = read(base)
  for name, merged in read(tmp_path / 'out').items():
    assert merged.tobytes() == before[name].tobytes()


@pytest.mark.parametrize('method', METHODS)
def test_a_tensor_that_one_expert_left_alone_is_finite(tmp_path, trio, method):
  base, experts = trio
  tensors = read(experts[1])
  tensors['layers.0.q.weight'] = read(base)['layers.0.q.weight']
  half = write(tmp_path / 'half', tensors)
  out = tmp_path / 'out'
  found = merge(out, base, [experts[0], half], method=method)
  merged = read(out)
  assert all(np.isfinite(array).all() for array in merged.values())
  name = 'layers.0.q.weight'
  assert (merged[name] != read(base)[name]).any()
  if method != 'average':
    (row,) = (r for r in found['tensors'] if r['name'] == name)
    assert row['result'] == 'merged, unchanged in half'
    assert row['tau_norms'][1] == 0


def test_everything_may_stay(tmp_path, trio):
  base, experts = trio
  for method in ('ties', 'dare', 'doge'):
    out = tmp_path / method
    merge(out, base, experts, method=method, keep=(100.0,), steps=400)
    assert all(np.isfinite(array).all() for array in read(out).values())
  # Of all entries DARE drops none: it is task arithmetic.
  merge(tmp_path / 'sum', base, experts, method='task_arithmetic')
  wanted = read(tmp_path / 'sum')
  for name, merged in read(tmp_path / 'dare').items():
    np.testing.assert_allclose(merged, wanted[name], atol=1e-6)


def test_methods_of_matrices_leave_the_rest_to_others(tmp_path, trio):
  base, experts = trio
  doge = merge(tmp_path / 'doge', base, experts, method='doge', solver='exact')
  tsv = merge(tmp_path / 'tsv', base, experts, method='tsv')
  for found, other in ((doge, 'base'), (tsv, 'average')):
    expected = dict.fromkeys(small_folders.SHAPES, other)
    expected |= {f'layers.{i}.q.weight': 'merged' for i in range(2)}
    assert actions(found) == expected
  np.testing.assert_allclose(
    read(tmp_path / 'tsv')['embed.weight'],
    np.mean([read(e)['embed.weight'] for e in experts], 0),
    atol=1e-6,
  )
  rest = (t for n, t in read(tmp_path / 'doge').items() if 'weight' not in n)
  assert [t.tobytes() for t in rest] == [
    t.tobytes() for n, t in read(base).items() if 'weight' not in n
  ]


@pytest.mark.parametrize('method', ['tsv', 'doge'])
def test_matrices_thinner_than_the_experts_are_many(tmp_path, method):
  # Such as the gate of a shared expert, which has one output.
  shapes = {'layers.0.gate.weight': (2, 8)}
  base = small_folders.drawn(0, shapes)
  folder = write(tmp_path / 'base', base)
  tuned = [small_folders.drawn(i, shapes, like=base) for i in (1, 2, 3)]
  experts = [write(tmp_path / str(i), t) for i, t in enumerate(tuned)]
  found = merge(tmp_path / 'out', folder, experts, method=method)
  gate = read(tmp_path / 'out')['layers.0.gate.weight']
  if method == 'tsv':
    row = found['tensors'][0]
    assert (row['action'], row['why']) == (
      'average',
      'tsv has no direction for each of 3 experts: --others average',
    )
    wanted = np.mean([t['layers.0.gate.weight'] for t in tuned], 0)
    np.testing.assert_allclose(gate, wanted, atol=1e-6)
  else:
    assert np.isfinite(gate).all()
    assert (gate != base['layers.0.gate.weight']).any()


def test_shards_in_and_out_are_the_same_tensors(tmp_path, trio):
  base, experts = trio
  tensors = read(experts[0])
  sharded = tmp_path / 'sharded'
  write(sharded, {})
  (sharded / 'model.safetensors').unlink()
  places = {}
  for index, (name, tensor) in enumerate(tensors.items()):
    places[name] = f'model-{index}.safetensors'
    safetensors.numpy.save_file({name: tensor}, sharded / places[name])
  (sharded / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': places})
  )
  merge(tmp_path / 'one', base, [experts[0], experts[1]], method='ties')
  merge(
    *(tmp_path / 'many', base, [sharded, experts[1]]),
    method='ties',
    shard_gb=300 / 2**30,
  )
  assert len(list((tmp_path / 'many').glob('model-*.safetensors'))) > 2
  index = json.loads(
    (tmp_path / 'many' / 'model.safetensors.index.json').read_text()
  )
  wanted = read(tmp_path / 'one')
  assert index['weight_map'].keys() == wanted.keys()
  for name, merged in read(tmp_path / 'many').items():
    assert merged.tobytes() == wanted[name].tobytes()


def test_dtypes_are_the_bases_or_one(tmp_path, trio):
  base, experts = trio
  half = {n: x.astype(ml_dtypes.bfloat16) for n, x in read(base).items()}
  low = write(tmp_path / 'low', half)
  fields = {'method': 'task_arithmetic', 'scale': 0.5}
  merge(tmp_path / 'out', low, experts, **fields)
  merge(tmp_path / 'wide', low, experts, dtype='float32', **fields)
  wide = read(tmp_path / 'wide')
  config = json.loads((tmp_path / 'wide' / 'config.json').read_text())
  assert config['dtype'] == 'float32'
  for name, merged in read(tmp_path / 'out').items():
    assert merged.dtype == ml_dtypes.bfloat16
    # What changed is the difference from the base as it was rounded.
    start = half[name].astype(np.float32)
    taus = [read(e)[name] - start for e in experts]
    np.testing.assert_allclose(wide[name], start + 0.5 * sum(taus), atol=1e-6)
    assert merged.tobytes() == wide[name].astype(merged.dtype).tobytes()


def test_what_a_dtype_cannot_hold_is_an_error(tmp_path, trio):
  base, experts = trio
  with pytest.raises(ValueError) as error:
    merge(
      *(tmp_path / 'out', base, experts),
      method='task_arithmetic',
      scale=1e9,
      dtype='float16',
    )
  assert 'which F16 cannot hold. Write another: --dtype bfloat16' in str(
    error.value
  )
  assert not (tmp_path / 'out').exists()


def test_lora_is_the_product_of_its_factors(tmp_path, trio):
  base, experts = trio
  rng = np.random.default_rng(0)
  a, b = (
    np.array(rng.standard_normal(shape), np.float32)
    for shape in ((2, 8), (8, 2))
  )
  lora = small_folders.write_lora(tmp_path / 'lora', {'layers.0.q': (a, b)})
  tensors = read(base)
  tensors['layers.0.q.weight'] = tensors['layers.0.q.weight'] + 2 * b @ a
  whole = write(tmp_path / 'whole', tensors)
  for method in METHODS:
    outs = []
    for expert in (lora, whole):
      outs.append(tmp_path / f'{method}{len(outs)}')
      # What is dropped at random depends on a label: the same one.
      place = (tmp_path / method / 'x').absolute()
      place.parent.mkdir(exist_ok=True)
      place.symlink_to(expert)
      merge(outs[-1], base, [place, experts[0]], method=method)
      place.unlink()
    wanted = read(outs[1])
    for name, merged in read(outs[0]).items():
      np.testing.assert_allclose(merged, wanted[name], atol=2e-5)


def test_heads_stay_with_their_tasks(tmp_path, trio):
  base, experts = trio
  tasks = []
  for index, expert in enumerate(experts[:2]):
    tensors = {f'bert.{n}': x for n, x in read(expert).items()}
    tensors['classifier.out.weight'] = np.full((index + 2, 8), index, 'f4')
    config = small_folders.CONFIG | {'labels': index + 2}
    tasks.append(write(tmp_path / f'task{index}', tensors, config))
  plain, one, each = (tmp_path / name for name in ('plain', 'one', 'each'))
  merge(plain, base, tasks)
  merge(one, base, tasks, heads='task1')
  merge(each, base, tasks, heads='each')
  assert read(plain).keys() == small_folders.SHAPES.keys()
  found = read(one)
  names = {f'bert.{n}' for n in small_folders.SHAPES}
  assert found.keys() == names | {'classifier.out.weight'}
  assert (found['classifier.out.weight'] == 1).all()
  for name, tensor in read(plain).items():
    assert found[f'bert.{name}'].tobytes() == tensor.tobytes()
  assert json.loads((one / 'config.json').read_text())['labels'] == 3
  for index in range(2):
    head = safetensors.numpy.load_file(
      each / 'heads' / f'task{index}.safetensors'
    )
    assert head['classifier.out.weight'].shape == (index + 2, 8)
  with pytest.raises(ValueError) as error:
    merge(tmp_path / 'no', base, tasks, heads='task3')
  assert str(error.value) == (
    "Unknown heads 'task3'; expected one of ('base', 'each', 'task0', 'task1')."
  )


def test_a_head_and_its_config_are_not_put_on_tensors_of_other_shapes(
  tmp_path, trio
):
  base, experts = trio
  untied = small_folders.CONFIG | {'tie_word_embeddings': False}
  tensors = read(experts[0]) | {'embed.weight': np.zeros((22, 8), 'f4')}
  tensors |= {'lm_head.weight': np.ones((22, 8), 'f4')}
  larger = write(tmp_path / 'larger', tensors, untied)
  fields = {'exclude': 'embed|^lm_head'}
  merge(tmp_path / 'plain', base, [larger, experts[1]], **fields)
  with pytest.raises(ValueError) as error:
    merge(
      *(tmp_path / 'out', base, [larger, experts[1]]),
      heads='larger',
      **fields,
    )
  assert str(error.value).splitlines()[1] == (
    '  embed.weight: [20, 8] in the base, [22, 8] in larger, whose config.json '
    '--heads larger takes: use --heads base or each'
  )


def test_all_that_does_not_fit_is_named_before_work(tmp_path, trio):
  base, experts = trio
  wrong = read(experts[0])
  wrong['embed.weight'] = np.zeros((22, 8), np.float32)
  wrong['layers.0.q.bias'] = np.zeros(9, np.float32)
  wrong['layers.9.q.bias'] = np.zeros(8, np.float32)
  del wrong['norm.scale']
  expert = write(tmp_path / 'wrong', wrong)
  with pytest.raises(ValueError) as error:
    merge(tmp_path / 'out', base, [experts[1], expert])
  assert str(error.value).splitlines() == [
    '4 tensors do not fit:',
    '  embed.weight: [20, 8] in the base, [22, 8] in wrong (vocabularies of 20 '
    "and 22 tokens: --exclude 'embed.weight' merges the rest, with the base's "
    'embedding and tokenizer)',
    '  layers.0.q.bias: [8] in the base, [9] in wrong',
    '  norm.scale: wrong lacks it',
    '  layers.9.q.bias: wrong has it, the base has no such tensor',
    '--exclude REGEX keeps the tensors of the base that it matches.',
  ]
  assert not (tmp_path / 'out').exists()
  found = merge(
    *(tmp_path / 'out', base, [experts[1], expert]),
    exclude=r'embed|bias|scale',
  )
  assert actions(found)['embed.weight'] == 'base'
  assert actions(found)['layers.0.q.weight'] == 'merged'


def test_heads_that_are_tied_in_one_folder_alone_are_an_error(tmp_path, trio):
  base, experts = trio
  untied = read(experts[0])
  untied['lm_head.weight'] = np.ones((20, 8), np.float32)
  fields = small_folders.CONFIG | {'tie_word_embeddings': False}
  expert = write(tmp_path / 'untied', untied, fields)
  with pytest.raises(ValueError) as error:
    merge(tmp_path / 'out', base, [expert])
  assert (
    'lm_head.weight: the base ties its head to its embedding, untied does not'
  ) in str(error.value)
  merge(tmp_path / 'out', base, [expert], exclude='^lm_head')
  assert 'lm_head.weight' not in read(tmp_path / 'out')
  # Where all have it, it is a tensor as others; a copy of it is left out.
  both = write(tmp_path / 'base2', {**read(base), **lm_head(0)}, fields)
  found = merge(tmp_path / 'out2', both, [expert])
  assert actions(found)['lm_head.weight'] == 'merged'
  assert (read(tmp_path / 'out2')['lm_head.weight'] == 1).all()
  tied = small_folders.CONFIG | {'tie_word_embeddings': True}
  copies = [
    write(tmp_path / f'tied{i}', {**read(base), **lm_head(i)}, tied)
    for i in range(2)
  ]
  found = merge(tmp_path / 'out3', copies[0], copies[1:])
  assert actions(found)['lm_head.weight'] == 'left out'
  # What an adapter adds to such a copy would be lost.
  factors = np.ones((2, 8), np.float32), np.ones((20, 2), np.float32)
  lora = small_folders.write_lora(tmp_path / 'lora', {'lm_head': factors})
  with pytest.raises(ValueError) as error:
    merge(tmp_path / 'out4', copies[0], [lora, copies[1]])
  assert str(error.value).splitlines()[1] == (
    '  lm_head.weight: lora adapts it, and the base ties it to its embedding; '
    "to go without: --exclude '^lm_head'"
  )
  merge(tmp_path / 'out4', copies[0], [lora, copies[1]], exclude='^lm_head')


def lm_head(value):
  return {'lm_head.weight': np.full((20, 8), value, np.float32)}


@pytest.mark.parametrize(
  ('change', 'text'),
  [
    ({'out': 'base'}, 'Cannot export to '),
    ({'experts': ('a', 'a')}, '--experts names '),
    ({'experts': ('nothing',)}, 'is no Hugging Face folder: it holds neither'),
    ({'include': 'nowhere'}, 'Nothing would be merged: '),
  ],
)
def test_mistakes_are_found_before_work(tmp_path, trio, change, text):
  fields = {'out': 'out', 'experts': ('a', 'b')} | change
  experts = [tmp_path / name for name in fields.pop('experts')]
  with pytest.raises(ValueError) as error:
    merge(tmp_path / fields.pop('out'), tmp_path / 'base', experts, **fields)
  assert text in str(error.value)
  assert not (tmp_path / 'out').exists()


def test_numbers_that_are_not_finite_are_an_error(tmp_path, trio):
  base, experts = trio
  tensors = read(experts[0])
  tensors['layers.0.q.bias'][3] = np.nan
  broken = write(tmp_path / 'broken', tensors)
  for method in ('average', 'ties'):
    with pytest.raises(ValueError, match='layers.0.q.bias.* not finite'):
      merge(tmp_path / 'out', base, [broken, experts[1]], method=method)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    *('a', 'b', 'base', 'broken', 'c')
  ]


def test_a_dry_run_writes_nothing(tmp_path, trio, capsys):
  base, experts = trio
  found = merge(tmp_path / 'out', base, experts, method='doge', dry_run=True)
  assert not (tmp_path / 'out').exists()
  report.show(found)
  shown = capsys.readouterr().out
  assert 'layers.*.q.weight      2  8 x 8   merged  --method doge' in shown
  assert 'Nothing was written. Merging holds about 0 MiB of one' in shown


def test_what_was_done_is_left_beside(tmp_path, trio, capsys):
  base, experts = trio
  out = tmp_path / 'out'
  found = merge(out, base, experts, method='doge', include='q.weight|none')
  assert (out / 'tokenizer.json').read_text() == 'tokenizer.json of base'
  assert (out / 'generation_config.json').exists()
  assert json.loads((out / 'config.json').read_text()) == small_folders.CONFIG
  told = json.loads((out / 'merge.json').read_text())
  assert told['tensors'] == found['tensors']
  assert told['eta'] == found['eta'] > 0
  (row,) = (r for r in told['tensors'] if r['name'] == 'layers.0.q.weight')
  assert row['loss_after'] < row['loss_before']
  assert len(row['lambda']) == len(row['tau_norms']) == 3
  assert 0 < row['kept'] < 1
  card = (out / 'README.md').read_text()
  assert card.startswith('---\nbase_model: ["')
  assert '| not included by q.weight\\|none: --others base |' in card
  report.show(found)
  assert f'Written to {out}' in capsys.readouterr().out


def test_experts_of_whom_nothing_is_dropped_are_named(tmp_path, trio):
  base, experts = trio
  tensors = read(base)
  tensors['layers.0.q.bias'] = tensors['layers.0.q.bias'] + np.float32(1)
  few = write(tmp_path / 'few', tensors)
  found = merge(tmp_path / 'out', base, [few, experts[0]], method='ties')
  assert found['thresholds'][0] == 0 < found['thresholds'][1]
  assert report.card(found).count('drops nothing') == 1
  assert (
    'keep 20 drops nothing of few: fewer of its entries changed at all'
  ) in report.card(found)


def test_what_a_tokenizer_needs_is_copied(tmp_path, trio):
  base, experts = trio
  names = ('sentencepiece.bpe.model', 'spm.model', 'preprocessor_config.json')
  for name in (*names, 'modeling_own.py', 'notes.md'):
    (base / name).write_text(name)
  merge(tmp_path / 'out', base, experts)
  for name in (*names, 'modeling_own.py'):
    assert (tmp_path / 'out' / name).read_text() == name
  assert not (tmp_path / 'out' / 'notes.md').exists()


KILLED = """
import os, signal, sys, time
from gnlorp_jax.models import hf_tensors
from gnlorp_jax.recipes.merge import recipe
from tests.recipes.merge import small_folders

values, count = recipe.Merger.values, 0

def waiting(self, row, headed):
  global count
  count += 1
  if count == 3:
    print('in the middle', flush=True)
    time.sleep(60)
  return values(self, row, headed)

recipe.Merger.values = waiting
small_folders.merge(*sys.argv[1:3], sys.argv[3:])
"""


def test_a_kill_in_the_middle_leaves_no_half_folder(tmp_path, trio):
  base, experts = trio
  words = [str(tmp_path / 'out'), str(base), *map(str, experts)]
  with subprocess.Popen(
    [sys.executable, '-c', KILLED, *words], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'in the middle\n'
    os.kill(process.pid, signal.SIGKILL)
  assert not (tmp_path / 'out').exists()
  merge(tmp_path / 'out', base, experts)
  assert read(tmp_path / 'out').keys() == small_folders.SHAPES.keys()
