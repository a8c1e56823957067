"""A step's loss and gradients against a plain loop in PyTorch.

The loop reads one conversation at a time, with labels of -100 where nothing is
learned; we read rows that hold several. It is a small random model unless
GNLORP_SMOLLM2 names the Hugging Face folder of a real one, such as
SmolLM2-135M in float32: that one is tried by hand.
"""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from gnlorp_jax import models
from gnlorp_jax.compose import adaptation, optimizer
from gnlorp_jax.compose.settings import AdapterOptions, MeshConfig
from gnlorp_jax.models import hf
from gnlorp_jax.recipes.sft import data, recipe
from gnlorp_jax.recipes.sft.settings import ChatDataConfig, SftConfig
from tests.compose import small_lm

FOLDER = os.environ.get('GNLORP_SMOLLM2')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def torch():
  pytest.importorskip('transformers')
  return pytest.importorskip('torch')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('model')
  records = [
    {
      'messages': [
        {'role': 'user', 'content': f'Is {n} more than {n % 3}?'},
        {'role': 'assistant', 'content': 'Yes.' if n > n % 3 else 'No.'},
        {'role': 'user', 'content': 'Why?' * (1 + n % 2)},
        {'role': 'assistant', 'content': f'{n} - {n % 3} = {n - n % 3}'},
      ]
    }
    for n in range(6)
  ]
  (path / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
  return SftConfig(
    init_from=FOLDER or small_lm.write(path / 'hf'),
    method='full',
    batch_size=3 if FOLDER is None else 2,
    mesh=MeshConfig(data=1),
    data=ChatDataConfig(
      source=str(path / 'a.jsonl'),
      template='none' if FOLDER is None else None,
      max_length=128 if FOLDER is None else 256,
      val_size=0,
    ),
  )


def gradients(config, prepared):
  """Loss and gradient of a packed batch, and the parameters."""
  built = recipe.plan(config).program
  state, frozen = built.start(
    jax.random.key(0), optimizer.numbers(prepared.config.optim, 1)
  )
  batch = next(data.training_batches(prepared.config, prepared.chat))
  assert batch['segments'].max() > 2  # Several in a row.
  examples = prepared.chat.examples.training
  assert batch['weights'].sum() == sum(x.weights.sum() for x in examples)
  trained = state.params
  if config.adapter.kind is not None:
    trained = jax.tree.map(
      lambda x: jax.random.normal(jax.random.key(1), x.shape) * 0.05, trained
    )

  @jax.jit
  def loss(trained, frozen):
    total, count = built.objective.loss(
      built.parameters.join(trained, frozen), batch
    )
    return total / count

  return *jax.value_and_grad(loss)(trained, frozen), trained, built


def torch_loss(torch, model, examples):
  """The mean over the learned tokens of all examples, one at a time."""
  total = count = 0
  for ids, weights in examples:
    labels = torch.tensor(np.where(weights > 0, ids, -100).astype(np.int64))
    logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
    total += torch.nn.functional.cross_entropy(
      logits[:-1].double(), labels[1:], ignore_index=-100, reduction='sum'
    )
    count += int((labels[1:] >= 0).sum())
  return total / count


def assert_equal(found, wanted, rtol):
  """Equal to a share of the largest element of each tensor."""
  assert found.keys() == wanted.keys()
  for name, value in found.items():
    scale = np.abs(wanted[name]).max()
    np.testing.assert_allclose(
      value, wanted[name], atol=rtol * scale, err_msg=name
    )


def test_full_gradients_are_those_of_pytorch(config, torch, tmp_path):
  import transformers

  prepared = recipe.prepare(config)
  loss, grads, params, _ = gradients(config, prepared)
  family = models.family(prepared.config.model)
  described = family.config_to_hf(prepared.config.model)
  for folder, tree in (('params', params), ('grads', grads)):
    hf.export(tmp_path / folder, tree, family.HF_TENSORS, described)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    str(tmp_path / 'params'), dtype=torch.float32, attn_implementation='eager'
  )
  expected = torch_loss(torch, model, prepared.chat.examples.training)
  assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
  expected.backward()
  found = safetensors.numpy.load_file(tmp_path / 'grads/model.safetensors')
  wanted = {n: p.grad.numpy() for n, p in model.named_parameters()}
  # Float32 sums over a hundred tokens, in another order.
  assert_equal(found, wanted, 1e-4)


@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_gradients_of_adapters_are_those_of_peft(config, torch, tmp_path, kind):
  import transformers

  theirs = pytest.importorskip('peft')
  config = dataclasses.replace(
    config, method=kind, adapter=AdapterOptions(kind=kind, rank=4)
  )
  prepared = recipe.prepare(config)
  model = prepared.config.model
  loss, grads, trained, built = gradients(config, prepared)
  for folder, tree in (('adapter', trained), ('grads', grads)):
    adaptation.export_peft(
      tmp_path / folder, tree, {}, built.adapter, model, base=None
    )
  base = transformers.AutoModelForCausalLM.from_pretrained(
    config.init_from, dtype=torch.float32, attn_implementation='eager'
  )
  adapted = theirs.PeftModel.from_pretrained(
    base, str(tmp_path / 'adapter'), is_trainable=True
  )
  expected = torch_loss(torch, adapted, prepared.chat.examples.training)
  assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
  expected.backward()
  found = safetensors.numpy.load_file(
    tmp_path / 'grads/adapter_model.safetensors'
  )
  wanted = {
    name.replace('.default', '').replace(
      'vector.weight', 'vector'
    ): p.grad.numpy()
    for name, p in adapted.named_parameters()
    if p.requires_grad
  }
  assert_equal(found, wanted, 1e-4)
