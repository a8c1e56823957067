import pytest

from gnlorp_jax.recipes.chat import settings
from gnlorp_jax.recipes.chat.settings import ChatConfig


def message(function, *args, **options):
  with pytest.raises(ValueError) as error:
    function(*args, **options)
  return str(error.value)


def test_first_word_is_the_folder(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  words = [str(tmp_path), '--prompt', 'Why?', '--top-p', 'None']
  config = settings.parse(words, 'Talks.')
  assert config == ChatConfig(folder=str(tmp_path), prompt='Why?', top_p=None)
  assert settings.parse(['hf:a/b'], 'Talks.').folder == 'hf:a/b'


def test_folders_that_are_none_are_refused(tmp_path):
  assert message(settings.parse, [], 'Talks.') == (
    'No model is named. Begin with its Hugging Face folder: '
    'python -m gnlorp_jax.chat FOLDER'
  )
  assert message(settings.parse, [str(tmp_path)], 'Talks.') == (
    f'{tmp_path} is no Hugging Face folder: it holds no config.json. Name the '
    'hf/ of a run, what save_pretrained wrote, or hf:OWNER/NAME.'
  )


def test_folders_without_adapters_are_refused(tmp_path):
  words = ['hf:a/b', '--adapter', str(tmp_path)]
  assert message(settings.parse, words, 'Talks.') == (
    f'--adapter {tmp_path}: there is no adapter_config.json in it. Name a '
    'folder that save_pretrained of peft wrote, or the adapter/ of a run.'
  )


@pytest.mark.parametrize(
  'options, text',
  [
    ({'max_tokens': 0}, 'ChatConfig.max_tokens must be at least 1, got 0.'),
    (
      {'temperature': -1.0},
      'temperature=-1.0 must be finite and not negative.',
    ),
    ({'seed': -1}, 'seed=-1 must be a whole number from 0 to 4294967295.'),
    (
      {'prompt': ' '},
      'prompt asks nothing: it is empty. Leave it out to talk.',
    ),
  ],
)
def test_impossible_settings_are_refused(options, text):
  assert message(ChatConfig, **options) == text
