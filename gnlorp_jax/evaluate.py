"""Scores a language model: tasks with options, free answers, perplexities.

The first word is a Hugging Face folder, such as the hf/ of a run of train_lm.py
or what save_pretrained of transformers wrote; or hf:OWNER/NAME of the hub.
Questions are read from files on this machine and put in the words of
EleutherAI's lm_eval. Beside every score stand its standard error and the share
of the most frequent answer. With EVALUATE_TRACEBACK set in the environment, an
error shows where it arose.

  python -m gnlorp_jax.evaluate FOLDER --tasks arc_easy,piqa --data questions/
  python -m gnlorp_jax.evaluate FOLDER --tasks mmlu --data mmlu/ --limit 20
  python -m gnlorp_jax.evaluate FOLDER --tasks perplexity:wiki.test.tokens
  python -m gnlorp_jax.evaluate FOLDER --tasks lm_eval:mine --include-path yaml/
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import sys

  from gnlorp_jax.compose import command_line, progress
  from gnlorp_jax.recipes.evaluate import recipe, report
  from gnlorp_jax.recipes.evaluate.settings import EvaluateConfig, parse


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  command_line.run(
    lambda: evaluate(parse(words, __doc__)),
    traceback_variable='EVALUATE_TRACEBACK',
  )


def evaluate(config: EvaluateConfig) -> None:
  """Scores a model, and shows and writes what was found."""
  found = recipe.evaluate(config, progress.bar)
  report.show(found)  # First, so that no trouble with a file hides it.
  if config.output is not None:
    report.write(config.output, found)


if __name__ == '__main__':
  main()
