"""What an instruction-tuning run leaves behind: samples, export, summary."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import rich.console
import rich.padding
import rich.text

from gnlorp_jax.compose import (
  adaptation,
  language_model,
  parameters,
  run_directory,
)
from gnlorp_jax.compose.report import (
  memory,
  memory_table,
  num_params,
  num_trained,
)
from gnlorp_jax.data import chat
from gnlorp_jax.disk import writing
from gnlorp_jax.recipes import grid
from gnlorp_jax.recipes.grid import Result
from gnlorp_jax.recipes.sft import data
from gnlorp_jax.recipes.sft.evaluation import SAMPLES_FILE, read_samples
from gnlorp_jax.recipes.sft.recipe import Prepared, make_run
from gnlorp_jax.recipes.sft.settings import SftConfig
from gnlorp_jax.training import distributed, metrics
from gnlorp_jax.training.interrupt import StopRequest
from gnlorp_jax.training.loop import Outcome

_SHOWN = 3  # Examples of a preview, answers at the end of a run.


def finish(
  prepared: Prepared, config: SftConfig, outcome: Outcome
) -> dict[str, Any]:
  """Writes plot, export and summary.

  Args:
    prepared: What the runs of the command share.
    config: The settings of this run.
    outcome: What the loop left.

  Returns:
    The summary.
  """
  folder = pathlib.Path(config.run_dir)
  export(prepared, config, outcome)

  def write() -> dict[str, Any]:
    metrics.plot_losses(folder / 'metrics.jsonl', folder / 'loss.png')
    metrics.plot_layers(folder / 'metrics.jsonl', folder / 'layers.png')
    summary = summarise(prepared, config, outcome)
    text = json.dumps(summary, indent=2) + '\n'
    writing.write_text(folder / 'summary.json', text)
    return summary

  return distributed.from_first(write)


def opened(config: SftConfig) -> contextlib.AbstractContextManager[None]:
  """The run directory, for this process alone: see `run_directory.opened`."""
  name = {'merged': 'hf', 'adapter': 'adapter'}.get(config.export)
  return run_directory.opened(
    config.run_dir,
    exports=(name,) if name and config.is_single else (),
    reads=(config.init_from, config.adapter.init_from, config.data.tokenizer),
  )


def export(prepared: Prepared, config: SftConfig, outcome: Outcome) -> None:
  """Writes the model, or its adapters, in place of what was there."""
  folder = pathlib.Path(config.run_dir)
  tokenizer = prepared.chat.tokenizer.with_chat_template(
    prepared.chat.template.jinja, prepared.chat.template.stop_ids
  )
  if config.export == 'merged':
    language_model.export(
      prepared.program,
      config.model,
      tokenizer,
      outcome,
      folder / 'hf',
      add_bos=tokenizer.adds_bos,
    )
  elif config.export == 'adapter':
    adapter = folder / 'adapter'
    with distributed.of_first(
      lambda: writing.replaced(adapter), adapter
    ) as draft:
      adaptation.export_peft(
        draft,
        outcome.params,
        outcome.constants,
        prepared.program.adapter,
        config.model,
        base=parameters.pinned(config.init_from),
      )
      if distributed.is_first():
        tokenizer.save(draft, add_bos=tokenizer.adds_bos)


def summarise(
  prepared: Prepared, config: SftConfig, outcome: Outcome
) -> dict[str, Any]:
  """The run in numbers: what it found, what it took."""
  rows = metrics.read_metrics(pathlib.Path(config.run_dir) / 'metrics.jsonl')
  # A number that was not finite is None in a row, and stays None here.
  first = next((row for row in rows if _is_evaluation(row)), {})
  record, built = outcome.record, prepared.program
  chosen = language_model.chosen_rows(rows)
  return ({'coreset': chosen} if chosen else {}) | {
    'method': config.method,
    'optimizer': config.optim.name,
    'adapter': config.adapter.kind,
    'learning_rate': config.optim.learning_rate,
    'parameters': num_params(built),
    'trained_parameters': num_trained(built),
    'optimizer_state_bytes': built.state_bytes,
    'steps': record['last']['step'],
    'epochs': (
      (record['last']['step'] - prepared.more_steps) / prepared.steps_per_epoch
    ),
    'data': {
      name: dataclasses.asdict(counts)
      for name, counts in prepared.chat.examples.report.items()
    },
    'first': {
      name.removeprefix('eval/'): value
      for name, value in first.items()
      if name.startswith('eval/')
    },
    'last': record['best'] or record['last'],
    'seconds_per_step': record['seconds_per_step'],
    'memory_bytes': memory(built, config.step, config.optim),
    'peak_device_bytes': record['peak_device_bytes'],
    'device': jax.local_devices()[0].device_kind,
  }


def _is_evaluation(row: dict[str, Any]) -> bool:
  return any(name.startswith('eval/') for name in row)


def show(config: SftConfig, summary: dict[str, Any]) -> None:
  """Prints the end of a run for the person who waited for it."""
  console = rich.console.Console()
  console.print(memory_table(summary['memory_bytes'], summary['method']))
  _show_answers(console, config, summary['last']['step'])
  first, last = summary['first'], summary['last']
  for name, text in (
    ('loss', 'Validation loss'),
    ('token_accuracy', 'Tokens guessed right'),
    ('exact_match', 'Answers as expected'),
  ):
    if last.get(name) is None or first.get(name) is None:
      continue
    # Free answers are never word for word as expected: that says nothing.
    if name != 'exact_match' or first[name] or last[name]:
      console.print(
        f'{text}: {first[name]:.3f} -> {last[name]:.3f}', highlight=False
      )
  for name, score in last.items():
    error = last.get(f'{name}_stderr')
    if error is not None:
      console.print(f'{name}: {score:.3f} ± {error:.3f}', highlight=False)
  folder = pathlib.Path(config.run_dir)
  exported = {'merged': {'hf': 'model'}, 'adapter': {'adapter': 'adapters'}}
  left = {
    'metrics.jsonl': 'metrics',
    'loss.png': 'plot',
    'layers.png': 'plot of the layers that were drawn',
    SAMPLES_FILE: 'answers',
    **exported.get(config.export, {}),
  }
  there = [
    f'{what} ({name})'
    for name, what in left.items()
    if (folder / name).exists()
  ]
  talk = {
    'merged': f'{folder / "hf"}',
    'adapter': f'{config.init_from} --adapter {folder / "adapter"}',
  }
  lines = [f'In {folder} are: {", ".join(there)}.']
  lines += [
    f'{folder / name} is of an earlier command, which exported it; it is not '
    'the model of this one.'
    for name in ('hf', 'adapter')
    if name not in left and (folder / name).exists()
  ]
  if config.export in talk:
    lines.append(f'Talk to it: python -m gnlorp_jax.chat {talk[config.export]}')
  for line in lines:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_answers(
  console: rich.console.Console, config: SftConfig, step: int
) -> None:
  """Prints some of the answers that the model gave at a step."""
  path = pathlib.Path(config.run_dir) / SAMPLES_FILE
  if not path.is_file():
    return
  rows = [row for row in read_samples(path) if row['step'] == step]
  for row in rows[:_SHOWN]:
    console.rule(f'{row["messages"][-1]["role"]}', align='left')
    lines = [(row['messages'][-1]['content'], ''), (row['answer'], 'bold')]
    if not row['exact_match']:
      lines.append((f'Expected: {row["expected"]}', 'dim'))
    for text, style in lines:
      console.print(rich.padding.Padding(rich.text.Text(text, style), (0, 2)))
  if rows:
    console.rule()
  if len(rows) > _SHOWN:
    console.print(
      f'These are {_SHOWN} of {len(rows)} answers; all are in {path}.',
      highlight=False,
      soft_wrap=True,
    )


def show_preview(config: SftConfig, found: data.Chat) -> None:
  """Prints the first examples, what is learned of them marked."""
  console = rich.console.Console()
  for number, example in enumerate(found.examples.training[:_SHOWN], 1):
    learned = int((example.weights > 0).sum())
    console.rule(
      f'example {number}: {len(example.ids)} tokens, {learned} of them learned',
      align='left',
    )
    console.print(
      chat.preview(example, found.tokenizer, brackets=not console.is_terminal),
      highlight=False,
      soft_wrap=True,
    )
  console.rule()
  learned = (
    'Bold is learned, faint is given, in reverse are control tokens.'
    if console.is_terminal
    else 'What stands in ⟦ and ⟧ is learned.'
  )
  console.print(
    f'{learned} Rows have {config.data.max_length} tokens'
    f'{", several examples in each" if config.data.packing else ""}.',
    highlight=False,
  )


def run_grid(prepared: Prepared, stop: StopRequest) -> list[Result]:
  """Runs the first seed with every learning rate, the others with the best.

  Args:
    prepared: What the runs share.
    stop: Tells of signals.

  Returns:
    The results, which are in the run directory's ``results.json`` as well.
  """
  return grid.run_all(
    prepared.config,
    functools.partial(make_run, prepared),
    functools.partial(finish, prepared),
    opened,
    stop,
  )
