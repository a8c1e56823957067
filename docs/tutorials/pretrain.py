# %% [markdown]
# # Pre-train a model
#
# From files of text to a model that writes, with the optimizer of your choice. What is run here takes two CPU
# cores some minutes: a model of a million parameters on a part of Python's standard library. With your own text, and a
# GPU, the commands are the same:
#
# ```bash
# pip install '.[train]'  # In a checkout; with a GPU also '.[cuda]'.
# gnlorp-train-lm --config llama_60m --data.mode packed --data.source 'text/*.jsonl' --dry-run
# gnlorp-train-lm --config llama_60m --data.mode packed --data.source 'text/*.jsonl' --run-dir runs/mine
# gnlorp-train-lm --config llama_60m --data.mode packed --data.source 'text/*.jsonl' --run-dir runs/galore --optim.name galore
# ```
#
# ## The text
#
# Files, folders or globs of text, JSON lines or parquet; [training](../training.html#data) has all kinds. Here
# it is the source of two packages that come with Python. The program trains a tokenizer on it, since
# none is named.

# %%
import json
import pathlib
import tempfile

import matplotlib.pyplot as plt

from gnlorp_jax.train_lm import main as train_lm

folder = pathlib.Path(tempfile.mkdtemp())
sources = ','.join(
  str(pathlib.Path(module.__file__).parent)
  for module in (json, __import__('email'))
)
small = [
  *('--data.source', sources, '--data.seq-len', '128'),
  *('--data.cache-dir', f'{folder}/cache'),
  *('--model.vocab-size', '512', '--model.hidden-size', '128'),
  *('--model.intermediate-size', '344', '--model.num-layers', '4'),
  *('--model.num-heads', '4', '--batch-size', '8'),
  *('--optim.rank', '32', '--optim.update-proj-gap', '40'),
]

# %% [markdown]
# ## Look before you train
#
# `--dry-run` says what the optimizer would do with each parameter, and why, and what its state takes beside
# AdamW's.

# %%
train_lm([*small, '--dry-run'])

# %% [markdown]
# ## Train
#
# GradNormLoRP is the default. Interrupt it whenever you like: the same command goes on where it stopped, after
# Ctrl-C as after `kill -9`.

# %%
run = [*('--steps', '120', '--eval-every', '40', '--eval-batches', '4')]
train_lm([*small, *run, '--run-dir', f'{folder}/gradnormlorp'])

# %% [markdown]
# ## What a run leaves

# %%
for path in sorted((folder / 'gradnormlorp').iterdir()):
  print(path.name)
print((folder / 'gradnormlorp' / 'sample.txt').read_text()[:300])

# %% [markdown]
# `hf/` is a Hugging Face folder: transformers reads it, and so do `gnlorp-train-sft --model`, to make it a
# chat model, and `gnlorp-evaluate`, to score it.
#
# ## Compare with another optimizer
#
# Each wants its own learning rate: `--learning-rates 3e-3,1e-2,3e-2` tries several; with `--seeds 0,1` the best runs again
# with the second seed.
# Two runs are enough to see the curves.

# %%
train_lm(
  [
    *(*small, *run, '--run-dir', f'{folder}/adamw'),
    *('--optim.name', 'adamw', '--optim.learning-rate', '2e-3'),
  ]
)
for name in ('gradnormlorp', 'adamw'):
  lines = (folder / name / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = [row for row in rows if 'eval/loss' in row]
  summary = json.loads((folder / name / 'summary.json').read_text())
  plt.plot(
    [row['step'] for row in rows],
    [row['eval/loss'] for row in rows],
    'o-',
    label=name,
  )
  print(f'{name:13s} last validation loss {rows[-1]["eval/loss"]:.3f}')
plt.xlabel('step')
plt.ylabel('validation loss')
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# A model so small says nothing about which is better: [the results](../results/quality.html) compare them with
# learning rates searched and several seeds.
#
# ## On from here
#
# * Larger models: `--config llama_130m`, `llama_350m`, `llama_1b`, and [7B on one card](large.html).
# * An open model instead of random weights: `--init-from hf:HuggingFaceTB/SmolLM2-135M`, with a
#   lower `--optim.learning-rate`, such as 2e-4.
# * Moments in 8 bits: `--optim.moment-bits 8`. Layer by layer: `--step.mode layerwise`.
# * All options: `gnlorp-train-lm --help`, and [the settings](../reference/config.html#trainconfig).
