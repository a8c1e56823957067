r"""Speed of instruction tuning beside transformers' and PEFT's PyTorch.

  python -m benchmarks.train.sft_step --model SMOLLM2_FOLDER --data chats.jsonl

Both sides take whole steps, AdamW without decay at one learning rate, on the
same batches of conversations in turns: rows padded on the right to one length,
the mean over the learned tokens. `full` trains all weights, `lora` adapters of
rank 8 on all matrices of the blocks. Weights and states are float32; all else
is float32 or, of PyTorch by its autocast, bfloat16. Rows of another version of
JAX stay in the record, if they are of the same processor and sizes.

  ratio    ours to PyTorch's tokens per second, padding included: median over
           the turns, in brackets its quartiles; above 1 ours is faster
  losses   largest difference of the two losses in the first steps
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, peers, programs, record, turns
from benchmarks.common.tables import median_in_quartiles, number, of_columns
from gnlorp_jax.compose import adaptation
from gnlorp_jax.config import ChatDataConfig, SftConfig, SftEvalOptions
from gnlorp_jax.models.interface import Dtype
from gnlorp_jax.recipes.sft import recipe
from gnlorp_jax.training import sharding
from gnlorp_jax.training.state import TrainState

RESULTS = pathlib.Path('benchmarks/results/sft_step.json')
PAGE = pathlib.Path('docs/results/train.md')
RATES = {'full': 1e-5, 'lora': 2e-4}
"""The methods, and the learning rate of each."""
Row = dict[str, Any]


def _settings(args: argparse.Namespace, method: str, dtype: Dtype) -> SftConfig:
  """The fine-tuning that is timed."""
  optim = dataclasses.replace(
    SftConfig().optim,
    learning_rate=RATES[method],
    clip_global_norm=None,
    warmup_fraction=0.0,
    final_fraction=1.0,
  )
  return SftConfig(
    init_from=str(args.model),
    model=dataclasses.replace(SftConfig().model, compute_dtype=dtype),
    method=method,
    optim=optim,
    batch_size=args.batch_size,
    epochs=100,
    keep_best=False,
    data=ChatDataConfig(
      source=str(args.data),
      template=args.template,
      max_length=args.max_length,
      packing=False,
      val_size=0,
    ),
    eval=SftEvalOptions(generate=0),
  )


def _padded(batches: list[Any], length: int, pad_id: int) -> list[Any]:
  """The batches, all of one shape, so that one program is timed.

  Each names the positions at which it is learned, as many as the one that has
  most of them.
  """
  most = max(batch['targets'].shape[1] for batch in batches)

  def widen(name: str, x: np.ndarray) -> np.ndarray:
    fill = pad_id if name in ('inputs', 'targets') else 0
    size = length if name == 'inputs' else most
    return np.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=fill)

  return [
    {
      name: widen(name, x)
      for name, x in {'positions': _everywhere(batch), **batch}.items()
    }
    for batch in batches
  ]


def _everywhere(batch: dict[str, np.ndarray]) -> np.ndarray:
  rows, size = batch['targets'].shape
  return np.tile(np.arange(size, dtype=np.int32), (rows, 1))


class _Theirs(peers.TorchTraining):
  """The same steps with transformers, PEFT and PyTorch."""

  def __init__(
    self,
    settings: SftConfig,
    prepared: recipe.Prepared,
    start: TrainState,
    batches: list[Any],
  ):
    super().__init__('cpu')
    self._batches = batches
    self._is_half = settings.model.compute_dtype == 'bfloat16'
    causal = peers.module('transformers').AutoModelForCausalLM
    self._model = causal.from_pretrained(
      settings.init_from, dtype=self.torch.float32
    )
    if settings.method == 'lora':
      with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'adapter')
        adaptation.export_peft(
          *(path, start.params, {}, prepared.program.adapter),
          prepared.config.model,
          base=None,
        )
        self._model = peers.module('peft').PeftModel.from_pretrained(
          self._model, str(path), is_trainable=True
        )
    self._model.train()
    trained = [p for p in self._model.parameters() if p.requires_grad]
    rate = RATES[settings.method]
    self.optimizer = self.torch.optim.AdamW(
      trained, rate, eps=1e-8, weight_decay=0.0
    )

  def loss_of(self, index: int) -> Any:
    """As `peers.TorchTraining`."""
    torch, batch = self.torch, self._batches[index]
    tokens = torch.from_numpy(batch['inputs']).long()
    targets = np.full(batch['inputs'].shape, -100)
    b, p = np.nonzero(batch['weights'])
    targets[b, batch['positions'][b, p]] = batch['targets'][b, p]
    with torch.autocast('cpu', torch.bfloat16, enabled=self._is_half):
      logits = self._model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), torch.from_numpy(targets).long().flatten()
    )


def _race(args: argparse.Namespace, method: str, dtype: Dtype) -> Row:
  """Both sides on the same batches, turn by turn."""
  settings = _settings(args, method, dtype)
  prepared = recipe.prepare(settings)
  run = recipe.make_run(prepared, prepared.config)
  count = turns.APART + args.rounds * args.turn
  pad_id = prepared.chat.tokenizer.pad_id
  batches = _padded(
    list(itertools.islice(run.batches, count)), args.max_length, pad_id
  )

  def step(state: Any, batch: Any, frozen: Any) -> Any:
    return run.train_step(state, sharding.put_batch(batch, run.mesh), frozen)

  # Ours compiles with a state of its own: both sides then see the same steps.
  started = time.perf_counter()
  programs.Steps(step, run.start(), batches).step(0)
  compile_seconds = time.perf_counter() - started
  start, frozen = run.start()
  theirs = _Theirs(settings, prepared, start, batches)
  sides = {
    'ours': programs.Steps(step, (start, frozen), batches),
    'pytorch': theirs,
  }
  racers = [turns.Racer(name, side, count) for name, side in sides.items()]
  turns.rounds(racers, args.rounds, args.turn)
  seconds = {
    racer.name: [float(turn.seconds.sum()) for turn in racer.turns]
    for racer in racers
  }
  tokens = args.turn * args.batch_size * args.max_length
  ratios = np.array(seconds['pytorch']) / np.array(seconds['ours'])
  losses = (side.losses[: turns.APART] for side in sides.values())
  return {
    **{'jax': jax.__version__, 'method': method, 'dtype': dtype},
    'tokens_per_second': {
      name: float(np.median(tokens / np.array(values)))
      for name, values in seconds.items()
    },
    'ratio': np.percentile(ratios, [25, 50, 75]).tolist(),
    'compile_seconds': compile_seconds,
    'loss_difference': max(abs(a - b) for a, b in zip(*losses, strict=True)),
    'seconds': seconds,
  }


COLUMNS: dict[str, Callable[[Row], str]] = {
  'jax': lambda row: row['jax'],
  'method': lambda row: row['method'],
  'computed in': lambda row: row['dtype'],
  'ours, tokens/s': lambda row: f'{row["tokens_per_second"]["ours"]:.0f}',
  'PyTorch': lambda row: f'{row["tokens_per_second"]["pytorch"]:.0f}',
  'ratio': lambda row: median_in_quartiles(row['ratio']),
  'compilation, s': lambda row: f'{row["compile_seconds"]:.0f}',
  'losses differ by': lambda row: number(row['loss_difference'], '.0e'),
}


def table(rows: list[Row]) -> str:
  """The rows as a Markdown table."""
  return of_columns(rows, COLUMNS)


def tables() -> dict[str, str]:
  """The table of `PAGE`, from the recorded file."""
  return {'sft_step': table(record.read(RESULTS)['rows'])}


def _of_other_versions(path: pathlib.Path, wanted: Row) -> list[Row]:
  """Recorded rows of other versions of JAX that compare with `wanted`."""
  if not path.exists():
    return []
  found = record.read(path)
  shared = ('model', 'batch_size', 'max_length', 'turn', 'cpu', 'cores')
  if any(found[name] != wanted[name] for name in shared):
    return []
  return [row for row in found['rows'] if row['jax'] != jax.__version__]


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, has_device=False)
  add = parser.add_argument
  folder = 'Hugging Face folder of the model'
  add('--model', type=pathlib.Path, help=folder)
  add('--data', type=pathlib.Path, help='conversations')
  add('--template', help='chat template, as of train_sft.py')
  add('--methods', nargs='+', choices=(*RATES,), default=(*RATES,))
  dtypes = get_args(Dtype)
  add('--dtypes', nargs='+', choices=dtypes, default=dtypes)
  add('--batch-size', type=harness.positive, default=4, help='rows of a step')
  add('--max-length', type=harness.positive, default=128, help='their tokens')
  add('--rounds', type=harness.positive, default=6, help='turns of either side')
  add('--turn', type=harness.positive, default=3, help='steps of a turn')
  args = parser.parse_args()
  if args.report:
    report.report('train.sft_step')
    return
  if args.model is None or args.data is None:
    parser.error('--model and --data are needed.')
  written: Row = {
    'model': args.model.name,
    **{'batch_size': args.batch_size, 'max_length': args.max_length},
    **{'turn': args.turn, **harness.environment()},
  }
  written['rows'] = _of_other_versions(args.output, written)
  for method, dtype in itertools.product(args.methods, args.dtypes):
    written['rows'].append(_race(args, method, dtype))
    record.write(args.output, written)
  sys.stdout.write(table(written['rows']))


if __name__ == '__main__':
  main()
