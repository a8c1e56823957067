r"""LoRA, DoRA and GradNormLoRP: low-rank changes of frozen kernels.

A kernel stays as it is; what trains are the factors A and B of its change and,
in two of the three, one magnitude per output unit: `adapted_layer` has the
mathematics. The arrays stand beside the kernel they adapt, stacked like it:

  layers/attn/q_proj/kernel     [L, in, out]
  layers/attn/q_proj/lora_a     [L, in, r]
  layers/attn/q_proj/lora_b     [L, r, out]
  layers/attn/q_proj/magnitude  [L, 1, out], absent for lora

so a model's scan slices them with everything else, and any model of Flax's
`nn.Dense` layers can be adapted without a change to its file:

  config = AdapterConfig(kind='lora')
  trainable = init(config, params, key)
  model = adapt(config, model)
  logits = model.apply(combine(params, trainable), tokens)
  params = merge(config, combine(params, trainable))

Shape suffixes in this file:
  I, O  a kernel's input and output axes
  R     rank of the change
  1O    one value per output unit, [*, 1, out]
"""

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gnlorp_jax.models.adapted_layer import (
  NAMES,
  adapted_output,
  check_arrays,
  column_norm,
  direction,
  gain,
)
from gnlorp_jax.models.adapted_layer import AdapterConfig as AdapterConfig
from gnlorp_jax.models.adapted_layer import Kind as Kind
from gnlorp_jax.models.interface import LayerFns, Model, Params


def init(config: AdapterConfig, params: Params, key: jax.Array) -> Params:
  """Draws the arrays of the adapters.

  B is zero, so that an adapted model starts as the model itself.

  Args:
    config: What to adapt.
    params: The model's parameters, kernels ``[*, in, out]`` of any floating
      dtype. Of those of `lora` only the shapes are read.
    key: A random key.

  Returns:
    A nested dict of the adapters' arrays alone, all float32: ``lora_a`` uniform
    in ±1/sqrt(in), ``lora_b`` zero and ``magnitude`` the length of the kernel's
    columns.

  Raises:
    ValueError: If a rule matches no kernel.

  Note:
    PEFT's draws: Kaiming's uniform distribution with a = sqrt(5), whose bound
    is 1/sqrt(in). As there, the arrays are float32 beside bfloat16 kernels too:
    they are small, and bfloat16 would lose most steps of an optimizer.
  """
  kernels = {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(params, sep='/').items()
    if path.split('/')[-1] == 'kernel' and len(leaf.shape) >= 2
  }
  for rule in config.rules:
    if not any(re.search(rule, path) for path in kernels):
      near = difflib.get_close_matches(rule, kernels, n=3, cutoff=0.3)
      raise ValueError(
        f'The adapter rule {rule!r} matches no kernel. Correct its regex. '
        f'Similar paths: {near or list(kernels)[:3]}.'
      )
  chosen = {
    path: kernel
    for path, kernel in sorted(kernels.items())
    if any(re.search(rule, path) for rule in config.rules)
  }
  flat = {}
  keys = jax.random.split(key, len(chosen))
  for (path, kernel), kernel_key in zip(chosen.items(), keys, strict=True):
    *stack, n_in, n_out = kernel.shape
    layer, bound = path.removesuffix('kernel'), n_in**-0.5
    shape = (*stack, n_in, config.rank)
    flat[f'{layer}lora_a'] = jax.random.uniform(
      kernel_key, shape, jnp.float32, -bound, bound
    )
    flat[f'{layer}lora_b'] = jnp.zeros((*stack, config.rank, n_out))
    if config.kind != 'lora':
      flat[f'{layer}magnitude'] = column_norm(kernel)
  return traverse_util.unflatten_dict(flat, sep='/')


