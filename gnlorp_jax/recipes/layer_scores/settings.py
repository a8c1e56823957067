"""What can be asked of a measurement of layers."""

import dataclasses
import difflib
import pathlib
from typing import Literal

from gnlorp_jax.compose import command_line, pretrained
from gnlorp_jax.compose.fields import check_seeds
from gnlorp_jax.compose.layer_scores import KINDS, Kind
from gnlorp_jax.compose.settings import check_at_least_one, check_within, words
from gnlorp_jax.models.interface import Dtype

THRESHOLDS = (3.0, 5.0, 7.0, 10.0, 13.0)
"""Of which outliers are always told: a threshold is chosen by looking."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScoresConfig:
  """A measurement of the layers of one model."""

  folder: str = ''
  """Hugging Face folder of a language model, such as the hf/ of a run, or
  hf:OWNER/NAME of the hub; on the command line the first word."""
  data: str = ''
  """Text that the model reads, named as in train_lm.py: files (.txt, .jsonl,
  .json.gz as in C4, ...), folders and globs, joined by commas;
  'hf:OWNER/NAME:CONFIG:SPLIT[:N]' for the first N documents of a set of the
  hub. With --format chat conversations, named as in train_sft.py."""
  text_column: str = 'text'
  """The field of JSON lines, or the column of a table or a data set, that holds
  the text."""
  format: Literal['text', 'chat'] = 'text'
  """'text' joins documents and cuts them every --length tokens; of 'chat' each
  conversation is a sequence."""
  template: str | None = None
  """How a conversation is written down: 'tokenizer' as the folder says,
  'alpaca' with the headings of Stanford's Alpaca, 'none' without any; or a
  FILE.jinja. By default the folder's, and without one Alpaca's."""
  kind: Kind = 'outliers'
  """What is written as the scores. 'outliers': the share, in percent, of
  weights whose size times that of what they read is more than --threshold times
  the mean of their layer. 'weight_norm': the Frobenius norm of the matrices of
  a layer. 'gradient_norm': the mean squared norm of their gradient. 'hill': one
  over the exponent of the tail of their spectra."""
  threshold: float = 5.0
  """How many times the mean an outlier is. The table has the shares of 3, 5, 7,
  10 and 13 as well."""
  measure: str = ','.join(KINDS)
  """What is measured and told beside the scores, joined by commas. On models of
  billions of parameters, hill takes long on a CPU."""
  sequences: int = 128
  """Sequences that the model reads, drawn at random."""
  length: int | None = None
  """Tokens of a sequence. By default what the model accepts, and at most
  2048."""
  batch_size: int = 8
  """Sequences per pass. The gradients are those of the mean loss of a batch, so
  that more sequences make their norms smaller, by as much as they disagree."""
  gradient_batches: int = 4
  """Batches whose gradients are taken."""
  seed: int = 0
  """Decides which sequences are drawn."""
  tokenizer: str | None = None
  """Folder or file of a tokenizer. By default that of the model's folder."""
  dtype: Dtype = 'float32'
  """Dtype of the weights and of the arithmetic; sums are float32 in both."""
  cache_dir: str = '~/.cache/gnlorp_jax'
  """Where tokenized text is kept between runs."""
  output: str = 'layer_scores.json'
  """JSON file to write the scores to; a picture of the same name, .png, is
  written beside it."""

  def __post_init__(self):
    check_at_least_one(self, 'sequences', 'batch_size', 'gradient_batches')
    if self.length is not None and self.length < 2:
      raise ValueError(f'length={self.length} must be at least 2.')
    check_seeds('seed', [self.seed])
    check_within(self, '(0, inf)', 'threshold', fix='5 is usual.')
    if self.template is not None and self.format != 'chat':
      raise ValueError(
        f'template={self.template!r} writes conversations down, and with '
        f'format={self.format!r} there are none. Add --format chat.'
      )
    for name in words(self.measure):
      if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError(
          f'measure names {name!r}; expected some of {KINDS}, joined by '
          f'commas.{hint}'
        )

  @property
  def measured(self) -> tuple[Kind, ...]:
    """What is measured, one by one, the kind of the scores among it."""
    asked = {self.kind, *words(self.measure)}
    return tuple(kind for kind in KINDS if kind in asked)

  @property
  def thresholds(self) -> tuple[float, ...]:
    """All thresholds whose shares are told, ascending."""
    return tuple(sorted({*THRESHOLDS, self.threshold}))


def parse(args: list[str], description: str) -> LayerScoresConfig:
  """The settings of a command line, whose first word is the folder.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.

  Returns:
    The settings.

  Raises:
    SystemExit: After `--help`.
    ValueError: If an option does not exist or a value is not allowed, or if
      there is no folder, no data, or no place for what is written.
  """
  config = command_line.override_with_folder(
    LayerScoresConfig(), args, description
  )
  usage = 'python -m gnlorp_jax.layer_scores FOLDER --data FILES'
  pretrained.check_name(config.folder, usage)
  if not config.data:
    raise ValueError(
      f'No data is named, and the model has nothing to read: {usage}'
    )
  command_line.check_place('output', config.output)
  if pathlib.Path(config.output).suffix == '.png':
    raise ValueError(
      f'--output {config.output}: the picture is written beside the JSON, as '
      'the .png of the same name. Name the JSON file.'
    )
  return config
