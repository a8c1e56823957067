"""Merges models that were tuned from one base into one, without training.

Folders are Hugging Face's, of any architecture: tensors are merged by their
names, one at a time, so that a 7B model needs little memory. Experts may be
whole models, or LoRA as PEFT writes it. What was done to every tensor, and why,
is shown and written beside it. With MERGE_TRACEBACK set in the environment, an
error shows where it arose.

  python -m gnlorp_jax.merge --base F --experts A B C --method doge --out OUT
  python -m gnlorp_jax.merge --base F --experts A B --method ties --keep 20
    --out OUT --dry-run
  python -m gnlorp_jax.merge --config merge.yaml --out OUT
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import sys

  from gnlorp_jax.compose import command_line, progress
  from gnlorp_jax.recipes.merge import recipe, report
  from gnlorp_jax.recipes.merge.parsing import parse
  from gnlorp_jax.recipes.merge.settings import MergeConfig


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  command_line.run(
    lambda: merge(parse(words, __doc__)),
    traceback_variable='MERGE_TRACEBACK',
  )


def merge(config: MergeConfig) -> None:
  """Merges, and shows what was done."""
  report.show(recipe.merge(config, progress.bar))


if __name__ == '__main__':
  main()
