"""What a task is: questions with options, or with an answer in free words."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Choice(NamedTuple):
  """A question with options, of which the likeliest is taken.

  Attributes:
    context: What stands before an option, solved questions included. It ends
      without a space.
    options: The options. A space goes between the context and each.
    answer: Index of the right one.
    group: Part of the task that it belongs to, such as a subject; may be ''.
  """

  context: str
  options: tuple[str, ...]
  answer: int
  group: str = ''


class FreeAnswer(NamedTuple):
  """A question that a model answers in its own words.

  Attributes:
    prompt: What the model continues.
    answer: The right answer.
    group: Part of the task that it belongs to; may be ''.
  """

  prompt: str
  answer: str
  group: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Questions, all of one kind, and what else it takes to score them."""

  name: str
  """Name of its module."""
  questions: Sequence[Choice] | Sequence[FreeAnswer]
  """At least one."""
  shots: int
  """Solved questions that stand before each."""
  has_acc_norm: bool = True
  """Of options: whether likelihood per character is a usual metric too."""
  stop: tuple[str, ...] = ()
  """Of free answers: what ends one, and is not part of it."""
  max_tokens: int = 256
  """Of free answers: the most tokens that one may have."""
  extract: Mapping[str, Callable[[str], str]] = dataclasses.field(
    default_factory=dict
  )
  """Of free answers: by metric, what is compared with the right answer."""

  @property
  def is_choice(self) -> bool:
    """Whether questions have options."""
    return isinstance(self.questions[0], Choice)


def solved(examples: Sequence[Choice]) -> str:
  """Solved questions, to be put before another."""
  return ''.join(
    f'{example.context} {example.options[example.answer]}\n\n'
    for example in examples
  )
