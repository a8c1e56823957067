"""From a Hugging Face folder to answers whose text arrives as it is written."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gnlorp_jax.compose import pretrained
from gnlorp_jax.data import chat
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.models.generate import stream
from gnlorp_jax.models.interface import Model
from gnlorp_jax.recipes.chat.settings import ChatConfig

_UNKNOWN = '\ufffd'  # What the beginning of a character is decoded to.


def load(config: ChatConfig) -> 'Dialogue':
  """Reads the model, its tokenizer and its template.

  Args:
    config: The settings.

  Returns:
    A conversation without a question.

  Raises:
    ValueError: If the folder holds no language model of a known family, a file
      is damaged, or there is no such template.
  """
  tokenizer_name, template_name = _names(config)
  found = pretrained.find(
    config.folder,
    dtype=config.dtype,
    tokenizer=tokenizer_name,
    adapter=config.adapter,
  )
  tokenizer = found.tokenizer
  if template_name == 'tokenizer' and tokenizer.chat_template is None:
    raise ValueError(
      f'{config.folder} has no chat template: it is a base model, which '
      'continues a text and was not taught to answer. Fine-tune it with '
      'train_sft.py and name the hf/ of that run, or name a model that was '
      'made for chat. If it was taught by another program, say in which form: '
      '--template alpaca, or --template FILE.jinja.'
    )
  template = chat.load_template(template_name, tokenizer)
  return Dialogue(config, found.model, found.read(), tokenizer, template)


def _names(config: ChatConfig) -> tuple[str | None, str]:
  """The tokenizer and the template: those saved with the adapters, if any."""
  tokenizer, template = config.tokenizer, config.template
  if config.adapter is None:
    return tokenizer, template
  folder = pathlib.Path(config.adapter).expanduser()
  if tokenizer is None and (folder / 'tokenizer.json').is_file():
    tokenizer = str(folder)
  file = folder / 'chat_template.jinja'
  if template == 'tokenizer' and file.is_file():
    template = str(file)
  return tokenizer, template


class Dialogue:
  """A conversation: what was said so far, and the model that answers.

  Attributes:
    left_out: Number of exchanges, the oldest, that the last answer did not
      take into account because they no longer fit.
  """

  def __init__(
    self,
    config: ChatConfig,
    model: Model,
    params: Any,
    tokenizer: tokenizers.Tokenizer,
    template: chat.Template,
  ):
    self._config = config
    self._model, self._params = model, params
    self._tokenizer, self._template = tokenizer, template
    self._key = jax.random.key(config.seed)
    self._asked = 0
    self.reset()

  def reset(self) -> None:
    """Forgets what was said."""
    self._exchanges: list[tuple[chat.Message, chat.Message]] = []
    self.left_out = 0

  @property
  def messages(self) -> list[chat.Message]:
    """What was said so far."""
    return self._messages(self._exchanges)

  def _messages(self, exchanges: Iterable[Sequence[chat.Message]]):
    system = self._config.system
    first = [] if system is None else [chat.Message('system', system)]
    return [*first, *(one for exchange in exchanges for one in exchange)]

  def ask(self, question: str) -> Iterator[str]:
    """Asks a question.

    Args:
      question: The question.

    Returns:
      The text of the answer in pieces, each as soon as it is written. What was
      said has both when the last piece is taken, or when no more are wanted;
      it has none of them if there is no answer.

    Raises:
      ValueError: If the question cannot be written down or does not fit.
    """
    message = chat.Message('user', question)
    ids, room = self._prompt(message)
    config, stop_ids = self._config, self._template.stop_ids
    tokens = stream(
      self._model,
      self._params,
      ids,
      room,
      temperature=config.temperature,
      top_k=config.top_k,
      top_p=config.top_p,
      key=jax.random.fold_in(self._key, self._asked),
      eos_ids=stop_ids,
    )
    self._asked += 1
    words = (token for token in tokens if token not in stop_ids)
    return self._answer(message, pieces(words, self._tokenizer.decode))

  def _answer(
    self, question: chat.Message, texts: Iterator[str]
  ) -> Iterator[str]:
    answer = ''
    try:
      for text in texts:
        answer += text
        yield text
    finally:  # Also of an answer that was stopped.
      if answer:
        self._exchanges.append((question, chat.Message('assistant', answer)))

  def _prompt(self, question: chat.Message) -> tuple[np.ndarray, int]:
    """What the model reads, and how many tokens it may answer."""
    longest = self._model.config.max_seq_len
    room = max(min(self._config.max_tokens, longest // 2), 1)
    for begin in range(len(self._exchanges) + 1):
      said = self._messages([*self._exchanges[begin:], (question,)])
      try:
        ids = self._template.prompt(said)
      except chat.SkippedError as error:
        raise ValueError(
          f'The template cannot write this down: {error}. Put it in other '
          'words; if that does not help, begin anew.'
        ) from error
      if ids.size + room <= longest:
        self.left_out = begin
        return ids, room
    raise ValueError(
      f'The question is too long: it makes {ids.size} tokens, and the model '
      f'reads {longest}, of which {room} are kept for its answer. Shorten it, '
      'or lower --max-tokens.'
    )


def pieces(
  tokens: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[str]:
  """The text of tokens, as soon as its characters are whole.

  Args:
    tokens: Token ids.
    decode: Text of ids.

  Yields:
    Pieces that are not empty, which joined are the text of all tokens. A piece
    ends with the beginning of a character only if no more tokens come.
  """
  ids: list[int] = []
  # Ids up to `end` were shown. Those from `begin` on are decoded once more:
  # some tokenizers write the first token of a text without its space.
  begin = end = 0

  def new() -> str:
    text, shown = decode(ids[begin:]), decode(ids[begin:end])
    # Bytes that are no character can spoil those before them.
    known = text.startswith(shown)
    return text[len(shown) :] if known else decode(ids[end:])

  for token in tokens:
    ids.append(token)
    text = new()
    if text and not text.endswith(_UNKNOWN):
      yield text
      begin, end = end, len(ids)
  if text := new():
    yield text
