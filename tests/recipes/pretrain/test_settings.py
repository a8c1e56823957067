"""Settings of pre-training: files, the command line, and mistakes."""

import dataclasses
import pathlib
import re

import pytest

from gnlorp_jax import config
from gnlorp_jax.compose import config_file
from gnlorp_jax.compose import settings as compose_settings
from gnlorp_jax.compose.settings import OptimConfig, TaskOptions
from gnlorp_jax.data import tasks
from gnlorp_jax.models import llama, roberta
from gnlorp_jax.recipes.pretrain import settings
from gnlorp_jax.recipes.pretrain.settings import (
  MASKED,
  DataConfig,
  SampleConfig,
  TrainConfig,
)
from gnlorp_jax.recipes.sft.settings import SftConfig

CONFIGS = pathlib.Path(__file__).parents[3] / 'configs'


def message_of(args, capsys):
  """What a person reads who typed `args`."""
  try:
    settings.parse(args, 'description')
  except ValueError as error:
    return str(error)
  except SystemExit as stop:
    assert stop.code == 2
    return ' '.join(capsys.readouterr().err.replace('│', ' ').split())
  raise AssertionError(f'{args} was accepted')


@pytest.mark.parametrize(
  'path', sorted(CONFIGS.glob('*.py')), ids=lambda p: p.stem
)
def test_every_configuration_file_loads_and_says_how_to_run_it(path):
  is_sft = path.stem.startswith('sft_')
  loaded = config_file.load(path, SftConfig if is_sft else TrainConfig)
  assert loaded.run_dir.startswith('runs/')
  program = 'train_sft.py' if is_sft else 'train_lm.py'
  assert f'python {program} --config configs/{path.name}' in path.read_text()


def test_file_is_the_default_and_options_override_it():
  parsed = settings.parse(
    [
      '--config',
      str(CONFIGS / 'llama_9m.py'),
      '--optim.rank=8',
      '--model.num-layers',
      '2',
      '--data.validation-source',
      'v.txt',
      '--optim.clip-global-norm',
      'None',
      '--optim.no-spread-refreshes',
      '--dry-run',
    ],
    '',
  )
  loaded = settings.load(CONFIGS / 'llama_9m.py')
  assert parsed == dataclasses.replace(
    loaded,
    dry_run=True,
    model=dataclasses.replace(loaded.model, num_layers=2),
    data=dataclasses.replace(loaded.data, validation_source='v.txt'),
    optim=dataclasses.replace(
      loaded.optim, rank=8, clip_global_norm=None, spread_refreshes=False
    ),
  )


def test_param_labels_can_be_given_on_the_command_line():
  args = ['--optim.param-labels', 'attn', 'low_rank', '.*', 'full']
  assert settings.parse(args, '').optim.param_labels == (
    ('attn', 'low_rank'),
    ('.*', 'full'),
  )
  args = ['--optim.param-labels', 'all']
  assert settings.parse(args, '').optim.param_labels == 'all'


