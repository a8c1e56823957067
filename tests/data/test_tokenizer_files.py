"""What lies beside a tokenizer.json, and what an export makes of it."""

import json
import logging

import numpy as np
import pytest
import tokenizers

from gnlorp_jax.data import bpe, text, tokenizer_files
from gnlorp_jax.data import tokenizer as tokenizer_lib
from gnlorp_jax.data.tokenizer_files import CONFIG

BOS, EOS, EOT = '<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'
SPECIAL = (BOS, EOS, EOT, '<|header|>')
CHAT = (
  '{% for m in messages %}<|header|>{{ m.role }}<|header|>{{ m.content }}'
  '<|eot_id|>{% endfor %}'
)
TALK = [
  {'role': 'user', 'content': 'the cat'},
  {'role': 'system', 'content': 'sat <|eot_id|> on'},
]
PROMPTS = ['hello world', 'the cat sat', ' two  spaces', 'né 漢 </s>', '']


@pytest.fixture(scope='module')
def llama_backend():
  """Bytes and pairs, as LLaMA 3 has them: a token goes before every text."""
  backend = bpe.train(
    iter(['the cat sat on the mat and the dog sat on the log\n'] * 9),
    280,
    SPECIAL,
  )
  backend.post_processor = tokenizers.processors.Sequence(
    [
      tokenizers.processors.ByteLevel(trim_offsets=False),
      tokenizers.processors.TemplateProcessing(
        single=f'{BOS} $A',
        pair=f'{BOS} $A {BOS}:1 $B:1',
        special_tokens=[(BOS, 0)],
      ),
    ]
  )
  return backend


@pytest.fixture
def write(tmp_path, llama_backend):
  """Writes a folder: the tokenizer, and JSON or text files beside it."""

  def make(**files):
    folder = tmp_path / f'folder{len(list(tmp_path.iterdir()))}'
    folder.mkdir()
    llama_backend.save(str(folder / 'tokenizer.json'))
    for name, content in files.items():
      if name.startswith('template'):
        path = folder / 'additional_chat_templates' / f'{name[9:]}.jinja'
        path = path if name[9:] else folder / 'chat_template.jinja'
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
      else:
        content = content if isinstance(content, str) else json.dumps(content)
        (folder / f'{name}.json').write_text(content)
    return folder

  return make


def load(folder):
  return tokenizer_lib.load(str(folder))


def auto(folder):
  transformers = pytest.importorskip('transformers')
  return transformers.AutoTokenizer.from_pretrained(str(folder))


# An export encodes as in training.


@pytest.mark.parametrize(
  ('name', 'add_bos'),
  [
    ('t5', False),
    ('roberta-base', False),
    ('roberta-base', True),
    ('llama', False),
    ('llama', True),
  ],
)
def test_causal_export_encodes_as_documents_of_the_training_begin(
  name, add_bos, request, tmp_path
):
  if name == 'llama':
    config = {'eos_token': EOS, 'bos_token': BOS}
    folder = request.getfixturevalue('write')(tokenizer_config=config)
  else:
    folder = request.getfixturevalue('shared') / 'data' / 'tokenizers' / name
  tokenizer = load(folder)
  tokenizer.save(tmp_path / 'hf', add_bos=add_bos)
  exported, again = auto(tmp_path / 'hf'), load(tmp_path / 'hf')
  assert again.adds_bos == add_bos
  for number, prompt in enumerate(PROMPTS[:3]):
    mode, length = ('padded', 24) if number % 2 else ('packed', None)
    source = tmp_path / f'{number}.jsonl'
    source.write_text(json.dumps({'text': prompt}))
    file = text.prepare(
      str(source),
      tokenizer,
      mode=mode,
      seq_len=length,
      cache_dir=tmp_path / 'cache',
      add_bos=add_bos,
    )
    seen = file.items().ravel()[: file.tokens - 1]
    assert exported(prompt)['input_ids'] == seen.tolist()
    np.testing.assert_array_equal(again.encode(prompt, True), seen)
    # A pair is two texts, each as one by itself.
    pair = exported(prompt, 'sat')['input_ids']
    assert pair == seen.tolist() + exported('sat')['input_ids']


