"""The generated instructions and their tokenizer."""

from gnlorp_jax.data import chat
from gnlorp_jax.data.chat import demo


def test_held_out_words_are_in_no_training_question():
  train, held_out = demo.sources(0, train=300, held_out=50)
  assert (len(train.conversations), len(held_out.conversations)) == (300, 50)
  questions = {c.messages[0].content for c in train.conversations}
  assert not questions & {c.messages[0].content for c in held_out.conversations}
  assert demo.sources(0, train=300, held_out=50) == (train, held_out)
  assert demo.sources(1, train=300, held_out=50) != (train, held_out)


def test_questions_have_their_answers():
  train, _ = demo.sources(0, train=200, held_out=1)
  found = {
    c.messages[0].content.split()[0]: [m.content for m in c.messages]
    for c in train.conversations
  }
  question, answer = found['Write']
  assert answer == question.split()[1].upper()
  question, answer = found['Put']
  assert answer == f'[{question.split()[1]}]'
  question, answer = found['How']
  assert int(answer) == len(question.split()[-1].rstrip('?'))


def test_tokenizer_writes_its_template_and_reads_any_text():
  tokenizer = demo.tokenizer()
  template = chat.load_template('tokenizer', tokenizer)
  train, _ = demo.sources(0, train=1, held_out=1)
  example = template.encode(train.conversations[0], 'assistant')
  answer = train.conversations[0].messages[1].content
  learned = example.ids[example.weights > 0]
  assert tokenizer.decode(learned) == answer
  assert learned[-1] == tokenizer.eos_id in template.stop_ids
  assert tokenizer.decode(tokenizer.encode('Zürich 漢')) == 'Zürich 漢'
  assert tokenizer.vocab_size == 260
