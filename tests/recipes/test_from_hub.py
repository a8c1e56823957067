"""Both recipes start from models of the hub."""

import contextlib
import dataclasses
import json
import socket
import types

import jax
import numpy as np
import pytest
import tokenizers

from gnlorp_jax.compose import parameters, pretrained
from gnlorp_jax.compose.settings import AdapterOptions, MeshConfig
from gnlorp_jax.data import chat, sources, tokenizer
from gnlorp_jax.models import hf, llama, roberta
from gnlorp_jax.plan.settings import GluePlanConfig
from gnlorp_jax.recipes.glue import recipe as glue_recipe
from gnlorp_jax.recipes.glue import tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig
from gnlorp_jax.recipes.merge.folders import open_base
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from tests.data import small_hub

TINY = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=1,
  num_heads=2,
  max_seq_len=8,
)
SPEC = 'hf:me/tiny'


@pytest.fixture
def server(tmp_path, monkeypatch):
  with small_hub.connected(tmp_path / 'hub', monkeypatch) as served:
    yield served


def tokenizer_file():
  vocabulary = {'<s>': 0, '<pad>': 1, '</s>': 2, 'a': 3}
  words = tokenizers.models.WordLevel(vocabulary, unk_token='</s>')
  backend = tokenizers.Tokenizer(words)
  backend.post_processor = tokenizers.processors.RobertaProcessing(
    ('</s>', 2), ('<s>', 0)
  )
  return backend.to_str().encode()


@pytest.mark.parametrize(
  'ask',
  [
    tokenizer.load,
    sources.documents,
    lambda name: sources.fingerprint(f'{name}[:10]'),
    chat.read,
    lambda name: parameters.architecture(name, TINY),
    lambda name: pretrained.find(name, dtype='float32'),
    lambda name: open_base(name, contextlib.ExitStack()),
    lambda name: recipe.plan(TrainConfig(init_from=name), 1),
    lambda name: tasks.find_tasks(
      GlueConfig(task='rte', init_from=name, data=TaskDataConfig(source=name))
    ),
  ],
)
@pytest.mark.parametrize('name', ['me/tiny', './tiny', 'hf:/me/tiny'])
def test_only_a_name_with_its_prefix_asks_the_network(ask, name, monkeypatch):
  def asked(*args, **kwargs):
    raise AssertionError(f'The network was asked for {args}.')

  monkeypatch.setattr(socket, 'getaddrinfo', asked)
  monkeypatch.setattr(socket.socket, 'connect', asked)
  with pytest.raises(ValueError, match='tiny'):
    ask(name)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pretraining_starts_from_the_hub(server, tmp_path):
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    jax.eval_shape(llama.make(TINY).init, jax.random.key(0)),
  )
  hf.export(
    tmp_path / 'hf', weights, llama.HF_TENSORS, llama.config_to_hf(TINY)
  )
  files = contents(tmp_path / 'hf') | {'tokenizer.json': tokenizer_file()}
  commit = server.add('me/tiny', files)
  config = TrainConfig(
    init_from=SPEC,
    data=DataConfig(seq_len=8),
    batch_size=3,
    adapter=AdapterOptions(kind='lora'),
  )
  planned = recipe.plan(config, jax.devices()[:1])
  assert planned.config.model.hidden_size == 16
  assert planned.config.init_from == SPEC
  # A plan needs no weights.
  assert server.downloads() == ['config.json']
  assert data.load_tokenizer(config, planned.config.model).vocab_size == 4
  frozen = planned.program.parameters.start_frozen(jax.random.key(7))
  jax.tree.map(np.testing.assert_array_equal, frozen, weights)
  assert server.downloads() == sorted(files)
  # Frozen weights are in no checkpoint: what a run records is their commit.
  prepared = types.SimpleNamespace(
    config=planned.config,
    program=planned.program,
    text=types.SimpleNamespace(
      training=types.SimpleNamespace(start=0, stop=1, tokens=1, fingerprint=''),
      tokenizer=types.SimpleNamespace(fingerprint=''),
    ),
  )
  found = recipe.metadata(prepared, planned.config)
  assert found['init_from'] == f'{SPEC}@{commit}'
  assert parameters.pinned(f'{SPEC}@main') == f'{SPEC}@{commit}'


def test_fine_tuning_starts_from_the_hub(server):
  config = dataclasses.replace(
    roberta.preset('tiny', vocab_size=4), max_seq_len=16
  )
  files = {
    'config.json': json.dumps(roberta.config_to_hf(config)).encode(),
    'tokenizer.json': tokenizer_file(),
  }
  server.add('me/tiny', files)
  settings = GlueConfig(task='demo', init_from=SPEC, mesh=MeshConfig(data=1))
  tokenizer = tasks.load_tokenizer(settings)
  assert tokenizer.vocab_size == 4
  found = tasks.architecture(settings, tokenizer)
  assert found.hidden_size == config.hidden_size
  (task,) = tasks.find_tasks(settings)
  data = tasks.load_task(settings, task)
  assert data.architecture == found
  prepared = glue_recipe.prepare(settings, data, 'lora')
  assert prepared.program.parameters.frozen['embed']
  planned = GluePlanConfig(init_from=SPEC)
  assert planned._tokenizer().vocab_size == 4
  assert server.downloads() == ['config.json', 'tokenizer.json']


def test_weights_that_are_not_there_are_told_before_text_is_read(
  server, tmp_path
):
  files = {'config.json': json.dumps(llama.config_to_hf(TINY)).encode()}
  server.add('me/tiny', files | {'tokenizer.json': tokenizer_file()})
  config = TrainConfig(
    init_from=SPEC, data=DataConfig(seq_len=8, cache_dir=str(tmp_path / 'no'))
  )
  with pytest.raises(ValueError, match="'hf:me/tiny' .* holds no model to re"):
    recipe.prepare(config)
  assert not (tmp_path / 'no').exists()
