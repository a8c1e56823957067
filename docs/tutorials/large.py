# %% [markdown]
# # 7 billion parameters on one card
#
# AdamW needs 80 GB and more for a model of 7 billion parameters. With moments of projected
# gradients, in 8 bits, one layer at a time, its pre-training is planned to fit a card of 24 GB, and with kernels
# in 8 bits one of 16 GB ([where memory goes](../concepts/memory.html)). On the machine with the card:
#
# ```bash
# pip install '.[train,cuda]'  # In a checkout.
# gnlorp-plan --config llama_7b_24gb --device rtx4090
# export XLA_PYTHON_CLIENT_MEM_FRACTION=0.97
# gnlorp-train-lm --config llama_7b_24gb --data.source 'c4/*.json.gz' \
#   --data.validation-source c4_validation.json.gz --data.tokenizer t5/
# ```
#
# This page goes the same way with a model that any machine holds. Nothing of that size has run on a card
# yet: the memory is what XLA's compiler says.
#
# ## Plan
#
# The plan is made before anything is bought or rented. Without the CUDA wheels, as here, it is a lower bound.

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
# A LLaMA of a million parameters with the settings of the card of 16 GB: layer by layer, kernels in 8
# bits that are rounded at random after each update, moments in 8 bits, bases in 4. Beside it the same model
# by whole steps in float32.

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
# Both losses, and the KiB of what lives in a step, activations not counted. Layer by layer the gradients are
# those of one of the four blocks, of the embedding and of the head.

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
# * **It does not fit after all.** The run ends with the message to plan. `--batch-size` counts sequences
#   of a step. Layer by layer the inputs of all blocks are kept for all of them: `--step.offload` keeps these in
#   the host's memory.
# * **Power or time runs out.** The same command goes on from the last checkpoint; `--checkpoint-every` says
#   how often one is written.
# * **Gradients explode.** Layer by layer the norm of all gradients is not known before the first update.
#   `--optim.clip-global-norm 1.0 --step.clipping recompute` clips by it exactly, for one more backward pass.
# * **The loss is not finite.** Such a step is left out and counted. Without clipping, blocks that were
#   updated before a bad gradient came up have moved; weights that are not finite are never saved.
#
# [Layer by layer](../layerwise.html) has all that can be asked of such steps, and
# [which method for my card?](../which-method.html) other cards.
