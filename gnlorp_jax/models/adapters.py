r"""LoRA, DoRA and GradNormLoRP: low-rank changes of frozen kernels.

A kernel stays as it is; what trains are the factors A and B of its change and,
in two of the three, one magnitude per output unit: `adapted_layer` has the
mathematics. The arrays stand beside the kernel they adapt, stacked like it:

  layers/attn/q_proj/kernel     [L, in, out]
  layers/attn/q_proj/lora_a     [L, in, r]
  layers/attn/q_proj/lora_b     [L, r, out]
  layers/attn/q_proj/magnitude  [L, 1, out], absent for lora

so a model's scan slices them with everything else, and any model of Flax's
`nn.Dense` and `nn.DenseGeneral` layers can be adapted without a change to its
file. Several input or output axes of a kernel, such as heads, are one axis of
the factors. With a function ``fn(params, x)`` that calls ``module.apply``:

  config = AdapterConfig(kind='lora', rules=('kernel',))
  trainable = init(config, params, key, lambda params: fn(params, x))
  y = adapted(config, fn)(combine(params, trainable), x)
  params = merge(config, combine(params, trainable))

`adapt` does that for all functions of a `Model`, whose layers are `nn.Dense`.

Shape suffixes in this file:
  I, O  a kernel's input and output axes
  R     rank of the change
  1O    one value per output unit, [*, 1, out]
"""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.models import kernels
from gnlorp_jax.models.adapted_layer import (
  NAMES,
  adapted_output,
  as_matrices,
  check_arrays,
  column_norm,
  direction,
  gain,
)
from gnlorp_jax.models.adapted_layer import AdapterConfig as AdapterConfig
from gnlorp_jax.models.adapted_layer import Kind as Kind
from gnlorp_jax.models.interface import LayerFns, Model, Params


def _chosen(config: AdapterConfig, params: Params) -> dict[kernels.Path, Any]:
  """The kernels that the rules choose, by the paths of their layers.

  Raises:
    ValueError: If a rule matches no kernel.
  """
  found = {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(params, sep='/').items()
    if path.split('/')[-1] == 'kernel' and kernels.array_of(leaf).ndim >= 2
  }
  for rule in config.rules:
    if not any(re.search(rule, path) for path in found):
      near = difflib.get_close_matches(rule, found, n=3, cutoff=0.3)
      raise ValueError(
        f'The adapter rule {rule!r} matches no kernel. Correct its regex. '
        f'Similar paths: {near or list(found)[:3]}.'
      )
  return {
    tuple(path.split('/')[:-1]): kernel
    for path, kernel in sorted(found.items())
    if any(re.search(rule, path) for rule in config.rules)
  }


def init(
  config: AdapterConfig,
  params: Params,
  key: jax.Array,
  call: Callable[[Params], Any] | None = None,
) -> Params:
  """Draws the arrays of the adapters.

  B is zero, so that an adapted model starts as the model itself.

  Args:
    config: What to adapt.
    params: The model's parameters, of any floating dtype, in Flax's boxes or
      not. Of those of `lora` only the shapes are read.
    key: A random key.
    call: A function of the parameters alone that applies the model to some
      input, such as ``lambda params: model.apply({'params': params}, x)``. It
      is traced to see which axes of the kernels go in and out; nothing is
      computed. None takes all kernels as ``[*, in, out]``, those of `nn.Dense`,
      as in a `Model`.

  Returns:
    A nested dict of the adapters' arrays alone, all float32: ``lora_a``,
    ``[*, in, r]``, uniform in ±1/sqrt(in), ``lora_b``, ``[*, r, out]``, zero
    and ``magnitude``, ``[*, 1, out]``, the length of the kernel's columns.
    Several input or output axes of a kernel are merged. Beside a kernel in an
    `nn.Partitioned` they are in one too, with its names of the axes they share.

  Raises:
    ValueError: If a rule matches no kernel, `call` applies to one that is
      matched no `nn.Dense` or `nn.DenseGeneral`, or the rank is more than any
      of them can use.

  Note:
    PEFT's draws: Kaiming's uniform distribution with a = sqrt(5), whose bound
    is 1/sqrt(in). As there, the arrays are float32 beside bfloat16 kernels too:
    they are small, and bfloat16 would lose most steps of an optimizer.
  """
  chosen = _chosen(config, params)
  if call is None:
    axes = dict.fromkeys(chosen, kernels.Axes())
  else:
    axes = kernels.axes_in(call, params, chosen)
  shapes = {
    layer: kernels.matrix_shape(kernels.array_of(kernel).shape, axes[layer])
    for layer, kernel in chosen.items()
  }
  _check_rank(config.rank, shapes)
  flat = {}
  keys = jax.random.split(key, len(chosen))
  for (layer, kernel), kernel_key in zip(chosen.items(), keys, strict=True):
    array = kernels.array_of(kernel)
    drawn = _draw(config, array, shapes[layer], kernel_key)
    for name, factor in drawn.items():
      shared = 'in' if name == 'lora_a' else 'out'
      flat[*layer, name] = kernels.boxed_beside(
        kernel, axes[layer], factor, shared
      )
  return traverse_util.unflatten_dict(flat)


