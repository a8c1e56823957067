"""What a pre-training run leaves behind: plot, sample, export, summary."""

import contextlib
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import rich.console

from gnlorp_jax.compose import language_model, run_directory
from gnlorp_jax.compose.report import memory, memory_table, num_params
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.disk import writing
from gnlorp_jax.models.generate import generate
from gnlorp_jax.models.on_host import to_host
from gnlorp_jax.recipes import grid
from gnlorp_jax.recipes.grid import Result
from gnlorp_jax.recipes.pretrain import data
from gnlorp_jax.recipes.pretrain.recipe import (
  Prepared,
  flops_per_token,
  make_run,
)
from gnlorp_jax.recipes.pretrain.settings import TrainConfig
from gnlorp_jax.training import distributed, metrics
from gnlorp_jax.training.interrupt import StopRequest
from gnlorp_jax.training.loop import Outcome


def finish(
  prepared: Prepared, config: TrainConfig, outcome: Outcome
) -> tuple[Result, str]:
  """Writes plot, sample, export and summary.

  Args:
    prepared: What the runs of the command share.
    config: The settings of this run.
    outcome: What the loop left.

  Returns:
    The summary, and the sample.
  """
  folder = pathlib.Path(config.run_dir)
  export(prepared, outcome, folder / 'hf')
  sample = sample_text(prepared, config, outcome)

  def write() -> Result:
    metrics.plot_losses(folder / 'metrics.jsonl', folder / 'loss.png')
    metrics.plot_layers(folder / 'metrics.jsonl', folder / 'layers.png')
    writing.write_text(folder / 'sample.txt', sample)
    summary = summarise(prepared, config, outcome)
    text = json.dumps(summary, indent=2) + '\n'
    writing.write_text(folder / 'summary.json', text)
    return summary

  return distributed.from_first(write), sample


