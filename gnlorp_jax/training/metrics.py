"""What a run tells while it trains: metrics on disk, lines of a log, plots."""

import importlib.util
import json
import logging
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import rich.logging

from gnlorp_jax.disk import extras, writing
from gnlorp_jax.training import records

METRICS_FILE = 'metrics.jsonl'
_WANDB_FILE = 'wandb_id.txt'


class Log(NamedTuple):
  """Where else rows of metrics go.

  Attributes:
    kind: ``wandb`` for Weights & Biases, or None for nowhere else.
    settings: The run's settings, which are shown beside its rows there.
  """

  kind: str | None = None
  settings: Mapping[str, Any] = {}


def check_log(kind: str | None) -> None:
  """Raises ValueError if rows cannot go where a `Log` says."""
  if kind not in (None, 'wandb'):
    raise ValueError(f"Unknown log {kind!r}; expected 'wandb' or None.")
  if kind is None:
    return
  spec = importlib.util.find_spec('wandb')
  # A folder that wandb wrote is called as it is, and is no package.
  if spec is None or spec.origin is None:
    raise ValueError(
      f"log='wandb' needs the package wandb: {extras.install('wandb')}"
    )


class MetricsWriter:
  """Writes metrics to ``metrics.jsonl`` and as TensorBoard events.

  Only one process of a run may have one. The file holds one JSON object per
  line, written out at once. A number that is not finite, which JSON does not
  have, is null there and left out of the events.

  Args:
    run_dir: Folder to write into; it is made.
    resume_step: The step of the checkpoint that training goes on from. What
      was written for later steps is dropped, as it will be written again. None
      starts afresh.
    name: What to call the run beside others; the folder's name, if empty.
    log: Where else rows go; None: nowhere.
    evaluated: The step of the last evaluation that is not repeated, where that
      is before `resume_step`: rows of later ones (``eval/...``) are dropped.

  Raises:
    ValueError: If they cannot go there.
  """

  def __init__(
    self,
    run_dir: str | pathlib.Path,
    resume_step: int | None = None,
    name: str = '',
    log: Log | None = None,
    evaluated: int | None = None,
  ):
    # Who only builds programs need not have it.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
    run_dir = pathlib.Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # First, as it is what may fail.
    self._wandb = _start_wandb(run_dir, resume_step, name, log or Log())
    path = run_dir / METRICS_FILE
    resumed = -1 if resume_step is None else resume_step
    evaluated = resumed if evaluated is None else min(evaluated, resumed)
    _drop_later_lines(path, resumed, evaluated)
    self._file = path.open('a', encoding='utf-8')
    # Written in this thread: tensorboardX's SummaryWriter has one of its own,
    # which dies on a full disk and leaves its caller waiting for ever.
    self._events = EventsWriter(str(run_dir / 'events'), f'.{os.getpid()}')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write_event(
      0 if resume_step is None else resume_step + 1, session_log=start
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    self._file.close()
    self._events.close()
    if self._wandb is not None:
      self._wandb.finish(exit_code=1 if kind else 0)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the metrics of one step.

    Args:
      step: The step they belong to.
      metrics: Scalars by name, such as ``{'train/loss': 3.2}``.
    """
    values = {name: _finite_or_none(value) for name, value in metrics.items()}
    line = json.dumps({'step': int(step)} | values, allow_nan=False)
    self._file.write(line + '\n')
    self._file.flush()
    summary = self._summary_pb2.Summary
    scalars = [
      summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
      if value is not None
    ]
    self._write_event(step, summary=summary(value=scalars))
    if self._wandb is not None:
      numbers = {n: value for n, value in values.items() if value is not None}
      self._wandb.log(numbers, step=int(step))

  def sync(self) -> None:
    """Returns when the rows of `metrics.jsonl` are on the disk."""
    os.fsync(self._file.fileno())

  def _write_event(self, step: int, **content: Any) -> None:
    self._events.write_event(
      self._event_pb2.Event(wall_time=time.time(), step=int(step), **content)
    )
    self._events.flush()


def _start_wandb(
  run_dir: pathlib.Path, resume_step: int | None, name: str, log: Log
) -> Any:
  """The run of Weights & Biases; None if rows do not go there.

  Its id is kept in the folder: a run that is resumed goes on under it. Rows of
  steps that it has already are not taken again.
  """
  check_log(log.kind)
  if log.kind is None:
    return None
  import wandb

  path = run_dir / _WANDB_FILE
  if resume_step is None or not path.is_file():
    path.write_text(f'{secrets.token_hex(4)}\n', encoding='utf-8')
  try:
    return wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'gnlorp_jax'),
      name=name or run_dir.resolve().name,
      id=path.read_text(encoding='utf-8').strip(),
      resume='allow',
      dir=str(run_dir),
      config=dict(log.settings),
      # What resumes may have other settings.
      allow_val_change=True,
      # The terminal belongs to the progress bar.
      settings=wandb.Settings(console='off'),
    )
  except wandb.Error as error:
    raise ValueError(
      f'Weights & Biases did not take the run: {error} To keep its rows on '
      'this machine, set WANDB_MODE=offline in the environment; the command '
      'wandb sync sends them later.'
    ) from error


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads a ``metrics.jsonl``, leaving out a last line that was cut off.

  Args:
    path: The file.

  Returns:
    One dict per line, with ``step`` and the metrics; None stands for a number
    that was not finite.

  Raises:
    ValueError: If the file is absent, or a line is damaged.
  """
  return records.read_rows(
    pathlib.Path(path), 'Repair or remove the line, or remove the file.'
  )


def _finite_or_none(value):
  value = float(value)
  return value if math.isfinite(value) else None


def _drop_later_lines(path, resume_step, evaluated):
  """Rewrites the file without a torn line and without what comes again."""
  if not path.exists():
    return

  def stays(line):
    is_evaluation = any(name.startswith('eval/') for name in line)
    return line['step'] <= (evaluated if is_evaluation else resume_step)

  lines = [line for line in read_metrics(path) if stays(line)]
  # A kill while writing must leave the old file: the new one replaces it whole.
  writing.write_text(path, ''.join(json.dumps(line) + '\n' for line in lines))


def log_to_terminal() -> None:
  """Shows what the loggers say, with the time where it is no terminal."""
  is_terminal = sys.stdout.isatty()
  logging.basicConfig(
    level=logging.INFO,
    format='%(message)s' if is_terminal else '%(asctime)s %(message)s',
    handlers=[
      rich.logging.RichHandler(show_path=False)
      if is_terminal
      else logging.StreamHandler(sys.stdout)
    ],
    force=True,  # absl has put its own handler there already.
  )
  # httpx tells addresses, and those of downloads are signed.
  for chatty in ('absl', 'httpx', 'httpx2', 'jax', 'orbax'):
    logging.getLogger(chatty).setLevel(logging.WARNING)


def plot_losses(
  metrics_jsonl: str | pathlib.Path, png: str | pathlib.Path
) -> None:
  """Draws the training and validation loss of a run over its steps.

  Args:
    metrics_jsonl: A file that `MetricsWriter` wrote, with ``train/loss`` and
      ``eval/loss``; either may be missing, and gaps are left open.
    png: The picture to write.
  """
  lines = read_metrics(metrics_jsonl)
  train_steps, train_losses = _series(lines, 'train/loss')
  eval_steps, eval_losses = _series(lines, 'eval/loss')
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout='constrained')
  axes = figure.add_subplot()
  if train_steps.size:
    axes.plot(train_steps, train_losses, color='#9ecae1', lw=0.8, label='train')
    axes.plot(
      train_steps,
      _smooth(train_losses),
      color='#08519c',
      lw=1.8,
      label='train, smoothed',
    )
  if eval_steps.size:
    axes.plot(
      eval_steps,
      eval_losses,
      color='#d94801',
      lw=1.5,
      marker='o',
      ms=4,
      label='validation',
    )
  axes.set(xlabel='step', ylabel='loss (nats per token)')
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.grid(color='0.9')
  axes.spines[['top', 'right']].set_visible(False)
  if axes.lines:
    axes.legend(frameon=False)
  _save(figure, png)


