"""RoBERTa: sizes of the encoder of `encoder.make`, and Hugging Face's names."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from gnlorp_jax.models import heads, interface, on_host
from gnlorp_jax.models import hf as hf_files
from gnlorp_jax.models.encoder import make, make_classifier
from gnlorp_jax.models.families._roberta_tensors import (
  HF_CLASSIFIER_TENSORS as HF_CLASSIFIER_TENSORS,
)
from gnlorp_jax.models.families._roberta_tensors import (
  HF_ENCODER_TENSORS as HF_ENCODER_TENSORS,
)
from gnlorp_jax.models.families._roberta_tensors import (
  HF_TENSORS as HF_TENSORS,
)
from gnlorp_jax.models.families._roberta_tensors import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.interface import Dtype, Params

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig:
  """Architecture of a RoBERTa encoder and the dtypes it works in."""

  model_type: ClassVar[str] = 'roberta'
  """Name of the family, in Hugging Face's configurations too."""

  vocab_size: int
  """Number of token ids; every id is in [0, vocab_size)."""
  hidden_size: int
  """Width of the residual stream, a multiple of num_heads."""
  intermediate_size: int
  """Width inside the feed-forward layers."""
  num_layers: int
  """Number of blocks."""
  num_heads: int
  """Number of attention heads per block."""
  max_seq_len: int
  """Longest sequence the model accepts, in tokens, padding included."""
  num_types: int = 1
  """Rows of the table of token types, of which the first is used."""
  pad_id: int = 1
  """Id of the padding token: no position attends to it."""
  layer_norm_eps: float = 1e-5
  """Added to the variance in LayerNorm."""
  hidden_dropout: float = dataclasses.field(
    default=0.1, metadata=interface.CHOSEN_BY_RUN
  )
  """Share of features dropped after the embeddings and after each sublayer,
  while training."""
  attention_dropout: float = dataclasses.field(
    default=0.1, metadata=interface.CHOSEN_BY_RUN
  )
  """Share of attention weights dropped while training."""
  classifier_dropout: float | None = dataclasses.field(
    default=None, metadata=interface.CHOSEN_BY_RUN
  )
  """Share of features dropped in the classifier; None: as hidden_dropout."""
  initializer_std: float = dataclasses.field(
    default=0.02, metadata=interface.FREE_ON_RESUME
  )
  """Standard deviation of the initial kernels and embeddings."""
  param_dtype: Dtype = dataclasses.field(
    default='float32', metadata=interface.KEPT_FROM_RUN
  )
  """Dtype the parameters are stored in."""
  compute_dtype: Dtype = dataclasses.field(
    default='float32', metadata=interface.CHOSEN_BY_RUN
  )
  """Dtype of activations and matrix products."""
  remat: bool = dataclasses.field(default=False, metadata=interface.FREE_IN_RUN)
  """Recompute each block in the backward pass: less memory, more time. Without,
  the outputs of its dense layers are kept and the rest is recomputed."""

  def __post_init__(self):
    interface.check_positive(
      self,
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_layers',
      'num_heads',
      'max_seq_len',
      'num_types',
      'layer_norm_eps',
      'initializer_std',
    )
    interface.check_heads(self)
    if not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f'pad_id={self.pad_id} must be in [0, vocab_size={self.vocab_size}).'
      )
    interface.check_rates(
      self, 'hidden_dropout', 'attention_dropout', 'classifier_dropout'
    )
    interface.check_dtypes(self)

  @property
  def head_size(self) -> int:
    """Width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def num_positions(self) -> int:
    """Rows of the table of positions, of which the first come to no use."""
    return self.max_seq_len + self.pad_id + 1


def _sized(hidden_size, intermediate_size, num_heads, num_layers):
  return RobertaConfig(
    vocab_size=50265,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_heads=num_heads,
    num_layers=num_layers,
    max_seq_len=512,
  )


PRESETS: dict[str, RobertaConfig] = {
  'tiny': _sized(128, 512, 2, 4),
  'mini': _sized(256, 1024, 4, 6),
  'small': _sized(512, 2048, 8, 6),
  'base': _sized(768, 3072, 12, 12),
  'large': _sized(1024, 4096, 16, 24),
}
"""``base`` and ``large`` of RoBERTa (arXiv:1907.11692), and small ones of
ours for experiments."""


def preset(name: str, **overrides: Any) -> RobertaConfig:
  """A configuration by name, with some fields replaced.

  Args:
    name: Key of `PRESETS`.
    **overrides: Fields of `RobertaConfig` and their values.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such name.

  Examples:
    >>> preset('base', param_dtype='bfloat16').hidden_size
    768
  """
  return dataclasses.replace(interface.find_preset(name, PRESETS), **overrides)


LABEL_RULES: tuple[tuple[str, str], ...] = (
  (r'layers/(attn|mlp)/.*/kernel', 'low_rank'),
  (r'.*', 'full'),
)
"""Which parameters are trained how: (regex over the path, label), first match
wins. The matrices of the blocks are projected; embeddings, heads, norms and
biases not.
"""


def num_params(config: RobertaConfig) -> int:
  """Number of parameters with the masked-LM head, from shapes alone."""
  abstract = jax.eval_shape(make(config).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def flops_per_token(
  config: RobertaConfig, seq_len: int, predicted: float = 0.15
) -> float:
  """Floating-point operations that masked-LM training needs per token.

  Counted as `llama.flops_per_token` does: 6 for each weight of a matrix, ``12 L
  D T`` for attention, nothing for lookups.

  Args:
    config: The architecture.
    seq_len: Tokens per sequence, T.
    predicted: Share of the positions that the head is computed for.

  Returns:
    FLOPs per token, forward and backward.

  References:
    Chowdhery et al., `PaLM`, 2022, arXiv:2204.02311, appendix B.
  """
  c = config
  width = c.hidden_size
  blocks = c.num_layers * (4 * width**2 + 2 * width * c.intermediate_size)
  head = width**2 + width * c.vocab_size
  attention = 12 * c.num_layers * width * seq_len
  return 6 * (blocks + predicted * head) + attention


_HEAD = 'classifier'
_HF_HEADS = r'(lm_head|classifier)\..*'

# Our field: Hugging Face's.
_HF_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'pad_id': 'pad_token_id',
  'layer_norm_eps': 'layer_norm_eps',
  'hidden_dropout': 'hidden_dropout_prob',
  'attention_dropout': 'attention_probs_dropout_prob',
  'classifier_dropout': 'classifier_dropout',
  'initializer_std': 'initializer_range',
  'num_types': 'type_vocab_size',
}
_HF_POSITIONS = 'max_position_embeddings'

# Fields of Hugging Face's that change what is computed, and their only
# supported value, which is also what their absence means.
_HF_FIXED = {
  'model_type': RobertaConfig.model_type,
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
  'tie_word_embeddings': True,
  'is_decoder': False,
  'add_cross_attention': False,
}


def config_from_hf(hf: dict[str, Any]) -> RobertaConfig:
  """Configuration from the contents of a Hugging Face `config.json`.

  Args:
    hf: The JSON object, as transformers 4 or 5 writes it.

  Returns:
    The configuration. `param_dtype` is bfloat16 if the checkpoint is and
    float32 otherwise; `compute_dtype` and `remat` have their defaults.

  Raises:
    ValueError: If fields are missing or ask for what is not supported.
  """
  hf_files.check_supported(
    'RoBERTa', hf, {**_HF_FIXED, 'quantization_config': None}
  )
  # transformers' own defaults for what older files leave out.
  hf = {'pad_token_id': 1, 'type_vocab_size': 2, 'layer_norm_eps': 1e-12, **hf}
  fields = hf_files.read_fields(
    'RoBERTa', hf, RobertaConfig, _HF_FIELDS | {'max_seq_len': _HF_POSITIONS}
  )
  fields['max_seq_len'] -= hf['pad_token_id'] + 1
  return RobertaConfig(**fields)


def config_to_hf(
  config: RobertaConfig,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | None = None,
  pad_token_id: int | None = None,
  architecture: str = 'RobertaForMaskedLM',
) -> dict[str, Any]:
  """Contents of a Hugging Face `config.json` for transformers 4 and 5.

  Args:
    config: The architecture.
    bos_token_id: Id of the token that begins a sequence, if there is one.
    eos_token_id: Id of the token that ends a sequence, if there is one.
    pad_token_id: Id of the padding token; it is the configuration's own.
    architecture: Name of transformers' class.

  Returns:
    A JSON object, the inverse of `config_from_hf`.

  Raises:
    ValueError: If `pad_token_id` is not the configuration's `pad_id`.
  """
  if pad_token_id not in (None, config.pad_id):
    raise ValueError(
      f'pad_token_id={pad_token_id} differs from the pad_id={config.pad_id} '
      'that the model was built with. Give the model the pad_id of its '
      'tokenizer.'
    )
  return {
    'architectures': [architecture],
    **_HF_FIXED,
    **{theirs: getattr(config, ours) for ours, theirs in _HF_FIELDS.items()},
    _HF_POSITIONS: config.num_positions,
    'torch_dtype': config.param_dtype,
    'dtype': config.param_dtype,
    'bos_token_id': bos_token_id,
    'eos_token_id': eos_token_id,
  }


def load_classifier(
  folder: str | os.PathLike,
  config: RobertaConfig,
  num_outputs: int,
  key: jax.Array,
  *,
  head: heads.Head = heads.NEW,
  shapes: Params | None = None,
  convert: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
  """Reads an encoder, and the classifier if the folder has one that fits.

  Args:
    folder: Hugging Face folder of a `RobertaForSequenceClassification`, a
      `RobertaForMaskedLM` or a `RobertaModel`.
    config: The architecture: `config_from_hf` of the folder's, with dropout
      rates and dtypes of the run's choice.
    num_outputs: Number of classes, or 1 for a regression.
    key: Random key of a classifier that the folder does not have.
    head: What `heads.match` says of the folder's configuration: whether its
      classifier is the task's.
    shapes: Nested dict with the shape, the dtype and, if set, the sharding of
      every parameter; None: those of `make_classifier`, on the first device.
    convert: ``convert(path, array)`` makes of a parameter what is returned for
      it, as in `hf.load_params`; None keeps the arrays.

  Returns:
    The parameters of `make_classifier`, in their shardings: read one at a time,
    and of the whole model no more than that is held on the host. Outputs are in
    the order of the task's classes.

  Raises:
    ValueError: As `hf.load_params`.
  """
  if shapes is None:
    shapes = jax.eval_shape(make_classifier(config, num_outputs).init, key)
  convert = convert or (lambda path, array: array)
  found = hf_files.tensor_shapes(folder)
  has_one = 'classifier.out_proj.weight' in found
  fits = has_one and head.outputs is not None
  _log_head(folder, num_outputs, head, has_one)
  table = HF_CLASSIFIER_TENSORS
  if not any(name.startswith('roberta.') for name in found):
    # A bare `RobertaModel` names its tensors without the prefix.
    table = tuple(
      (ours, theirs.removeprefix('roberta.'), transposed)
      for ours, theirs, transposed in table
    )
  params = hf_files.load_params(
    folder,
    table,
    {name: tree for name, tree in shapes.items() if fits or name != _HEAD},
    _reordered(convert, head.outputs) if fits else convert,
    unread=HF_UNREAD if fits else f'{HF_UNREAD}|{_HF_HEADS}',
  )
  if not fits:
    new = _draw_classifier(config, num_outputs)(key)
    params[_HEAD] = jax.tree.map_with_path(
      lambda path, leaf, array: convert(
        '/'.join([_HEAD, *(entry.key for entry in path)]),
        jax.device_put(
          on_host.to_host(array).astype(leaf.dtype), leaf.sharding
        ),
      ),
      shapes[_HEAD],
      new,
    )
  return params


def _log_head(
  folder: str | os.PathLike, num_outputs: int, head: heads.Head, has_one: bool
) -> None:
  if not has_one or head.outputs is None:
    _logger.info(
      'The classifier of %d outputs is new: %s has %s.',
      num_outputs,
      folder,
      f'one, but {head.why}' if has_one else 'none',
    )
  elif head.outputs == tuple(range(num_outputs)):
    _logger.info('The classifier is that of %s.', folder)
  else:
    _logger.info(
      'The classifier is that of %s, its outputs in the order %s.',
      folder,
      head.outputs,
    )


def _reordered(
  convert: Callable[[str, jax.Array], Any], outputs: Sequence[int]
) -> Callable[[str, jax.Array], Any]:
  """Takes the classifier's outputs in an order, before they are kept."""
  order = np.array(outputs)

  def kept(path: str, array: jax.Array) -> Any:
    if path.startswith(f'{_HEAD}/out/'):
      array = jax.device_put(array[..., order], array.sharding)
    return convert(path, array)

  return kept


