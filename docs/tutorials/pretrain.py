# %% [markdown]
# # Pre-train a model
#
# This page goes from files of text to a model that writes, with the optimizer of your choice. What it runs takes two
# CPU cores some minutes: a model of a million parameters learns a part of Python's standard library. With your own
# text, and on a GPU, the commands are of the same kind:
#
# ```bash
# pip install '.[train]'  # In a checkout; with an NVIDIA GPU '.[train,cuda]'.
# gnlorp-train-lm --config llama_60m --data.mode packed --data.source 'text/*.jsonl' --dry-run
# gnlorp-train-lm --config llama_60m --data.mode packed --data.source 'text/*.jsonl' --run-dir runs/mine
# gnlorp-train-lm --config llama_60m --data.mode packed --data.source 'text/*.jsonl' --run-dir runs/galore --optim.name galore
# ```
#
# `llama_60m` is one of the configurations that come with the package. It puts one document in a row, cut or padded,
# as its published protocol does; `--data.mode packed` joins documents instead, so that nothing is cut off or padded.
#
# ## The text
#
# The text may be files, folders or globs of plain text, JSON lines or Parquet ([all kinds](../training.html#data)). Here
# it is the source of two packages that come with Python. Since no tokenizer is named, the program trains one on the
# text.
#
# The options of the optimizer: the gradient of each weight matrix is projected onto 32 directions
# (`--optim.rank`), which are chosen again every 40 steps (`--optim.update-proj-gap`)
# ([how that works](../concepts/projection.html)).

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
# `--dry-run` says what the optimizer would do with each parameter, and why. It also compares the memory of its state
# with that of AdamW's.

# %%
train_lm([*small, '--dry-run'])

# %% [markdown]
# ## Train
#
# GradNormLoRP is the default optimizer. You may interrupt a run whenever you like. The same command goes on where the
# run stopped after Ctrl-C, and from its last checkpoint after `kill -9`.

# %%
run = [*('--steps', '120', '--eval-every', '40', '--eval-batches', '4')]
train_lm([*small, *run, '--run-dir', f'{folder}/gradnormlorp'])

# %% [markdown]
# ## What a run leaves
#
# The run directory holds checkpoints, metrics, a plot, a sample of text and the exported model
# ([all files](../training.html#the-run-directory)):

# %%
for path in sorted((folder / 'gradnormlorp').iterdir()):
  print(path.name)
print((folder / 'gradnormlorp' / 'sample.txt').read_text()[:300])

# %% [markdown]
# `hf/` is a Hugging Face folder. The transformers library reads it, `gnlorp-train-sft --model` makes a chat model of
# it, and `gnlorp-evaluate` scores it.
#
# ## Compare with another optimizer
#
# Each optimizer wants its own learning rate. `--learning-rates 3e-3,1e-2,3e-2` runs the first seed with each of
# them; with `--seeds 0,1` the best rate runs again with the second seed. Here one rate for each optimizer is enough to
# see the curves.

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
# So small a model, with one rate and one seed, does not tell which optimizer is better.
# [The results](../results/quality.html) compare them with learning rates that were searched, and two seeds.
#
# ## On from here
#
# * Larger models: `--config llama_130m`, `llama_350m`, `llama_1b`, and [7B on one card](large.html).
# * An open model instead of random weights: `--init-from hf:HuggingFaceTB/SmolLM2-135M`, with a
#   lower `--optim.learning-rate`, such as 2e-4. The default, 1e-2, is for random weights.
# * Less memory: `--optim.moment-bits 8` keeps Adam's moments in 8 bits, and `--step.mode layerwise` updates
#   [layer by layer](../concepts/layerwise.html), so that the gradient of one block exists at a time.
# * A chat model: [from your own data](chat.html).
# * All options: `gnlorp-train-lm --help`, and [the settings](../reference/config.html#trainconfig).
