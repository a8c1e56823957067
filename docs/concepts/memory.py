# %% [markdown]
# # Where memory goes
#
# Training a model needs room for more than its weights: for every weight a gradient and, with Adam, two
# moments, and for every token the values that the backward pass reads again. Each method
# of this package makes one of these parts small. This page counts them for LLaMA-7B, from shapes alone;
# nothing of that size is made, so that it runs anywhere.
#
# ## The parts of a step
#
# * **Weights**: two bytes each in bfloat16, one in 8 bits.
# * **Moments**: what Adam remembers of past gradients. Two numbers for every weight, or for every
#   coordinate of the gradient in its subspace.
# * **Bases**: the subspaces themselves, of methods that project.
# * **Gradients**: one number for every weight that trains, unless a layer's gradient is used
#   and forgotten before the next one is computed.
# * **Saved activations**: the inputs of the blocks, which the backward pass begins with.
#
# The sum of what must exist at once is a lower bound. What XLA's compiler adds to it, above all the
# activations within a block and the logits, is known when it has compiled the step:
# [Will it fit my card?](../tutorials/will_it_fit.html) does that.

# %%
import dataclasses
import logging

import matplotlib.pyplot as plt

import gnlorp_jax.plan as planning
from gnlorp_jax.config import load

logging.disable(logging.WARNING)  # AdamW has no rank, which we know.
llama_7b = planning.PlanConfig(**vars(load('llama_7b')))
llama_7b = dataclasses.replace(llama_7b, batch_size=4)


def count(**changes):
  """GiB of the parts of a step of LLaMA-7B, with these settings changed."""
  options = {name.replace('__', '.'): v for name, v in changes.items()}
  bound = planning.lower_bound(planning.replace(llama_7b, options))
  return {part: size / 2**30 for part, size in bound.components.items()}


def show(rows):
  """A bar for each row, of the parts that it holds."""
  parts = list(dict.fromkeys(part for row in rows.values() for part in row))
  figure, axes = plt.subplots(figsize=(9, 0.6 + 0.45 * len(rows)))
  start = dict.fromkeys(rows, 0.0)
  for part in parts:
    sizes = [row.get(part, 0.0) for row in rows.values()]
    if max(sizes) < 0.1:
      continue  # Too thin to be seen.
    label = part.replace('_', ' ')
    axes.barh(list(rows), sizes, left=list(start.values()), label=label)
    start = {name: start[name] + rows[name].get(part, 0.0) for name in rows}
  for name, size in start.items():
    axes.text(1.01 * size, name, f'{size:.1f}', va='center')
  axes.invert_yaxis()
  axes.set(xlabel='GiB, lower bound', xlim=(0, 1.15 * max(start.values())))
  axes.legend(frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5))
  figure.tight_layout()


# %% [markdown]
# ## The optimizer
#
# Weights in bfloat16, 4 sequences of 256 tokens, one GPU. AdamW's moments, in float32, take four times what the
# weights do. A projection of rank 1024, a quarter of the width, leaves a third of that, 8 bits a quarter of what is
# left. The gradient stays.

# %%
plain = {'optim__moment_bits': 32, 'optim__basis_bits': 32}
show(
  {
    'AdamW': count(optim__name='adamw', **plain),
    'GaLore': count(optim__name='galore', **plain),
    'GradNormLoRP': count(**plain),
    'GradNormLoRP, 8 bits': count(optim__moment_bits=8, optim__basis_bits=8),
    'APOLLO-Mini': count(optim__name='apollo_mini', **plain),
  }
)

# %% [markdown]
# ## The step
#
# Once the moments are small, the gradient and the weights are what is left. **Layer by layer** a block's
# gradient is projected, used and forgotten as soon as it is there
# ([how](layerwise.html)). Kernels in **8 bits** then halve the weights.

# %%
small = {'optim__moment_bits': 8, 'optim__basis_bits': 8}
one_by_one = small | {
  'step__mode': 'layerwise',
  'optim__clip_global_norm': None,
}
show(
  {
    'whole step': count(**small),
    'layer by layer': count(**one_by_one),
    '... kernels in 8 bits': count(step__weight_bits=8, **one_by_one),
  }
)

# %% [markdown]
# ## What trains
#
# In fine-tuning one may train less. **Adapters** of rank 16 beside frozen kernels have small gradients and
# small moments, and what is frozen may be rounded to 8 or 4 bits. **A few layers at a time** trains the
# layers in turn, and holds gradients and moments of the drawn ones alone.

# %%
lora = {
  'optim__name': 'adamw',
  'adapter__kind': 'lora',
  'adapter__rank': 16,
  'optim__clip_global_norm': None,
}
show(
  {
    'LoRA': count(**lora),
    'LoRA on an 8-bit base': count(step__weight_bits=8, **lora),
    'LoRA on a 4-bit base': count(step__weight_bits=4, **lora),
    'BAdam, a layer at a time': count(
      optim__name='adamw', sampling__method='badam', step__mode='layerwise'
    ),
  }
)

# %% [markdown]
# ## What to take
#
# | what is too large | what makes it small | what it takes instead |
# |---|---|---|
# | moments | a projection; a smaller rank; 8 or 4 bits | a refresh of the basis now and then; rounding |
# | gradients | [layer by layer](../layerwise.html); [a few layers at a time](../layer-sampling.html) | where they are clipped, gradients that wait or a second backward pass; more steps |
# | weights | 8 bits; in fine-tuning a base of 4 bits | stochastic rounding; rounding once |
# | activations | `--model.remat`, `--micro-batches` | a second forward pass; smaller matrix products |
# | logits | `--loss-chunk-tokens` | nothing worth mention |
#
# `python -m gnlorp_jax.plan` tries these for a run that does not fit, one at a time, and lists first what
# saves most. Which of them costs quality is measured in [the results](../results/index.html).