def _check_rank(
  rank: int, shapes: Mapping[kernels.Path, tuple[int, ...]]
) -> None:
  """Raises ValueError if no kernel has as many directions as the rank.

  Where some have, as where keys have fewer heads than queries, the others are
  given more than they can use: one rank is for all.
  """
  most, layer = max((min(shape[-2:]), layer) for layer, shape in shapes.items())
  if rank > most:
    raise ValueError(
      f'rank={rank} is more than any adapted kernel can use: the largest, '
      f'{"/".join(layer)}, is {shapes[layer][-2]} x {shapes[layer][-1]}. Use '
      f'at most {most}.'
    )


def _draw(
  config: AdapterConfig, kernel: Any, shape: tuple[int, ...], key: jax.Array
) -> Params:
  """The arrays of an adapter by name, of a kernel as ``[*, in, out]``."""
  *stack, n_in, n_out = shape
  bound, a_shape = n_in**-0.5, (*stack, n_in, config.rank)
  drawn = {
    'lora_a': jax.random.uniform(key, a_shape, jnp.float32, -bound, bound),
    'lora_b': jnp.zeros((*stack, config.rank, n_out), jnp.float32),
  }
  if config.kind != 'lora':
    drawn['magnitude'] = column_norm(kernel.reshape(shape))
  return drawn


def adapted(
  config: AdapterConfig, fn: Callable[..., Any], *, is_part: bool = False
) -> Callable[..., Any]:
  """Makes a function that applies a Flax module use the adapters it is given.

  Layers whose parameters hold no adapter compute what they always do.

  Args:
    config: The configuration of the adapters.
    fn: Any function that applies modules of Flax Linen to parameters, such as
      a module's `apply`; `adapt` wraps all of a `Model`. Wrap it once, and
      before `jax.jit` does: what JAX has traced without this wrapper it may not
      trace again.
    is_part: Whether `fn` may leave adapters in its arguments unused, as the
      head of a model does that is given the parameters of all of it.

  Returns:
    A function of the same arguments, to be given parameters with adapters in
    them: the first argument of a module's `apply` holds them under ``params``.
    It works under `jax.jit` and `jax.grad`, and adapts inside of `nn.scan` and
    `nn.remat`. When traced it raises a ValueError if an adapter is not of this
    configuration, does not fit its kernel, stands in a layer other than
    `nn.Dense` and `nn.DenseGeneral`, or is in no layer that `fn` applies.

  References:
    Hu et al., `LoRA`, 2021, arXiv:2106.09685, section 4; Liu et al., `DoRA`,
    2024, arXiv:2402.09353, equations 5 and 11; Huang et al., `GradNormLoRP`,
    2024, arXiv:2412.19616, whose I and J are the transposes of B and A.

  Note:
    Products are taken in the dtype of the layer's output, as PEFT does under
    autocast, and have a reverse mode only, see `layers.product`. Norms are
    float32, where PEFT takes them in the dtype of the input.

    The norm of a zero column is no divisor: where V is zero, W is V itself, as
    in LoRA, for its value and its gradient; PEFT gives NaN. The column gets a
    direction from its first step, and then its magnitude begins to train.

    As in PEFT, dropout acts on the input of the adapter and on that of
    ``(c - 1) x W0``, with one mask. It needs Flax's collection ``dropout`` of
    random keys at the layer and is inactive without: `fn` must pass one to
    `Module.apply`, and a scan must split it, as those of a `Model` do that are
    given a dropout key.
  """
  # Of all calls: what JAX compiled in the first one is not traced again.
  used: set[kernels.Path] = set()

  def intercept(next_fn, args, kwargs, context):
    y = next_fn(*args, **kwargs)
    if not kernels.is_call_with('lora_a', context):
      return y
    used.add(context.module.path)
    (x,) = (*args, *kwargs.values())
    return adapted_output(config, context.module, x, y)

  @functools.wraps(fn)
  def run(*args, **kwargs):
    with nn.intercept_methods(intercept):
      y = fn(*args, **kwargs)
    if not is_part:
      _check_used(kernels.adapted_layers((args, kwargs)), used)
    return y

  return run


