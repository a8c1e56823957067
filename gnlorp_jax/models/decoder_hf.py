"""Decoders in Hugging Face's checkpoints: names of tensors and of fields."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

from gnlorp_jax.models import rope
from gnlorp_jax.models.decoder_config import DecoderConfig, WindowedConfig
from gnlorp_jax.models.field_types import described, is_of

_LAYER = 'model.layers.{layer}'


def _dense_rows(ours: str, theirs: str) -> tuple[tuple[str, str, bool], ...]:
  return (
    (f'layers/{ours}/kernel', f'{_LAYER}.{theirs}.weight', True),
    (f'layers/{ours}/bias', f'{_LAYER}.{theirs}.bias', False),
  )


_BEFORE_NORMS: tuple[tuple[str, str, bool], ...] = (
  ('embed/embedding', 'model.embed_tokens.weight', False),
  *_dense_rows('attn/q_proj', 'self_attn.q_proj'),
  *_dense_rows('attn/k_proj', 'self_attn.k_proj'),
  *_dense_rows('attn/v_proj', 'self_attn.v_proj'),
  *_dense_rows('attn/qkv_proj', 'self_attn.qkv_proj'),
  *_dense_rows('attn/o_proj', 'self_attn.o_proj'),
  ('layers/attn/q_norm/scale', f'{_LAYER}.self_attn.q_norm.weight', False),
  ('layers/attn/k_norm/scale', f'{_LAYER}.self_attn.k_norm.weight', False),
  *_dense_rows('mlp/gate_proj', 'mlp.gate_proj'),
  *_dense_rows('mlp/up_proj', 'mlp.up_proj'),
  *_dense_rows('mlp/gate_up_proj', 'mlp.gate_up_proj'),
  *_dense_rows('mlp/down_proj', 'mlp.down_proj'),
  ('layers/attn_norm/scale', f'{_LAYER}.input_layernorm.weight', False),
)
_AFTER_NORMS: tuple[tuple[str, str, bool], ...] = (
  ('norm/scale', 'model.norm.weight', False),
  ('lm_head/kernel', 'lm_head.weight', True),
  # Where the head is tied, a copy.
  ('embed/embedding', 'lm_head.weight', False),
)

HF_TENSORS: tuple[tuple[str, str, bool], ...] = (
  *_BEFORE_NORMS,
  ('layers/mlp_norm/scale', f'{_LAYER}.post_attention_layernorm.weight', False),
  *_AFTER_NORMS,
)
"""Our path, Hugging Face's name, whether the matrix is transposed there. Rows
of what a family does not have are passed over."""

HF_POST_NORM_TENSORS: tuple[tuple[str, str, bool], ...] = (
  *_BEFORE_NORMS,
  (
    'layers/attn_post_norm/scale',
    f'{_LAYER}.post_attention_layernorm.weight',
    False,
  ),
  (
    'layers/mlp_norm/scale',
    f'{_LAYER}.pre_feedforward_layernorm.weight',
    False,
  ),
  (
    'layers/mlp_post_norm/scale',
    f'{_LAYER}.post_feedforward_layernorm.weight',
    False,
  ),
  *_AFTER_NORMS,
)
"""The same of a family that norms its outputs too."""

HF_UNREAD = ''
"""A regex over tensors that a checkpoint may hold beside these: none."""

# Our field: Hugging Face's.
_FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'max_seq_len': 'max_position_embeddings',
  'rms_norm_eps': 'rms_norm_eps',
  'tie_embeddings': 'tie_word_embeddings',
  'initializer_std': 'initializer_range',
}
# What every model must say of itself.
_REQUIRED = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'max_position_embeddings',
)
# What a model may leave to others, where it is null.
_OPTIONAL = ('num_key_value_heads', 'head_dim')
_MOST_LAYERS = 10_000
SLIDING, FULL = 'sliding_attention', 'full_attention'

Read = Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[str]]]


class Layout(NamedTuple):
  """How a family's configuration stands in a `config.json`.

  Attributes:
    config: The family's configuration.
    name: What to call the family in an error.
    architecture: transformers' class of it.
    fixed: Fields of Hugging Face's that change what is computed, and their only
      supported value, which is also what their absence means.
    defaults: What the absence of other fields means, where it is not what the
      absence of ours means.
    fields: Fields of ours beside the common ones, and Hugging Face's names.
    prepare: Maps a JSON object to one that spells what the family spells in its
      own way as the others do.
    read: Maps a JSON object, defaults filled in, to further fields of ours, and
      to reasons why they are not supported.
    write: Maps a configuration to further fields of a `config.json`.
  """

  config: type[DecoderConfig]
  name: str
  architecture: str
  fixed: Mapping[str, Any]
  defaults: Mapping[str, Any] = {}
  fields: Mapping[str, str] = {}
  prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: hf
  read: Read = lambda hf: ({}, [])
  write: Callable[[Any], dict[str, Any]] = lambda config: {}

  def config_from_hf(self, hf: Mapping[str, Any]) -> DecoderConfig:
    """Configuration from the contents of a Hugging Face `config.json`.

    Args:
      hf: The JSON object, as transformers 4 (`rope_theta`, `rope_scaling`) or
        transformers 5 (`rope_parameters`) writes it.

    Returns:
      The configuration. `param_dtype` is bfloat16 if the checkpoint is and
      float32 otherwise; `compute_dtype` and `remat` have their defaults.

    Raises:
      ValueError: If fields are missing or ask for what is not supported; all
        reasons are named.
    """
    self._check_objects(hf)
    hf = self.prepare(hf)
    filled = {
      **self.defaults,
      **{
        k: v
        for k, v in hf.items()
        # Of these heads null does not mean the default: one for each query's.
        if not (v is None and k in self.defaults) or k == 'num_key_value_heads'
      },
    }
    fixed = {
      **self.fixed,
      'model_type': self.config.model_type,
      'attention_dropout': 0.0,
      'quantization_config': None,
    }
    reasons = [
      f'{name}={filled[name]!r} (supported: {value!r})'
      for name, value in fixed.items()
      if name in filled and filled[name] != value
    ]
    names = {**_FIELDS, **self.fields}
    sizes = _reasons_of_sizes(filled)
    sizes += self._reasons_of_types(
      {
        theirs: (ours, filled[theirs])
        for ours, theirs in names.items()
        if filled.get(theirs) is not None
        and theirs not in (*_REQUIRED, *_OPTIONAL)
      }
    )
    theta, scaling, why = _read_rope(filled)
    # What goes through layers one by one needs their number.
    read, more = ({}, []) if sizes else self.read(filled)
    more += self._reasons_of_types({k: (k, v) for k, v in read.items()})
    reasons += [*sizes, *why, *more]
    if reasons:
      raise ValueError(
        f'Unsupported {self.name} configuration: {", ".join(reasons)}.'
      )
    dtype = filled.get('dtype') or filled.get('torch_dtype')
    given = {
      ours: filled[theirs]
      for ours, theirs in names.items()
      if filled.get(theirs) is not None
    }
    if theta is not None:
      given['rope_theta'] = theta
    if given.get('head_dim', 0) * given['num_heads'] == given['hidden_size']:
      del given['head_dim']  # Which None stands for.
    return self.config(
      param_dtype='bfloat16' if dtype == 'bfloat16' else 'float32',
      rope_scaling=scaling,
      **{**given, **read},
    )

  def _check_objects(self, hf: Mapping[str, Any]) -> None:
    """Raises ValueError where an object is needed and something else is."""
    wrong = [
      f'{name}={hf[name]!r} (supported: an object, or null)'
      for name in ('rope_scaling', 'rope_parameters')
      if not isinstance(hf.get(name) or {}, Mapping)
    ]
    if wrong:
      raise ValueError(
        f'Unsupported {self.name} configuration: {", ".join(wrong)}.'
      )

  def _reasons_of_types(
    self, values: Mapping[str, tuple[str, Any]]
  ) -> list[str]:
    """Why values have no meaning as our fields.

    Args:
      values: Our field and the value, by Hugging Face's name.
    """
    types = get_type_hints(self.config)
    return [
      f'{theirs}={value!r} (supported: {described(types[ours])})'
      for theirs, (ours, value) in values.items()
      if not is_of(value, types[ours])
    ]

  def config_to_hf(
    self,
    config: DecoderConfig,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
  ) -> dict[str, Any]:
    """Contents of a Hugging Face `config.json` for transformers 4 and 5.

    Args:
      config: The architecture.
      bos_token_id: Id of the token that begins a sequence, if there is one.
      eos_token_id: Id of the token that ends a sequence, or several.
      pad_token_id: Id of the padding token, if there is one.

    Returns:
      A JSON object, the inverse of `config_from_hf`.
    """
    names = {**_FIELDS, **self.fields}
    parameters = rope.to_hf(config.rope_theta, config.rope_scaling)
    scaling = {k: v for k, v in parameters.items() if k != 'rope_theta'}
    return {
      'architectures': [self.architecture],
      'model_type': config.model_type,
      **self.fixed,
      'attention_dropout': 0.0,
      **{theirs: getattr(config, ours) for ours, theirs in names.items()},
      'num_key_value_heads': config.kv_heads,
      'head_dim': config.head_size,
      'rope_theta': config.rope_theta,
      'rope_parameters': parameters,
      # What transformers 4 reads.
      'rope_scaling': None if config.rope_scaling is None else scaling,
      'torch_dtype': config.param_dtype,
      'dtype': config.param_dtype,
      'bos_token_id': bos_token_id,
      'eos_token_id': eos_token_id,
      'pad_token_id': pad_token_id,
      **self.write(config),
    }


def _reasons_of_sizes(hf: Mapping[str, Any]) -> list[str]:
  """Why sizes that every model must have are none that one can have."""
  missing = [name for name in _REQUIRED if hf.get(name) is None]
  reasons = [f'the fields {missing} are missing'] if missing else []
  for name in (*_REQUIRED, *_OPTIONAL):
    value = hf.get(name)
    most = _MOST_LAYERS if name == 'num_hidden_layers' else 2**31 - 1
    is_size = type(value) is int and 0 < value <= most  # True is an int too.
    if value is not None and not is_size:
      reasons.append(
        f'{name}={value!r} (supported: whole numbers from 1 to {most})'
      )
  return reasons


def _read_rope(
  hf: Mapping[str, Any],
) -> tuple[float | None, rope.Scaling | None, list[str]]:
  """The base of the frequencies, if there is one, and their scaling."""
  old, new = hf.get('rope_scaling') or {}, hf.get('rope_parameters') or {}
  if {SLIDING, FULL} & new.keys():
    reason = f'rope_parameters={new!r} (supported: the same for all layers)'
    return None, None, [reason]
  fields = dict(old or new)  # As in transformers, which reads one of the two.
  original = hf.get('original_max_position_embeddings')
  scaling, reasons = rope.from_hf(
    fields, original or hf.get('max_position_embeddings')
  )
  theta = fields.get('rope_theta') or hf.get('rope_theta')
  if theta is not None and not is_of(theta, float):
    reasons.append(f'rope_theta={theta!r} (supported: a number)')
  part = fields.get('partial_rotary_factor') or hf.get('partial_rotary_factor')
  if part not in (None, 1, 1.0):
    reasons.append(f'partial_rotary_factor={part!r} (supported: 1.0)')
  return theta, scaling, reasons


def read_windows(
  hf: Mapping[str, Any], slides: Callable[[int], bool]
) -> tuple[dict[str, Any], list[str]]:
  """The fields of a `WindowedConfig`.

  Args:
    hf: The JSON object.
    slides: Whether a layer slides where the object has no `layer_types`.

  Returns:
    The fields, and reasons why they are not supported.
  """
  window, count = hf.get('sliding_window'), hf.get('num_hidden_layers') or 0
  types = hf.get('layer_types')
  if types is None:
    types = [SLIDING if slides(i) else FULL for i in range(count)]
  is_known = isinstance(types, list) and len(types) == count
  if not is_known or any(kind not in (SLIDING, FULL) for kind in types):
    return {}, [
      f'layer_types={types!r} (supported: {SLIDING!r} or {FULL!r} for each of '
      f'{count} layers)'
    ]
  is_sliding = tuple(kind == SLIDING for kind in types)
  if window is None or not any(is_sliding):
    return {}, []
  layers = None if all(is_sliding) else is_sliding
  return {'sliding_window': window, 'sliding_layers': layers}, []


def layer_types(config: WindowedConfig) -> list[str]:
  """Hugging Face's name of each layer's kind of attention."""
  types = [FULL if w is None else SLIDING for w in config.windows]
  return types if len(types) > 1 else types * config.num_layers
