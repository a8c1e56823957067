"""A tokenizer whose ids can be read: bytes, and five control tokens."""

import json

import hypothesis
import tokenizers

from gnlorp_jax.data import tokenizer_files
from gnlorp_jax.data.tokenizer import Tokenizer

# The same examples every time.
FEW = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)

START, END, PAD, BOS, THINK = range(256, 261)
TOKENS = ('<|start|>', '<|end|>', '<|pad|>', '<|bos|>', '<think>')

# As ChatML has it.
PLAIN = """\
{%- for message in messages -%}
<|start|>{{ message['role'] }}
{{ message['content'] }}<|end|>
{% endfor -%}
{% if add_generation_prompt -%}
<|start|>assistant
{% endif -%}
"""
# The same, with marks.
MARKED = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|start|>assistant
{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}

{% else -%}
<|start|>{{ message['role'] }}
{{ message['content'] }}<|end|>
{% endif -%}
{% endfor -%}
{% if add_generation_prompt -%}
<|start|>assistant
{% endif -%}
"""
# Shows tools, and what is done with them.
TOOLS = """\
{%- if tools -%}
<|start|>system
{{ tools | tojson }}<|end|>
{% endif -%}
{%- for message in messages -%}
<|start|>{{ message['role'] }}
{{ message['content'] }}
{%- for call in message['tool_calls'] or [] -%}
[{{ call['function']['name'] }} {{ call['function']['arguments'] | tojson }}]
{%- endfor -%}
<|end|>
{% endfor -%}
{% if add_generation_prompt -%}
<|start|>assistant
{% endif -%}
"""
# Leaves thoughts out once the conversation has gone on.
FORGETFUL = """\
{%- for message in messages -%}
{%- set words = message['content'] -%}
{%- if not loop.last -%}
{%- set words = words.split('</think>')[-1] -%}
{%- endif -%}
<|start|>{{ message['role'] }}
{{ words }}<|end|>
{% endfor -%}
{% if add_generation_prompt -%}
<|start|>assistant
{% endif -%}
"""


def _characters():
  """The character that stands for each byte in byte-level vocabularies."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in shown]
  table = {byte: chr(byte) for byte in shown}
  return table | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def backend(merges=(), adds_bos=False, trims=False):
  """Of the `tokenizers` library; ids of bytes are the bytes.

  Args:
    merges: Pairs of pieces that become one, with ids from 300 on.
    adds_bos: Whether a text begins with `<|bos|>`.
    trims: Whether offsets leave spaces out, as in GPT-2 and LLaMA 3.
  """
  vocab = {character: byte for byte, character in _characters().items()}
  vocab |= {a + b: 300 + i for i, (a, b) in enumerate(merges)}
  model = tokenizers.models.BPE(vocab=vocab, merges=list(merges))
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  # Ids of added tokens cannot be chosen, unless a file says them.
  state = json.loads(made.to_str())
  flags = ('single_word', 'lstrip', 'rstrip', 'normalized')
  state['added_tokens'] = [
    {'id': 256 + i, 'content': token, 'special': token[1] == '|'}
    | dict.fromkeys(flags, False)
    for i, token in enumerate(TOKENS)
  ]
  state['model']['vocab'] |= {t: 256 + i for i, t in enumerate(TOKENS)}
  made = tokenizers.Tokenizer.from_str(json.dumps(state))
  if trims:
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  if adds_bos:
    made = tokenizer_files.with_bos_alone(made, BOS)
  return made


def tokenizer(chat_template=None, *, pad='<|pad|>', **options):
  """Ours, of such a backend."""
  config = {
    'eos_token': '<|end|>',
    'bos_token': '<|bos|>',
    'pad_token': pad,
    'chat_template': chat_template,
  }
  beside = tokenizer_files.Beside(config=config)
  return Tokenizer(backend(**options), beside=beside)


def ids(*parts):
  """Ids of texts and of control tokens, in order."""
  found = []
  for part in parts:
    found += [part] if isinstance(part, int) else list(part.encode())
  return found


def weights(*parts):
  """Weights of parts that are ``(text or control token, weight)``."""
  return [float(w) for part, w in parts for _ in ids(part)]
