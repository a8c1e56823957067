# %% [markdown]
# # Compare methods on a task
#
# Which method of fine-tuning is best for your task? Only a trial on the task can tell. `gnlorp-train-glue` fine-tunes an
# encoder such as RoBERTa to sort sentences into classes. It does so with all the methods, learning rates and seeds that
# you name, and ends with a table that compares them. These are the commands for your own task and a trained encoder:
#
# ```bash
# pip install '.[glue]'  # In a checkout.
# gnlorp-train-glue --task mine --data.train train.jsonl --data.dev dev.jsonl \
#   --init-from hf:FacebookAI/roberta-base --method full,lora,gradnormlorp \
#   --learning-rates 1e-5,3e-5,1e-4,4e-4 --seeds 0,1,2 --epochs 3
# ```
#
# Of these methods `full` trains all weights by AdamW. `lora` trains adapters, which are pairs of thin matrices beside
# weights that stay as they are. `gradnormlorp` trains all weights, and projects the gradient of each weight matrix onto a
# few directions, so that Adam's moments are small. The learning rates reach from what suits the first to what suits LoRA.
#
# The tasks of GLUE are read from its official files: `--task mrpc,rte --data.source glue/`. Without any option the
# program generates a task and a small encoder, and needs no files.
#
# This page runs the same commands on a task that is made up here, with a small encoder that is trained here.
#
# ## The task
#
# A task is two files, of JSON lines or of tab-separated values. `--data.text-columns` names the columns of the text (one
# or two; `text` by default), and `--data.label-column` that of the class (`label`). The question here is whether a
# sentence is about a fruit or about a tool. The sentences to evaluate on have adjectives that are not in the sentences to
# train on.

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
# The encoder is a Hugging Face folder of a RoBERTa, or its name on the hub; it may have any head or none. Here
# `gnlorp-train-lm` makes one, with a tokenizer. It learns to guess tokens that are left out of such sentences.

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
#
# `--dry-run` lists what a method would do with every parameter.

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
# For each method, the first seed runs with every learning rate, and the second seed with the best of them. You may
# interrupt the command whenever you like: given again, it repeats nothing that is finished.

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
# `results.md`, `results.json` and `results.png` are about all runs. Each run has a folder with its metrics, and with its
# predictions if there is a test split (`--data.test`). If the command is for one run alone, or with `--export True`, the
# folder also has the model as a Hugging Face folder.

# %%
print((folder / 'compared' / 'results.md').read_text())

# %% [markdown]
# Give the same command with another method, rate or seed, and it adds what is missing to the table.
#
# Next: [fine-tuning on GLUE](../finetuning.html) has all methods and options, and says where the settings of GLUE's tasks
# come from. [The results](../results/glue.html) show what a small encoder gained by each method.
