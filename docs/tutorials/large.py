# %% [markdown]
# # 7 billion parameters on one card
#
# To pre-train a model of 7 billion parameters AdamW needs 80 GB and more. Three things together are planned to make it
# fit a card of 24 GB, and a fourth a card of 16 GB ([where memory goes](../concepts/memory.html)):
#
# * Gradients are projected onto a number of directions, the *rank*, and Adam keeps its moments only for the
#   coordinates that are left ([how](../concepts/projection.html)).
# * These moments are kept in 8 bits, and the *bases* (the matrices of the directions) in 8 or 4.
# * Each step goes layer by layer: the gradient of one block exists at a time ([how](../concepts/layerwise.html)).
# * For 16 GB, *kernels* (the weight matrices of attention and MLP) are kept in 8 bits too.
#
# On the machine with the card of 24 GB:
#
# ```bash
# pip install '.[train,cuda]'  # In a checkout.
# gnlorp-plan --config llama_7b_24gb --device rtx4090
# export XLA_PYTHON_CLIENT_MEM_FRACTION=0.97
# gnlorp-train-lm --config llama_7b_24gb --data.source 'c4/*.json.gz' \
#   --data.validation-source c4_validation.json.gz --data.tokenizer t5/
# ```
#
# `c4/` and `c4_validation.json.gz` are texts of the C4 data set, and `t5/` is a folder with the tokenizer of T5.
#
# No model of 7 billion parameters has been trained on a card with this package yet. The figures of memory are what
# XLA's compiler says. The rest of this page takes the same steps with a model that is small enough for any machine.
#
# ## Plan
#
# You can plan before you buy or rent a card. Without the CUDA wheels, as here, the plan is a lower bound.

# %%
import json
import pathlib
import tempfile

from gnlorp_jax.plan.__main__ import main as plan
from gnlorp_jax.train_lm import main as train_lm

plan(['--config', 'llama_7b_24gb', '--device', 'rtx4090'])

# %% [markdown]
# ## Every step of the way, small
#
# A LLaMA of a million parameters is trained twice: first by whole steps, with everything in float32, and then with the
# settings for 16 GB. These are steps layer by layer, kernels in 8 bits that are rounded up or down at random after each
# update, moments in 8 bits, and bases in 4.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
small = [
  *('--data.source', str(pathlib.Path(json.__file__).parent)),
  *('--data.seq-len', '128', '--data.cache-dir', f'{folder}/cache'),
  *('--model.vocab-size', '512', '--model.hidden-size', '128'),
  *('--model.intermediate-size', '344', '--model.num-layers', '4'),
  *('--model.num-heads', '4', '--batch-size', '8'),
  *('--optim.rank', '32', '--optim.update-proj-gap', '40'),
  *('--steps', '80', '--eval-every', '40', '--eval-batches', '2'),
]
train_lm([*small, '--run-dir', f'{folder}/whole'])

# %%
train_lm(
  [
    *(*small, '--run-dir', f'{folder}/small'),
    *('--step.mode', 'layerwise', '--step.weight-bits', '8'),
    *('--optim.moment-bits', '8', '--optim.basis-bits', '4'),
    *('--optim.clip-global-norm', 'None'),
  ]
)

# %% [markdown]
# ## What it costs, and what it saves
#
# These are the losses of both runs, and the KiB that a step holds, without activations. Layer by layer the gradients
# that are counted are those of one of the four blocks, of the embedding, of the head and of the last norm.

# %%
for name in ('whole', 'small'):
  summary = json.loads((folder / name / 'summary.json').read_text())
  parts = {
    part: sizes['this run'] // 1024
    for part, sizes in summary['memory_bytes'].items()
  }
  print(name, f'{summary["last_eval_loss"]:.3f}', parts, sum(parts.values()))

# %% [markdown]
# ## What may go wrong at that size
#
# * **It does not fit after all.** The run ends with a message that tells you to plan. Layer by layer the inputs of all
#   blocks are kept for all sequences of a step, and `--micro-batches` does not change that: it makes smaller what is
#   needed inside a block. A smaller `--batch-size` does lessen them, and `--step.offload` keeps them in the host's memory.
# * **Power or time runs out.** The same command goes on from the last checkpoint. `--checkpoint-every` says
#   after how many steps one is written.
# * **Gradients explode.** Layer by layer the norm of all gradients is not known before the first update, and these
#   configurations do not clip. `--optim.clip-global-norm 1.0 --step.clipping recompute` clips by the exact norm, and takes
#   one more backward pass.
# * **A gradient is not finite.** Such a step is left out and counted. Without clipping, blocks that were
#   updated before the bad gradient came up have moved already. Weights that are not finite are never saved.
#
# Next: [layer by layer](../layerwise.html) has all that can be asked of such steps, and
# [which method for my card?](../which-method.html) has other cards. `gnlorp-evaluate RUN_DIR/hf` scores what
# was trained ([evaluate a model](../evaluation.html)), and a [chat model](chat.html) can be made of it.
