# %% [markdown]
# # Will it fit my card?
#
# In short, for a model of 7 billion parameters on a card of 16 GB, of which a run may use 14.98 GiB
# (`XLA_PYTHON_CLIENT_MEM_FRACTION=0.96` lets it): **pre-training** fits layer by layer with
# the blocks' weight matrices in 8 bits (12.9 GiB), **LoRA** beside a base in 8 or 4 bits (8.7 or 5.8 GiB by whole
# steps), and whole steps on all weights do not (52.5 GiB). [Which method for my card?](../which-method.html) has other cards. This page
# shows how to find out for any model.
#
# A run's memory follows from shapes. `python -m gnlorp_jax.plan` says what a training step takes on a
# GPU that need not be there, component by component, and what would make it fit.
#
# ## A 7B model on a card of 16 GB
#
# Without the CUDA wheels the plan is a lower bound, counted from shapes; with them
# (`pip install '.[cuda]'`; no GPU is needed) XLA's compiler says what the step takes.

# %%
from gnlorp_jax.plan.__main__ import main as plan

plan(['--config', 'llama_7b_16gb', '--device', 'rtx4060ti'])

# %% [markdown]
# ## What to change where it does not fit
#
# Whole steps in bfloat16 do not fit there, even with moments in 8 bits: the plan says so, tries changes
# one at a time, and lists first what saves most.

# %%
plan(['--config', 'llama_7b', '--device', 'rtx4060ti'])

# %% [markdown]
# ## Fine-tuning
#
# `plan sft` and `plan glue` take the options of `train_sft.py` and `train_glue.py`. LoRA beside a
# base in 4 bits, as QLoRA:

# %%
plan(
  [
    *('sft', '--model', 'llama-3.1-8b', '--method', 'lora'),
    *('--step.weight-bits', '4', '--model.remat', '--micro-batches', '8'),
    *('--device', 'rtx4060ti'),
  ]
)

# %% [markdown]
# ## In a program
#
# The same numbers as values; [the reference](../reference/plan.html) has the functions. GiB of LLaMA-7B
# by rank, layer by layer:

# %%
import gnlorp_jax.plan as planning
from gnlorp_jax.config import load

found = planning.PlanConfig(**vars(load('llama_7b_16gb')), device='rtx4060ti')
for rank in (128, 512, 1024):
  settings = planning.replace(found, {'optim.rank': rank})
  bound = planning.lower_bound(settings)
  print(f'rank {rank:4d}: {bound.peak / 2**30:.2f} GiB')
