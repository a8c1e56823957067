"""Trains a language model on text, from random weights or from a trained model.

Without options, and without network, it trains a small model on the sources of
the running Python's standard library. --config takes a Python file, or the name
of a configuration that comes with the package, such as llama_60m, of which any
field can be overridden. --init-from goes on from the Hugging Face folder of a
LLaMA, Qwen, Mistral, Gemma, Phi or SmolLM, or from a name of the hub. With
--objective masked the model is a RoBERTa, which learns to guess tokens left out
of a text. The same command in the same run directory resumes where it stopped.
With TRAIN_LM_TRACEBACK set in the environment, an error shows where it arose.

  python train_lm.py
  python train_lm.py --init-from hf:HuggingFaceTB/SmolLM2-135M --data.source t/
  python train_lm.py --objective masked
  python train_lm.py --config configs/llama_60m.py --data.source 'c4/*.json.gz'
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import sys

  from gnlorp_jax.compose import command_line, device_settings, language_model
  from gnlorp_jax.recipes import grid
  from gnlorp_jax.recipes.pretrain import recipe, report
  from gnlorp_jax.recipes.pretrain.settings import TrainConfig, parse
  from gnlorp_jax.training import distributed, loop, metrics
  from gnlorp_jax.training.interrupt import StopRequest


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  metrics.log_to_terminal()
  command_line.run(
    lambda: pretrain(parse(words, __doc__)),
    traceback_variable='TRAIN_LM_TRACEBACK',
  )


def pretrain(config: TrainConfig) -> None:
  """One run, or a search over learning rates and seeds."""
  if config.dry_run:
    planned = recipe.plan(config.on_one_device(), 1)
    sys.stdout.write(language_model.dry_run(*planned))
    return
  device_settings.join(config)
  with report.opened(config):
    prepared = recipe.prepare(config)
    if config.is_single:
      run = recipe.make_run(prepared, prepared.config)
      with StopRequest() as stop:
        outcome = loop.train(run, stop)
      found = report.finish(prepared, prepared.config, outcome)
      if distributed.is_first():
        report.show(config, *found)
      return
    with StopRequest() as stop:
      results = report.run_grid(prepared, stop)
  if distributed.is_first():
    grid.show(config.run_dir, results)


if __name__ == '__main__':
  main()
