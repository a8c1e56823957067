# %% [markdown]
# # Will it fit my card?
#
# In short, for a model of 7 billion parameters on a card of 16 GB:
#
# | what is trained | one step takes, GiB | does it fit? |
# |---|---|---|
# | all weights of LLaMA-7B, by whole steps | 52.5 | no |
# | all weights of LLaMA-7B, layer by layer, kernels in 8 bits | 12.9 | yes |
# | LoRA on Mistral 7B, by whole steps, the base in 8 bits | 8.7 | yes |
# | LoRA on Mistral 7B, by whole steps, the base in 4 bits (NF4) | 5.8 | yes |
#
# A *whole step* computes all gradients before it updates; *layer by layer* the gradient of one block exists at a time
# ([how](../concepts/layerwise.html)). *Kernels* are the weight matrices of attention and MLP. The *base* is the model
# that LoRA leaves as it is, and *NF4* is the 4-bit code of QLoRA. LLaMA's rows are GradNormLoRP of rank 1024 (it keeps
# 1024 directions of each gradient), with moments in 8 bits, bases (the matrices of these directions) in 8 or, layer by
# layer, 4 bits, and 16 sequences of 256 tokens. Mistral's rows have 16 sequences of 1024 tokens, one at a time, and
# adapters of rank 16. All are what XLA's compiler plans, not compared with a card
# ([commands and commits of LLaMA's](../results/scaling.html#planning-llama-7b) and
# [of Mistral's](../instruction-tuning.html#will-it-fit)).
#
# Of the 16 GB a run may use 14.98 GiB, if `XLA_PYTHON_CLIENT_MEM_FRACTION=0.96` is set.
# [Which method for my card?](../which-method.html) has other cards. This page shows how to find out for any model.
#
# The memory of a run follows from the shapes of its arrays. `gnlorp-plan` says what a training step takes on a
# GPU, component by component, and what would make it fit. The GPU need not be there.
#
# ## A 7B model on a card of 16 GB
#
# ```bash
# pip install '.[train]'       # In a checkout: plans are lower bounds, counted from shapes.
# pip install '.[train,cuda]'  # XLA's compiler says what a step takes. No GPU is needed.
# ```
#
# In Python the command is the function `main`, with the same words:

# %%
from gnlorp_jax.plan.__main__ import main as plan

plan(['--config', 'llama_7b_16gb', '--device', 'rtx4060ti'])

# %% [markdown]
# ## What to change where it does not fit
#
# Whole steps in bfloat16 do not fit there, even with moments in 8 bits. The plan says so, tries changes
# one at a time, and lists first those that may suffice and then those that save most. It tries
# [the changes named here](../plan.html#what-would-make-it-fit), and not, for example, a smaller batch, another optimizer
# or training a few layers at a time.

# %%
plan(['--config', 'llama_7b', '--device', 'rtx4060ti'])

# %% [markdown]
# ## Fine-tuning
#
# `gnlorp-plan sft` and `gnlorp-plan glue` take the options of `gnlorp-train-sft` and `gnlorp-train-glue`. This is LoRA
# beside a base in 4 bits, as in QLoRA:

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
# Functions give the same numbers as values ([the reference](../reference/plan.html) has all of them). These are lower
# bounds for LLaMA-7B, layer by layer with kernels in 8 bits, at three ranks:

# %%
import gnlorp_jax.plan as planning
from gnlorp_jax.config import load

found = planning.PlanConfig(**vars(load('llama_7b_16gb')), device='rtx4060ti')
for rank in (128, 512, 1024):
  settings = planning.replace(found, {'optim.rank': rank})
  bound = planning.lower_bound(settings)
  print(f'rank {rank:4d}: {bound.peak / 2**30:.2f} GiB')

# %% [markdown]
# Next: [7 billion parameters on one card](large.html) trains what was planned. [Plan a run](../plan.html) explains every
# row of the tables, what is assumed of a card, and `--budget`, which names what measured best within a budget.