def plot_layers(
  metrics_jsonl: str | pathlib.Path, png: str | pathlib.Path
) -> bool:
  """Draws when each layer was trained, where layers are drawn.

  Args:
    metrics_jsonl: A file that `MetricsWriter` wrote, with ``layers/rests/00``
      and ``layers/visits/00`` and the like.
    png: The picture to write.

  Returns:
    Whether there was anything to draw.
  """
  lines = read_metrics(metrics_jsonl)
  names = sorted({n for row in lines for n in row if n.startswith('layers/')})
  rests = [_series(lines, n) for n in names if n.startswith('layers/rests/')]
  visits = [_series(lines, n) for n in names if n.startswith('layers/visits/')]
  if not rests:
    return False
  figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout='constrained')
  over_time, in_all = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
  image = over_time.pcolormesh(
    rests[0][0],
    np.arange(len(rests)),
    np.stack([values for _, values in rests]),
    cmap='Blues',
    shading='nearest',
  )
  figure.colorbar(image, ax=over_time, label='steps since a layer was trained')
  over_time.set(xlabel='step', ylabel='layer')
  over_time.xaxis.set_major_formatter('{x:,.0f}')
  over_time.yaxis.get_major_locator().set_params(integer=True)
  in_all.barh(
    np.arange(len(visits)),
    [values[-1] for _, values in visits],
    color='#08519c',
  )
  in_all.set(xlabel='steps trained')
  in_all.spines[['top', 'right']].set_visible(False)
  _save(figure, png)
  return True


def _save(figure, png):
  with writing.written(pathlib.Path(png)) as draft:
    figure.savefig(draft, format='png', dpi=150)


def _series(lines, name):
  """Steps and values of one metric; NaN where the value was not finite."""
  points = [(line['step'], line[name]) for line in lines if name in line]
  values = np.array(points, np.float64).reshape(-1, 2)
  return values[:, 0], values[:, 1]


def _smooth(values):
  """Mean of the finite values around each: five, or 2 % of a long series."""
  side = min(max(len(values) // 100, 2), (len(values) - 1) // 2)
  window = np.ones(2 * side + 1)
  finite = np.isfinite(values)
  count = np.convolve(finite, window, mode='same')
  total = np.convolve(np.where(finite, values, 0), window, mode='same')
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)