def _check_used(given: set[kernels.Path], used: set[kernels.Path]) -> None:
  """Raises a ValueError if adapters were given to a function in vain."""
  unused = sorted(
    '/'.join(path)
    for path in given
    if not any(kernels.is_same(path, other) for other in used)
  )
  if unused:
    raise ValueError(
      f'The adapters of {unused} are ignored: the function that `adapted` '
      'wraps applies no layer of Flax Linen there, or JAX traced it before. '
      'Wrap one that does so by Module.apply, once and before jax.jit does, or '
      'say is_part=True if others use them.'
    )


def _start(config: AdapterConfig, model: Model) -> Params:
  """Adapters of a model, if its `apply` can use them; of use for this alone."""
  key, token_11 = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  return init(
    config, model.init(key), key, lambda params: model.apply(params, token_11)
  )


def adapt(config: AdapterConfig, model: Model) -> Model:
  """Makes a model use the adapters among its parameters.

  Args:
    config: The configuration of the adapters.
    model: The model, of functions that are not compiled yet.

  Returns:
    The model with `hidden`, `logits`, `apply`, `extend` and the functions of
    `layer_fns` as of `adapted`; `init` draws the parameters without adapters. A
    dropout key also drops what the adapters read.

  Raises:
    ValueError: If it is no `Model`, a rule matches none of its kernels, or its
      `apply` is not of Flax layers that can use the adapters.
  """
  if not isinstance(model, Model):
    raise ValueError(
      f'adapt takes a gnlorp_jax Model, but got a {type(model).__name__}. Of '
      'any other model, wrap the function that applies it: '
      'adapted(config, model.apply).'
    )
  jax.eval_shape(lambda: _start(config, model))

  def wrap(fn: Any) -> Any:
    return None if fn is None else adapted(config, fn, is_part=True)

  return model._replace(
    hidden=wrap(model.hidden),
    logits=wrap(model.logits),
    apply=adapted(config, model.apply),
    layer_fns=LayerFns(*map(wrap, model.layer_fns)),
    extend=wrap(model.extend),
  )


def combine(frozen: Params, trainable: Params) -> Params:
  """Joins two nested dicts of parameters that have no path in common.

  Args:
    frozen: Nested dict of arrays.
    trainable: Nested dict of arrays.

  Returns:
    A nested dict of the arrays of both.

  Raises:
    ValueError: If both hold a parameter.

  Examples:
    >>> combine({'dense': {'kernel': 1}}, {'dense': {'lora_a': 2}})
    {'dense': {'kernel': 1, 'lora_a': 2}}
  """
  flat_frozen, flat_trainable = (
    traverse_util.flatten_dict(tree, sep='/') for tree in (frozen, trainable)
  )
  both = sorted(flat_frozen.keys() & flat_trainable.keys())
  if both:
    raise ValueError(
      f'Both trees hold the parameters {both}. Take them out of one, as with '
      'split.'
    )
  return traverse_util.unflatten_dict(
    {**flat_frozen, **flat_trainable}, sep='/'
  )


