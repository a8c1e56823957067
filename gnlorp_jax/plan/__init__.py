"""Tells whether a run fits a GPU, and what would make it fit, without a GPU.

It takes the options of train_lm.py, or after the word glue or sft those of
train_glue.py or train_sft.py, and its own: --device, --devices, --json and, in
pre-training, --budget. It reads no data. Weights and optimizer state are
counted exactly. With the CUDA wheels (the extra cuda of this package), XLA
compiles the training step for the GPU and says what it takes; without them the
rest is a lower bound. If the run does not fit, changes that lower its memory
are tried one by one. With a budget, the optimizers that fit it are named, by
the losses that were measured with them. With PLAN_TRACEBACK set in the
environment, an error shows where it arose.

  python -m gnlorp_jax.plan --config configs/llama_7b.py --device rtx4090
  python -m gnlorp_jax.plan --config configs/llama_7b.py --devices 8 \
    --mesh.fsdp 8 --json plan.json
  python -m gnlorp_jax.plan --config configs/llama_7b.py --adapter.kind lora \
    --step.mode layerwise --step.weight-bits 8 --device rtx4060ti
  python -m gnlorp_jax.plan --config configs/llama_7b.py --budget 16GiB
  python -m gnlorp_jax.plan glue --method lora --init-from large
  python -m gnlorp_jax.plan sft --model llama-3.1-8b --method lora
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from gnlorp_jax.plan.count import Plan, compiled, lower_bound
  from gnlorp_jax.plan.settings import GluePlanConfig, PlanConfig, SftPlanConfig
  from gnlorp_jax.plan.suggest import Suggestion, changes, replace, suggestions
else:

  def __getattr__(name: str) -> Any:
    # When they are asked for, as in the package above.
    for module in ('count', 'settings', 'suggest'):
      if name in __all__:
        found = importlib.import_module(f'{__name__}.{module}')
        if hasattr(found, name):
          return getattr(found, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


__all__ = [
  'GluePlanConfig',
  'Plan',
  'PlanConfig',
  'SftPlanConfig',
  'Suggestion',
  'changes',
  'compiled',
  'lower_bound',
  'replace',
  'suggestions',
]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
