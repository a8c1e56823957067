"""What a task is: columns, classes, metrics and names of files.

The tasks of GLUE (arXiv 1804.07461), and tasks of one's own.
"""

import dataclasses
import difflib
from collections.abc import Sequence

CLASS_METRICS = ('accuracy', 'f1', 'matthews_correlation')
REGRESSION_METRICS = ('pearson', 'spearmanr')

_FILES = {'train': 'train', 'dev': 'dev', 'test': 'test'}
_MATCHED_FILES = {
  'train': 'train',
  'dev': 'dev_matched',
  'dev_mismatched': 'dev_mismatched',
  'test': 'test_matched',
  'test_mismatched': 'test_mismatched',
}


@dataclasses.dataclass(frozen=True)
class Task:
  """A task of classifying, or scoring, a text or a pair of texts.

  Attributes:
    name: Name of the task: that of its TFDS configuration, `glue/NAME`.
    folder: Folder of its files, and stem of its submission file.
    text_columns: Names of the one or two columns of text.
    label_column: Name of the column of labels or scores.
    labels: Names of the classes in the order of their ids; empty for a
      regression.
    metrics: Names of all its metrics.
    main_metric: The one that tables of results give.
    file_labels: What the files and the server write for each class; `labels`
      where not given.
    columns: All columns of train and dev files that have no header; empty
      where the first line names the columns.
    tfds_columns: `text_columns` as TFDS names them, where it differs.
    score_range: Smallest and largest score of a regression, if bounded.
    has_mismatched: Whether there are splits `dev_mismatched` and
      `test_mismatched`, and `dev` and `test` are the matched ones.
    faults_allowed: Malformed rows the official files are known to hold; up to
      so many are left out with a warning instead of refused.
  """

  name: str
  folder: str
  text_columns: tuple[str, ...]
  label_column: str
  labels: tuple[str, ...]
  metrics: tuple[str, ...]
  main_metric: str
  file_labels: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()
  tfds_columns: tuple[str, ...] = ()
  score_range: tuple[float, float] | None = None
  has_mismatched: bool = False
  faults_allowed: int = 0

  def __post_init__(self):
    if not self.file_labels:
      object.__setattr__(self, 'file_labels', self.labels)
    if not self.tfds_columns:
      object.__setattr__(self, 'tfds_columns', self.text_columns)

  @property
  def is_regression(self) -> bool:
    """Whether the task asks for a number instead of a class."""
    return not self.labels

  @property
  def num_outputs(self) -> int:
    """Number of outputs of a model: one per class, or one for a score."""
    return max(len(self.labels), 1)

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits the task may have."""
    return tuple(_MATCHED_FILES if self.has_mismatched else _FILES)

  def file_stem(self, split: str) -> str:
    """Returns the name of a split's file without its suffix.

    Raises:
      ValueError: If the task has no such split.
    """
    files = _MATCHED_FILES if self.has_mismatched else _FILES
    if split not in files:
      raise ValueError(
        f'Unknown split {split!r} of task {self.name!r}; expected one of '
        f'{self.splits}.'
      )
    return files[split]

  def submission_file(self, split: str) -> str:
    """Returns the name the GLUE server wants for the predictions of a split.

    Raises:
      ValueError: If `split` is not a test split of the task.
    """
    suffixes = {'test': ''}
    if self.has_mismatched:
      suffixes = {'test': '-m', 'test_mismatched': '-mm'}
    if split not in suffixes:
      raise ValueError(
        f'Predictions of split {split!r} of task {self.name!r} cannot be '
        f'submitted; expected one of {tuple(suffixes)}.'
      )
    return f'{self.folder}{suffixes[split]}.tsv'


_BITS = ('0', '1')
_PAIR = ('sentence1', 'sentence2')
_ENTAILMENT = ('entailment', 'not_entailment')

# Ids of classes are those of TFDS.
TASKS: dict[str, Task] = {
  task.name: task
  for task in (
    Task(
      'cola',
      'CoLA',
      ('sentence',),
      'label',
      ('unacceptable', 'acceptable'),
      ('matthews_correlation',),
      'matthews_correlation',
      file_labels=_BITS,
      columns=('source', 'label', 'mark', 'sentence'),
    ),
    Task(
      'sst2',
      'SST-2',
      ('sentence',),
      'label',
      ('negative', 'positive'),
      ('accuracy',),
      'accuracy',
      file_labels=_BITS,
    ),
    Task(
      'mrpc',
      'MRPC',
      ('#1 String', '#2 String'),
      'Quality',
      ('not_equivalent', 'equivalent'),
      ('f1', 'accuracy'),
      'f1',
      file_labels=_BITS,
      tfds_columns=_PAIR,
    ),
    Task(
      'stsb',
      'STS-B',
      _PAIR,
      'score',
      (),
      ('pearson', 'spearmanr'),
      'pearson',
      score_range=(0.0, 5.0),
    ),
    Task('rte', 'RTE', _PAIR, 'label', _ENTAILMENT, ('accuracy',), 'accuracy'),
    Task(
      'wnli',
      'WNLI',
      _PAIR,
      'label',
      ('not_entailment', 'entailment'),
      ('accuracy',),
      'accuracy',
      file_labels=_BITS,
    ),
    Task(
      'qnli',
      'QNLI',
      ('question', 'sentence'),
      'label',
      _ENTAILMENT,
      ('accuracy',),
      'accuracy',
    ),
    Task(
      'qqp',
      'QQP',
      ('question1', 'question2'),
      'is_duplicate',
      ('not_duplicate', 'duplicate'),
      ('f1', 'accuracy'),
      'accuracy',
      file_labels=_BITS,
      # Some questions hold line ends, which break their rows.
      faults_allowed=10,
    ),
    Task(
      'mnli',
      'MNLI',
      _PAIR,
      'gold_label',
      ('entailment', 'neutral', 'contradiction'),
      ('accuracy', 'accuracy_mm'),
      'accuracy',
      tfds_columns=('premise', 'hypothesis'),
      has_mismatched=True,
    ),
  )
}


def get_task(name: str) -> Task:
  """Returns a task of GLUE.

  Args:
    name: A key of `TASKS`.

  Raises:
    ValueError: If there is no such task; names the nearest.
  """
  if name in TASKS:
    return TASKS[name]
  keys = {key: key for key in TASKS}
  keys |= {task.folder.lower(): key for key, task in TASKS.items()}
  close = difflib.get_close_matches(name.lower(), keys, n=1)
  hint = f' Did you mean {keys[close[0]]!r}?' if close else ''
  raise ValueError(
    f'Unknown task {name!r}; expected one of {tuple(TASKS)}.{hint} A task of '
    'your own is made by custom_task, in train_glue.py by data.train.'
  )


def custom_task(
  name: str,
  text_columns: Sequence[str],
  label_column: str,
  labels: Sequence[str] | None,
  metrics: Sequence[str] | None = None,
) -> Task:
  """Makes a task for files of one's own.

  Args:
    name: Name of the task and of its submission file.
    text_columns: The one or two columns (keys, in JSON lines) of text.
    label_column: The column of labels or scores.
    labels: The classes, in the order of their ids, as the files write them; see
      `infer_labels`. None for a regression.
    metrics: The first is the main one. Of classes any of `'accuracy'`, `'f1'`
      (two classes; of the second) and `'matthews_correlation'`, by default the
      first; of a regression `'pearson'` and `'spearmanr'`, by default both.

  Returns:
    The task.

  Raises:
    ValueError: If the columns, labels or metrics do not make a task.
  """
  if isinstance(text_columns, str) or len(text_columns) not in (1, 2):
    raise ValueError(
      f'text_columns={text_columns!r} must be a sequence of one or two names.'
    )
  if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
    raise ValueError(
      f'labels={tuple(labels)} must be two or more distinct classes, or None '
      'for a regression.'
    )
  known = REGRESSION_METRICS if labels is None else CLASS_METRICS
  if metrics is None:
    metrics = known if labels is None else known[:1]
  wrong = [metric for metric in metrics if metric not in known]
  if wrong or not metrics:
    kind = 'a regression' if labels is None else 'classes'
    raise ValueError(
      f'metrics={tuple(metrics)} of {kind} must be some of {known}.'
    )
  if 'f1' in metrics and len(labels) > 2:
    raise ValueError(
      f"Metric 'f1' is that of one class against another; the task has "
      f'{len(labels)} classes. Use accuracy or matthews_correlation.'
    )
  return Task(
    name,
    name,
    tuple(text_columns),
    label_column,
    () if labels is None else tuple(labels),
    tuple(metrics),
    metrics[0],
  )
