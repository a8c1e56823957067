"""What can be asked of a conversation."""

import dataclasses
import pathlib

from gnlorp_jax.compose import command_line, pretrained
from gnlorp_jax.compose.fields import check_seeds
from gnlorp_jax.compose.settings import check_at_least_one
from gnlorp_jax.models.generate import Sampling
from gnlorp_jax.models.interface import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
  """A conversation with one model."""

  folder: str = ''
  """Hugging Face folder of a language model, such as the hf/ of a run, or
  hf:OWNER/NAME of the hub; on the command line the first word."""
  prompt: str | None = None
  """Ask this alone, write the answer and end. By default questions are asked
  for; where standard input is no terminal, each line of it is one."""
  adapter: str | None = None
  """Folder of PEFT with adapters to use; `folder` is the model that they were
  trained beside. A tokenizer or a chat template in it goes before that of the
  model."""
  system: str | None = None
  """What the model is told before the first question. By default what its
  template says itself, if anything."""
  template: str = 'tokenizer'
  """How a conversation is written down: 'tokenizer' as the folder says,
  'alpaca' with the headings of Stanford's Alpaca, 'none' without any; or a
  FILE.jinja."""
  max_tokens: int = 512
  """Most tokens of an answer."""
  temperature: float = 0.7
  """Randomness: 0 takes the likeliest token."""
  top_k: int | None = None
  """Tokens to choose among at each position. By default all."""
  top_p: float | None = 0.9
  """Choose among the likeliest tokens that together have this probability;
  None: among all."""
  seed: int = 0
  """Decides what is drawn."""
  tokenizer: str | None = None
  """Folder or file of a tokenizer. By default that of the model's folder."""
  dtype: Dtype = 'float32'
  """Dtype of the weights and of the arithmetic."""

  def __post_init__(self):
    check_at_least_one(self, 'max_tokens')
    Sampling(self.temperature, self.top_k, self.top_p).check()
    check_seeds('seed', [self.seed])
    if self.prompt is not None and not self.prompt.strip():
      raise ValueError(
        'prompt asks nothing: it is empty. Leave it out to talk.'
      )


def parse(args: list[str], description: str) -> ChatConfig:
  """The settings of a command line, whose first word is the folder.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.

  Returns:
    The settings.

  Raises:
    SystemExit: After `--help`.
    ValueError: If an option does not exist or a value is not allowed, or there
      is no folder.
  """
  config = command_line.override_with_folder(ChatConfig(), args, description)
  pretrained.check_name(
    config.folder, 'python -m gnlorp_jax.chat FOLDER', takes_adapter=True
  )
  if config.adapter is not None:
    file = pathlib.Path(config.adapter).expanduser() / 'adapter_config.json'
    if not file.is_file():
      raise ValueError(
        f'--adapter {config.adapter}: there is no {file.name} in it. Name a '
        'folder that save_pretrained of peft wrote, or the adapter/ of a run.'
      )
  return config
