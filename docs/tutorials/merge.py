# %% [markdown]
# # Merge models
#
# Suppose that two people each took a copy of one model and trained it further, each on a different text. Merging
# combines their two models into one, without any more training and without their texts. On this page the merged
# model is better on both texts than the model that both of them started from. The models here have a million
# parameters and are trained here. These are the commands for models of your own:
#
# ```bash
# pip install '.[train]'  # In a checkout.
# gnlorp-merge --base base/ --experts one/ two/ --method task_arithmetic --scale 0.5 --out both/ --dry-run
# gnlorp-merge --base base/ --experts one/ two/ --method task_arithmetic --scale 0.5 --out both/
# gnlorp-evaluate both/ --tasks perplexity:one.txt,perplexity:two.txt
# ```
#
# `base/` is the model that both started from, and `one/` and `two/` are what they made of it, all as Hugging Face folders.
# Models that were trained from one base are called its *experts*.
#
# ## A model, and two experts of it
#
# The two texts are English and code. Python's standard library has both: English is in the texts of its help. The last
# tenth of each text is not trained on, and is kept to score the models.

# %%
import asyncio
import pathlib
import pydoc_data.topics
import tempfile

from gnlorp_jax.evaluate import main as evaluate
from gnlorp_jax.merge import main as merge
from gnlorp_jax.train_lm import main as train_lm

folder = pathlib.Path(tempfile.mkdtemp())
modules = sorted(pathlib.Path(asyncio.__file__).parent.glob('*.py'))
texts = {
  'english': '\n'.join(pydoc_data.topics.topics.values()),
  'code': '\n'.join(path.read_text() for path in modules),
}
for name, text in texts.items():
  end = len(text) * 9 // 10
  (folder / f'{name}.txt').write_text(text[:end])
  (folder / f'{name}_scored.txt').write_text(text[end:])

# %% [markdown]
# The base is trained on both texts for a while. Then each expert starts from it, and is trained on one of them. The
# optimizer is GaLore of rank 32: it projects the gradient of each weight matrix onto 32 directions.

# %%
common = [
  *('--data.seq-len', '128', '--data.cache-dir', f'{folder}/cache'),
  *('--batch-size', '8', '--optim.rank', '32', '--optim.name', 'galore'),
  *('--optim.update-proj-gap', '50', '--eval-batches', '2'),
]
train_lm(
  [
    *(*common, '--data.source', f'{folder}/english.txt,{folder}/code.txt'),
    *('--model.vocab-size', '512', '--model.hidden-size', '128'),
    *('--model.intermediate-size', '344', '--model.num-layers', '4'),
    *('--model.num-heads', '4', '--run-dir', f'{folder}/base'),
    *('--steps', '200', '--eval-every', '200'),
  ]
)

# %%
for name in texts:
  train_lm(
    [
      *(*common, '--data.source', f'{folder}/{name}.txt'),
      *('--init-from', f'{folder}/base/hf', '--run-dir', f'{folder}/{name}'),
      *('--steps', '150', '--eval-every', '150'),
      *('--optim.learning-rate', '5e-3'),
    ]
  )

# %% [markdown]
# ## Look before you merge
#
# `--dry-run` lists what would become of every tensor, and everything in which the models do not fit together.

# %%
both = [
  *('--base', f'{folder}/base/hf', '--out', f'{folder}/both'),
  *('--experts', f'{folder}/english/hf', f'{folder}/code/hf'),
  *('--method', 'task_arithmetic', '--scale', '0.5'),
]
merge([*both, '--dry-run'])

# %% [markdown]
# ## Merge
#
# Task arithmetic takes the change that each expert made to the base, and adds a part of it, here half (`--scale 0.5`),
# to the base. Other methods do more: `ties`, `tsv` and `doge` lessen conflicts between the changes, and `dare` drops most
# entries of the changes at random and scales up the others. [Merging models](../merging.html) explains them.

# %%
merge(both)

# %% [markdown]
# ## What it can do
#
# The four models are scored by their perplexity on the parts of the texts that were kept. A lower perplexity is better.

# %%
scored = ','.join(f'perplexity:{folder}/{name}_scored.txt' for name in texts)
for model in ('base/hf', 'english/hf', 'code/hf', 'both'):
  evaluate([f'{folder}/{model}', '--tasks', scored])

# %% [markdown]
# Each expert is better than the base on the text that it was trained on, and worse on the other. The merged model is
# better than the base on both texts, though by less than each expert is on its own.
#
# Merging does not always give a good model. Score the experts and the merged model on all their tasks, and try several
# values of `--scale`: too small a value forgets the tasks, and too large a value disturbs the base.
#
# Next: [merging models](../merging.html) has all methods and options, adapters of LoRA among them, and
# [evaluate a model](../evaluation.html) has other tasks to score by.
