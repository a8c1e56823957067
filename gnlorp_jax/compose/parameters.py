"""How a run holds a model's weights: what trains, what stays, in how many bits.

Adapters, weights in few bits, frozen weights and weights from a Hugging Face
folder are all values of one `training.parameters.Parameters`.
"""

import dataclasses
import difflib
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh

from gnlorp_jax import models, optim
from gnlorp_jax.compose import adaptation, folders, memory
from gnlorp_jax.compose.optimizer import LabelRules
from gnlorp_jax.compose.settings import StepConfig
from gnlorp_jax.data import hub
from gnlorp_jax.data.files import nearest_file
from gnlorp_jax.models import adapters, hf
from gnlorp_jax.models.decoder_config import DecoderConfig
from gnlorp_jax.models.interface import Model, first_layers
from gnlorp_jax.optim.parts.labels import Assignment, assign
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.training import parameters, sharding

Params = dict[str, Any]
# A field of a model's configuration that a run has its own value of.
_FROM_RUN = 'from_run'


def architecture(
  init_from: str | None,
  model: models.Config,
  *,
  keep_dropout: bool = True,
  **overrides: Any,
) -> models.Config:
  """A model's configuration: as given, of a folder, or a preset of that name.

  Args:
    init_from: A Hugging Face folder, a name of the hub or of a preset, or None.
    model: The configuration that the run gives. What is its own affair (dtypes,
      remat, dropout) it keeps where the rest comes from elsewhere.
    keep_dropout: Whether rates of dropout are among that.
    **overrides: Fields to replace in the end.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is neither a folder nor a preset of that name, or it
      is a decoder where `model` is an encoder, or the reverse.
  """
  if init_from is None:
    return dataclasses.replace(model, **overrides)
  if is_folder(init_from):
    path = folder(init_from, 'config')
    _check_model_folder(path)
    found_hf = hf.load_config(path)
    family = models.family_of(found_hf)
    found = family.config_from_hf(found_hf)
    hf.check_size(path, family.num_params(found))
  else:
    found = _preset(init_from, model)
  if isinstance(found, DecoderConfig) != isinstance(model, DecoderConfig):
    kinds = ('a decoder', 'an encoder')
    asked, got = kinds if isinstance(model, DecoderConfig) else kinds[::-1]
    raise ValueError(
      f'init_from={init_from!r} holds {got} ({found.model_type}), and {asked} '
      'is asked for. Name another model, or of train_lm.py another objective.'
    )
  kept = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.metadata.get(_FROM_RUN)
    and (keep_dropout or not field.name.endswith('_dropout'))
  }
  return dataclasses.replace(found, **(kept | overrides))


def _check_model_folder(path: str) -> None:
  """Raises ValueError for the directory of a run, whose model is inside."""
  inner = pathlib.Path(path) / 'hf'
  if (inner / 'config.json').is_file():
    if not (pathlib.Path(path) / 'config.json').is_file():
      raise ValueError(
        f'{path} is the directory of a run: its model is {inner}.'
      )


def _preset(init_from: str, model: models.Config) -> models.Config:
  """The preset of that name; a ValueError says what was meant perhaps."""
  presets = models.presets()
  if init_from in presets:
    return presets[init_from]
  if pathlib.Path(init_from).is_file():
    raise ValueError(
      f'init_from={init_from!r} is a file: name its folder, '
      f'{str(pathlib.Path(init_from).parent)!r}.'
    )
  known = [
    name
    for name, preset in presets.items()
    if isinstance(preset, DecoderConfig) == isinstance(model, DecoderConfig)
  ]
  near = difflib.get_close_matches(init_from.lower(), known, n=1)
  if re.fullmatch(r'[\w.-]+/[\w.-]+', init_from):
    near = [f'hf:{init_from}']
  hint = f' Did you mean {near[0]!r}?' if near else ''
  if '/' in init_from and not near:
    hint = nearest_file(pathlib.Path(init_from))
  # A path is no misspelt preset.
  presets_known = '' if '/' in init_from else f' Presets: {known}.'
  raise ValueError(
    f'init_from={init_from!r} is neither a folder nor a preset.{hint}'
    f"{presets_known} A model of the Hugging Face hub is named 'hf:OWNER/NAME'."
  )


def is_folder(init_from: str | None) -> bool:
  """Whether weights come from a folder, and are not random."""
  return hub.is_hub(init_from) or (
    init_from is not None and pathlib.Path(init_from).is_dir()
  )


def folder(
  init_from: str, what: Literal['model', 'tokenizer', 'config'] = 'model'
) -> str:
  """The local folder behind `init_from`, where `is_folder` says there is one.

  Args:
    init_from: A folder, or a name of the hub, of which what is asked for is
      downloaded unless it is there.
    what: Of a name of the hub; see `hub.folder`.

  Raises:
    ValueError: If the hub does not give it.
  """
  if hub.is_hub(init_from):
    return str(hub.folder(init_from, what))
  return init_from