@functools.cache
def _draw_classifier(
  config: RobertaConfig, num_outputs: int
) -> Callable[[jax.Array], Params]:
  """A new head from a key, compiled once for all the runs of a comparison."""
  init = make_classifier(config, num_outputs).init
  # Of the encoder that is drawn with it, the compiler leaves nothing.
  return jax.jit(lambda key: init(key)[_HEAD])


def export_classifier(
  folder: str | os.PathLike,
  config: RobertaConfig,
  params: Params,
  labels: Sequence[str] = (),
  task: str | None = None,
) -> None:
  """Writes a folder that `RobertaForSequenceClassification` reads.

  Args:
    folder: Folder to create.
    config: The architecture.
    params: Parameters of the classifier, as plain arrays.
    labels: Names of the classes; none for a regression.
    task: Name of the task, by which `heads.match` tells whether the classifier
      is that of another.

  Raises:
    ValueError: If the folder holds something already, or the names are not as
      many as the classes, all different.
  """
  num_outputs = params['classifier']['out']['bias'].shape[0]
  wanted = 0 if num_outputs == 1 else num_outputs
  if not len(labels) == len(set(labels)) == wanted:
    raise ValueError(
      f'{len(labels)} labels {tuple(labels)} for {num_outputs} outputs: give '
      'each class a name of its own, and a regression none.'
    )
  hf_config = {
    **config_to_hf(config, architecture='RobertaForSequenceClassification'),
    **heads.describe(labels, task),
  }
  hf_files.export(folder, params, HF_CLASSIFIER_TENSORS, hf_config)