def test_help_explains_every_field(capsys):
  with pytest.raises(SystemExit) as stop:
    settings.parse(['--help', 'all'], 'What this program does.')
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert 'What this program does.' in text
  flat = ' '.join(text.replace('│', ' ').split())

  def fields(node, prefix=''):
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if dataclasses.is_dataclass(value):
        yield from fields(value, f'{prefix}{field.name}.')
      else:
        yield f'--{prefix}{field.name}'.replace('_', '-')

  # A group that is None has no fields yet.
  options = [o for o in fields(TrainConfig()) if 'rope-scaling' not in o]
  assert len(options) > 40
  for option in options:
    after = re.split(f'{option},? ', flat, maxsplit=1)
    assert len(after) == 2, option
    # Prose stands between an option and its default.
    explanation = after[1].split('(default', 1)[0]
    assert len(explanation.split()) > 2, option


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (['--optim.rank', '0'], 'OptimConfig.rank must be at least 1, got 0.'),
    (['--steps', '0'], 'TrainConfig.steps must be at least 1, got 0.'),
    (
      ['--optim.learning-rate', '-1'],
      'OptimConfig.learning_rate must be in (0, inf), got -1.0.',
    ),
    (
      ['--optim.clip-global-norm', '0'],
      'OptimConfig.clip_global_norm must be in (0, inf), got 0.0. Use None '
      'not to clip.',
    ),
    (
      ['--optim.warmup-fraction', '1.5'],
      'OptimConfig.warmup_fraction must be in [0, 1], got 1.5.',
    ),
    (
      ['--data.seq-len', '4096'],
      'data.seq_len=4096 is longer than the model accepts: '
      'model.max_seq_len=128. Lower the former or raise the latter.',
    ),
    # Not when the text is tokenised.
    (
      ['--objective', 'masked', '--data.seq-len', '2'],
      "data.seq_len=2 must be at least 3 with objective='masked': a token to "
      'guess, and those that begin and end a sequence.',
    ),
    (
      ['--data.mode', 'padded', '--data.seq-len', '1'],
      "data.seq_len=1 must be at least 2 with data.mode='padded': a token, and "
      'that which ends a document.',
    ),
    (
      ['--sample.top-k', '0'],
      'top_k=0 must be positive, or None for no limit.',
    ),
    # Not when the run is over and its sample is drawn.
    (
      ['--sample.top-p', '0'],
      'top_p=0.0 must be in (0, 1], or None for no limit.',
    ),
    (
      ['--sample.num-tokens', '-5'],
      'SampleConfig.num_tokens must be in [0, inf), got -5.',
    ),
    (['--eval-batches', '0'], 'TrainConfig.eval_batches must be at least 1'),
    (
      ['--eval.tasks', 'piqa'],
      "eval.tasks='piqa' is read from files on this machine: name their folder "
      'as eval.data.',
    ),
    (
      ['--eval.tasks', 'piqa,boolq', '--eval.data', __file__],
      f'eval.data names one file, {__file__}, and eval.tasks 2 tasks: name '
      'their folder.',
    ),
    (
      ['--eval.tasks', 'piqa, pica', '--eval.data', 'x'],
      f"eval.tasks names 'pica'; expected some of {tasks.names()}, joined by "
      'commas. Perplexities of texts and tasks of lm_eval are asked by python '
      "-m gnlorp_jax.evaluate alone. Did you mean 'piqa'?",
    ),
    (
      ['--eval.data', 'x'],
      'eval.data is given, and eval.tasks asks nothing.',
    ),
    (
      ['--objective', 'masked', '--eval.tasks', 'piqa', '--eval.data', 'x'],
      "eval.tasks='piqa' needs objective='causal': a masked model continues no "
      'text.',
    ),
    (['--eval.limit', '0'], 'TaskOptions.limit must be at least 1, got 0.'),
    (
      ['--data.validation-fraction', '3'],
      'DataConfig.validation_fraction must be in (0, 1), got 3.0.',
    ),
    (
      ['--model.num-heads', '3'],
      'hidden_size=128 must be a multiple of num_heads=3.',
    ),
    (['--optim.name', 'adam'], "--optim.name 'adam': expected one of ['None',"),
    (['--optim.name=adamm'], "Did you mean 'adamw'?"),
    (['--step.weight-bits', '7'], "expected one of ['4', '8', 'None']."),
    (
      ['--step', '20'],
      '--step is a group of options. Did you mean --steps? --help step lists',
    ),
    (['--mesh'], '--mesh is a group of options. --help mesh lists those in'),
    (['--model.num-layers', 'many'], "int() with base 10: 'many'"),
    (['--config'], '--config needs the path of a configuration file.'),
    (
      ['--batchsize', '4'],
      'There is no option --batchsize. Did you mean --batch-size?',
    ),
    (
      ['--optim.name', 'None'],
      'optim.name must be given in pre-training, got None. Only fine-tuning '
      'has methods and tables to take it from.',
    ),
    (
      ['--optim.learning-rate', 'None'],
      'optim.learning_rate must be given in pre-training, got None.',
    ),
    (
      ['--steps', 'None'],
      "int() with base 10: 'None'",
    ),
    (
      ['--adapter.dropout', '1.5'],
      'AdapterOptions.dropout must be in [0, 1), got 1.5.',
    ),
    (
      ['--learning-rates', '0.1,x'],
      "learning_rates='0.1,x' must be numbers joined by commas: could not "
      "convert string to float: 'x'.",
    ),
    (
      ['--loss-chunk-tokens', '0'],
      'TrainConfig.loss_chunk_tokens must be at least 1, got 0.',
    ),
  ],
)
def test_bad_value_gets_the_value_the_rule_and_the_fix(args, text, capsys):
  assert text in message_of(args, capsys)