@pytest.mark.parametrize('name', ['t5', 'roberta-base'])
def test_export_of_a_masked_model_keeps_what_is_around_a_text(
  name, shared, tmp_path
):
  folder = shared / 'data' / 'tokenizers' / name
  load(folder).save(tmp_path)
  before, after = auto(folder), auto(tmp_path)
  for prompt in PROMPTS:
    ids = before(prompt)['input_ids']
    assert after(prompt)['input_ids'] == ids
    assert before(prompt, 'x')['input_ids'] == after(prompt, 'x')['input_ids']
    assert ids[-1] == after.eos_token_id
  assert not (tmp_path / 'generation_config.json').exists()


def test_what_a_tokenizer_puts_before_a_text_is_known(shared, write):
  folder = shared / 'data' / 'tokenizers'
  assert load(folder / 'roberta-base').adds_bos
  assert not load(folder / 't5').adds_bos
  config = {'eos_token': EOS, 'bos_token': BOS}
  assert load(write(tokenizer_config=config)).adds_bos
  # It begins with another token than the one that is named.
  config['bos_token'] = EOT
  assert not load(write(tokenizer_config=config)).adds_bos


def test_end_that_is_the_beginning_too_is_not_put_before_a_text():
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'a': 0, 'e': 1}, unk_token='a')
  )
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A e', special_tokens=[('e', 1)]
  )
  tokenizer = tokenizer_lib.Tokenizer(backend, eos_token='e', bos_token='e')
  assert not tokenizer.adds_bos


def test_offsets_of_byte_level_tokens_survive_an_export(write, tmp_path):
  config = {'eos_token': EOS, 'bos_token': BOS}
  tokenizer = load(write(tokenizer_config=config))
  tokenizer.save(tmp_path / 'hf', add_bos=True)
  before = tokenizer.backend.encode('the  cat')
  after = load(tmp_path / 'hf').backend.encode('the  cat')
  assert (after.ids, after.offsets) == (before.ids, before.offsets)


def test_prompt_is_encoded_without_an_end(write, shared):
  tokenizer = load(shared / 'data' / 'tokenizers' / 't5')
  ids = tokenizer.encode('Hello </s> world')
  assert ids.dtype == np.int64
  np.testing.assert_array_equal(
    ids, tokenizer.encode_batch(['Hello </s> world'])[0][:-1]
  )
  assert 1 not in ids
  assert tokenizer.encode('Hello </s> world', True)[-1] == 1
  tokenizer = load(write(tokenizer_config={'eos_token': EOS}))
  ids = tokenizer.encode(f'{BOS}the{EOT}', add_special_tokens=True)
  assert ids[0] == 0 and ids[1:].min() >= len(SPECIAL)
  assert tokenizer.decode(ids) == f'{BOS}the{EOT}'
  assert tokenizer.encode('').shape == (0,)


# Which token is which.


def test_special_tokens_are_named_by_the_first_file_that_does(write, caplog):
  config = {'eos_token': EOT}
  special = {'eos_token': EOS, 'bos_token': {'content': BOS, 'lstrip': False}}
  generation = {'eos_token_id': [1, 2, 3, 999], 'pad_token_id': 3}

  def ids(**files):
    tokenizer = load(write(**files))
    return (
      tokenizer.eos_ids,
      tokenizer.bos_id,
      tokenizer.pad_id,
    )

  assert ids(
    tokenizer_config=config,
    special_tokens_map=special,
    generation_config=generation,
  ) == ((2, 1, 3), 0, 3)
  assert (
    "tokenizer_config.json names '<|eot_id|>' as eos_token, "
    "special_tokens_map.json names '<|end_of_text|>'; the former counts."
  ) in caplog.text
  caplog.clear()
  assert ids(special_tokens_map=special) == ((1,), 0, 1)
  assert ids(generation_config={'eos_token_id': 2}) == ((2,), 0, 2)
  assert ids(
    tokenizer_config={'eos_token': None}, generation_config=generation
  ) == ((1, 2, 3), 0, 3)
  assert ids(
    tokenizer_config={'eos_token': EOS}, generation_config={'eos_token_id': 2}
  ) == ((1, 2), 0, 1)
  model = {'eos_token_id': 2, 'vocab_size': 999}
  assert ids(config=model) == ((2,), 0, 2)
  assert ids(config=model, generation_config={'eos_token_id': 1}) == (
    (1,),
    0,
    1,
  )
  assert caplog.text == ''