def adapted(
  config: AdapterConfig, fn: Callable[..., Any]
) -> Callable[..., Any]:
  """Makes a function that applies a Flax module use the adapters it is given.

  Layers whose parameters hold no adapter compute what they always do.

  Args:
    config: The configuration of the adapters.
    fn: Any function that applies modules of Flax Linen to parameters, such as
      a model's `apply`; `adapt` wraps all of a model's. Wrap it before
      `jax.jit` does: a compiled one may have been traced without adapters.

  Returns:
    A function of the same arguments, to be given parameters with adapters in
    them. It works under `jax.jit` and `jax.grad`, and adapts inside of
    `nn.scan` and `nn.remat`. When traced it raises a ValueError if an adapter
    is not of this configuration, or stands in a layer other than `nn.Dense`.

  References:
    Hu et al., `LoRA`, 2021, arXiv:2106.09685, section 4; Liu et al., `DoRA`,
    2024, arXiv:2402.09353, equations 5 and 11; Huang et al., `GradNormLoRP`,
    2024, arXiv:2412.19616, whose I and J are the transposes of B and A.

  Note:
    Products are taken in the dtype of the layer's output, as PEFT does under
    autocast. Norms are float32, where PEFT takes them in the dtype of the
    input.

    The norm of a zero column is no divisor: where V is zero, W is V itself, as
    in LoRA, for its value and its gradient; PEFT gives NaN. The column gets a
    direction from its first step, and then its magnitude begins to train.

    As in PEFT, dropout acts on the input of the adapter and on that of
    ``(c - 1) x W0``, with one mask. It needs Flax's collection ``dropout`` of
    random keys at the layer and is inactive without: `fn` must pass one to
    `Module.apply`, and a scan must split it, as those of a `Model` do that are
    given a dropout key.
  """

  def intercept(next_fn, args, kwargs, context):
    module = context.module
    y = next_fn(*args, **kwargs)
    if context.method_name != '__call__' or module.scope is None:
      return y
    if not module.has_variable('params', 'lora_a'):
      return y
    if not isinstance(module, nn.Dense):
      raise ValueError(
        f'{"/".join(module.path)!r} has an adapter, but is a '
        f'{type(module).__name__}: only nn.Dense can be adapted. Change the '
        'rules so that they leave it out.'
      )
    (x,) = (*args, *kwargs.values())
    return adapted_output(config, module, x, y)

  @functools.wraps(fn)
  def run(*args, **kwargs):
    with nn.intercept_methods(intercept):
      return fn(*args, **kwargs)

  return run


def adapt(config: AdapterConfig, model: Model) -> Model:
  """Makes a model use the adapters among its parameters.

  Args:
    config: The configuration of the adapters.
    model: The model, of functions that are not compiled yet.

  Returns:
    The model with `hidden`, `logits`, `apply` and the functions of `layer_fns`
    as of `adapted`; `init` draws the parameters without adapters. A dropout key
    also drops what the adapters read.
  """
  wrap = functools.partial(adapted, config)
  return model._replace(
    hidden=wrap(model.hidden),
    logits=wrap(model.logits),
    apply=wrap(model.apply),
    layer_fns=LayerFns(*map(wrap, model.layer_fns)),
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


def merge(config: AdapterConfig, params: Params) -> Params:
  """Folds adapters into their kernels, so that the model needs none.

  Args:
    config: The configuration of the adapters.
    params: Parameters with adapters.

  Returns:
    Parameters without them. Each kernel is computed in float32, one matrix at a
    time, and rounded once to its dtype.

  Raises:
    ValueError: If an adapter is not of this configuration or has no kernel.
  """

  def fold(w_IO, arrays):
    if w_IO.ndim > 2:
      return jax.lax.map(lambda args: fold(*args), (w_IO, arrays))
    v_IO = direction(config, w_IO, arrays['lora_a'], arrays['lora_b'])
    if config.kind != 'lora':
      v_IO *= gain(arrays['magnitude'], column_norm(v_IO))
    return v_IO.astype(w_IO.dtype)

  layers: dict[tuple[str, ...], Params] = {}
  flat = {}
  for (*layer, name), leaf in traverse_util.flatten_dict(params).items():
    if name in NAMES:
      layers.setdefault(tuple(layer), {})[name] = leaf
    else:
      flat[*layer, name] = leaf
  for layer, arrays in layers.items():
    check_arrays(config, '/'.join(layer), arrays)
    if (*layer, 'kernel') not in flat:
      raise ValueError(
        f'The adapter {"/".join(layer)!r} has no kernel beside it. Combine it '
        "with the model's parameters first."
      )
    flat[*layer, 'kernel'] = fold(flat[*layer, 'kernel'], arrays)
  return traverse_util.unflatten_dict(flat)
