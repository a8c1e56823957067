# %% [markdown]
# # A chat model from your own data
#
# From a file of conversations to a model that answers, in four commands. What is run here, on two
# CPU cores in a minute, is a model of a million parameters that first learns to
# speak by generated instructions; with a real one the commands are the same:
#
# ```bash
# pip install '.[sft]'  # In a checkout.
# gnlorp-train-sft --model hf:HuggingFaceTB/SmolLM2-135M --data chats.jsonl --preview
# gnlorp-train-sft --model hf:HuggingFaceTB/SmolLM2-135M --data chats.jsonl --epochs 10 --batch-size 2
# gnlorp-chat runs/sft/hf
# ```
#
# ## The model to start from
#
# Without options `train_sft.py` trains a small model on instructions about made-up words, and
# leaves it as a Hugging Face folder. Two epochs are enough here.

# %%
import json
import pathlib
import tempfile

from gnlorp_jax.chat import main as chat
from gnlorp_jax.train_sft import main as train_sft

folder = pathlib.Path(tempfile.mkdtemp())
train_sft(
  [
    *('--run-dir', f'{folder}/base', '--epochs', '2'),
    *('--eval.generate', '4', '--eval.max-tokens', '24'),
  ]
)

# %% [markdown]
# ## The conversations
#
# One JSON object on every line: the messages of a conversation. Other formats (alpaca, sharegpt,
# prompt and completion, plain text) are [told apart by their keys](../instruction-tuning.html#data).

# %%
words = ['pinaha', 'lomiku', 'tarero', 'sudevo', 'kilaba', 'monuri', 'vesoti']
with open(folder / 'chats.jsonl', 'w') as file:
  for word in words:
    for mark in '!?':
      messages = [
        {'role': 'user', 'content': f'Shout {word} with {mark}'},
        {'role': 'assistant', 'content': f'{word}{mark}{mark}'},
      ]
      file.write(json.dumps({'messages': messages}) + '\n')

# %% [markdown]
# ## Look before you train
#
# What the model reads, and what of it is learned: the answers, up to the token that ends them.

# %%
model = ['--model', f'{folder}/base/hf', '--data', f'{folder}/chats.jsonl']
train_sft([*model, '--preview'])

# %% [markdown]
# ## Train
#
# LoRA here; `--method` takes [every other one](../instruction-tuning.html#methods). A run that is
# interrupted goes on where it stopped when the same command is given again.

# %%
train_sft(
  [
    *(*model, '--run-dir', f'{folder}/run', '--method', 'lora'),
    *('--learning-rate', '3e-3', '--epochs', '20', '--batch-size', '2'),
    *('--eval-every', '20', '--eval.max-tokens', '24'),
  ]
)

# %% [markdown]
# ## Talk to it
#
# The run left a Hugging Face folder, which transformers reads too. `gnlorp-chat` talks on a
# terminal; with `--prompt` it answers one question.

# %%
chat(
  [f'{folder}/run/hf', '--prompt', 'Shout pinaha with !', '--temperature', '0']
)
