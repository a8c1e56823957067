r"""What a choice of 64 rows among 128 is worth, by every way of choosing.

Three questions, each a part of the record:

  errors  How far is the mean gradient of the chosen rows from that of the pool,
          by the last value projection and by the whole model? On consecutive
          pools, with a model that stands still: a pre-trained one (--model),
          and a small one (--size) after --adapt steps of AdamW on the mixture.
  train   What does the small model learn, source by source, at equal tokens?
          The rate is the same for all. Batches of twice the size take half the
          steps; the loss of each source is on text that is held out.
  cost    How long does a step take and what does it hold, beside the honest
          competitor: all 128 rows in micro-batches? With --timed, on a machine
          that does nothing else.

--data names the sources, two of them rare. Runs are kept in --runs and go on
where they stopped; the JSON file is written after each row, and what is in it
is not run again. Parameters and states are float32, all else bfloat16.

  python -m benchmarks.quality.coresets --model SMOLLM2_FOLDER \
    --data 'wiki=A.json.gz,web=B.json.gz,code=SOURCES,talk=C.txt'

The tables: relative errors with their deviations over the pools; losses with
theirs over the seeds, and differences from `quotas` of runs of one seed with
their standard errors. `plain` is any 64 rows, `quotas` a random choice within
the quotas, with small sources whole.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import harness, programs, record
from benchmarks.common.rows import Row, Rows
from benchmarks.common.tables import markdown, median_in_quartiles
from gnlorp_jax.compose import coreset
from gnlorp_jax.config import (
  CoresetOptions,
  DataConfig,
  MeshConfig,
  OptimConfig,
  SampleConfig,
  TrainConfig,
)
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import loop, sharding
from gnlorp_jax.training.interrupt import StopRequest
from gnlorp_jax.training.selection import selection

PAGE = pathlib.Path('docs/results/coresets.md')
OUTPUT = pathlib.Path('benchmarks/results/coresets.json')
KEYS = ('part', 'model', 'method', 'seed')  # Of a row.

QUOTAS = 'quotas'
# Ways of choosing within quotas, and the options of each.
CHOICES: dict[str, dict[str, Any]] = {
  QUOTAS: {'selector': 'random'},
  'herding': {'selector': 'herding', 'sketch': 0},
  'herding, sketched': {'selector': 'herding'},
  'facility, exact': {'selector': 'facility'},
  'facility, spsa 1': {'selector': 'facility', 'features': 'spsa'},
  'facility, spsa 16': {
    'selector': 'facility',
    'features': 'spsa',
    'directions': 16,
  },
  'facility, spsa 64': {
    'selector': 'facility',
    'features': 'spsa',
    'directions': 64,
  },
}
PLAIN, TWICE, MICRO = 'plain', 'plain, twice', 'twice, micro-batches'


def configure(
  args: argparse.Namespace, where: str, name: str, seed: int = 0
) -> TrainConfig:
  """A run of a method: where is 'small', or what `--model` is called."""
  is_small = where == 'small'
  twice = 2 if name in (TWICE, MICRO) else 1
  options = CoresetOptions()
  if name in CHOICES:
    options = CoresetOptions(pool=2 * args.batch_size, **CHOICES[name])
  return TrainConfig(
    run_dir=str(args.runs / where / name.replace(', ', '_') / str(seed)),
    init_from=None if is_small else str(args.model),
    model=llama.preset(
      args.size, vocab_size=args.vocab, compute_dtype='bfloat16'
    ),
    batch_size=twice * args.batch_size,
    micro_batches=args.pieces * (2 if name == MICRO else 1),
    steps=args.steps // twice,
    eval_every=args.steps // twice,
    eval_batches=args.eval_batches,
    checkpoint_every=max(args.steps // 10, 1),
    checkpoint_keep=1,
    seed=seed,
    coreset=options,
    sample=SampleConfig(num_tokens=0),
    data=DataConfig(
      source=args.data,
      seq_len=args.seq_len,
      cache_dir=str(args.runs / 'cache'),
    ),
    optim=OptimConfig(name='adamw', learning_rate=args.rate),
    mesh=MeshConfig(data=1),
  )


def trained(args: argparse.Namespace, where: str) -> Any:
  """A model to take gradients of: what is prepared, its state and constants."""
  prepared = recipe.prepare(configure(args, where, PLAIN))
  steps = args.adapt if where == 'small' else 0
  config = dataclasses.replace(prepared.config, steps=max(steps, 1))
  run = recipe.make_run(prepared, config)
  state, frozen = run.start()
  numbers = range(1, steps + 1)
  for taken in loop.steps(
    *(run.train_step, state, run.batches, run.mesh, numbers, frozen)
  ):
    state = taken.state
  run.batches.close()
  return prepared, state, frozen


def pools(args: argparse.Namespace, prepared: recipe.Prepared) -> list[Any]:
  """Consecutive pools, in another order than the model was adapted in."""
  options = CoresetOptions(pool=2 * args.batch_size, selector='random')
  config = dataclasses.replace(prepared.config, coreset=options, seed=1000)
  batches = data.training_batches(config, prepared.text)
  found = list(itertools.islice(batches, args.pools))
  batches.close()
  return found


def measure_errors(
  args: argparse.Namespace, where: str, names: Sequence[str], found: Rows
) -> None:
  """Relative errors of all methods on all pools, method by method."""
  names = [n for n in names if n == PLAIN or n in CHOICES]
  keys = [{'part': 'errors', 'model': where, 'method': n} for n in names]
  missing = [key for key in keys if found.find(key) is None]
  if not missing:
    return
  prepared, state, frozen = trained(args, where)
  gradient = _mean_gradient(prepared, args.pieces)
  drawn = pools(args, prepared)
  placed = [sharding.put_batch(pool, prepared.program.mesh) for pool in drawn]
  for key in missing:
    errors = []
    chosen = _choose(args, prepared, key['method'], state, frozen, placed)
    for pool, batch in zip(placed, chosen, strict=True):
      whole = gradient(state.params, frozen, _without_source(pool))
      part = gradient(state.params, frozen, batch)
      errors.append(_relative_errors(part, whole))
      harness.progress(f'  {where}, {key["method"]}: {errors[-1]}')
    last, of_model = np.transpose(errors).tolist()
    found.keep(key | {'last_v': last, 'whole_model': of_model})


def _without_source(pool: Row) -> Row:
  return {name: rows for name, rows in pool.items() if name != 'source'}


def _choose(
  args: argparse.Namespace,
  prepared: recipe.Prepared,
  name: str,
  state: Any,
  frozen: Any,
  placed: Sequence[Any],
) -> Any:
  """The batches that a method chooses of pools, one after the other."""
  if name == PLAIN:
    for number, pool in enumerate(placed):
      rows = np.random.default_rng([7, number]).permutation(
        2 * args.batch_size
      )[: args.batch_size]
      yield {n: x[rows] for n, x in _without_source(pool).items()}
    return
  selected = _selection(prepared, configure(args, 'small', name))
  memory = selected.start()
  for pool in placed:
    memory, batch, _ = selected.choose(memory, state, pool, frozen)
    yield batch


def _selection(
  prepared: recipe.Prepared, config: TrainConfig
) -> selection.Selection:
  sizes = data.rows_by_source(prepared.config, prepared.text)
  found = coreset.make(
    *(config.coreset, prepared.program, prepared.config.model),
    batch_size=config.batch_size,
    micro_batches=config.micro_batches,
    chunk_tokens=config.loss_chunk_tokens,
    seed=config.seed,
    names=tuple(sizes),
    sizes=tuple(sizes.values()),
  )
  assert found is not None
  return found


def _mean_gradient(prepared: recipe.Prepared, pieces: int) -> Any:
  """A function of parameters, frozen ones and a batch, in micro-batches."""
  objective, held = prepared.program.objective, prepared.program.parameters

  @jax.jit
  def sums(params: Any, frozen: Any, batch: Any) -> tuple[Any, jax.Array]:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
      return objective.loss(held.join(params, frozen), batch)

    grads, weight = jax.grad(loss, has_aux=True)(params)
    return grads, weight

  def gradient(params: Any, frozen: Any, batch: Any) -> Any:
    rows = len(batch['inputs']) // pieces
    total, weights = None, 0.0
    for first in range(0, len(batch['inputs']), rows):
      piece = {n: x[first : first + rows] for n, x in batch.items()}
      grads, weight = sums(params, frozen, piece)
      total = grads if total is None else jax.tree.map(jnp.add, total, grads)
      weights += float(weight)
    return jax.tree.map(lambda g: g / weights, total)

  return gradient


def _relative_errors(part: Any, whole: Any) -> tuple[float, float]:
  """Of the last value projection, and of all parameters."""

  def error(part: Any, whole: Any) -> float:
    difference = jax.tree.map(jnp.subtract, part, whole)
    squares = [
      sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(tree))
      for tree in (difference, whole)
    ]
    return float(np.sqrt(squares[0] / squares[1]))

  last = [
    tree['layers']['attn']['v_proj']['kernel'][-1] for tree in (part, whole)
  ]
  return error(*last), error(part, whole)


def train(args: argparse.Namespace, name: str, found: Rows) -> None:
  """Trains the small model by a method, with every seed."""
  prepared = functools.cache(
    lambda: recipe.prepare(configure(args, 'small', name))
  )
  for seed in range(args.seeds):
    key = {'part': 'train', 'method': name, 'seed': seed}
    if found.find(key) is not None:
      continue
    config = configure(args, 'small', name, seed)
    config = dataclasses.replace(config, model=prepared().config.model)
    run = recipe.make_run(prepared(), config)
    with StopRequest() as stop:
      outcome = loop.train(run, stop)
    run.batches.close()
    losses = {
      n: x for n, x in outcome.record['last'].items() if n.startswith('loss')
    }
    found.keep(key | {'steps': config.steps, 'losses': losses})
    harness.progress(f'  {name}, seed {seed}: {losses}')


def measure_cost(args: argparse.Namespace, name: str) -> Row:
  """Seconds and bytes of a step of the small model, choosing included."""
  config = configure(args, 'small', name)
  prepared = recipe.prepare(config)
  run = recipe.make_run(prepared, prepared.config)
  state, frozen = run.start()
  step = run.train_step.lower(
    state, prepared.planned.abstract_batch, frozen
  ).compile()
  held = {'step_bytes': programs.memory(step)['total'], 'choosing_bytes': 0}
  memory = None if run.select is None else run.select.start()
  if config.coreset.needs_model:
    held['choosing_bytes'] = _choosing_bytes(prepared, state, frozen, memory)
  seconds = []
  for taken in range(args.timed + 2):
    batch = sharding.put_batch(next(run.batches), run.mesh)
    started = time.perf_counter()
    if run.select is not None:
      memory, batch, _ = run.select.choose(memory, state, batch, frozen)
    state, values = run.train_step(state, batch, frozen)
    jax.block_until_ready((state, values))
    if taken > 1:  # The first ones compile.
      seconds.append(time.perf_counter() - started)
  run.batches.close()
  quartiles = np.percentile(seconds, [25, 50, 75]).tolist()
  return {'part': 'cost', 'method': name, 'seconds': quartiles, **held}


def _choosing_bytes(
  prepared: recipe.Prepared, state: Any, frozen: Any, memory: Any
) -> int:
  config, program = prepared.config, prepared.program
  sizes = data.rows_by_source(config, prepared.text)
  rule = coreset.rule(
    *(config.coreset, config.batch_size, config.micro_batches, config.seed),
    *(tuple(sizes), tuple(sizes.values())),
  )
  tail = coreset.tail(program, config.model, config.loss_chunk_tokens)
  pool = {
    n: jax.ShapeDtypeStruct((rule.pool, *x.shape[1:]), x.dtype)
    for n, x in prepared.planned.abstract_batch.items()
  }
  pool['source'] = jax.ShapeDtypeStruct((rule.pool,), jnp.int32)
  measured = jax.jit(functools.partial(selection.measure, rule, tail))
  lowered = measured.lower(state.params, frozen, memory, pool)
  return programs.memory(lowered.compile())['total']


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The tables of the page, of the parts that were run."""
  rows = record.read(path)['rows']
  made = {'errors': _errors_table, 'train': _train_table, 'cost': _cost_table}
  parts = {part: [r for r in rows if r['part'] == part] for part in made}
  seeds = [r['seed'] for r in parts['train'] if r['method'] == QUOTAS]
  parts['paired'] = parts['train'] if len(seeds) > 1 else []
  made['paired'] = _paired_table
  return {
    f'coresets_{part}': made[part](found)
    for part, found in parts.items()
    if found
  }