def test_token_that_is_named_null_is_not_looked_for(write):
  config = {'eos_token': EOS, 'bos_token': None}
  folder = write(tokenizer_config=config, generation_config={'bos_token_id': 0})
  tokenizer = load(folder)
  assert tokenizer.bos_id is None
  assert not tokenizer.adds_bos
  del config['bos_token']
  assert load(write(tokenizer_config=config)).bos_id == 0


def test_guessed_end_of_sequence_is_told(write, caplog):
  caplog.set_level(logging.WARNING, logger='gnlorp_jax')
  folder = write(tokenizer_config={'model_max_length': 8})
  assert load(folder).eos_id == 1
  assert (
    f'Nothing beside {folder}/tokenizer.json names the token that ends a '
    "document: '<|end_of_text|>' is taken, because it is usual. If that is "
    f'wrong, name it as "eos_token" in {folder}/tokenizer_config.json.'
  ) in caplog.text


@pytest.mark.parametrize('value', ['2', [1, '2'], True, [1.0]])
def test_ids_that_are_no_integers_are_an_error(write, value):
  folder = write(generation_config={'eos_token_id': value})
  with pytest.raises(ValueError) as error:
    load(folder)
  assert str(error.value) == (
    f'{folder}/generation_config.json has eos_token_id={value!r}; expected an '
    'integer or a list of integers.'
  )


@pytest.mark.parametrize(
  'name', ['tokenizer_config', 'special_tokens_map', 'generation_config']
)
def test_damaged_file_is_named(write, name):
  folder = write(**{name: '{"eos_token": '})
  with pytest.raises(ValueError, match=f'Cannot read {folder}/{name}.json: '):
    load(folder)
  folder = write(**{name: '[1]'})
  with pytest.raises(ValueError) as error:
    load(folder)
  assert str(error.value) == (
    f'{folder}/{name}.json must hold a JSON object, not [1].'
  )


# What an export keeps.


NAMED = [
  {'name': 'default', 'template': CHAT},
  {'name': 'tool', 'template': '_'},
]
SPELLINGS = {
  'string': {'tokenizer_config': {'chat_template': CHAT}},
  'list': {'tokenizer_config': {'chat_template': NAMED}},
  'file': {'template': CHAT},
  'file before string': {
    'tokenizer_config': {'chat_template': '_'},
    'template': CHAT,
  },
  'files': {'template': CHAT, 'template_tool': '_'},
}


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_chat_template_survives_an_export(spelling, write, tmp_path):
  files = dict(SPELLINGS[spelling])
  config = {'eos_token': EOT, 'bos_token': BOS, 'pad_token': EOS}
  files['tokenizer_config'] = config | files.get('tokenizer_config', {})
  folder = write(**files)
  tokenizer = load(folder)
  assert tokenizer.chat_template == CHAT
  tokenizer.save(tmp_path / 'hf', add_bos=False)
  assert load(tmp_path / 'hf').chat_template == CHAT
  pytest.importorskip('jinja2')
  before, after = auto(folder), auto(tmp_path / 'hf')
  assert before.chat_template == after.chat_template
  ids = after.apply_chat_template(TALK, return_dict=False)
  assert ids == before.apply_chat_template(TALK, return_dict=False)
  assert ids.count(load(folder).eos_id) == 3  # Two ends and one in the text.
  if 'tool' in str(files):
    named = after.apply_chat_template(
      TALK, chat_template='tool', tokenize=False
    )
    assert named == '_'


def test_tokenizer_without_a_chat_template_has_none(write):
  config = {'eos_token': EOT}
  assert load(write(tokenizer_config=config)).chat_template is None
  config['chat_template'] = NAMED[1:]
  assert load(write(tokenizer_config=config)).chat_template is None


