"""Conversations to train on: files to tokens, with which of them count.

Files are read (`read`), a template (`load_template`) makes examples of their
conversations, `prepare` splits and counts them, and batches have one of them or
several in a row (`TrainingBatches`, `evaluation_batches`). `preview` shows what
counts of an example.
"""

from gnlorp_jax.data.chat.batches import TrainingBatches, evaluation_batches
from gnlorp_jax.data.chat.conversations import (
  Conversation,
  Message,
  SkippedError,
)
from gnlorp_jax.data.chat.packing import pack
from gnlorp_jax.data.chat.preparing import Counts, Prepared, prepare
from gnlorp_jax.data.chat.preview import preview
from gnlorp_jax.data.chat.reading import Source, read
from gnlorp_jax.data.chat.templates import Example, Template, load_template

__all__ = [
  'Conversation',
  'Counts',
  'Example',
  'Message',
  'Prepared',
  'SkippedError',
  'Source',
  'Template',
  'TrainingBatches',
  'evaluation_batches',
  'load_template',
  'pack',
  'prepare',
  'preview',
  'read',
]
