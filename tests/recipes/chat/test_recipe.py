"""Conversations; what the model draws is given, as `stream` has tests."""

import contextlib
import dataclasses
import json
import types

import pytest
import tokenizers

from gnlorp_jax.data import chat
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.chat import recipe
from gnlorp_jax.recipes.chat.settings import ChatConfig
from tests.compose import small_lm

CONFIG = ChatConfig(folder='f', template='alpaca', system='Be kind.')


@pytest.fixture
def drawn(monkeypatch):
  """What the model was asked for, and what it answers, as text."""

  found = types.SimpleNamespace(answer='Zoë 🙂!', asked=[])

  def stream(model, params, ids, num_tokens, **options):
    found.asked.append((ids, num_tokens, options))
    for token in small_lm.tokenizer().encode(found.answer):
      yield int(token)
    yield options['eos_ids'][0]

  monkeypatch.setattr(recipe, 'stream', stream)
  return found


def dialogue(config=CONFIG, template='none', max_seq_len=128):
  size = dataclasses.replace(small_lm.CONFIG, max_seq_len=max_seq_len)
  model, tokenizer = types.SimpleNamespace(config=size), small_lm.tokenizer()
  return recipe.Dialogue(
    config, model, {}, tokenizer, chat.load_template(template, tokenizer)
  )


def said(talk):
  return [(message.role, message.content) for message in talk.messages]


SYSTEM = ('system', 'Be kind.')


def test_what_was_said_is_told_again(drawn):
  talk = dialogue()
  pieces = list(talk.ask('Hi'))
  assert pieces == ['Z', 'o', 'ë', ' ', '🙂', '!']
  exchange = [('user', 'Hi'), ('assistant', 'Zoë 🙂!')]
  assert said(talk) == [SYSTEM, *exchange]
  drawn.answer = 'b'
  list(talk.ask('a'))
  assert said(talk) == [SYSTEM, *exchange, ('user', 'a'), ('assistant', 'b')]
  (first, room, options), (second, _, later) = drawn.asked
  template = chat.load_template('none', small_lm.tokenizer())
  assert first.tolist() == template.prompt(talk.messages[:2]).tolist()
  assert second.tolist() == template.prompt(talk.messages[:4]).tolist()
  assert room == 64  # Half of what the model reads.
  assert options['eos_ids'] == template.stop_ids
  assert (options['temperature'], options['top_p']) == (0.7, 0.9)
  assert options['key'] != later['key']
  talk.reset()
  assert said(talk) == [SYSTEM]


def test_answer_that_is_stopped_counts_as_far_as_it_got(drawn):
  talk = dialogue()
  with contextlib.closing(talk.ask('Hi')) as answer:
    assert next(answer) == 'Z'
    assert next(answer) == 'o'
  assert said(talk)[-1] == ('assistant', 'Zo')
  drawn.answer = ''
  assert list(talk.ask('And?')) == []
  assert said(talk)[-1] == ('assistant', 'Zo')


def test_oldest_exchanges_are_left_out_when_they_no_longer_fit(drawn):
  talk = dialogue(dataclasses.replace(CONFIG, max_tokens=40))
  for left_out in (0, 0, 0, 1, 2):
    list(talk.ask('How are you today?'))
    assert talk.left_out == left_out
  ids = drawn.asked[-1][0]
  assert ids.size + 40 <= 128
  shown = small_lm.tokenizer().decode(ids)
  assert shown.startswith('Be kind.') and shown.count('How are you') == 3


def test_questions_that_are_too_long_or_cannot_be_written_are_refused(drawn):
  talk = dialogue()
  with pytest.raises(ValueError) as error:
    talk.ask('why ' * 20)
  size = len('Be kind.\n' + 'why ' * 20 + '\n')
  assert str(error.value) == (
    f'The question is too long: it makes {size} tokens, and the model reads '
    '128, of which 64 are kept for its answer. Shorten it, or lower '
    '--max-tokens.'
  )
  with pytest.raises(ValueError) as error:
    talk.ask('</s>')
  assert str(error.value) == (
    'The template cannot write this down: spells a control token. Put it in '
    'other words; if that does not help, begin anew.'
  )
  assert said(talk) == [SYSTEM] and not drawn.asked


def test_base_model_is_told_what_to_do(tmp_path):
  fields = llama.config_to_hf(small_lm.CONFIG)
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  small_lm.tokenizer().save(tmp_path)
  with pytest.raises(ValueError) as error:
    recipe.load(ChatConfig(folder=str(tmp_path)))
  assert str(error.value) == (
    f'{tmp_path} has no chat template: it is a base model, which continues a '
    'text and was not taught to answer. Fine-tune it with train_sft.py and '
    'name the hf/ of that run, or name a model that was made for chat. If it '
    'was taught by another program, say in which form: --template alpaca, or '
    '--template FILE.jinja.'
  )


def test_what_is_saved_with_adapters_goes_before_the_models_own(tmp_path):
  config = ChatConfig(folder='f', adapter=str(tmp_path))
  assert recipe._names(config) == (None, 'tokenizer')
  for name in ('tokenizer.json', 'chat_template.jinja'):
    (tmp_path / name).touch()
  file = str(tmp_path / 'chat_template.jinja')
  assert recipe._names(config) == (str(tmp_path), file)
  given = dataclasses.replace(config, tokenizer='t', template='alpaca')
  assert recipe._names(given) == ('t', 'alpaca')


# Pieces of text.

TEXT = 'aé漢🙂👩\u200d👧 \n x'


def fallback():
  """A tokenizer of pieces with spaces, and of bytes for all else."""
  vocab = {f'<0x{byte:02X}>': byte for byte in range(256)} | {'▁x': 256}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True)
  )
  backend.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace('▁', ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(' ', 1, 0),
    ]
  )
  return backend


def test_no_piece_has_half_a_character():
  tokenizer = small_lm.tokenizer()
  ids = tokenizer.encode(TEXT).tolist()
  assert len(ids) == len(TEXT.encode())
  assert list(recipe.pieces(ids, tokenizer.decode)) == list(TEXT)


def test_pieces_of_bytes_beside_words_make_the_text():
  decode = fallback().decode
  ids = [256, 256, *TEXT.encode(), 256, *TEXT.encode()]
  found = list(recipe.pieces(ids, decode))
  assert ''.join(found) == decode(ids)
  assert found[:5] == ['x', ' x', 'a', 'é', '漢']
  assert not any('\ufffd' in piece for piece in found)


def test_beginning_of_a_character_is_shown_if_nothing_follows():
  ids = [*'é🙂'.encode()][:-1]
  decode = fallback().decode
  assert ''.join(recipe.pieces(ids, decode)) == 'é' + 3 * '\ufffd'
  # What is no character at all does not keep the rest back.
  found = list(recipe.pieces([0x61, 0xFF, 256, 256], decode))
  assert found == ['a', '\ufffd x', ' x']
