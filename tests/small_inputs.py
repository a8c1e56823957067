"""Text and models of some kilobytes that runs of tests read."""

import pathlib
import random

import jax

from gnlorp_jax.data import tokenizer
from gnlorp_jax.models import hf, llama

CONFIG = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=32,
  num_layers=2,
  num_heads=2,
  max_seq_len=64,
)


def write_text(path: pathlib.Path, lines: int = 400) -> None:
  """Writes lines of eight words, of fifty in all."""
  rng = random.Random(0)
  words = [
    ''.join(rng.choices('abcdefghij', k=rng.randint(2, 6))) for _ in range(50)
  ]
  path.write_text(
    '\n'.join(' '.join(rng.choices(words, k=8)) for _ in range(lines))
  )


def write_model(
  folder: pathlib.Path, text: pathlib.Path, cache: pathlib.Path, seed: int = 0
) -> None:
  """Writes a LLaMA that has not learned, and a tokenizer that has.

  Args:
    folder: The folder of the model.
    text: A file to train the tokenizer on.
    cache: A folder to keep the tokenizer in.
    seed: Of the weights.
  """
  params = jax.jit(llama.make(CONFIG).init)(jax.random.key(seed))
  hf.export(folder, params, llama.HF_TENSORS, llama.config_to_hf(CONFIG))
  found = tokenizer.load(
    'bpe', source=str(text), vocab_size=CONFIG.vocab_size, cache_dir=cache
  )
  found.save(folder)
