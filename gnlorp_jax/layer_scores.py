"""Measures how much each layer of a language model stands out.

Training that draws a few layers at a time may draw those more often that have
more of something: outliers among their weights (OwLore), norm, gradient, or a
heavy tail in their spectra. The first word is a Hugging Face folder, such as
the hf/ of a run of train_lm.py or what save_pretrained of transformers wrote;
or hf:OWNER/NAME of the hub. The model reads some text, and nothing is trained.
A table shows what was found; a JSON file for training and a picture are
written. With LAYER_SCORES_TRACEBACK set in the environment, an error shows
where it arose.

  python -m gnlorp_jax.layer_scores FOLDER --data text.jsonl
  python -m gnlorp_jax.layer_scores FOLDER --data 'c4/*.json.gz' --threshold 7
  python -m gnlorp_jax.layer_scores FOLDER --data chat.jsonl --format chat
  python -m gnlorp_jax.layer_scores FOLDER --data text.txt --kind gradient_norm
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import pathlib
  import sys

  from gnlorp_jax.compose import command_line, progress
  from gnlorp_jax.recipes.layer_scores import recipe, report
  from gnlorp_jax.recipes.layer_scores.settings import LayerScoresConfig, parse


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  command_line.run(
    lambda: score(parse(words, __doc__)),
    traceback_variable='LAYER_SCORES_TRACEBACK',
  )


def score(config: LayerScoresConfig) -> None:
  """Measures the layers of a model; shows, writes and draws what was found."""
  found = recipe.measure(config, progress.bar)
  report.show(found)  # First, so that no trouble with a file hides it.
  report.write(config.output, found)
  output = pathlib.Path(config.output).expanduser()
  report.plot(output.with_suffix('.png'), found)


if __name__ == '__main__':
  main()
