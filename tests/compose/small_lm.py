"""A small random LLaMA that reads bytes, and its Hugging Face folder."""

import functools

import jax
import tokenizers

from gnlorp_jax.data.tokenizer import Tokenizer
from gnlorp_jax.models import hf, llama

CONFIG = llama.LlamaConfig(
  vocab_size=260,
  hidden_size=32,
  intermediate_size=44,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  max_seq_len=128,
  initializer_std=0.3,
  tie_embeddings=True,
)


def tokenizer(merges=()):
  """Bytes, and the tokens `</s>` and `<s>`."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  pieces = [*alphabet, *(a + b for a, b in merges)]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=list(merges))
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(['</s>', '<s>'])
  return Tokenizer(backend)


@functools.cache
def model():
  made = llama.make(CONFIG)
  return made, made.init(jax.random.key(1))


def write(folder, **fields):
  """Writes the folder; returns its path as text."""
  _, params = model()
  hf_config = llama.config_to_hf(CONFIG) | fields
  hf.export(folder, params, llama.HF_TENSORS, hf_config)
  tokenizer().save(folder)
  return str(folder)
