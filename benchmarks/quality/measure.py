r"""Pre-trains one LLaMA with several optimizers, tuned, over several seeds.

Every optimizer takes equal steps on equal data with the training step,
schedule and clipping of `train_lm.py`, in one process: text is tokenised once,
and each optimizer's step is compiled once, with the learning rate as a number
in its state. First each peak learning rate of an optimizer is tried with seed
0, the likeliest first; where the best lies at the edge of those tried, up to
--extend more follow beyond it. The best is then repeated with the other seeds.
A seed decides the initial weights and the order of the data, the same for
every optimizer.

  python -m benchmarks.quality --data 'wikipedia_en/*train*' \
    --validation 'wikipedia_en/*validation*' --tokenizer t5/ --seeds 3

The JSON file is written after every run. The same command goes on where it
stopped and repeats no run; a file of other settings is refused. On two cores,
two processes of one thread share the optimizers:

  export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
  taskset -c 0 python -m benchmarks.quality OPTIONS --process 1/2 &
  taskset -c 1 python -m benchmarks.quality OPTIONS --process 2/2 & wait
  python -m benchmarks.quality --report

The table, and its plot of loss curves and of memory against loss:

  peak rate   the learning rate whose run with seed 0 ended lowest
  eval loss   after the last step, on the same held-out tokens for every run,
              nats per token: mean and standard deviation over the seeds
  perplexity  the same of exp(loss)
  state       the optimizer's arrays, bases included, counted from their shapes
  tuning      the eval loss of seed 0 at each rate tried

Seed 0 chose the rate, and counts among the seeds where there are not two
others. Differences within the deviations order nothing.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax

from benchmarks.common import harness
from benchmarks.quality import runs
from gnlorp_jax.compose import optimizer
from gnlorp_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama
from gnlorp_jax.models.interface import Dtype
from gnlorp_jax.optim.inspect import state_bytes
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import loop

COMPARISON = runs.Comparison('quality')
PAGE, tables, plots = runs.PAGE, COMPARISON.tables, COMPARISON.plots


class Method(NamedTuple):
  """An optimizer of the comparison."""

  options: dict[str, Any]  # Of OptimConfig, beyond rank and interval.
  rates: tuple[float, ...]  # Peak learning rates, the likeliest first.


METHODS = {
  'adamw': Method({'name': 'adamw'}, (2e-3, 4e-3, 1e-3)),
  'galore': Method({'name': 'galore'}, (5e-3, 1e-2, 2.5e-3)),
  'gradnormlorp': Method({'name': 'gradnormlorp'}, (5e-3, 1e-2, 2.5e-3)),
  'gradnormlorp-8bit': Method(
    {'name': 'gradnormlorp', 'moment_bits': 8, 'basis_bits': 8},
    (5e-3, 1e-2, 2.5e-3),
  ),
  'apollo': Method({'name': 'apollo'}, (5e-3, 2.5e-3, 1e-2)),
  'fira': Method({'name': 'fira'}, (5e-3, 2.5e-3, 1e-2)),
}


def configure(
  args: argparse.Namespace, model: llama.LlamaConfig | None, **options: Any
) -> TrainConfig:
  """The configuration of a method, without rate and seed of a run."""
  vocabulary = {} if args.vocab is None else {'vocab_size': args.vocab}
  model = model or llama.preset(
    args.size, compute_dtype=args.compute_dtype, **vocabulary
  )
  optim = OptimConfig(learning_rate=1.0, **options)
  given = {
    'rank': args.rank or model.hidden_size // 4,
    'update_proj_gap': args.gap,
  }
  for name, value in given.items():
    if name not in options and optimizer.accepts(optim, name):
      optim = dataclasses.replace(optim, **{name: value})
  return TrainConfig(
    steps=args.steps,
    batch_size=args.batch_size,
    eval_every=args.eval_every or max(args.steps // 4, 1),
    eval_batches=args.eval_batches,
    model=model,
    data=DataConfig(
      source=args.data,
      validation_source=args.validation,
      tokenizer=args.tokenizer,
      seq_len=args.seq_len,
    ),
    optim=optim,
    mesh=MeshConfig(data=1),  # Of several devices, one.
  )


def settings_of(
  args: argparse.Namespace, config: TrainConfig, corpus: data.Text
) -> dict[str, Any]:
  """What the runs of one file share, from the configuration of one of them."""
  names = {
    part: source and [pathlib.Path(name).name for name in source.split(',')]
    for part, source in (('data', args.data), ('validation', args.validation))
  }
  return names | {
    'size': args.size,
    'vocab_size': config.model.vocab_size,
    'parameters': llama.num_params(config.model),
    'training_tokens': corpus.training.stop - corpus.training.start,
    'validation_tokens': corpus.validation.stop - corpus.validation.start,
    'tokenizer': corpus.tokenizer.fingerprint,
    'steps': config.steps,
    'batch_size': config.batch_size,
    'seq_len': config.data.seq_len,
    'rank': args.rank or config.model.hidden_size // 4,
    'update_proj_gap': args.gap,
    'warmup_fraction': config.optim.warmup_fraction,
    'final_fraction': config.optim.final_fraction,
    'clip_global_norm': config.optim.clip_global_norm,
    'eval_every': config.eval_every,
    'eval_batches': config.eval_batches,
    'compute_dtype': config.model.compute_dtype,
    'device': args.device,
  }


def train(
  prepared: recipe.Prepared, learning_rate: float, seed: int
) -> runs.Row:
  """One run of a method, whose step is compiled at the first.

  It ends early, at an evaluation, if the loss is not finite any more.
  """
  config = prepared.config
  config = dataclasses.replace(
    config,
    seed=seed,
    optim=dataclasses.replace(config.optim, learning_rate=learning_rate),
  )
  run = recipe.make_run(prepared, config)
  state, constants = run.start()
  evals = [[0, run.evaluate(state.params, constants)['loss']]]
  losses: list[float] = []
  waiting: list[jax.Array] = []  # Losses that are not fetched yet.
  taken = loop.steps(
    *(run.train_step, state, run.batches, run.mesh, range(1, run.steps + 1)),
    constants,
  )
  with contextlib.closing(run.batches):
    for step in taken:
      number, state = step.number, step.state
      waiting.append(step.metrics['loss'])
      if number % config.eval_every and number < run.steps:
        continue
      losses += map(float, jax.device_get(waiting))
      waiting.clear()
      evals.append([number, run.evaluate(state.params, constants)['loss']])
      if not math.isfinite(losses[-1] + evals[-1][1]):
        break
  return {
    **runs.ending(evals, losses, state.skipped),
    'state_bytes': state_bytes(state.opt_state),
  }


def parse_rates(
  words: Sequence[str], methods: Mapping[str, Method] = METHODS
) -> dict[str, tuple[float, ...]]:
  """Reads ``METHOD=RATE,RATE`` words; methods without one keep their rates.

  Raises:
    ValueError: If a word does not read so.
  """
  rates = {name: method.rates for name, method in methods.items()}
  for word in words:
    name, _, values = word.partition('=')
    try:
      given = tuple(map(float, values.split(',')))
    except ValueError:
      given = ()
    if name not in methods or not given or min(given) <= 0:
      raise ValueError(
        f'--rates {word} must be METHOD=RATE[,RATE...] with positive rates and '
        f'a method of {", ".join(methods)}.'
      )
    rates[name] = given
  return rates


def parser(
  doc: str = __doc__,
  comparison: runs.Comparison = COMPARISON,
  methods: Mapping[str, Method] = METHODS,
) -> argparse.ArgumentParser:
  """The command line."""
  found = harness.parser(doc)
  comparison.add_arguments(found, methods)
  add = found.add_argument
  add('--size', choices=llama.PRESETS, default='9m', help='preset of LLaMA')
  dtype = 'of all but parameters and states (default: %(default)s)'
  choices = get_args(Dtype)
  add('--compute-dtype', choices=choices, default='float32', help=dtype)
  add('--data', default='stdlib', help="training text, as train_lm's")
  add('--validation', help='validation text (default: the end of --data)')
  add('--tokenizer', default='bpe', help="as train_lm's data.tokenizer")
  for name, default, text in (
    ('--vocab', None, "vocabulary (default: the preset's)"),
    ('--steps', 300, 'steps of a run'),
    ('--batch-size', 4, 'sequences of a step'),
    ('--seq-len', 128, 'tokens of a sequence'),
    ('--rank', None, 'default: a quarter of the width'),
    ('--gap', 50, 'between two refreshes, steps'),
    ('--eval-every', None, 'steps (default: a quarter of --steps)'),
    ('--eval-batches', 40, 'held-out batches'),
    ('--extend', 2, 'most rates beyond the edge'),
    ('--seeds', 3, 'seeds 0 to N - 1'),
  ):
    if default is not None:
      text += ' (default: %(default)s)'
    add(name, type=int, default=default, metavar='N', help=text)
  add(
    '--rates',
    nargs='+',
    default=(),
    metavar='METHOD=RATE,RATE',
    help='peak learning rates to try, the likeliest first',
  )
  return found


def main(
  arguments: list[str] | None = None, model: llama.LlamaConfig | None = None
) -> None:
  """Runs what is missing, then reports; one of several processes only runs."""
  compare(parser(), arguments, model, COMPARISON, METHODS)


def compare(
  command: argparse.ArgumentParser,
  arguments: list[str] | None,
  model: llama.LlamaConfig | None,
  comparison: runs.Comparison,
  methods: Mapping[str, Method],
) -> None:
  """The same of any methods.

  Args:
    command: What `parser` made.
    arguments: The command line.
    model: The architecture; None: the preset that is asked for.
    comparison: Where the rows go.
    methods: What is compared, by name.
  """
  args = command.parse_args(arguments)
  if args.seeds < 1 or args.extend < 0:
    command.error(
      f'--seeds {args.seeds} must be at least 1 and --extend {args.extend} at '
      'least 0.'
    )
  try:
    plan = runs.Plan(parse_rates(args.rates, methods), args.seeds, args.extend)
  except ValueError as error:
    command.error(str(error))

  def prepare() -> tuple[runs.Row, Callable[[str], runs.Trainer]]:
    base = configure(args, model, name='adamw')
    corpus = data.load(base, base.model)

    def make(name: str) -> runs.Trainer:
      planned = recipe.plan(configure(args, model, **methods[name].options))
      return functools.partial(train, recipe.Prepared(planned, corpus))

    return settings_of(args, base, corpus), make

  comparison.run(command, args, plan, prepare)


if __name__ == '__main__':
  main()
