# %% [markdown]
# # Where memory goes
#
# Training a model needs room for more than its weights. Every weight has a gradient and, with Adam, two
# moments, and for every token there are values that the backward pass reads again. Each method
# of this package makes one of these parts small. This page counts them for LLaMA-7B, from shapes alone.
# Nothing of that size is made, so the page runs anywhere.
#
# ## The parts of a step
#
# * **Weights**: two bytes each in bfloat16, one in 8 bits.
# * **Moments**: what Adam remembers of past gradients. These are two numbers for every weight, or, where the
#   gradient is [projected onto a few directions](projection.html), two for each coordinate that is left.
# * **Bases**: matrices that hold these directions, in methods that project. The number of directions is the
#   *rank*.
# * **Gradients**: one number for every weight that trains, unless a block's gradient is used
#   and forgotten before the next one is computed.
# * **Saved activations**: the inputs of the blocks, from which the backward pass computes each block again.
#
# The sum of what must exist at once is a lower bound. A step takes more, above all for the activations within a
# block and the logits. How much more is known when XLA's compiler has compiled the step:
# [Will it fit my card?](../tutorials/will_it_fit.html) shows how to ask it.

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
# All rows have weights in bfloat16, 4 sequences of 256 tokens, and one GPU. AdamW's moments, in float32, take
# four times as much as the weights. With a projection of rank 1024, a quarter of the model's width, moments and
# bases together take a third of that, and in 8 bits a quarter of what is left. The gradient is as large as before.

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
# Once the moments are small, most of what is left are the gradient and the weights. A step that goes **layer by
# layer** uses the gradient of a block as soon as it is there, and forgets it before the next one is computed
# ([how](layerwise.html)). The kernels of the blocks, which are the weight matrices of attention and MLP, can then
# be kept in **8 bits**, which nearly halves the weights.

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
    '... and kernels in 8 bits': count(step__weight_bits=8, **one_by_one),
  }
)

# %% [markdown]
# ## What trains
#
# In fine-tuning one may train less. **Adapters**, such as those of LoRA, are pairs of thin matrices beside kernels
# that are frozen; here they have rank 16, the number of columns of the first. Only they have gradients and
# moments, and the frozen kernels may be rounded to 8 bits, or to 4 (in NF4, whose 16 levels suit weights that are
# normally distributed). Training **a few layers at a time** draws some layers every so many steps, and holds
# gradients and moments of these alone. BAdam draws one.

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
    'BAdam, one drawn layer': count(
      optim__name='adamw', sampling__method='badam', step__mode='layerwise'
    ),
  }
)

# %% [markdown]
# ## What to take
#
# | what is too large | what makes it small | what that costs |
# |---|---|---|
# | moments | a projection; a smaller rank | a refresh of the bases now and then |
# | | moments and bases in 8 or 4 bits | rounding |
# | gradients | steps [layer by layer](../layerwise.html) | if gradients are clipped, memory for projected gradients that wait, or a second backward pass |
# | gradients and moments | training [a few layers at a time](../layer-sampling.html) | the other layers rest |
# | weights | kernels in 8 bits, layer by layer | random rounding after every update |
# | | adapters beside kernels in 8 or 4 bits | rounding once; only the adapters learn |
# | saved activations, whole steps | `--model.remat`, and more `--micro-batches` | more is computed twice; smaller matrix products |
# | saved activations, layer by layer | a smaller `--batch-size`, or `--step.offload` on a GPU | other gradients; copies to the host and back |
# | logits | `--loss-chunk-tokens` | smaller matrix products; every chunk adds a gradient of the head's size |
#
# For a run that does not fit, `gnlorp-plan` tries changes of this kind one at a time, and lists first those that
# suffice and then those that save most. It does not try everything in the table: it leaves the batch, the optimizer
# and the chunks of the loss as they are, and draws no layers. It tries adapters only where `--init-from` (or
# `--model`) names what to start from ([all that it tries](../plan.html#what-would-make-it-fit)).
#
# What some of these changes cost in quality is measured in [the results](../results/index.html). Next:
# [the layer-wise step](layerwise.html), or [which method for my card?](../which-method.html)