def opened(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
  """The run directory, for this process alone: see `run_directory.opened`."""
  return run_directory.opened(
    config.run_dir,
    exports=('hf',) if config.is_single else (),
    reads=(config.init_from, config.adapter.init_from, config.data.tokenizer),
  )


def sample_text(
  prepared: Prepared, config: TrainConfig, outcome: Outcome
) -> str:
  """What the model makes of text: a continuation, or guesses.

  Causal, that is the configured prompt and what follows it. Masked, the
  beginning of the validation text, in which ``[guess|token]`` stands where the
  model was to guess a token.
  """
  settings, tokenizer = config.sample, prepared.text.tokenizer
  if settings.num_tokens == 0:
    return ''
  built = prepared.program
  params = built.parameters.join(outcome.params, outcome.constants)
  if config.is_masked:
    return _guesses(prepared, config, params)
  prompt_T = prompt_ids(tokenizer, settings.prompt, config.data.add_bos)
  (new_T,) = generate(
    built.model,
    params,
    [prompt_T],
    settings.num_tokens,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    key=jax.random.key(config.seed),
    eos_ids=tokenizer.eos_ids,
  )
  return settings.prompt + tokenizer.decode(new_T)


def prompt_ids(
  tokenizer: tokenizers.Tokenizer, prompt: str, add_bos: bool
) -> np.ndarray:
  """Ids of a prompt, int64, as a document of the training begins.

  Args:
    tokenizer: The tokenizer.
    prompt: The text; an empty one begins after the end of a document.
    add_bos: Whether documents begin with the tokenizer's `bos_id`.
  """
  ids = tokenizer.encode(prompt)
  if add_bos:
    return np.append(tokenizer.bos_id, ids)
  return ids if ids.size else np.array([tokenizer.eos_id])


def _guesses(prepared: Prepared, config: TrainConfig, params: Any) -> str:
  tokenizer = prepared.text.tokenizer
  batches = data.evaluation_batches(config, prepared.text)()
  batch = next(batches)
  batches.close()
  inputs_T = batch['inputs'][0][: config.sample.num_tokens]
  guesses_TV = to_host(
    prepared.program.model.apply(params, batch['inputs'][:1])
  )[0]
  guesses_T = guesses_TV.argmax(axis=-1)
  targets = {
    position: target
    for position, target, weight in zip(
      batch['positions'][0],
      batch['targets'][0],
      batch['weights'][0],
      strict=True,
    )
    if weight
  }

  def word(i: int) -> str:
    if i not in targets:
      return tokenizer.decode([inputs_T[i]])
    pair = [tokenizer.decode([x]).strip() for x in (guesses_T[i], targets[i])]
    return ' [' + '|'.join(pair) + ']'

  return ''.join(word(i) for i in range(len(inputs_T)))


def export(prepared: Prepared, outcome: Outcome, folder: pathlib.Path) -> None:
  """Writes a Hugging Face folder, in place of that of an earlier finish."""
  config = prepared.config
  language_model.export(
    prepared.program,
    config.model,
    prepared.text.tokenizer,
    outcome,
    folder,
    # A causal model saw plain text.
    add_bos=None if config.is_masked else config.data.add_bos,
  )


def summarise(
  prepared: Prepared, config: TrainConfig, outcome: Outcome
) -> dict[str, Any]:
  """The run in numbers: losses, speed, memory."""
  rows = metrics.read_metrics(pathlib.Path(config.run_dir) / 'metrics.jsonl')
  # A number that was not finite is None in a row, and stays None here. So is
  # what was lost with rows, which are no reason not to end.
  first = next((row for row in rows if 'eval/loss' in row), {})
  last = outcome.record['best'] or outcome.record['last']
  speeds = [
    row['train/tokens_per_second']
    for row in rows
    if 'train/tokens_per_second' in row
  ]
  built = prepared.program
  chosen = language_model.chosen_rows(rows)
  summary: dict[str, Any] = {
    'optimizer': config.optim.name,
    'adapter': config.adapter.kind,
    'parameters': num_params(built),
    'steps': outcome.record['last']['step'],
    'first_eval_loss': first.get('eval/loss'),
    'last_eval_loss': last['loss'],
    'last_eval_perplexity': last['perplexity'],
    'tasks': {name: x for name, x in last.items() if '/' in name},
    'median_tokens_per_second': float(np.median(speeds)) if speeds else None,
    'memory_bytes': memory(built, config.step, config.optim),
    'device': jax.local_devices()[0].device_kind,
    'peak_device_bytes': outcome.record['peak_device_bytes'],
  }
  if chosen:
    summary['coreset'] = chosen
  if speeds:
    instruments = built.instruments(
      config.optim, config.steps, flops_per_token=flops_per_token(config)
    )
    speed = instruments.speed(float(np.median(speeds)))
    summary['mfu'] = speed.get('train/mfu')
  return summary


def show(config: TrainConfig, summary: dict[str, Any], sample: str) -> None:
  """Prints the end of a run for the person who waited for it."""
  console = rich.console.Console()
  console.print(memory_table(summary['memory_bytes'], summary['optimizer']))
  if sample:
    console.rule('Sample', align='left')
    console.print(sample, markup=False, highlight=False)
    console.rule()
  first, last = summary['first_eval_loss'], summary['last_eval_loss']
  if last is None:
    outcome = 'The validation loss is not finite.'
  elif first is None:
    outcome = f'Validation loss {last:.3f}; of the first, no number is known.'
  else:
    change = 'lower' if last <= first else 'higher'
    outcome = (
      f'Validation loss {first:.3f} -> {last:.3f} '
      f'({abs(1 - last / first):.0%} {change}), perplexity '
      f'{summary["last_eval_perplexity"]:.1f}.'
    )
  for name, share in summary['tasks'].items():
    error = summary['tasks'].get(f'{name}_stderr')
    if error is not None:
      console.print(f'{name} {share:.3f} ± {error:.3f}', highlight=False)
  console.print(
    f'{outcome} Plot, sample, metrics and the Hugging Face export (hf/) are in '
    f'{config.run_dir}.',
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