def pinned(init_from: str | None) -> str | None:
  """`init_from`, a name of the hub with the commit that it stands for."""
  if not hub.is_hub(init_from):
    return init_from
  commit = hub.folder(init_from, 'config').name
  return f'{init_from.partition("@")[0]}@{commit}'


def plan(
  make: Callable[[Any], Model],
  config: models.Config,
  *,
  mesh: Mesh | AbstractMesh,
  adapter: adapters.AdapterConfig | None,
  step: StepConfig,
  rules: LabelRules,
  beside_adapters: tuple[str, ...] = (),
  read: Callable[..., Params] | None = None,
  adapter_from: str | None = None,
  seed: int = 0,
) -> tuple[parameters.Parameters, LabelRules]:
  """Says how a run holds a model's weights; allocates nothing.

  Args:
    make: Makes the model of a configuration.
    config: The architecture.
    mesh: The devices.
    adapter: Low-rank changes beside the kernels; None trains the weights.
    step: How steps go through the model, and the bits of its kernels.
    rules: Pairs (regex, label) over the paths of what may train, adapters in
      place of the model's weights. What they label frozen is not trained.
    beside_adapters: Prefixes of paths that train with adapters, such as those
      of a new head.
    read: ``read(key, shapes)`` reads the weights to start from as they are
      stored, kernels as `folders.keeper` keeps them; None draws them.
    adapter_from: Folder of PEFT with the adapters to start from, of which
      `adapter` is the configuration; None draws them.
    seed: Decides how weights in 8 bits are rounded.

  Returns:
    The parameters, and the label rules of what trains.

  Raises:
    ValueError: If weights that train should be kept in 4 bits, or in whole
      steps in 8, or rules match nothing.
  """
  layout = _Layout(
    make,
    config,
    mesh,
    adapter,
    step,
    beside_adapters,
    rules,
    adapter_from,
    seed,
  )
  trained, frozen, trained_rules = layout.abstract
  if step.weight_bits == 4 or step.mode == 'whole':
    _check_weight_bits(step, trained, adapter)
  return parameters.Parameters(
    trained=trained,
    frozen=frozen,
    join=parameters.join,
    decode=layout.decode_whole,
    decode_exact=layout.decode('float32'),
    split=functools.partial(sharding.split, mesh=mesh),
    store=layout.store,
    start=functools.partial(layout.initialise, read),
    start_frozen=functools.partial(layout.initialise_frozen, read),
    merge=lambda trained, frozen: folders.merged(
      parameters.join(trained, frozen), adapter, config.param_dtype
    ),
  ), trained_rules


