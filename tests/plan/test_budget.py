"""Which measured optimizers fit a budget, with which step, and its options."""

import dataclasses
import functools
import json

import pytest

from gnlorp_jax import plan
from gnlorp_jax.config import StepConfig
from gnlorp_jax.optim import advice
from gnlorp_jax.plan import budget
from gnlorp_jax.plan.__main__ import main
from gnlorp_jax.plan.settings import size_of
from gnlorp_jax.plan.suggest import option_text
from gnlorp_jax.recipes.pretrain.settings import TrainConfig, parse

OPTIONS = (
  '--batch-size 8 --data.seq-len 16 --optim.name galore --optim.rank 64 '
  '--model.vocab-size 64 --model.hidden-size 128 '
  '--model.intermediate-size 256 --model.num-layers 2 --model.num-heads 4 '
  '--model.max-seq-len 16'
)
WIDTH = 128


lower_bound = functools.cache(plan.lower_bound)


def bound_of(run):
  """The lower bound of a run, counted once whatever the budget."""
  return lower_bound(dataclasses.replace(run, budget=None))


@pytest.fixture(autouse=True)
def counted_once_and_not_compiled(monkeypatch):
  monkeypatch.setattr(budget, 'compiler_is_installed', lambda: False)
  monkeypatch.setattr(budget, 'lower_bound', bound_of)


@pytest.fixture(scope='module', autouse=True)
def bounds_are_forgotten():
  yield
  lower_bound.cache_clear()


@pytest.mark.parametrize(
  ('text', 'size'),
  [
    ('16GiB', 16 * 2**30),
    ('12GB', 12 * 10**9),
    ('800MiB', 800 * 2**20),
    ('1.5 KiB', 1536),
  ],
)
def test_sizes(text, size):
  assert size_of(text) == size


@pytest.mark.parametrize(
  'text', ['16', 'GiB', '16gib', '-1GiB', '0GiB', '1e3B']
)
def test_what_is_no_size(text):
  with pytest.raises(ValueError) as error:
    size_of(text)
  assert str(error.value) == (
    f'{text!r} is no size: give a positive number and a unit (KB, MB, GB, TB, '
    'KiB, MiB, GiB, TiB), such as 16GiB, 12GB or 800MiB.'
  )


def fitting(run, size):
  return budget.choices(
    plan.replace(run, {'budget': f'{size / 1000!r}KB'}), WIDTH
  )