def _spread(values: Sequence[float], form: str = '.3f') -> str:
  """Mean and standard deviation."""
  deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return f'{np.mean(values):{form}} ± {deviation:{form}}'


def _errors_table(rows: Sequence[Row]) -> str:
  heads = ['model', 'choice', 'last V', 'whole model', 'pools']
  return markdown(
    heads,
    [
      [
        *(row['model'], row['method'], _spread(row['last_v'])),
        *(_spread(row['whole_model']), str(len(row['last_v']))),
      ]
      for row in rows
    ],
  )


def _train_table(rows: Sequence[Row]) -> str:
  names = list(rows[0]['losses'])
  lines = []
  for method in dict.fromkeys(row['method'] for row in rows):
    runs = [r for r in rows if r['method'] == method]
    lines.append(
      [
        *(method, str(runs[0]['steps'])),
        *(_spread([r['losses'][n] for r in runs], '.4f') for n in names),
        str(len(runs)),
      ]
    )
  return markdown(['choice', 'steps', *names, 'seeds'], lines)


def _paired_table(rows: Sequence[Row]) -> str:
  """Losses less those of random choices within the quotas, seed by seed."""
  names = list(rows[0]['losses'])
  start = {r['seed']: r['losses'] for r in rows if r['method'] == QUOTAS}
  lines = []
  for method in dict.fromkeys(row['method'] for row in rows):
    runs = [r for r in rows if r['method'] == method and r['seed'] in start]
    if method == QUOTAS or len(runs) < 2:
      continue
    cells = []
    for name in names:
      less = [r['losses'][name] - start[r['seed']][name] for r in runs]
      error = np.std(less, ddof=1) / len(less) ** 0.5
      cells.append(f'{np.mean(less):+.4f} ± {error:.4f}')
    lines.append([method, *cells, str(len(runs))])
  return markdown([f'choice, less {QUOTAS}', *names, 'seeds'], lines)


