import dataclasses

import pytest

from gnlorp_jax import models
from gnlorp_jax.models import families, interface, llama, roberta

CHOICES = {'base': 1, 'large': 2}
CONFIGS = (llama.preset('9m'), roberta.preset('tiny'))


def test_finds_by_name():
  assert interface.find_preset('large', CHOICES) == 2


@pytest.mark.parametrize(
  'name, hint', [('Lrge', " Did you mean 'large'?"), ('60m', '')]
)
def test_unknown_name_is_told_the_choices_and_the_nearest(name, hint):
  with pytest.raises(ValueError) as error:
    interface.find_preset(name, CHOICES)
  assert str(error.value) == (
    f"Unknown model {name!r}; expected one of ('base', 'large').{hint}"
  )


# Fields that a run decides.


def marked(config, name, value):
  """Fields whose metadata says so."""
  return {
    field.name
    for field in dataclasses.fields(config)
    if field.metadata.get(name) == value
  }


DROPOUTS = {'hidden_dropout', 'attention_dropout', 'classifier_dropout'}
FREE = {'remat', 'initializer_std'}
KEPT = {'param_dtype', 'compute_dtype', 'remat'}


def test_fields_say_what_a_resumed_run_may_change():
  # A table of positions has the length of RoBERTa's sequences.
  for config, expected in (
    (llama.LlamaConfig, FREE | {'max_seq_len'}),
    (roberta.RobertaConfig, FREE),
  ):
    assert marked(config, 'on_resume', 'free') == expected


def test_fields_say_what_changes_a_result():
  for config, expected in (
    (llama.LlamaConfig, {'compute_dtype'}),
    (roberta.RobertaConfig, {'compute_dtype'} | DROPOUTS),
  ):
    assert marked(config, 'on_resume', 'result') == expected


def test_fields_say_what_a_run_keeps_of_its_own_beside_a_folder():
  for config, expected in (
    (llama.LlamaConfig, KEPT),
    (roberta.RobertaConfig, KEPT | DROPOUTS),
  ):
    assert marked(config, 'from_run', True) == expected


def test_fields_without_a_default_have_none():
  needed = {
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_layers'),
    *('num_heads', 'max_seq_len'),
  }
  for config in (llama.LlamaConfig, roberta.RobertaConfig):
    assert needed == {
      field.name
      for field in dataclasses.fields(config)
      if field.default is dataclasses.MISSING
    }


# Families.


@pytest.mark.parametrize('config', CONFIGS)
def test_family_is_found_by_the_type_of_the_model(config):
  family = models.family(config)
  assert family is getattr(families, config.model_type)
  assert family.config_to_hf(config)['model_type'] == config.model_type
  found = family.config_from_hf(family.config_to_hf(config))
  assert type(found) is type(config)
  for name in (
    *('make', 'LABEL_RULES', 'HF_TENSORS', 'HF_UNREAD', 'num_params'),
    *('flops_per_token', 'PRESETS', 'preset'),
  ):
    assert hasattr(family, name)


@pytest.mark.parametrize('face', [llama, roberta])
def test_face_has_what_its_family_has(face):
  family = getattr(families, face.__name__.rpartition('.')[2])
  public = {
    name
    for name, value in vars(family).items()
    if not name.startswith('_')
    and (
      name.isupper()
      or value.__class__.__name__ == 'function'
      or getattr(value, '__module__', None) == family.__name__
    )
  }
  assert {'make', 'preset', 'PRESETS', 'HF_TENSORS', 'num_params'} <= public
  for name in public:
    assert getattr(face, name) is getattr(family, name)
  assert face.Model is interface.Model
  assert face.LayerFns is interface.LayerFns
