"""Talks to a language model, whose answers appear as it writes them.

The first word is a Hugging Face folder, such as the hf/ of a run that was
fine-tuned on conversations or what save_pretrained of transformers wrote; or
hf:OWNER/NAME of the hub. The folder's chat template writes the conversation
down. On a terminal /reset begins anew, /quit or Ctrl-D ends, and Ctrl-C stops
an answer; where questions come through a pipe, each line is one. With
CHAT_TRACEBACK set in the environment, an error shows where it arose.

  python -m gnlorp_jax.chat FOLDER
  python -m gnlorp_jax.chat FOLDER --adapter ADAPTER
  python -m gnlorp_jax.chat FOLDER --system 'Answer in one sentence.'
  python -m gnlorp_jax.chat FOLDER --prompt 'What is JAX?' --temperature 0
  python -m gnlorp_jax.chat FOLDER < questions.txt > answers.txt
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import sys

  import rich.console

  from gnlorp_jax.compose import command_line
  from gnlorp_jax.recipes.chat import recipe, terminal
  from gnlorp_jax.recipes.chat.settings import ChatConfig, parse


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  command_line.run(
    lambda: chat(parse(words, __doc__)), traceback_variable='CHAT_TRACEBACK'
  )


def chat(config: ChatConfig) -> None:
  """Loads a model and talks."""
  # In a notebook rich would ask for ipywidgets.
  console = rich.console.Console(stderr=True, force_jupyter=False)
  with console.status('Reading the model ...'):
    dialogue = recipe.load(config)
  terminal.run(dialogue, config.prompt)


if __name__ == '__main__':
  main()