def _cost_table(rows: Sequence[Row]) -> str:
  heads = ['choice', 'step', 'choosing', 'seconds a step']
  sizes = ('step_bytes', 'choosing_bytes')
  return markdown(
    heads,
    [
      [
        row['method'],
        *(f'{row[n] / 2**20:.0f} MiB' for n in sizes),
        median_in_quartiles(row['seconds']),
      ]
      for row in rows
    ],
  )


def main(arguments: list[str] | None = None) -> None:
  """Runs what is missing, then prints the tables."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  folder: Row = {'type': pathlib.Path, 'metavar': 'FOLDER'}
  names = (PLAIN, TWICE, MICRO, *CHOICES)
  add('--model', **folder, help='Hugging Face folder, for errors')
  add('--data', help="sources, as train_lm's data.source with names")
  add('--runs', **folder, default=pathlib.Path('runs/coresets'))
  add('--size', default='9m', choices=llama.PRESETS, help='the small model')
  add('--methods', nargs='+', choices=names, default=names, metavar='NAME')
  add('--parts', nargs='+', default=('errors', 'train'), metavar='PART')
  add('--rate', type=float, default=2e-3, help='learning rate of all runs')
  for name, default, text in (
    ('--vocab', 4096, 'of the small model'),
    ('--batch-size', 64, 'rows that are trained'),
    ('--seq-len', 128, 'tokens of a row'),
    ('--pieces', 4, 'micro-batches of a batch'),
    ('--pools', 10, 'pools of errors'),
    ('--adapt', 200, 'steps of the small model before'),
    ('--steps', 400, 'steps of a batch of that size'),
    ('--seeds', 5, 'seeds 0 to N - 1'),
    ('--eval-batches', 20, 'held-out batches of each source'),
    ('--timed', 0, 'measure the cost of so many steps, and nothing else'),
  ):
    text += ' (default: %(default)s)'
    add(name, type=int, default=default, metavar='N', help=text)
  harness.add_arguments(parser, OUTPUT, has_device=False)
  args = parser.parse_args(arguments)
  try:
    if not args.report:
      _run(args)
    for name, table in tables(args.output).items():
      sys.stdout.write(f'{name}\n{table}\n')
  except (ValueError, OSError) as error:
    parser.error(str(error))


def _run(args: argparse.Namespace) -> None:
  if args.data is None:
    raise ValueError('--data is needed: named sources, two of them rare.')
  named = (
    *('size', 'vocab', 'batch_size', 'seq_len', 'pieces', 'pools', 'adapt'),
    *('steps', 'rate', 'eval_batches'),
  )
  settings = {name: getattr(args, name) for name in named}
  sources = [spec.partition('=')[0].strip() for spec in args.data.split(',')]
  found = Rows(args.output, KEYS)
  found.agree(settings | {'sources': sources})
  if args.timed:
    for name in args.methods:
      found.keep(measure_cost(args, name))
    return
  if 'errors' in args.parts:
    measure_errors(args, 'small', args.methods, found)
    if args.model is not None:
      measure_errors(args, args.model.resolve().name, args.methods, found)
  if 'train' in args.parts:
    for name in args.methods:
      train(args, name, found)


if __name__ == '__main__':
  main()
