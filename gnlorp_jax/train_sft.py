r"""Fine-tunes a language model on instructions and conversations.

Without options, and without network, it trains a small model on generated
instructions. --model is the Hugging Face folder of a LLaMA, Qwen, Mistral,
Gemma, Phi or SmolLM, or hf:OWNER/NAME of the hub; --data are files of
conversations in any of the usual formats; --method says what trains: full,
lora, dora, galore, gradnormlorp, ... --config takes a Python file, or the name
of a configuration that comes with the package, such as sft_smollm2, of which
any field can be overridden. The same command in the same run directory resumes
where it stopped. With TRAIN_SFT_TRACEBACK set in the environment, an error
shows where it arose.

  python train_sft.py
  python train_sft.py --model hf:HuggingFaceTB/SmolLM2-135M --data chats.jsonl
  python train_sft.py --model FOLDER --data a.jsonl b.json@0.5 --preview
  python train_sft.py --model FOLDER --data chats.jsonl --method lora \
    --step.weight-bits 8 --export adapter
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import sys

  from gnlorp_jax.compose import command_line, device_settings, language_model
  from gnlorp_jax.recipes import grid
  from gnlorp_jax.recipes.sft import data, recipe, report
  from gnlorp_jax.recipes.sft.settings import SftConfig, parse
  from gnlorp_jax.training import distributed, loop, metrics
  from gnlorp_jax.training.interrupt import StopRequest


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  metrics.log_to_terminal()
  command_line.run(
    lambda: fine_tune(parse(words, __doc__)),
    traceback_variable='TRAIN_SFT_TRACEBACK',
  )


def fine_tune(config: SftConfig) -> None:
  """One run, or a search over learning rates and seeds."""
  if config.dry_run:
    planned = recipe.plan(config.on_one_device(), 1)
    sys.stdout.write(language_model.dry_run(*planned))
    return
  if config.preview:
    config = recipe.resolve(config)
    found = data.load(config)
    report.show_preview(config, found)
    recipe.tell_length(config, found, recipe.length_of(config, found))
    return
  device_settings.join(config)
  with report.opened(recipe.resolve(config)):
    prepared = recipe.prepare(config)
    with StopRequest() as stop:
      if not config.is_single:
        results = report.run_grid(prepared, stop)
        if distributed.is_first():
          grid.show(prepared.config.run_dir, results)
        return
      run = recipe.make_run(prepared, prepared.config)
      outcome = loop.train(run, stop)
    found = report.finish(prepared, prepared.config, outcome)
    if distributed.is_first():
      report.show(prepared.config, found)


if __name__ == '__main__':
  main()
