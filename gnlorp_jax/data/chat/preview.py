"""What of an example a model learns, for people to see."""

import itertools

import rich.text

from gnlorp_jax.data.chat.templates import Example, control_tokens
from gnlorp_jax.data.tokenizer import Tokenizer

TRAINED, GIVEN, CONTROL = 'bold green', 'dim', 'reverse'
BRACKETS = ('⟦', '⟧')


def preview(
  example: Example, tokenizer: Tokenizer, *, brackets: bool = False
) -> rich.text.Text:
  """Writes an example out: tokens that count are bold, others faint.

  Args:
    example: The example.
    tokenizer: Of its template.
    brackets: Whether what counts stands in `BRACKETS` too, for readers without
      colours.

  Returns:
    The text, in which control tokens stand by their names, in reverse colours.
  """
  _, control = control_tokens(tokenizer)
  ids = example.ids.tolist()
  kinds = [
    (bool(weight > 0), number in control)
    for number, weight in zip(ids, example.weights, strict=True)
  ]
  text = rich.text.Text()
  shown, start, was_trained = '', 0, False
  for (trained, is_control), group in itertools.groupby(kinds):
    start += len(list(group))
    # Of the whole so far: a token may be a part of a character.
    whole = tokenizer.backend.decode(ids[:start], skip_special_tokens=False)
    style = TRAINED if trained else GIVEN
    if brackets and trained != was_trained:
      text.append(BRACKETS[was_trained])
    text.append(whole[len(shown) :], f'{style} {CONTROL}' * is_control or style)
    shown, was_trained = whole, trained
  if brackets and was_trained:
    text.append(BRACKETS[True])
  return text
