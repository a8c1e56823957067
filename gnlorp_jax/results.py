"""What a run leaves behind: speed, memory, plot, sample, export, summary."""

import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from gnlorp_jax import folders, models
from gnlorp_jax.build import Run, weight_storage
from gnlorp_jax.config import TrainConfig
from gnlorp_jax.data import masking
from gnlorp_jax.models.generate import generate
from gnlorp_jax.optim.inspect import format_bytes, state_bytes, tree_bytes
from gnlorp_jax.training import hardware, layerwise, metrics
from gnlorp_jax.training.state import TrainState

_logger = logging.getLogger(__name__)


def speed(run: Run, tokens_per_second: float) -> dict[str, float]:
  """Tokens per second, and model FLOP utilisation where the peak is known."""
  row = {'train/tokens_per_second': tokens_per_second}
  peak = hardware.PEAK_FLOPS.get(jax.devices()[0].device_kind)
  if peak is not None:
    flops = tokens_per_second * _flops_per_token(run.config)
    row['train/mfu'] = flops / (peak * run.mesh.size)
  return row


def _flops_per_token(config: TrainConfig) -> float:
  model, seq_len = config.model, config.data.seq_len
  if config.objective == 'causal':
    return models.family(model).flops_per_token(model, seq_len)
  predicted = masking.num_predictions(config.mask_rate, seq_len) / seq_len
  return models.family(model).flops_per_token(model, seq_len, predicted)


def memory(run: Run) -> dict[str, dict[str, int]]:
  """Bytes of this run by component, beside those of AdamW.

  AdamW is counted in whole steps, with parameters and gradients in the model's
  dtype and two float32 moments per parameter, which is what `optim.adamw`
  holds. Layer by layer a run's gradients are those of one block, those around
  the blocks, and where it waits before it updates, what the projection leaves
  of all blocks.
  """
  config = run.config
  exact = jax.eval_shape(run.model.init, jax.random.key(0))
  ours = {
    'parameters': tree_bytes(run.abstract_state.params),
    'gradients': tree_bytes(exact)
    if config.step.mode == 'whole'
    else _layerwise_gradients(run),
    **state_bytes(run.abstract_state.opt_state),
  }
  adamw = {
    **dict.fromkeys(ours, 0),
    'parameters': tree_bytes(exact),
    'gradients': tree_bytes(exact),
    'moments': 8 * _num_params(run),
  }
  return {
    name: {'this run': ours[name], 'adamw': adamw[name]}
    for name in ours
    if name != 'errors' or ours[name]  # Few optimizers have them.
  }


def _num_params(run: Run) -> int:
  return models.family(run.config.model).num_params(run.config.model)


def _layerwise_gradients(run: Run) -> int:
  """Bytes of the gradients that a step holds at once, layer by layer."""
  config, abstract = run.config, run.abstract_state
  load = weight_storage(config).load
  params = jax.eval_shape(
    lambda params: {**params, 'layers': load(params['layers'])}, abstract.params
  )
  layers = tree_bytes(params['layers'])
  around = tree_bytes(params) - layers
  one = layers // config.model.num_layers
  waits = layerwise.gradients_wait(
    run.tx,
    config.optim.clip_global_norm,
    config.step.clipping,
    config.step.accumulate,
  )
  if not waits:
    return around + one
  left = jax.eval_shape(
    lambda params, opt: run.tx.project(params, opt, params)[0],
    *(params, abstract.opt_state),
  )
  if config.step.accumulate == 'projected':  # They are added up.
    return one + 4 * sum(leaf.size for leaf in jax.tree.leaves(left))
  return one + tree_bytes(left)


