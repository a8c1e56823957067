# %% [markdown]
# # A chat model from your own data
#
# This page goes from a file of conversations to a model that answers. With an open model and your own file these are the
# commands:
#
# ```bash
# pip install '.[train]'  # In a checkout; '.[sft]' reads Parquet files too.
# gnlorp-train-sft --model hf:HuggingFaceTB/SmolLM2-135M --data chats.jsonl --preview
# gnlorp-train-sft --model hf:HuggingFaceTB/SmolLM2-135M --data chats.jsonl --method lora --learning-rate 1e-3 \
#   --epochs 20 --batch-size 2 --data.val-size 6
# gnlorp-chat runs/sft/hf
# ```
#
# `--method lora` trains *adapters*: beside each weight matrix of the blocks, which stays as it is, stand two thin
# matrices that learn a change of it. Without `--method` all weights are trained, by GradNormLoRP.
#
# Epochs and batch size are those of a file of some thirty conversations: an epoch of these is one step or two, and two
# steps change a model little. The preview says how many steps a run will take. `--data.val-size 6` holds out six
# conversations, which say what was learned. A thousand conversations need none of these options. If one rate is not
# enough, `--learning-rates 1e-3,3e-3` tries both ([where each is left](../instruction-tuning.html#several-learning-rates)).
#
# The rest of this page runs the same commands on a model of a million parameters, which takes two CPU cores a minute or two.
#
# ## The model to start from
#
# A real model can already write. The small one of this page first has to learn it. Without options
# `gnlorp-train-sft` trains such a model on generated instructions about made-up words, and leaves it as a Hugging
# Face folder.

# %%
import contextlib
import io
import json
import pathlib
import random
import tempfile

from gnlorp_jax.chat import main as chat
from gnlorp_jax.train_sft import main as train_sft

folder = pathlib.Path(tempfile.mkdtemp())
train_sft(
  [
    *('--run-dir', f'{folder}/base', '--epochs', '3'),
    *('--eval.generate', '4', '--eval.max-tokens', '24'),
  ]
)

# %% [markdown]
# ## The conversations
#
# Every line of the file is a JSON object with the messages of one conversation. Other formats (alpaca, sharegpt,
# prompt and completion, plain text) are recognised [by their keys](../instruction-tuning.html#data). In these
# conversations the model learns to shout a word.

# %%
draw = random.Random(0)
syllables = 'ba de fi go ka lo mi na pe ra su to vi zu'.split()
with open(folder / 'chats.jsonl', 'w') as file:
  for _ in range(120):
    word = ''.join(draw.choices(syllables, k=3))
    messages = [
      {'role': 'user', 'content': f'Shout {word}.'},
      {'role': 'assistant', 'content': f'{word.upper()}!'},
    ]
    file.write(json.dumps({'messages': messages}) + '\n')

# %% [markdown]
# ## Look before you train
#
# `--preview` shows what the model reads, and marks what of it is learned. Here that is the answers, with the token that
# ends each of them. The template of a model may begin every conversation with a system message of its own; it is shown
# too. Write `system` messages of your own to replace it.

# %%
model = ['--model', f'{folder}/base/hf', '--data', f'{folder}/chats.jsonl']
train_sft([*model, '--preview'])

# %% [markdown]
# ## Train
#
# The method is LoRA; `--method` takes [many others](../instruction-tuning.html#methods). A run that was
# interrupted goes on when the same command is given again.

# %%
train_sft(
  [
    *(*model, '--run-dir', f'{folder}/run', '--method', 'lora'),
    *('--learning-rate', '3e-3', '--epochs', '6', '--batch-size', '4'),
    *('--eval-every', '50', '--eval.max-tokens', '24'),
  ]
)

# %% [markdown]
# ## Did it learn?
#
# The end of the run shows some held-out questions with the answers that the model writes, and beside an answer that
# differs the expected one. All are in `samples.jsonl`. Read these first. The share of tokens that are guessed right is
# high soon, because most tokens of an answer follow from the ones before: a model learns the manner of answers before
# their facts. A validation loss that rises again says that the model learns its training file by heart; the weights of
# the lowest one are those that are exported.
#
# ## Talk to it
#
# The run left a Hugging Face folder, with the adapters added to the weights. The transformers library reads it too.
# `gnlorp-chat` talks on a terminal; with `--prompt` it answers one question. The word in this question was in none of
# the conversations.

# %%
# An answer appears piece by piece, as it is written. This page shows it whole.
with contextlib.redirect_stdout(io.StringIO()) as answer:
  chat([f'{folder}/run/hf', '--prompt', 'Shout pinaha.', '--temperature', '0'])
print(answer.getvalue())

# %% [markdown]
# Next:
#
# * [Fine-tuning on instructions and conversations](../instruction-tuning.html) has all formats, methods and options, and
#   `--export adapter`, which leaves the small file of the adapters alone.
# * [Will it fit my card?](will_it_fit.html) plans the memory of larger models.
# * [Evaluate a model](../evaluation.html) scores what was trained, and [merging](merge.html) makes one model of several.
