"""How Qwen 2 and 3 say which of their layers have windows."""

from collections.abc import Mapping
from typing import Any

from gnlorp_jax.models import decoder_hf
from gnlorp_jax.models.decoder_config import WindowedConfig


def read(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """As of `decoder_hf.Layout.read`."""
  if not hf.get('use_sliding_window'):
    return {}, []
  hf = {'sliding_window': 4096, 'max_window_layers': 28, **hf}
  return decoder_hf.read_windows(
    hf, lambda layer: layer >= hf['max_window_layers']
  )


def write(config: WindowedConfig) -> dict[str, Any]:
  """The fields of a `config.json` that `read` reads."""
  types = decoder_hf.layer_types(config)
  return {
    'use_sliding_window': config.sliding_window is not None,
    'sliding_window': config.sliding_window,
    'layer_types': types,
    # For readers that do not know the types: right where the first layers are
    # those without a window.
    'max_window_layers': types.count(decoder_hf.FULL),
  }