def test_a_configuration_of_the_package_is_named_without_its_folder(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert 'llama_60m' in config_file.names()
  found = settings.load('llama_60m')
  assert found.model.num_layers == 8
  assert settings.parse(['--config', 'llama_60m'], '') == found
  with pytest.raises(ValueError, match="Did you mean 'llama_60m'"):
    settings.load('lama_60m')


def test_missing_file_names_the_nearest(tmp_path):
  (tmp_path / 'llama.py').write_text('')
  with pytest.raises(ValueError) as error:
    settings.load(tmp_path / 'lama.py')
  assert str(error.value) == (
    f'No configuration file {str(tmp_path / "lama.py")!r}. Did you mean '
    f'{str(tmp_path / "llama.py")!r}? Those of the package: '
    f'{", ".join(config_file.names())}.'
  )
  with pytest.raises(ValueError) as error:
    settings.load(tmp_path / 'llama.py')
  assert "it must assign a TrainConfig to the name 'config'" in str(error.value)


@pytest.mark.parametrize(
  'build',
  [
    lambda: TrainConfig(batch_size=0),
    lambda: DataConfig(seq_len=0),
    lambda: OptimConfig(update_proj_gap=0),
    lambda: OptimConfig(final_fraction=2),
  ],
)
def test_configurations_validate_themselves(build):
  with pytest.raises(ValueError, match='must be'):
    build()


def test_documents_are_kept_apart_where_there_are_several():
  with pytest.raises(ValueError) as error:
    DataConfig(mode='padded', document_mask=True)
  assert str(error.value) == (
    "data.document_mask=True needs data.mode='packed', got 'padded': there "
    'every row is one document, its padding comes after it, and no token '
    'attends to later ones, so there is nothing to keep apart. Leave it out.'
  )
  with pytest.raises(ValueError) as error:
    dataclasses.replace(MASKED, data=DataConfig(document_mask=True))
  assert str(error.value) == (
    "data.document_mask=True is for objective='causal', got 'masked': an "
    'encoder attends to all of its row. Leave it out.'
  )


def test_masked_sequences_begin_with_a_token_anyway():
  with pytest.raises(ValueError) as error:
    dataclasses.replace(MASKED, data=DataConfig(add_bos=True))
  assert str(error.value) == (
    "data.add_bos=True is for objective='causal', got 'masked': there every "
    'sequence begins with that token, documents within it do not. Leave it out.'
  )


def test_patience_needs_the_best():
  with pytest.raises(ValueError) as error:
    TrainConfig(patience=2)
  assert str(error.value) == (
    'patience=2 counts evaluations since the best one, and with '
    'keep_best=False there is none. Add --keep-best.'
  )
  assert TrainConfig(patience=2, keep_best=True).patience == 2


# What a run may change when it is resumed. A new field must be judged here.

KINDS = {
  TrainConfig: {
    'fixed': 'objective mask_rate seed',
    'result': 'batch_size steps micro_batches init_from eval_every patience '
    'eval_batches keep_best',
    'free': 'run_dir seeds learning_rates checkpoint_every checkpoint_keep '
    'log_every log dry_run loss_chunk_tokens accept',
  },
  DataConfig: {
    'fixed': 'source mode add_bos document_mask seq_len',
    'result': 'validation_source',
    # Which part is trained on, and by which tokens, a run compares itself.
    'free': 'validation_fraction text_column tokenizer cache_dir',
  },
  TaskOptions: {'free': 'tasks data limit shots batch_size'},
  SampleConfig: {'free': 'prompt num_tokens temperature top_k top_p'},
  llama.LlamaConfig: {
    'fixed': 'vocab_size hidden_size intermediate_size num_layers num_heads '
    'num_kv_heads head_dim rms_norm_eps rope_theta rope_scaling attention_bias '
    'mlp_bias tie_embeddings param_dtype',
    'result': 'compute_dtype',
    # No table of positions has that length.
    'free': 'max_seq_len initializer_std remat',
  },
  roberta.RobertaConfig: {
    'fixed': 'vocab_size hidden_size intermediate_size num_layers num_heads '
    'max_seq_len num_types pad_id layer_norm_eps param_dtype',
    'result': 'hidden_dropout attention_dropout classifier_dropout '
    'compute_dtype',
    'free': 'initializer_std remat',
  },
}


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_every_field_says_what_becomes_of_a_resumed_run(kind):
  found = {}
  for field in dataclasses.fields(kind):
    if not is_group(field):
      on_resume = field.metadata.get(compose_settings.ON_RESUME, 'fixed')
      found.setdefault(on_resume, set()).add(field.name)
  assert found == {k: set(names.split()) for k, names in KINDS[kind].items()}


def is_group(field):
  return dataclasses.is_dataclass(field.default)


@pytest.mark.parametrize('default', [TrainConfig(), MASKED], ids=['llm', 'mlm'])
def test_settings_of_all_groups_are_fixed_by_their_dotted_names(default):
  found = compose_settings.fixed_settings(default)
  model = type(default.model)
  expected = set(KINDS[TrainConfig]['fixed'].split())
  expected |= {f'data.{name}' for name in KINDS[DataConfig]['fixed'].split()}
  expected |= {f'model.{name}' for name in KINDS[model]['fixed'].split()}
  groups = ('optim', 'adapter', 'step', 'sampling', 'coreset')
  others = {name for name in found if name.split('.')[0] in groups}
  assert set(found) - others == expected
  assert found['model.hidden_size'] == 128
  assert found['optim.rank'] == default.optim.rank
  compared = compose_settings.fixed_settings(default, compared=True)
  assert found.items() <= compared.items()
  assert set(KINDS[TrainConfig]['result'].split()) <= set(compared)
  for free in KINDS[TrainConfig]['free'].split():
    assert free not in compared
  assert not any(name.startswith(('sample.', 'mesh.')) for name in compared)


def test_configuration_files_import_the_groups_from_one_place():
  for group in (TrainConfig, DataConfig, SampleConfig, OptimConfig):
    assert getattr(config, group.__name__) is group
  assert config.load is settings.load and config.parse is settings.parse