def _check_weight_bits(
  step: StepConfig, trained: Any, adapter: adapters.AdapterConfig | None
) -> None:
  """No step can train kernels of 4 bits; whole steps those of none.

  They would have a full-precision gradient of every such kernel.
  """
  names = [
    path_name(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      trained, is_leaf=folders.is_quantized
    )
    if folders.is_quantized(leaf)
  ]
  if names:
    layerwise = (
      "step.mode='layerwise', which rounds the updates of kernels "
      'stochastically, or '
    )
    raise ValueError(
      f'step.weight_bits={step.weight_bits} needs '
      f'{layerwise if step.weight_bits == 8 else ""}adapters '
      "(adapter.kind='lora') beside kernels that stay as they are; got "
      f'step.mode={step.mode!r} and adapter.kind='
      f'{None if adapter is None else adapter.kind!r}.'
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
  """What of a model trains, and how all of it is stored."""

  make: Callable[[Any], Model]
  config: models.Config
  mesh: Mesh | AbstractMesh
  adapter: adapters.AdapterConfig | None
  step: StepConfig
  beside_adapters: tuple[str, ...]
  rules: LabelRules
  adapter_from: str | None
  seed: int

  @property
  def is_quantized(self) -> bool:
    return self.step.weight_bits is not None

  def decode(self, dtype: Any) -> Callable[[Any], Any]:
    if not self.is_quantized:
      return parameters.unchanged
    return lambda tree: optim.quantized_weights.dequantize_weights(tree, dtype)

  @property
  def decode_whole(self) -> Callable[[Any], Any]:
    decode = self.decode(self.config.compute_dtype)
    if self.mesh.shape['fsdp'] == 1:
      return decode
    # Codes are gathered before they are decoded: they are fewer bytes.
    return lambda tree: decode(sharding.gather(tree, self.mesh))

  def store(self, new: Any, old: Any, number: jax.Array, first: Any) -> Any:
    if not self.is_quantized:
      return parameters.cast_like(new, old, number, first)
    key = jax.random.fold_in(jax.random.key(self.seed), number)
    key = jax.random.fold_in(key, first)
    return optim.quantized_weights.requantize_weights(new, old, key)

  # Shapes.

  @functools.cached_property
  def abstract(self) -> tuple[Any, Any, LabelRules]:
    """Trained and frozen shapes in their shardings, and rules of the former."""
    trained, frozen, rules = self.divide(
      jax.eval_shape(self.random, jax.random.key(0)), None
    )
    return self.placed(trained), self.placed(frozen), rules

  def placed(self, tree: Any) -> Any:
    """Shapes with the shardings of parameters."""
    shardings = sharding.infer_shardings({'params': tree}, self.mesh)['params']
    return jax.tree.map(
      lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
      tree,
      shardings,
    )

  # Shapes or arrays.

  def divide(
    self, base: Any, key: jax.Array | None
  ) -> tuple[Any, Any, LabelRules]:
    """The model's weights as those that train and those that do not.

    Args:
      base: The weights as they are stored, or their shapes.
      key: Draws the adapters; None makes shapes alone.

    Returns:
      The two trees, and the label rules of the first.
    """
    trained, frozen = base, {}
    if self.adapter is not None:
      frozen, trained = adapters.split(
        base, lambda path: path.startswith(self.beside_adapters)
      )
      trained = parameters.join(trained, self.adapters(base, key))
    exact = jax.eval_shape(self.decode('float32'), trained)
    labels = {
      path_name(path): assignment.label
      for path, assignment in jax.tree_util.tree_leaves_with_path(
        assign(exact, self.rules),
        is_leaf=lambda node: isinstance(node, Assignment),
      )
    }
    if 'frozen' not in labels.values():
      return trained, frozen, self.rules
    labelled, trained = adapters.split(
      trained, lambda path: labels[path] != 'frozen'
    )
    rules = tuple(rule for rule in self.rules if rule[1] != 'frozen')
    return trained, parameters.join(labelled, frozen), rules

  def adapters(self, base: Any, key: jax.Array | None) -> Any:
    """The arrays of the adapters beside these weights."""
    if key is None or self.adapter_from is not None:
      shapes = jax.eval_shape(self.draw_adapters, base, jax.random.key(0))
      if key is None:
        return shapes
      return adaptation.read_peft(self.adapter_from, self.config, shapes)
    return self.draw_adapters(base, jax.random.fold_in(key, 1))

  # Compiled once, however many runs draw their weights.

  @functools.cached_property
  def draw(self) -> Callable[[jax.Array], Any]:
    """Maps a key to the model's random weights, in their shardings."""
    shapes = self.placed(jax.eval_shape(self.random, jax.random.key(0)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(self.random, out_shardings=shardings)

  @functools.cached_property
  def draw_adapters(self) -> Callable[[Any, jax.Array], Any]:
    """Maps the model's weights, as stored, and a key to adapters."""
    exact = self.decode('float32')
    return jax.jit(
      lambda base, key: adapters.init(self.adapter, exact(base), key)
    )

  # Arrays.

  def random(self, key: jax.Array) -> Any:
    """Random weights as they are stored; in codes, layer after layer."""
    if not self.is_quantized:
      return self.make(self.config).init(key)
    single = self.make(first_layers(self.config, 1))

    def layer(key: jax.Array) -> Any:
      stored = optim.quantized_weights.quantize_weights(
        single.init(key)['layers'],
        optim.quantized_weights.CODECS[self.step.weight_bits],
      )
      return jax.tree.map(lambda x: x[0], stored)

    keys_L = jax.random.split(
      jax.random.fold_in(key, 1), self.config.num_layers
    )
    # Outside of the layers as in `Model.init`. Of the layer that comes with it,
    # the compiler leaves nothing.
    outside = single.init(key)
    return {**outside, 'layers': jax.lax.map(layer, keys_L)}

  def initialise(
    self, read: Callable[..., Params] | None, key: jax.Array
  ) -> tuple[Any, Any]:
    """Trained and frozen weights in their shardings."""
    if read is None:
      memory.check(self.abstract[:2])
      base = self.draw(key)
    else:
      shapes = jax.eval_shape(self.make(self.config).init, key)
      base = read(key, self.placed(shapes))
    trained, frozen, _ = self.divide(base, key)
    like, frozen_like, _ = self.abstract
    return _put(trained, like), _put(frozen, frozen_like)

  def initialise_frozen(
    self, read: Callable[..., Params] | None, key: jax.Array
  ) -> Any:
    """The frozen weights alone."""
    if not self.abstract[1]:
      return {}
    return self.initialise(read, key)[1]


def _put(tree: Any, like: Any) -> Any:
  return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, like))
