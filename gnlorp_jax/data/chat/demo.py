"""Instructions that need no files: what to do with a made-up word.

The words are syllables joined at random, and those of the held-out questions
are in no training question: a model answers them only if it learned what is to
be done, not the answers.
"""

from collections.abc import Callable

import numpy as np
import tokenizers

from gnlorp_jax.data import tokenizer_files
from gnlorp_jax.data.chat.conversations import Conversation, Message
from gnlorp_jax.data.chat.reading import Source
from gnlorp_jax.data.tokenizer import Tokenizer

_SYLLABLES = (
  *('ba', 'be', 'bo', 'da', 'de', 'do', 'fa', 'fi', 'go', 'ha', 'ka', 'ke'),
  *('la', 'li', 'lo', 'ma', 'mi', 'mo', 'na', 'ne', 'no', 'pa', 'pi', 'po'),
  *('ra', 're', 'ri', 'sa', 'se', 'so', 'ta', 'te', 'to', 'va', 'vi', 'zu'),
)
_TASKS: tuple[tuple[str, Callable[[str], str]], ...] = (
  ('Write {} in capital letters.', str.upper),
  ('Say {} twice.', lambda word: f'{word} {word}'),
  ('What is the first letter of {}?', lambda word: word[0]),
  ('What is the last letter of {}?', lambda word: word[-1]),
  ('Put {} in brackets.', lambda word: f'[{word}]'),
  ('How many letters has {}?', lambda word: str(len(word))),
)

_PAD, _USER, _ASSISTANT, _END = (
  '<|pad|>',
  '<|user|>',
  '<|assistant|>',
  '<|end|>',
)
_TEMPLATE = (
  '{% for message in messages %}'
  "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def sources(
  seed: int, *, train: int = 3000, held_out: int = 200
) -> tuple[Source, Source]:
  """Makes questions and answers, those to train on and those held out.

  Args:
    seed: At least 0; decides the words.
    train: Number of questions to train on.
    held_out: Number of questions held out.
  """
  rng = np.random.default_rng(seed)
  words: dict[str, None] = {}
  while len(words) < train + held_out:
    words[''.join(rng.choice(_SYLLABLES, rng.integers(2, 4)))] = None
  made = tuple(_conversation(rng, word) for word in words)
  return (
    Source('demo', 1.0, made[:train], {}),
    Source('demo', 1.0, made[train:], {}),
  )


def _conversation(rng: np.random.Generator, word: str) -> Conversation:
  question, answer = _TASKS[rng.integers(len(_TASKS))]
  return Conversation(
    messages=(
      Message(role='user', content=question.format(word)),
      Message(role='assistant', content=answer(word)),
    ),
    where='demo',
  )


def tokenizer() -> Tokenizer:
  """A tokenizer of bytes, with a chat template; no text is unknown to it."""
  special = (_PAD, _END, _USER, _ASSISTANT)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate((*special, *alphabet))}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocabulary, merges=[])
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(list(special))
  beside = tokenizer_files.Beside(
    config={'eos_token': _END, 'pad_token': _PAD, 'bos_token': None},
    templates={'chat_template.jinja': _TEMPLATE},
  )
  return Tokenizer(backend, beside=beside)
