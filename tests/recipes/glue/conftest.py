"""The demo's model and task, cut down to a few examples."""

import dataclasses

import pytest

from gnlorp_jax.compose.settings import AdapterOptions, MeshConfig
from gnlorp_jax.recipes.glue import tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig


@pytest.fixture(scope='session')
def settings():
  """Two epochs of three batches; rank 2, a refresh every two steps."""
  default = GlueConfig()
  return dataclasses.replace(
    default,
    batch_size=8,
    eval_batch_size=8,
    epochs=2,
    optim=dataclasses.replace(
      default.optim, rank=2, update_proj_gap=2, learning_rate=1e-2
    ),
    adapter=AdapterOptions(rank=2),
    data=TaskDataConfig(max_train_examples=20, max_dev_examples=13),
    mesh=MeshConfig(data=1),
  )


@pytest.fixture(scope='session')
def data(settings):
  """The generated task with its examples."""
  (task,) = tasks.find_tasks(settings)
  return tasks.load_task(settings, task)
