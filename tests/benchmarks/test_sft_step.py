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
  (row,) = json.loads(output.read_text())['rows']
  assert row['loss_difference'] < 1e-4
  assert [len(turns) for turns in row['seconds'].values()] == [2, 2]
  assert capsys.readouterr().out == sft_step.table([row])