def finish(run: Run, state: TrainState) -> None:
  """Writes plot, sample, export and summary, and shows them.

  Args:
    run: The run.
    state: Its last state.
  """
  folder = pathlib.Path(run.config.run_dir)
  metrics.plot_losses(folder / 'metrics.jsonl', folder / 'loss.png')
  export(run, state.params, folder / 'hf')
  sample = sample_text(run, state.params)
  (folder / 'sample.txt').write_text(sample, encoding='utf-8')
  summary = summarise(run, folder / 'metrics.jsonl')
  (folder / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
  show(run, summary, sample)


def sample_text(run: Run, params: Any) -> str:
  """What the model makes of text: a continuation, or guesses.

  Causal, that is the configured prompt and what follows it. Masked, the
  beginning of the validation text, in which ``[guess|token]`` stands where the
  model was to guess a token.
  """
  settings = run.config.sample
  if settings.num_tokens == 0:
    return ''
  if run.config.objective == 'masked':
    return _guesses(run, params)
  (prompt_T,) = run.tokenizer.encode_batch([settings.prompt])
  prompt_T = prompt_T[:-1]  # Without the end of sequence.
  if prompt_T.size == 0:
    prompt_T = np.array([run.tokenizer.eos_id])
  new_T = generate(
    run.apply,
    params,
    prompt_T,
    settings.num_tokens,
    max_seq_len=run.config.model.max_seq_len,
    temperature=settings.temperature,
    top_k=min(settings.top_k, run.tokenizer.vocab_size),
    key=jax.random.key(run.config.seed),
    eos_id=run.tokenizer.eos_id,
  )
  return settings.prompt + run.tokenizer.decode(new_T)


def _guesses(run: Run, params: Any) -> str:
  batches = run.eval_batches()
  batch = next(batches)
  batches.close()
  inputs_T = batch['inputs'][0][: run.config.sample.num_tokens]
  guesses_TV = np.asarray(run.apply(params, batch['inputs'][:1]))[0]
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

  def piece(i: int) -> str:
    if i not in targets:
      return run.tokenizer.decode([inputs_T[i]])
    pair = [
      run.tokenizer.decode([x]).strip() for x in (guesses_T[i], targets[i])
    ]
    return ' [' + '|'.join(pair) + ']'

  return ''.join(piece(i) for i in range(len(inputs_T)))


def export(run: Run, params: Any, folder: pathlib.Path) -> None:
  """Writes a Hugging Face folder, in place of that of an earlier finish."""
  tokenizer = run.tokenizer
  folders.export(
    folder,
    params,
    run.config.model,
    bos_token_id=tokenizer.bos_id,
    eos_token_id=tokenizer.eos_id,
    pad_token_id=tokenizer.pad_id,
  )
  tokenizer.save(folder)


def summarise(run: Run, metrics_path: pathlib.Path) -> dict[str, Any]:
  """The run in numbers: losses, speed, memory."""
  rows = metrics.read_metrics(metrics_path)
  # A number that was not finite is None in a row, and stays None here.
  evals = [row for row in rows if 'eval/loss' in row]
  speeds = [
    row['train/tokens_per_second']
    for row in rows
    if 'train/tokens_per_second' in row
  ]
  summary: dict[str, Any] = {
    'optimizer': run.config.optim.name,
    'parameters': _num_params(run),
    'steps': run.config.steps,
    'first_eval_loss': evals[0]['eval/loss'],
    'last_eval_loss': evals[-1]['eval/loss'],
    'last_eval_perplexity': evals[-1]['eval/perplexity'],
    'median_tokens_per_second': float(np.median(speeds)) if speeds else None,
    'memory_bytes': memory(run),
    'device': jax.devices()[0].device_kind,
  }
  device_memory = jax.devices()[0].memory_stats()  # None on a CPU.
  if device_memory:
    summary['peak_device_bytes'] = device_memory.get('peak_bytes_in_use')
  if speeds:
    summary['mfu'] = speed(run, float(np.median(speeds))).get('train/mfu')
  return summary


def show(run: Run, summary: dict[str, Any], sample: str) -> None:
  """Prints the end of a run for the person who waited for it."""
  console = rich.console.Console()
  table = rich.table.Table(title='Memory', title_justify='left')
  table.add_column('component')
  table.add_column(f'this run ({summary["optimizer"]})', justify='right')
  table.add_column('AdamW', justify='right')
  totals = {'this run': 0, 'adamw': 0}
  for name, sizes in summary['memory_bytes'].items():
    table.add_row(name, *(format_bytes(size) for size in sizes.values()))
    totals = {key: totals[key] + sizes[key] for key in totals}
  table.add_section()
  table.add_row('total', *(format_bytes(size) for size in totals.values()))
  console.print(table)
  if sample:
    console.rule('Sample', align='left')
    console.print(sample, markup=False, highlight=False)
    console.rule()
  first, last = summary['first_eval_loss'], summary['last_eval_loss']
  if first is None or last is None:
    outcome = 'The validation loss is not finite.'
  else:
    change = 'lower' if last <= first else 'higher'
    outcome = (
      f'Validation loss {first:.3f} -> {last:.3f} '
      f'({abs(1 - last / first):.0%} {change}), perplexity '
      f'{summary["last_eval_perplexity"]:.1f}.'
    )
  console.print(
    f'{outcome} Plot, sample, metrics and the Hugging Face export (hf/) are in '
    f'{run.config.run_dir}.',
    highlight=False,
  )
