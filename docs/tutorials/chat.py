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
# gnlorp-train-sft --model hf:HuggingFaceTB/SmolLM2-135M --data chats.jsonl --method lora --learning-rate 1e-3
# gnlorp-chat runs/sft/hf
# ```
#
# ## The model to start from
#
# Without options `train_sft.py` trains a small model on instructions about made-up words, and
# leaves it as a Hugging Face folder.

# %%
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
# One JSON object on every line: the messages of a conversation. Other formats (alpaca, sharegpt,
# prompt and completion, plain text) are [told apart by their keys](../instruction-tuning.html#data).

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
    *('--learning-rate', '3e-3', '--epochs', '6', '--batch-size', '4'),
    *('--eval-every', '50', '--eval.max-tokens', '24'),
  ]
)

# %% [markdown]
# ## Talk to it
#
# The run left a Hugging Face folder, which transformers reads too. `gnlorp-chat` talks on a
# terminal; with `--prompt` it answers one question. This word was in no conversation.

# %%
chat([f'{folder}/run/hf', '--prompt', 'Shout pinaha.', '--temperature', '0'])
