from gnlorp_jax.data import chat
from tests.data.chat import small_chat


def test_what_counts_can_be_seen():
  tokenizer = small_chat.tokenizer(small_chat.PLAIN)
  template = chat.load_template('tokenizer', tokenizer)
  conversation = chat.Conversation(
    (chat.Message('user', 'Hé'), chat.Message('assistant', 'Nö😀'))
  )
  text = chat.preview(template.encode(conversation), tokenizer)
  assert text.plain == (
    '<|start|>user\nHé<|end|>\n<|start|>assistant\nNö😀<|end|>\n'
  )
  shown = [(text.plain[s.start : s.end], s.style) for s in text.spans]
  bracketed = chat.preview(
    template.encode(conversation), tokenizer, brackets=True
  )
  assert bracketed.plain == text.plain.replace('Nö😀<|end|>', '⟦Nö😀<|end|>⟧')
  assert shown == [
    ('<|start|>', 'dim reverse'),
    ('user\nHé', 'dim'),
    ('<|end|>', 'dim reverse'),
    ('\n', 'dim'),
    ('<|start|>', 'dim reverse'),
    ('assistant\n', 'dim'),
    ('Nö😀', 'bold green'),
    ('<|end|>', 'bold green reverse'),
    ('\n', 'dim'),
  ]
