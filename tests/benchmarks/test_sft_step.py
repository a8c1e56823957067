"""Instruction tuning beside PyTorch: both compute the same."""

import json

import pytest

from benchmarks.train import sft_step
from tests.compose import small_lm


@pytest.mark.slow
def test_instruction_tuning_beside_pytorch_computes_the_same(
  tmp_path, monkeypatch, capsys, one_torch_thread
):
  for module in ('torch', 'transformers', 'peft'):
    pytest.importorskip(module)
  records = [
    {'prompt': f'Say {word}.', 'completion': word}
    for word in ('one', 'two', 'three', 'four')
  ]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
  output = tmp_path / 'speed.json'
  words = [
    *('--model', small_lm.write(tmp_path / 'hf'), '--template', 'none'),
    *('--data', str(tmp_path / 'a.jsonl'), '--output', str(output)),
    *('--batch-size', '4', '--max-length', '32', '--rounds', '2'),
    *('--turn', '1', '--methods', 'lora'),
  ]
  monkeypatch.setattr('sys.argv', ['sft_step', *words])
  sft_step.main()
  rows = json.loads(output.read_text())['rows']
  assert [row['dtype'] for row in rows] == ['float32', 'bfloat16']
  # Two ways to compute in bfloat16 round in different places.
  for row, tolerance in zip(rows, (1e-4, 1e-2), strict=True):
    assert row['loss_difference'] < tolerance
    assert [len(turns) for turns in row['seconds'].values()] == [2, 2]
  assert capsys.readouterr().out == sft_step.table(rows)

  # Another version's rows stay, unless another processor measured them.
  found = json.loads(output.read_text())
  found['rows'][0]['jax'] = '0.1'
  output.write_text(json.dumps(found))
  kept = sft_step._of_other_versions(output, found)
  assert [row['jax'] for row in kept] == ['0.1']
  assert not sft_step._of_other_versions(output, found | {'cpu': 'another'})
  assert not sft_step._of_other_versions(tmp_path / 'none.json', found)
