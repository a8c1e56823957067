"""A task that needs no files: which sentences of a small grammar are sound.

Sentences such as "the brave otters near the wizard juggle the turnips ." have a
subject and, between it and its verb, a noun of the other number. The
unacceptable ones are such sentences with two words exchanged: the two nouns, so
that the verb agrees with the wrong one, or an article and the word after it.
The words are the same in both classes, so a bag of words is at chance.
"""

import numpy as np
import tokenizers

from gnlorp_jax.data.glue.files import Examples
from gnlorp_jax.data.glue.tasks import Task, custom_task

_NOUNS = (
  ('otter', 'otters'),
  ('wizard', 'wizards'),
  ('penguin', 'penguins'),
  ('pirate', 'pirates'),
  ('robot', 'robots'),
  ('teapot', 'teapots'),
  ('dragon', 'dragons'),
  ('baker', 'bakers'),
  ('ghost', 'ghosts'),
  ('llama', 'llamas'),
)
_VERBS = (
  ('sings', 'sing'),
  ('dances', 'dance'),
  ('giggles', 'giggle'),
  ('snores', 'snore'),
  ('sneezes', 'sneeze'),
)
_TRANSITIVE_VERBS = (
  ('juggles', 'juggle'),
  ('paints', 'paint'),
  ('steals', 'steal'),
  ('admires', 'admire'),
)
_OBJECTS = ('moon', 'turnips', 'cake', 'trumpet', 'socks', 'porridge')
_ADJECTIVES = ('brave', 'sleepy', 'purple', 'tiny', 'famous', 'clumsy')
_PREPOSITIONS = ('near', 'behind', 'beside', 'above', 'under')
_ADVERBS = ('softly', 'loudly', 'twice', 'again', 'backwards')

# The grammar has 2.4 million acceptable sentences. Half of those drawn have no
# adjective, of which there are 49,000.
_MOST_EXAMPLES = 100_000

_SPECIAL = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')


def generated_task(
  seed: int, *, train: int = 4000, dev: int = 500, test: int = 500
) -> tuple[Task, dict[str, Examples]]:
  """Makes the task.

  Args:
    seed: At least 0; decides the sentences.
    train: Number of examples to train on.
    dev: Number of examples to evaluate on.
    test: Number of examples to test on, labels included.

  Returns:
    A task named `'demo'` and its `'train'`, `'dev'` and `'test'`, which share
    no sentence. Half of the examples of each, rounded down, are unacceptable.

  Raises:
    ValueError: If a size is out of range.
  """
  sizes = {'train': train, 'dev': dev, 'test': test}
  if min(sizes.values()) < 1 or sum(sizes.values()) > _MOST_EXAMPLES:
    raise ValueError(
      f'train={train}, dev={dev} and test={test} must be at least 1 each and '
      f'at most {_MOST_EXAMPLES} together, as all sentences are distinct.'
    )
  task = custom_task(
    'demo',
    ('sentence',),
    'label',
    ('unacceptable', 'acceptable'),
    ('matthews_correlation', 'accuracy'),
  )
  rng = np.random.default_rng(seed)
  seen: set[str] = set()
  return task, {
    split: _examples(rng, size, seen) for split, size in sizes.items()
  }


def generated_tokenizer() -> tokenizers.Tokenizer:
  """Returns a tokenizer of the task's words, with RoBERTa's special tokens.

  Ids 0 to 4 are `<s>`, `<pad>`, `</s>`, `<unk>` and `<mask>`.
  """
  words = {'the', '.', *_OBJECTS, *_ADJECTIVES, *_PREPOSITIONS, *_ADVERBS}
  for forms in (*_NOUNS, *_VERBS, *_TRANSITIVE_VERBS):
    words |= set(forms)
  vocabulary = {w: i for i, w in enumerate((*_SPECIAL, *sorted(words)))}
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='<unk>')
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(list(_SPECIAL))
  backend.post_processor = tokenizers.processors.RobertaProcessing(
    ('</s>', vocabulary['</s>']), ('<s>', vocabulary['<s>'])
  )
  return backend


def _examples(rng: np.random.Generator, size: int, seen: set[str]) -> Examples:
  """Draws examples whose sentences are not in `seen`, and adds them to it."""
  labels_N = rng.permutation(np.arange(size) >= size // 2).astype(np.int32)
  texts = []
  for label in labels_N:
    sentence = None
    while sentence is None or sentence in seen:
      words, nouns = _sentence(rng)
      if not label:
        words = _corrupted(rng, words, nouns)
      sentence = ' '.join(words)
    seen.add(sentence)
    texts.append((sentence,))
  return Examples(texts, labels_N, [str(i) for i in range(size)])


def _sentence(rng: np.random.Generator) -> tuple[list[str], tuple[int, int]]:
  """Draws an acceptable sentence; also returns the places of its two nouns."""

  def one_of(words):
    return words[rng.integers(len(words))]

  def maybe_adjective():
    return [one_of(_ADJECTIVES)] if rng.random() < 0.3 else []

  number = rng.integers(2)
  subject = ['the', *maybe_adjective(), one_of(_NOUNS)[number]]
  other = [one_of(_PREPOSITIONS), 'the', *maybe_adjective()]
  words = [*subject, *other, one_of(_NOUNS)[1 - number]]
  nouns = (len(subject) - 1, len(words) - 1)
  if rng.random() < 0.5:
    words += [one_of(_VERBS)[number], one_of(_ADVERBS)]
  else:
    words += [one_of(_TRANSITIVE_VERBS)[number], 'the', one_of(_OBJECTS)]
  return [*words, '.'], nouns


def _corrupted(
  rng: np.random.Generator, words: list[str], nouns: tuple[int, int]
) -> list[str]:
  if rng.random() < 0.5:
    first, second = nouns
  else:
    articles = [i for i, word in enumerate(words) if word == 'the']
    first = articles[rng.integers(len(articles))]
    second = first + 1
  words = list(words)
  words[first], words[second] = words[second], words[first]
  return words
