"""Outputs of a model to metrics and to files for the GLUE server.

All functions are pure: what one task or epoch was given cannot reach the next.

Shape suffixes: N examples, C outputs per example.
"""

import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.stats

from gnlorp_jax.data.glue.tasks import Task
from gnlorp_jax.disk import writing


def scores(
  task: Task, outputs: np.ndarray, labels: np.ndarray, split: str = 'dev'
) -> dict[str, float]:
  """Computes the metrics of a task.

  Args:
    task: The task.
    outputs: Logits ``[N, C]``, or values ``[N]`` or ``[N, 1]`` of a regression.
    labels: ``[N]``, ids of classes or scores.
    split: The split the examples are of. That of `'dev_mismatched'` is named
      `accuracy_mm`.

  Returns:
    Fractions in [-1, 1] by the names of `task.metrics`. Undefined values are
    those of scikit-learn and SciPy: a Matthews correlation is 0 if all
    predictions, or all labels, are one class, F1 is 0 if neither holds the
    second class, correlations of constants or of one example are NaN. All are
    NaN if an output is NaN, or infinite in a regression: a model that diverged
    has no score.

  Raises:
    ValueError: If the shapes do not fit or there are no examples.
  """
  predictions_N = _predictions(task, outputs)
  labels_N = np.asarray(labels)
  if labels_N.shape != predictions_N.shape or not len(labels_N):
    raise ValueError(
      f'outputs of {len(predictions_N)} examples and labels of shape '
      f'{labels_N.shape} do not fit; there must be as many labels as outputs, '
      'at least one.'
    )
  if task.has_mismatched:
    mismatched = split.endswith('mismatched')
    names = {'accuracy_mm' if mismatched else 'accuracy': 'accuracy'}
  else:
    names = {name: name for name in task.metrics}
  if not _has_score(task, outputs):
    return dict.fromkeys(names, float('nan'))
  with warnings.catch_warnings():
    # Of undefined values, which are returned as the docstring says.
    warnings.simplefilter('ignore')
    return {
      name: float(_METRICS[metric](labels_N, predictions_N))
      for name, metric in names.items()
    }


def write_submission(
  task: Task,
  folder: str | pathlib.Path,
  split: str,
  ids: Sequence[str],
  outputs: np.ndarray,
) -> pathlib.Path:
  """Writes predictions in the format of the GLUE server.

  Args:
    task: The task.
    folder: Receives the file, named by the task; made if need be.
    split: `'test'` or, for MNLI, `'test_mismatched'`.
    ids: Of the N examples, `Examples.ids`. Rows are in their order if they are
      numbers.
    outputs: Logits ``[N, C]``, or values ``[N]`` or ``[N, 1]``.

  Returns:
    The file: a header, and per example its index and class as the task's own
    files write it, or its score with three decimals, kept within the range of
    scores.

  Raises:
    ValueError: If the split is no test split, the shapes do not fit or an
      output is not a number.
  """
  name = task.submission_file(split)
  predictions_N = _predictions(task, outputs)
  if len(ids) != len(predictions_N):
    raise ValueError(f'{len(ids)} ids have {len(predictions_N)} outputs.')
  if not _has_score(task, outputs):
    raise ValueError(
      f'Outputs for {name} hold values that are not finite; the model has '
      'diverged and there is nothing to submit.'
    )
  if task.is_regression:
    if task.score_range is not None:
      predictions_N = np.clip(predictions_N, *task.score_range)
    # Adding 0 makes -0 positive.
    written = [f'{np.round(value, 3) + 0.0:.3f}' for value in predictions_N]
  else:
    written = [task.file_labels[label] for label in predictions_N]
  rows = list(zip(ids, written, strict=True))
  if all(index.isdecimal() for index in ids):
    rows.sort(key=lambda row: int(row[0]))
  path = pathlib.Path(folder) / name
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ['index\tprediction', *(f'{index}\t{text}' for index, text in rows)]
  writing.write_text(path, ''.join(f'{line}\n' for line in lines))
  return path


def _predictions(task: Task, outputs: np.ndarray) -> np.ndarray:
  """Returns classes ``[N]``, or scores ``[N]`` in float64."""
  outputs = np.asarray(outputs)
  if task.is_regression and outputs.ndim == 1:
    outputs = outputs[:, None]
  if outputs.ndim != 2 or outputs.shape[1] != task.num_outputs:
    raise ValueError(
      f'outputs of shape {outputs.shape} do not fit task {task.name!r}; '
      f'expected [N, {task.num_outputs}].'
    )
  if task.is_regression:
    return outputs[:, 0].astype(np.float64)
  return np.argmax(outputs, axis=1)


def _has_score(task: Task, outputs: np.ndarray) -> bool:
  outputs = np.asarray(outputs, np.float64)
  if task.is_regression:
    return bool(np.isfinite(outputs).all())
  return not np.isnan(outputs).any()


def _accuracy(labels_N: np.ndarray, predictions_N: np.ndarray) -> float:
  # Imported here and below: who plans a run has no scores, and needs none.
  from sklearn import metrics

  return metrics.accuracy_score(labels_N, predictions_N)


def _f1(labels_N: np.ndarray, predictions_N: np.ndarray) -> float:
  from sklearn import metrics

  return metrics.f1_score(labels_N, predictions_N, zero_division=0.0)


def _matthews(labels_N: np.ndarray, predictions_N: np.ndarray) -> float:
  from sklearn import metrics

  return metrics.matthews_corrcoef(labels_N, predictions_N)


def _pearson(labels_N: np.ndarray, predictions_N: np.ndarray) -> float:
  if len(labels_N) < 2:
    return float('nan')
  labels_N = labels_N.astype(np.float64)
  return scipy.stats.pearsonr(predictions_N, labels_N).statistic


def _spearman(labels_N: np.ndarray, predictions_N: np.ndarray) -> float:
  if len(labels_N) < 2:
    return float('nan')
  return scipy.stats.spearmanr(predictions_N, labels_N).statistic


_METRICS = {
  'accuracy': _accuracy,
  'f1': _f1,
  'matthews_correlation': _matthews,
  'pearson': _pearson,
  'spearmanr': _spearman,
}
