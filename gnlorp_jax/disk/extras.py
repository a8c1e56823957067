"""Which extra of this package brings a module that is not installed.

Optimizers need JAX, Optax and NumPy, and no more is installed by default.
This module imports nothing: it is asked when an import failed.
"""

MODULES = {
  'docstring_parser': 'train',
  'flax': 'train',
  'grain': 'train',
  'huggingface_hub': 'train',
  'matplotlib': 'train',
  'orbax': 'train',
  'rich': 'train',
  'safetensors': 'train',
  'tensorboardX': 'train',
  'tokenizers': 'train',
  'tyro': 'train',
  'yaml': 'train',
  'jinja2': 'train',
  'pyarrow': 'sft',
  'sklearn': 'glue',
  'tensorflow_datasets': 'tfds',
}
"""By the name that is imported."""


def missing(error: ImportError) -> str | None:
  """What to install, if an import failed for want of an extra.

  Args:
    error: What the import raised.

  Returns:
    The message, or None of any other module.
  """
  module = (error.name or '').partition('.')[0]
  extra = MODULES.get(module)
  if extra is None or not isinstance(error, ModuleNotFoundError):
    return None
  return (
    f'The package {module} is not installed, and this needs it: '
    f'{install(extra)}'
  )


def install(extra: str) -> str:
  """How an extra is installed, for a message that says so.

  Args:
    extra: Its name in pyproject.toml.
  """
  return (
    f"pip install 'gnlorp_jax[{extra}]', or in a checkout pip install "
    f"'.[{extra}]'"
  )
