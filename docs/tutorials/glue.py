# %% [markdown]
# # Compare methods on a task
#
# Only your task can tell which method is best for it. `gnlorp-train-glue` fine-tunes an encoder
# such as RoBERTa to tell sentences apart, with as many methods, learning rates and seeds as you ask for, and
# ends with a table. What is run here is a made-up task and a small encoder made on the spot; with a trained
# one the commands are the same:
#
# ```bash
# pip install '.[glue]'  # In a checkout.
# gnlorp-train-glue --task mine --data.train train.jsonl --data.dev dev.jsonl \
#   --init-from hf:FacebookAI/roberta-base --method full,lora,gradnormlorp \
#   --learning-rates 1e-5,3e-5,1e-4,4e-4 --seeds 0,1,2 --epochs 3
# ```
#
# GLUE's own tasks are read from its official files: `--task mrpc,rte --data.source glue/`. Without options at
# all the program generates a task, and needs nothing.
#
# ## The task
#
# Two files of JSON lines or of tab-separated values. Columns are named by `--data.text-columns`
# (one or two, `text` by default) and `--data.label-column` (`label`). Is a sentence about a fruit or about a tool?
# The adjectives of the sentences to evaluate on are not among those that are trained on.

# %%
import itertools
import json
import pathlib
import tempfile

from gnlorp_jax.train_glue import main as train_glue
from gnlorp_jax.train_lm import main as train_lm

folder = pathlib.Path(tempfile.mkdtemp())
things = {
  'fruit': ('apple', 'pear', 'plum', 'cherry', 'grape'),
  'tool': ('saw', 'axe', 'file', 'drill', 'plane'),
}
people, verbs = ('she', 'he', 'the man'), ('takes', 'sees', 'has', 'wants')
adjectives = {'train': ('old', 'big', 'red'), 'dev': ('small', 'good')}
for split, found in adjectives.items():
  with open(folder / f'{split}.jsonl', 'w') as file:
    for kind in things:
      for words in itertools.product(people, verbs, found, things[kind]):
        text = '{} {} the {} {}'.format(*words)
        file.write(json.dumps({'text': text, 'label': kind}) + '\n')

# %% [markdown]
# ## The encoder
#
# A folder of the hub or of transformers, with any head or none. Here `gnlorp-train-lm` makes one that has
# learned to guess words that are left out of such sentences, and a tokenizer with it.

# %%
train_lm(
  [
    *('--objective', 'masked', '--config', 'roberta_tiny'),
    *('--data.source', f'{folder}/*.jsonl', '--data.seq-len', '32'),
    *('--data.cache-dir', f'{folder}/cache', '--model.vocab-size', '300'),
    *('--data.validation-fraction', '0.2', '--batch-size', '16'),
    *('--steps', '100', '--eval-every', '100', '--eval-batches', '1'),
    *('--run-dir', f'{folder}/encoder'),
  ]
)

# %% [markdown]
# ## Look before you train

# %%
task = [
  *('--task', 'mine', '--data.train', f'{folder}/train.jsonl'),
  *('--data.dev', f'{folder}/dev.jsonl'),
  *('--init-from', f'{folder}/encoder/hf'),
]
train_glue([*task, '--method', 'lora', '--dry-run'])

# %% [markdown]
# ## Compare
#
# The first seed runs with every learning rate, the second with the best. Interrupt it whenever you like: the same
# command repeats nothing that is finished.

# %%
train_glue(
  [
    *(*task, '--method', 'full,lora,gradnormlorp'),
    *('--learning-rates', '1e-3,3e-3', '--seeds', '0,1', '--epochs', '3'),
    *('--run-dir', f'{folder}/compared'),
  ]
)

# %% [markdown]
# ## What is in the folder
#
# `results.md`, `results.json` and `results.png` over all runs, and a folder for each, with its metrics,
# and predictions where there is a `--data.test`; of one run alone, or with `--export True`, also the model as a Hugging Face folder.

# %%
print((folder / 'compared' / 'results.md').read_text())

# %% [markdown]
# With another method, rate or seed the same command adds what is missing to the table. Published settings
# of GLUE's tasks, and where they come from, are in [fine-tuning on GLUE](../finetuning.html); what a
# small encoder gained by each method is in [the results](../results/glue.html).