def test_export_keeps_what_transformers_should_know(write, tmp_path):
  config = {
    'eos_token': {'content': EOT, '__type': 'AddedToken', 'lstrip': False},
    'bos_token': BOS,
    'model_max_length': 77,
    'padding_side': 'left',
    'tokenizer_class': 'SomeTokenizer',
    'auto_map': {'AutoTokenizer': ['code.SomeTokenizer', None]},
    'name_or_path': '/somewhere',
    'add_bos_token': True,
    'clean_up_tokenization_spaces': True,
  }
  special = {'additional_special_tokens': [{'content': '<|header|>'}]}
  folder = write(tokenizer_config=config, special_tokens_map=special)
  load(folder).save(tmp_path / 'hf', add_bos=False)
  written = json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())
  assert written == {
    'eos_token': EOT,
    'bos_token': BOS,
    'pad_token': EOT,
    'model_max_length': 77,
    'padding_side': 'left',
    'additional_special_tokens': ['<|header|>'],
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'add_prefix_space': False,
    'add_bos_token': False,
    'add_eos_token': False,
    'clean_up_tokenization_spaces': False,
  }
  exported = auto(tmp_path / 'hf')
  assert (exported.model_max_length, exported.padding_side) == (77, 'left')
  assert '<|header|>' in exported.all_special_tokens


@pytest.mark.parametrize('eos_ids', [1, [2, 1]])
def test_export_tells_generation_where_to_stop(write, tmp_path, eos_ids):
  folder = write(
    tokenizer_config={'bos_token': BOS},
    generation_config={'eos_token_id': eos_ids, 'temperature': 0.6},
  )
  load(folder).save(tmp_path / 'hf', add_bos=True)
  transformers = pytest.importorskip('transformers')
  found = transformers.GenerationConfig.from_pretrained(tmp_path / 'hf')
  assert (found.bos_token_id, found.eos_token_id) == (0, eos_ids)
  assert found.pad_token_id == load(folder).pad_id
  assert found.temperature != 0.6  # It is the other model's.
  assert load(tmp_path / 'hf').eos_ids == load(folder).eos_ids


def test_export_cannot_put_a_token_before_a_text_that_is_not_there(
  shared, tmp_path
):
  tokenizer = load(shared / 'data' / 'tokenizers' / 't5')
  with pytest.raises(ValueError, match='add_bos=True needs a beginning-of-seq'):
    tokenizer.save(tmp_path, add_bos=True)


def test_absent_files_say_nothing(tmp_path, llama_backend):
  found = tokenizer_files.read(tmp_path, llama_backend)
  assert found == tokenizer_files.Beside()


@pytest.mark.parametrize(
  ('file', 'fields', 'text'),
  [
    (CONFIG, {'eos_token': 3}, 'has eos_token=3; expected a text, null, or an'),
    (CONFIG, {'pad_token': ['a']}, "has pad_token=['a']; expected a text"),
    (CONFIG, {'bos_token': {'content': None}}, None),
    (CONFIG, {'bos_token': {'content': 3}}, 'has bos_token=3; expected a text'),
    (CONFIG, {'chat_template': 3}, 'has chat_template=3; expected a text, or'),
    (CONFIG, {'chat_template': ['a']}, "has chat_template=['a']; expected a"),
    (CONFIG, {'chat_template': [{'name': 'default'}]}, 'has chat_template=[{'),
    (CONFIG, {'chat_template': {'default': 3}}, 'has chat_template={'),
    ('special_tokens_map.json', {'eos_token': 3}, 'has eos_token=3; expected'),
  ],
)
def test_files_of_another_shape_are_refused(tmp_path, file, fields, text):
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'</s>': 0}, unk_token='</s>')
  )
  (tmp_path / file).write_text(json.dumps(fields))
  if text is None:
    tokenizer_files.read(tmp_path, backend)
    return
  with pytest.raises(ValueError) as error:
    tokenizer_files.read(tmp_path, backend)
  assert str(error.value).startswith(f'{tmp_path / file} {text}')


def test_deeply_nested_files_are_refused(tmp_path):
  path = tmp_path / CONFIG
  path.write_text('[' * 100_000)
  with pytest.raises(ValueError, match=f'Cannot read {path}: '):
    tokenizer_files.read_object(path)
