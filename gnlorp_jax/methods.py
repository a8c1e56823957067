"""How a model is fine-tuned: the methods, and their hyper-parameters per task.

One table says what each method trains and with which optimizer, one says with
which numbers. Where a number was published, its source stands beside it; where
none was, a comment says so.
"""

import dataclasses
import difflib
from typing import NamedTuple

from gnlorp_jax.models import adapters


class Method(NamedTuple):
  """What a method trains, and how.

  Attributes:
    optimizer: Name of an optimizer of `gnlorp_jax.optim`.
    adapter: Kind of the adapters. With them, they and the classifier train, and
      all other weights are frozen; None trains every weight.
    rates: Row of the learning rates it takes: of `LEARNING_RATES`.
    is_projected: Whether the optimizer has subspaces, and so a rank.
  """

  optimizer: str
  adapter: adapters.Kind | None = None
  rates: str = 'galore'
  is_projected: bool = True


METHODS: dict[str, Method] = {
  'full': Method('adamw', is_projected=False),
  'lora': Method('adamw', 'lora', rates='lora', is_projected=False),
  'dora': Method('adamw', 'dora', rates='lora', is_projected=False),
  'galore': Method('galore'),
  'gradnormlorp': Method('gradnormlorp', rates='gradnormlorp'),
  # The factors of the adapters are projected on both sides, as in the paper.
  'gradnormlorp_adapter': Method('galore', 'gradnormlorp', 'gradnormlorp'),
  # Others of the family, in place of GaLore.
  **{
    name: Method(name)
    for name in (
      'q_galore',
      'galore_adafactor',
      'dct_adamw',
      'apollo',
      'apollo_mini',
      'fira',
      'ldadam',
    )
  },
}

# What '--method all' stands for: those that the papers put side by side.
COMPARED = (
  'full',
  'lora',
  'dora',
  'galore',
  'gradnormlorp',
  'gradnormlorp_adapter',
)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
  """All numbers of a fine-tuning run that are not the model's or the data's."""

  learning_rate: float
  batch_size: int
  epochs: int
  max_length: int  # Tokens of a sequence, special tokens included.
  weight_decay: float
  warmup_fraction: float  # Share of the steps before the decay begins.
  rank: int  # Of the subspaces, or of the adapters.
  scale: float | None  # Of projected updates; None is the optimizer's own.
  update_proj_gap: int  # Steps between two refreshes of a subspace.
  adapter_alpha: float
  adapter_dropout: float


def get_method(name: str) -> Method:
  """A method by its name.

  Args:
    name: Key of `METHODS`.

  Returns:
    The method.

  Raises:
    ValueError: If there is none of that name.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'Unknown method {name!r}.{hint} Methods: {list(METHODS)}, or all for '
      f'{list(COMPARED)}.'
    )
  return METHODS[name]


def hyperparameters(task: str, method: str, rank: int = 8) -> Hyperparameters:
  """The numbers of a method on a task, before the user changes any.

  Args:
    task: Name of a task; one that is not of GLUE gets what suits most.
    method: Name of a method.
    rank: Rank of the subspaces or adapters; GaLore's rates depend on it.

  Returns:
    The hyper-parameters.

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
  chosen = get_method(method)
  is_demo = task == 'demo'
  return Hyperparameters(
    learning_rate=_learning_rate(task, chosen, rank),
    batch_size=32 if task == 'cola' or is_demo else 16,
    epochs=5 if is_demo else 30,
    max_length=16 if is_demo else 512,
    weight_decay=0.0,
    warmup_fraction=0.0,
    rank=rank,
    scale=_scale(task, chosen, rank),
    update_proj_gap=50 if is_demo else 500,
    adapter_alpha=16.0,
    adapter_dropout=0.0 if is_demo else 0.1,
  )


def _learning_rate(task: str, method: Method, rank: int) -> float:
  if task == 'demo':
    return _DEMO[method.rates]
  row = method.rates
  if row == 'galore' and method.is_projected and rank <= 4:
    row = 'galore, rank 4'
  return LEARNING_RATES[row].get(task, _OTHER_TASKS[method.rates])


def _scale(task: str, method: Method, rank: int) -> float | None:
  if task == 'demo' and method.is_projected:
    return 1.0
  if method.rates == 'gradnormlorp':
    return 4.0  # The released scripts, at every rank.
  if method.optimizer in ('galore', 'galore_adafactor', 'q_galore'):
    return 16 / rank  # GaLore's pairs: 4 at rank 4, 2 at rank 8.
  return None  # None was published for GLUE, and it differs in meaning.