def test_what_fits_is_ranked_and_its_steps_are_no_harsher_than_needed(settings):
  run = settings()
  found = fitting(run, 10**9)
  assert {c.row.name for c in found} == {r.name for r in advice.record().rows}
  order = [(c.place, c.state) for c in found]
  assert order == sorted(order)
  assert all(c.run.step == StepConfig() for c in found)
  for choice in found:
    bound = bound_of(choice.run)
    parts = ('moments', 'bases', 'errors', 'other')
    assert choice.peak == bound.peak
    assert choice.state == sum(bound.components[name] for name in parts)
    assert choice.run.optim.rank in (WIDTH // 4, None)
  # To the byte.
  best = found[0]
  assert fitting(run, best.peak)[0] == best._replace(
    run=plan.replace(best.run, {'budget': f'{best.peak / 1000!r}KB'})
  )
  below = {c.row.name: c for c in fitting(run, best.peak - 1)}
  assert below[best.row.name].run.step.mode == 'layerwise'
  # Less memory never gives a better place.
  places = [found[0].place, *(c.place for c in below.values())]
  assert places == sorted(places)


def test_kernels_in_8_bits_come_last_and_then_nothing_fits(settings):
  run = settings(step=StepConfig(mode='layerwise'))
  most = fitting(run, 10**9)[0]
  least = fitting(run, most.peak - 1)[0]
  assert least.row == most.row
  assert least.run.step == StepConfig(
    mode='layerwise', clipping='recompute', weight_bits=8
  )
  with pytest.raises(ValueError) as error:
    fitting(run, least.peak - 1)
  text = str(error.value)
  assert text.startswith(
    f'Nothing fits --budget {(least.peak - 1) / 1000!r}KB: '
  )
  assert (
    f'at least {least.peak / 2**30:.3f} GiB are needed, by '
    f'{least.row.name!r} (layer by layer, kernels in 8 bits). Raise the budget,'
  ) in text


def test_the_options_make_the_run_in_the_parser_of_train_lm(settings):
  own = (
    *('--optim.moment-bits', '4', '--optim.weight-norm', '--optim.scale', '2'),
    *('--optim.update-proj-gap', '7', '--optim.weight-decay', '0.1'),
    *('--optim.param-labels', 'all', '--optim.no-spread-refreshes'),
  )
  words = [*OPTIONS.split(), *own]
  run = plan.PlanConfig.parse([*words, '--budget', '1GB'], '')
  names = set()
  for choice in [*budget.choices(run, WIDTH), fitting(settings(), 10**9)[0]]:
    change = option_text(choice.change(run))
    names.add(choice.row.optimizer)
    parsed = parse([*words, *change.split()], '')
    assert type(parsed) is TrainConfig
    assert (parsed.optim, parsed.step) == (choice.run.optim, choice.run.step)
    assert (parsed.model, parsed.batch_size) == (run.model, run.batch_size)
  assert 'adamw' in names
  # What is the run's to say stays.
  gnlorp = next(
    c.run.optim for c in budget.choices(run, WIDTH) if c.run.optim.rank
  )
  assert (gnlorp.update_proj_gap, gnlorp.weight_decay) == (7, 0.1)
  assert gnlorp.param_labels is None


def test_steps_are_compiled_until_one_fits(settings, monkeypatch):
  run = settings()
  bounds, least = fitting(run, 10**9), fitting(run, 10**6)[0]
  asked = []

  def compiled(run, name):
    asked.append((name, run.step.mode))
    bound = bound_of(run)
    # Whole steps take more than is there.
    more = 10**9 if run.step.mode == 'whole' else 1000
    return bound._replace(components={**bound.components, 'temporaries': more})

  monkeypatch.setattr(budget, 'compiler_is_installed', lambda: True)
  monkeypatch.setattr(budget, 'try_compiled', compiled)
  found = fitting(run, 10**9)
  # Of the others whole steps are estimated as what was compiled.
  name = bounds[0].row.name
  assert asked == [(name, 'whole'), (name, 'layerwise')]
  assert [c.known for c in found] == ['compiled'] + ['estimated'] * 5
  for choice in found:
    assert choice.run.step.mode == 'layerwise'
    assert choice.peak == bound_of(choice.run).peak + 1000
  # The last step turns out not to fit either.
  with pytest.raises(ValueError) as error:
    fitting(run, least.peak + 999)
  need = (least.peak + 1000) / 2**30
  assert f': {need:.3f} GiB are needed, by {least.row.name!r}' in str(
    error.value
  )


def printed(capsys, *words):
  main([*OPTIONS.split(), *words])
  return ' '.join(capsys.readouterr().out.split())


def test_command_prints_what_fits_and_what_that_rests_on(capsys):
  text = printed(capsys, '--budget', '1GiB')
  assert text.startswith('What may fit 1.000 GiB on one device, best first')
  for row in advice.record().rows:
    assert f'{row.loss:.3f} ± {row.deviation:.3f}' in text
  assert '--optim.name gradnormlorp' in text
  assert advice.record().grounds(1) in text
  assert '>=: a lower bound; activations inside a block' in text
  assert 'kernels in 8 bits' not in text


def test_command_writes_json(capsys):
  found = json.loads(printed(capsys, '--budget', '1GiB', '--json', '-'))
  assert found['budget'] == 2**30
  best = found['choices'][0]
  assert best['change']['optim.rank'] == WIDTH // 4
  assert best['known'] == 'bound'
  assert best['seeds'] >= 2


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (['--budget', '1KiB'], 'Nothing fits --budget 1KiB: at least 0.00'),
    (['--budget', '16'], "budget='16' is no size: give a positive number"),
    (
      ['--budget', '1GiB', '--adapter.kind', 'lora'],
      "budget='1GiB' ranks optimizers that train all weights in every step: "
      'leave out adapter.kind and the options of sampling, or budget.',
    ),
  ],
)
def test_mistakes_get_the_value_the_rule_and_the_fix(words, text, capsys):
  with pytest.raises(SystemExit) as stop:
    printed(capsys, *words)
  assert stop.value.code == 2
  assert text in ' '.join(capsys.readouterr().err.replace('│', ' ').split())


def test_a_budget_is_of_pre_training(capsys):
  with pytest.raises(SystemExit):
    main(['sft', '--budget', '16GiB'])
  assert 'There is no option --budget.' in capsys.readouterr().err
