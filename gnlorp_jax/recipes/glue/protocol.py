"""The published protocol of fine-tuning on GLUE: a number for every field.

Where a number was published, its source stands beside it; where none was, a
comment says so. What the user gives counts more.
"""

import dataclasses

from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.methods import Method, get_method, sampling_of
from gnlorp_jax.compose.settings import AdapterOptions, OptimConfig
from gnlorp_jax.recipes.glue.settings import DEMO, GlueConfig

# Learning rates by task.
#
# galore: RoBERTa-base, rank 8 and rank 4 (arXiv:2403.03507, appendix). The same
# are taken for full fine-tuning and for the other optimizers that train all
# weights: for these and GLUE none was published with this protocol. WNLI is not
# in the paper; it gets what RTE, the task nearest in size and kind, has.
# lora: RoBERTa-base, rank 8, alpha 16 (the scripts of arXiv:2106.09685). DoRA
# published none for GLUE and takes them too, as WNLI takes RTE's.
# gradnormlorp: one for all tasks (the released scripts of arXiv:2412.19616, for
# the optimizer and for adapters).
LEARNING_RATES: dict[str, dict[str, float]] = {
  'galore': {
    'mnli': 1e-5,
    'sst2': 2e-5,
    'mrpc': 2e-5,
    'cola': 1e-5,
    'qnli': 1e-5,
    'qqp': 2e-5,
    'rte': 2e-5,
    'stsb': 3e-5,
    'wnli': 2e-5,
  },
  'galore, rank 4': {
    'mnli': 1e-5,
    'sst2': 1e-5,
    'mrpc': 3e-5,
    'cola': 3e-5,
    'qnli': 1e-5,
    'qqp': 1e-5,
    'rte': 1e-5,
    'stsb': 1e-5,
    'wnli': 1e-5,
  },
  'lora': {
    'mnli': 5e-4,
    'sst2': 5e-4,
    'mrpc': 4e-4,
    'cola': 4e-4,
    'qnli': 4e-4,
    'qqp': 5e-4,
    'rte': 5e-4,
    'stsb': 4e-4,
    'wnli': 5e-4,
  },
  'gradnormlorp': {},
}
# For a user's own task, and for tasks without a row above: the middle of what
# RoBERTa's authors searched (arXiv:1907.11692, appendix), LoRA's lower value,
# and GradNormLoRP's one.
_OTHER_TASKS = {'galore': 2e-5, 'lora': 4e-4, 'gradnormlorp': 3e-5}
# The generated task trains a small random model, from scratch and in a minute:
# chosen by trial, as everything about it is ours.
_DEMO = {'galore': 1e-3, 'lora': 2e-3, 'gradnormlorp': 3e-3}


def resolve(config: GlueConfig, task: str, method: str) -> GlueConfig:
  """The settings of a method on a task: what is given, or else the protocol's.

  Args:
    config: What the user asks for; None stands for the protocol's value.
    task: Name of a task; one that is not of GLUE gets what suits most.
    method: Name of a method.

  Returns:
    Settings without None where the optimizer, the adapters or the length of the
    run need a number; without a learning rate where rates are searched.

  Raises:
    ValueError: If there is no such method.

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507, appendix on fine-tuning:
    batch size, epochs, ranks, scales, interval, length 512, linear decay
    without warm-up, no weight decay. Of adapters: the released scripts of Huang
    et al., `GradNormLoRP`, 2024, arXiv:2412.19616, for all three kinds.

  Note:
    LoRA's own scripts adapt queries and values alone, warm up over 6 % of the
    steps, decay weights by 0.1 and take other batches and epochs on some tasks,
    and start MRPC, RTE and STS-B from a model trained on MNLI. Here all methods
    share one protocol, and adapters stand on all matrices of the blocks, which
    are also those that the others project.
  """
  chosen, is_demo = get_method(method), task == DEMO
  small_batch = 32 if task == 'cola' or is_demo else 16
  return dataclasses.replace(
    config,
    batch_size=_or(config.batch_size, small_batch),
    epochs=_or(config.epochs, 5 if is_demo else 30),
    max_length=_or(config.max_length, 16 if is_demo else 512),
    optim=optimizer.in_cycles(_optimizer(config, task, chosen), config.adapter),
    adapter=_adapter(config.adapter, task, chosen),
    sampling=sampling_of(chosen, config.sampling),
  )


def _or(given, default):
  return default if given is None else given


def _optimizer(given: GlueConfig, task: str, method: Method) -> OptimConfig:
  config = given.optim
  config = dataclasses.replace(config, name=config.name or method.optimizer)
  # Where rates are searched, each run gets its own.
  if config.learning_rate is None and given.learning_rates is None:
    rate = _learning_rate(task, method, config)
    config = dataclasses.replace(config, learning_rate=rate)
  rank = optimizer.rank_or(config, 8)
  numbers = {
    'rank': rank,
    'update_proj_gap': _or(config.update_proj_gap, 50 if task == DEMO else 500),
    'scale': _or(config.scale, _scale(task, method, config, rank)),
  }
  # Where methods are compared, each takes what it has a use for.
  return dataclasses.replace(
    config,
    **{
      name: value if optimizer.accepts(config, name) else None
      for name, value in numbers.items()
    },
  )


def _adapter(
  given: AdapterOptions, task: str, method: Method
) -> AdapterOptions:
  kind = given.kind or method.adapter
  if kind is None:
    return AdapterOptions()
  return dataclasses.replace(
    given,
    kind=kind,
    rank=_or(given.rank, 8),
    alpha=_or(given.alpha, 16.0),
    dropout=_or(given.dropout, 0.0 if task == DEMO else 0.1),
  )


def _learning_rate(task: str, method: Method, config: OptimConfig) -> float:
  if task == DEMO:
    return _DEMO[method.rates]
  row = method.rates
  is_projected = optimizer.has_subspaces(config)
  if row == 'galore' and is_projected and _or(config.rank, 8) <= 4:
    row = 'galore, rank 4'
  return LEARNING_RATES[row].get(task, _OTHER_TASKS[method.rates])


def _scale(
  task: str, method: Method, config: OptimConfig, rank: int | None
) -> float | None:
  if task == DEMO:
    return 1.0
  if method.rates == 'gradnormlorp':
    return 4.0  # The released scripts, at every rank.
  if config.name in ('galore', 'galore_adafactor', 'q_galore'):
    return 16 / rank  # GaLore's pairs: 4 at rank 4, 2 at rank 8.
  return None  # None was published for GLUE, and it differs in meaning.
