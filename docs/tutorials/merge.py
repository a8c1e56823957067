# %% [markdown]
# # Merge models
#
# Two people trained copies of one model further, each on other text. Merging makes one model of theirs that is
# better than the first on both, without training and without their data. The models here have a million
# parameters and are made on the spot. With models of your own:
#
# ```bash
# pip install '.[train]'  # In a checkout.
# gnlorp-merge --base base/ --experts one/ two/ --method task_arithmetic --scale 0.5 --out both/ --dry-run
# gnlorp-merge --base base/ --experts one/ two/ --method task_arithmetic --scale 0.5 --out both/
# gnlorp-evaluate both/ --tasks perplexity:one.txt,perplexity:two.txt
# ```
#
# ## A model, and two experts of it
#
# Python's standard library has both: English in the texts of its help, and code. The last tenth of either is
# kept to score by.

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
# The base reads some of both, then each expert starts from it and reads one alone.

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
# `--dry-run` lists what would become of every tensor, and all that does not fit.

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
# Task arithmetic adds to the base what each expert changed, here half of it. `ties`, `tsv` and `doge` lessen
# conflicts between the changes, `dare` drops most of them at random; [merging models](../merging.html) explains them.

# %%
merge(both)

# %% [markdown]
# ## What it can do
#
# Perplexity on the texts that were kept, lower is better:

# %%
scored = ','.join(f'perplexity:{folder}/{name}_scored.txt' for name in texts)
for model in ('base/hf', 'english/hf', 'code/hf', 'both'):
  evaluate([f'{folder}/{model}', '--tasks', scored])

# %% [markdown]
# Each expert is better than the base at what it read, and worse at the rest. The merged model is better at both, by
# less.
#
# Merged models are not good by construction: score experts and merged models on all their tasks, and try several
# values of `--scale`. Too small a one forgets the tasks, too large a one disturbs the base.