def split(
  params: Params, is_trainable: Callable[[str], bool]
) -> tuple[Params, Params]:
  """Takes parameters apart; `combine` puts them together again.

  Args:
    params: Nested dict of arrays.
    is_trainable: Tells by its ``/``-joined path whether a parameter trains.

  Returns:
    The frozen and the trainable parameters.

  Examples:
    >>> split({'dense': {'kernel': 1, 'bias': 2}}, lambda p: 'bias' in p)
    ({'dense': {'kernel': 1}}, {'dense': {'bias': 2}})
  """
  parts: tuple[Params, Params] = ({}, {})
  for path, leaf in traverse_util.flatten_dict(params, sep='/').items():
    parts[bool(is_trainable(path))][path] = leaf
  frozen, trainable = (
    traverse_util.unflatten_dict(part, sep='/') for part in parts
  )
  return frozen, trainable


def restart(config: AdapterConfig, layer: Params, key: jax.Array) -> Params:
  """Folds a layer's adapter into its kernel, and draws another one.

  The layer computes what it did before, but for rounding: the new B is zero,
  and a new magnitude is the length of the new kernel's columns.

  Args:
    config: The configuration of the adapter.
    layer: The layer's parameters by name, the kernel ``[*, in, out]`` and the
      arrays of its adapter among them.
    key: A random key.

  Returns:
    Parameters of the same names, shapes and dtypes.

  Raises:
    ValueError: As of `merge`.

  References:
    Lialin et al., `ReLoRA`, 2023, arXiv:2307.05695, section 3.

  Note:
    The public code zeroes A too until the first restart, which leaves both
    factors without a gradient. The paper knows no magnitudes.
  """
  merged = merge(config, {'layer': layer})['layer']
  kernel = merged['kernel']
  drawn = _draw(config, kernel, kernel.shape, key)
  return merged | {
    name: x.astype(layer[name].dtype) for name, x in drawn.items()
  }


def merge(config: AdapterConfig, params: Params) -> Params:
  """Folds adapters into their kernels, so that the model needs none.

  Args:
    config: The configuration of the adapters.
    params: Parameters with adapters.

  Returns:
    Parameters without them, in the boxes they had. Each kernel is computed in
    float32 at least, one matrix at a time, and rounded once to its dtype.

  Raises:
    ValueError: If an adapter is not of this configuration, does not fit its
      kernel or has none.
  """

  def fold(w_IO, arrays):
    if w_IO.ndim > 2:
      return jax.lax.map(lambda args: fold(*args), (w_IO, arrays))
    v_IO = direction(config, w_IO, arrays['lora_a'], arrays['lora_b'])
    if config.kind != 'lora':
      v_IO *= gain(arrays['magnitude'], column_norm(v_IO))
    return v_IO.astype(w_IO.dtype)

  layers: dict[kernels.Path, Params] = {}
  flat = {}
  for (*layer, name), leaf in traverse_util.flatten_dict(params).items():
    if name in NAMES:
      layers.setdefault(tuple(layer), {})[name] = kernels.array_of(leaf)
    else:
      flat[*layer, name] = leaf
  for layer, arrays in layers.items():
    where = '/'.join(layer)
    check_arrays(config, where, arrays)
    if (*layer, 'kernel') not in flat:
      raise ValueError(
        f'The adapter {where!r} has no kernel beside it. Combine it with the '
        "model's parameters first."
      )
    boxed = flat[*layer, 'kernel']
    kernel, a_IR = kernels.array_of(boxed), arrays['lora_a']
    # The factors tell which of the kernel's axes they have merged.
    stack = kernel.shape[: a_IR.ndim - 2]
    shape = (*stack, a_IR.shape[-2], arrays['lora_b'].shape[-1])
    w_IO = as_matrices(where, kernel, arrays, shape)
    merged = fold(w_IO, arrays).reshape(kernel.shape)
    flat[*layer, 'kernel'] = jax.tree.map(lambda _, new=merged: new, boxed)
  return traverse_util.unflatten_dict(flat)
