"""What a fine-tuned model says: outputs, metrics, predictions, an export."""

import dataclasses
import json
import logging
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy

from gnlorp_jax.compose.settings import MeshConfig
from gnlorp_jax.models import heads, hf, roberta
from gnlorp_jax.recipes.glue import evaluation, recipe
from gnlorp_jax.training import layer_sampling, loop, metrics
from gnlorp_jax.training.interrupt import Interrupted, StopRequest


@pytest.fixture(scope='module')
def prepared(settings, data):
  return recipe.prepare(settings, data, 'lora')


@pytest.fixture(scope='module')
def started(prepared):
  """Parameters at step 0, adapters moved so that they count."""
  trained, frozen = start(prepared)
  move = jax.jit(lambda params: jax.tree.map(lambda x: x + 0.01, params))
  return move(trained), frozen


def start(prepared):
  return prepared.program.parameters.start(jax.random.key(0))


def outputs_of(prepared, params, frozen, batch_size=8):
  return evaluation.outputs_of(
    prepared.program,
    prepared.data,
    batch_size,
    params,
    frozen,
    prepared.data.evaluated['dev'],
  )


@pytest.mark.slow
def test_outputs_of_a_sharded_model_are_those_of_one_device(
  settings, data, prepared
):
  expected = outputs_of(prepared, *start(prepared))
  changed = dataclasses.replace(settings, mesh=MeshConfig(data=2, fsdp=2))
  sharded = recipe.prepare(changed, data, 'lora')
  trained, frozen = start(sharded)
  kernel = frozen['layers']['mlp']['up_proj']['kernel']  # [2, 64, 256]
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 64, 128)}
  found = outputs_of(sharded, trained, frozen)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_signal_ends_an_evaluation_between_two_batches(prepared, started):
  with StopRequest() as stop:
    stop.received = signal.SIGTERM
    with pytest.raises(Interrupted):
      outputs_of(prepared, *started)


def test_outputs_do_not_depend_on_the_size_of_batches(prepared, started):
  expected = outputs_of(prepared, *started)
  assert expected.shape == (13, 2) and expected.dtype == np.float32
  # Sums of other shapes, in another order.
  np.testing.assert_allclose(
    outputs_of(prepared, *started, batch_size=5), expected, atol=1e-5
  )


def test_metrics_are_those_of_the_outputs(prepared, started):
  found = evaluation.evaluate(prepared.program, prepared.data, 8, *started)
  outputs = outputs_of(prepared, *started).astype(np.float64)
  labels = prepared.data.evaluated['dev'].labels
  right = outputs.argmax(axis=1) == labels
  assert found['accuracy'] == pytest.approx(right.mean())
  losses = np.log(np.exp(outputs).sum(axis=1)) - outputs[np.arange(13), labels]
  assert found['loss'] == pytest.approx(losses.mean(), rel=1e-5)


def finish(prepared, started, folder, *, exports):
  evaluation.finish(
    prepared.program,
    prepared.data,
    8,
    folder,
    loop.Outcome(*started, record={}),
    exports=exports,
  )


def test_predictions_and_export_are_of_the_same_model(
  prepared, started, tmp_path
):
  finish(prepared, started, tmp_path, exports=True)
  data = prepared.data
  lines = (tmp_path / 'predictions' / 'demo.tsv').read_text().splitlines()
  assert len(lines) == 501 and lines[0] == 'index\tprediction'
  model, params = roberta_of(tmp_path / 'hf')
  tokens = np.full((500, data.max_length), data.architecture.pad_id, np.int32)
  for row, ids in zip(tokens, data.predicted['test'].encoded, strict=True):
    row[: len(ids)] = ids
  classes = np.argmax(jax.jit(model.apply)(params, tokens), axis=1)
  names = [data.task.labels[c] for c in classes]
  assert [line.split('\t')[1] for line in lines[1:]] == names


def roberta_of(folder):
  config = roberta.config_from_hf(hf.load_config(folder))
  params = roberta.load_classifier(
    folder, config, 2, jax.random.key(0), head=heads.Head((0, 1), '')
  )
  return roberta.make_classifier(config, 2), params


@pytest.mark.parametrize(
  ('change', 'is_read'),
  [
    ({}, True),
    ({'finetuning_task': 'other'}, False),
    ({'id2label': {'0': 'no', '1': 'yes'}}, False),
  ],
)
def test_classifier_of_a_folder_is_read_by_names_in_their_order(
  settings, prepared, started, tmp_path, change, is_read
):
  """A folder scores 1 on its own predictions, whatever its order of classes."""
  folder = tmp_path / 'hf'
  finish(prepared, started, tmp_path, exports=True)
  described = json.loads((folder / 'config.json').read_text())
  labels = prepared.data.task.labels
  assert described['finetuning_task'] == 'demo'
  assert described['id2label'] == {
    str(i): name for i, name in enumerate(labels)
  }
  described['id2label'] = {str(i): name for i, name in enumerate(labels[::-1])}
  (folder / 'config.json').write_text(json.dumps(described | change))
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  for name in ('classifier.out_proj.weight', 'classifier.out_proj.bias'):
    tensors[name] = tensors[name][::-1].copy()
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  expected = outputs_of(prepared, *started)
  changed = dataclasses.replace(settings, init_from=str(folder))
  again = recipe.prepare(changed, prepared.data, 'lora')
  # Another key than that of the weights in the folder.
  started_again = again.program.parameters.start(jax.random.key(1))
  found = outputs_of(again, *started_again)
  if is_read:
    # Adapters are merged in the folder: other sums of float32.
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
  else:
    assert np.abs(found - expected).max() > 0.1


def test_nothing_is_exported_unless_asked_for(prepared, started, tmp_path):
  finish(prepared, started, tmp_path, exports=False)
  assert [path.name for path in tmp_path.iterdir()] == ['predictions']


def test_layers_that_were_drawn_are_a_plot(prepared, started, tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    for step in (1, 2):
      writer.write(step, {'layers/rests/00': 0, 'layers/visits/00': step})
  drawing = layer_sampling.LayerSampling(num_layers=2, layers=1, every=3)
  drawn = prepared._replace(program=prepared.program._replace(sampling=drawing))
  finish(drawn, started, tmp_path, exports=False)
  assert (tmp_path / 'layers.png').is_file()


def test_a_diverged_model_predicts_nothing(prepared, started, tmp_path, caplog):
  params, frozen = started
  broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
  with caplog.at_level(logging.WARNING):
    finish(prepared, (broken, frozen), tmp_path, exports=False)
  assert caplog.messages == [f'{tmp_path} diverged: no predictions of test.']
  assert not list(tmp_path.iterdir())
  found = evaluation.evaluate(
    prepared.program, prepared.data, 8, broken, frozen
  )
  assert np.isnan(found['loss'])
