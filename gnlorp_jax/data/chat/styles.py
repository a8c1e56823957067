"""Templates for models that bring none: no headings, and those of Alpaca.

Both are Jinja, so that an exported model writes prompts as it learnt them.
Answers stand in ``{% generation %}`` with the end-of-sequence token.
"""

NAMES = ('none', 'alpaca')

# Headings of Stanford's Alpaca, which many models have learnt.
_TASK = 'Below is an instruction that describes a task'
_INPUT = ', paired with an input that provides further context'
_WISH = '. Write a response that appropriately completes the request.'
_HEADINGS = {
  name: f'### {name.title()}:\n'
  for name in ('instruction', 'input', 'response')
}

_ANSWER = (
  "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
)


def jinja(name: str, *, adds_bos: bool) -> str:
  """The template of a name.

  Args:
    name: One of `NAMES`.
    adds_bos: Whether it begins with `bos_token`.

  Returns:
    The template, without line breaks outside of its texts.
  """
  body = _alpaca() if name == 'alpaca' else _none()
  return '{{ bos_token }}' * adds_bos + body


def _none() -> str:
  return (
    '{% for message in messages %}'
    "{% if message['role'] == 'assistant' %}"
    f'{_ANSWER}'
    '{% else %}'
    "{{ message['content'] }}"
    "{% if message['role'] != 'user' %}{{ '\\n\\n' }}{% endif %}"
    '{% endif %}'
    '{% endfor %}'
  )


def _alpaca() -> str:
  task, asks, response = (
    _quoted(text) for text in (_TASK, _WISH, '\n\n' + _HEADINGS['response'])
  )
  instruction, given = (
    _quoted(_HEADINGS[name]) for name in ('instruction', 'input')
  )
  return (
    '{% for message in messages %}'
    "{% if message['role'] == 'assistant' %}"
    f'{_ANSWER}'
    "{{ '\\n\\n' if not loop.last else '' }}"
    "{% elif message['role'] == 'user' %}"
    f'{{% if loop.first %}}{{{{ {task} + ({_quoted(_INPUT)} if '
    f"message['input'] else '') + {asks} + '\\n\\n' }}}}{{% endif %}}"
    "{% if message['input'] %}"
    f"{{{{ {instruction} + message['instruction'] + '\\n\\n' + {given} + "
    "message['input'] }}"
    '{% else %}'
    f"{{{{ {instruction} + message['content'] }}}}"
    '{% endif %}'
    f'{{{{ {response} }}}}'
    '{% else %}'
    "{{ message['content'] + '\\n\\n' }}"
    '{% endif %}'
    '{% endfor %}'
  )


def _quoted(text: str) -> str:
  """A string of Jinja."""
  return "'" + text.replace('\n', '\\n') + "'"
