"""What a family of decoders is: the fields and the switches of one decoder.

A family's configuration is a `DecoderConfig`. What its users may choose are
fields; what is the same in all its models are class variables.
"""

import dataclasses
from typing import ClassVar, Literal

from gnlorp_jax.models import interface
from gnlorp_jax.models.attention import ScoreRule
from gnlorp_jax.models.interface import Dtype
from gnlorp_jax.models.rope import LongRope, Rope, Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Architecture of a decoder and the dtypes it works in."""

  model_type: ClassVar[str]
  """Name of the family, in Hugging Face's configurations too."""
  fused: ClassVar[bool] = False
  """Whether queries, keys and values are one product, and gate and up one."""
  qkv_bias: ClassVar[bool] = False
  """Whether queries, keys and values have biases."""
  qk_norm: ClassVar[bool] = False
  """Whether queries and keys are normed before they are rotated."""
  activation: ClassVar[Literal['silu', 'gelu_tanh']] = 'silu'
  """Of the gate in the feed-forward layers."""
  post_norms: ClassVar[bool] = False
  """Whether the outputs of attention and feed-forward layers are normed too."""
  norms_from_one: ClassVar[bool] = False
  """Whether a norm multiplies by 1 plus its parameter, not by the parameter."""
  scaled_embeddings: ClassVar[bool] = False
  """Whether embeddings are multiplied by the root of their width."""

  vocab_size: int
  """Number of token ids; every id is in [0, vocab_size)."""
  hidden_size: int
  """Width of the residual stream."""
  intermediate_size: int
  """Width inside the feed-forward layers."""
  num_layers: int
  """Number of blocks."""
  num_heads: int
  """Number of query heads per block."""
  num_kv_heads: int | None = None
  """Number of key/value heads, a divisor of num_heads; None: num_heads."""
  head_dim: int | None = None
  """Width of one head, even; None: hidden_size / num_heads."""
  max_seq_len: int = dataclasses.field(metadata=interface.FREE_ON_RESUME)
  """Longest sequence the model accepts, in tokens."""
  rms_norm_eps: float = 1e-6
  """Added to the mean square in RMSNorm."""
  rope_theta: float = 10000.0
  """Base of the rotary frequencies."""
  rope_scaling: Scaling | None = None
  """How the frequencies are scaled for a context longer than the original."""
  tie_embeddings: bool = False
  """Use the embedding matrix as the head as well."""
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
  """Keep the inputs of the blocks alone for the backward pass, and compute them
  again there: less memory, more time. Otherwise the products of the kernels and
  the results of the attention are kept as well."""

  def __post_init__(self):
    interface.check_positive(
      self,
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_layers',
      'num_heads',
      'num_kv_heads',
      'head_dim',
      'max_seq_len',
      'rms_norm_eps',
      'rope_theta',
      'initializer_std',
    )
    if self.head_dim is None:
      interface.check_heads(self)
      if self.head_size % 2:
        raise ValueError(
          f'hidden_size / num_heads = {self.head_size} must be even: rotary '
          'positions turn pairs of features. Change hidden_size or num_heads, '
          'or give head_dim.'
        )
    elif self.head_dim % 2:
      raise ValueError(
        f'head_dim={self.head_dim} must be even: rotary positions turn pairs '
        'of features.'
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of '
        f'num_kv_heads={self.num_kv_heads}.'
      )
    if isinstance(self.rope_scaling, LongRope):
      self.rope_scaling.check(self.rotary_width // 2)
    interface.check_dtypes(self)

  @property
  def head_size(self) -> int:
    """Width of one head with the default filled in."""
    return self.head_dim or self.hidden_size // self.num_heads

  @property
  def rotary_width(self) -> int:
    """Features of a head that turn, the first ones."""
    return self.head_size

  @property
  def kv_heads(self) -> int:
    """Number of key/value heads with the default filled in."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def o_bias(self) -> bool:
    """Whether the output projection of the attention has a bias."""
    return False

  @property
  def has_mlp_bias(self) -> bool:
    """Whether the projections of the feed-forward layers have biases."""
    return False

  @property
  def windows(self) -> tuple[int | None, ...]:
    """Positions tokens attend to, None for all up to them.

    One value for all layers, or one for each.
    """
    return (None,)

  @property
  def ropes(self) -> tuple[Rope | None, ...]:
    """The rotary positions, None for none.

    One value for all layers, or one for each.
    """
    return (Rope(self.rope_theta, self.rope_scaling),)

  @property
  def score_rule(self) -> ScoreRule:
    """How products of queries and keys become scores."""
    return ScoreRule(self.head_size**-0.5)

  @property
  def final_softcap(self) -> float | None:
    """Largest size of a logit, or None."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
  """A decoder of which some layers attend to the last positions alone."""

  sliding_window: int | None = None
  """Positions that tokens of sliding layers attend to; None: all."""
  sliding_layers: tuple[bool, ...] | None = None
  """Which layers slide, one after the other; None: all of them."""

  def __post_init__(self):
    super().__post_init__()
    interface.check_positive(self, 'sliding_window')
    layers = self.sliding_layers
    if layers is not None and len(layers) != self.num_layers:
      raise ValueError(
        f'sliding_layers names {len(layers)} layers, and num_layers='
        f'{self.num_layers}: give one value for each layer, or None.'
      )

  @property
  def windows(self) -> tuple[int | None, ...]:
    """Positions tokens attend to; one value for all layers, or one for each."""
    slides = self.sliding_layers or (True,)
    return tuple(self.sliding_window if s else None for s in slides)
