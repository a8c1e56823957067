"""Makes twenty faults in the library, one by one, and asks if tests see them.

  python .ci/faults.py            # all of them, on all cores
  python .ci/faults.py refresh    # those whose description has the word

Each fault is a line of code that goes wrong in a way somebody might write it.
It is made in a copy of the checkout, where the tests that ought to notice run
until one fails. The exit status is 1 if a fault goes unnoticed, or if its line
is not in the code any more.
"""

import argparse
import concurrent.futures
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ('benchmarks', 'configs', 'docs', 'gnlorp_jax', 'tests')


class Fault(NamedTuple):
  """A line that goes wrong, and the tests that must notice."""

  name: str
  file: str  # In gnlorp_jax.
  right: str
  wrong: str
  tests: str  # In tests, separated by spaces.


FAULTS = (
  Fault(
    *(
      'wrong sign in the tangent of a normalised weight',
      'optim/parts/weight_norm.py',
    ),
    'tangent_IO = grad_IO - w_IO * (dg_1O * inverse_1O)',
    'tangent_IO = grad_IO + w_IO * (dg_1O * inverse_1O)',
    'optim/parts/test_weight_norm.py',
  ),
  Fault(
    *('magnitudes that stay', 'optim/parts/weight_norm.py'),
    'new_g = jax.tree.map(jnp.add, g, g_step)',
    'new_g = g',
    'optim/methods/test_gradnormlorp.py optim/parts/test_weight_norm.py',
  ),
  Fault(
    *('skipped refresh of half of the matrices', 'optim/subspace/refresh.py'),
    'return jnp.mod(count - offset, gap) == 0',
    'return jnp.mod(count - offset, 2 * gap) == 0',
    'optim/subspace/test_refresh.py optim/subspace/test_low_rank.py',
  ),
  Fault(
    *('first refresh missed', 'optim/subspace/refresh.py'),
    'return due_s | (unset_s & (context.total(nonzero_s) > 0))',
    'return due_s',
    'optim/subspace/test_refresh.py optim/subspace/test_low_rank.py',
  ),
  Fault(
    *(
      'stale basis: only the count of a refresh moves on',
      'optim/subspace/refresh.py',
    ),
    'return _where(usable & jnp.isfinite(energy), fitted, old)',
    'return _where(\n    usable & jnp.isfinite(energy),\n'
    '    fitted._replace(basis=old.basis),\n    old,\n  )',
    'optim/subspace/test_refresh.py optim/subspace/test_low_rank.py',
  ),
  Fault(
    *(
      'basis of one device, not of the sum over devices',
      'optim/subspace/refresh.py',
    ),
    'total_IO = context.total(part(grad_sIO))',
    'total_IO = part(grad_sIO)',
    'optim/parts/test_split.py training/layerwise/test_waiting.py',
  ),
  Fault(
    *('moments that are not turned', 'optim/subspace/moments.py'),
    'mu = transport(moments.mu, 1)',
    'mu = moments.mu',
    'optim/methods/test_ldadam.py optim/subspace/test_refresh.py',
  ),
  Fault(
    *('bias correction of the first moment for both', 'optim/parts/adam.py'),
    'return correction(b1), correction(b2)',
    'return correction(b1), correction(b1)',
    'optim/parts/test_adam.py optim/methods/test_adamw.py',
  ),
  Fault(
    *('lost weight decay', 'optim/parts/adam.py'),
    'return optax.chain(decay, step)',
    'return step',
    'optim/parts/test_adam.py optim/test_conformance.py',
  ),
  Fault(
    *('error feedback of the gradient alone', 'optim/methods/ldadam.py'),
    'grad_IO = grad_IO + decode_error(old.error)',
    'grad_IO = grad_IO + 0 * decode_error(old.error)',
    'optim/methods/test_ldadam.py',
  ),
  Fault(
    *('norm growth that is never limited', 'optim/parts/norm_growth.py'),
    'factor = jnp.where(is_over, new_norm / norm, 1)',
    'factor = jnp.where(is_over, 1, 1)',
    'optim/parts/test_norm_growth.py optim/methods/test_apollo.py',
  ),
  Fault(
    *(
      'stochastic rounding that always rounds down',
      'optim/quantized/arrays.py',
    ),
    'y_KB = jnp.floor(y_KB + uniform_KB)',
    'y_KB = jnp.floor(y_KB + 0 * uniform_KB)',
    'optim/quantized/test_weights.py optim/quantized/test_codecs.py',
  ),
  Fault(
    *('columns of a power iteration that are not orthonormal',),
    'optim/parts/orthonormal.py',
    'columns_NR = unit_columns(unit_columns(wanted_NR) + fill * old_NR)',
    'columns_NR = unit_columns(wanted_NR)',
    'optim/projections/test_svd.py optim/subspace/test_refresh.py',
  ),
  Fault(
    *('lost micro-batch', 'training/step.py'),
    'total, _ = jax.lax.scan(add, ((zero, zero), grads), micro_batches)',
    'rest = jax.tree.map(lambda x: x[1:], micro_batches)\n'
    '    total, _ = jax.lax.scan(add, ((zero, zero), grads), rest)',
    'training/test_step.py',
  ),
  Fault(
    *('mean of means: weights of a batch forgotten', 'training/step.py'),
    'divisor = jnp.where(weight_sum > 0, weight_sum, 1)',
    "divisor = jnp.float32(batch['weights'].size)",
    'training/test_step.py',
  ),
  Fault(
    *('clipping by the square of the factor', 'training/layerwise/engine.py'),
    'return jnp.where(norm < clip, 1, clip / norm)',
    'return jnp.where(norm < clip, 1, jnp.square(clip / norm))',
    'training/layerwise/test_layerwise_step.py',
  ),
  Fault(
    *('projected gradients of the last micro-batch alone',),
    'training/layerwise/waiting.py',
    'total = jax.tree.map(lambda t, x: t + x.astype(t.dtype), waits, new)',
    'total = jax.tree.map(lambda t, x: x.astype(t.dtype), waits, new)',
    'training/layerwise/test_layerwise_step.py '
    'training/layerwise/test_waiting.py',
  ),
  Fault(
    *('seeds of the dropout not used', 'training/step.py'),
    "return jax.random.fold_in(jax.random.key(0), batch['seeds'][0])",
    'return jax.random.key(0)',
    'training/test_objectives.py recipes/pretrain/test_masked.py',
  ),
  Fault(
    *('padding that is attended to layer by layer', 'training/objectives.py'),
    "context = layer_fns.context(batch['inputs'], batch.get('segments'))",
    'context = None',
    'training/test_objectives.py training/layerwise/test_frozen.py',
  ),
  Fault(
    *('adapters without their scale', 'models/adapted_layer.py'),
    'low = keep(config.scale * matmul(dropped, a_IR.astype(y.dtype)))',
    'low = keep(matmul(dropped, a_IR.astype(y.dtype)))',
    'models/test_adapters.py',
  ),
)


def make(fault: Fault, folder: pathlib.Path) -> None:
  """Makes the fault in a copy of the checkout.

  Raises:
    ValueError: If the line is not in the file exactly once.
  """
  path = folder / 'gnlorp_jax' / fault.file
  text = path.read_text()
  if text.count(fault.right) != 1:
    raise ValueError(
      f'{fault.file} has {text.count(fault.right)} times, not once: '
      f'{fault.right!r}. Adapt the fault to the code.'
    )
  path.write_text(text.replace(fault.right, fault.wrong))


def outcome(fault: Fault | None, tests: str) -> str:
  """The first of the tests that fails with a fault; an empty text if none."""
  with tempfile.TemporaryDirectory() as parent:
    folder = pathlib.Path(parent, 'checkout')
    folder.mkdir()
    for name in COPIED:
      shutil.copytree(ROOT / name, folder / name)
    for path in (*ROOT.glob('*.py'), ROOT / 'pyproject.toml'):
      shutil.copy(path, folder)
    # The reference data beside the checkout.
    if (ROOT.parent / 'shared').is_dir():
      pathlib.Path(parent, 'shared').symlink_to(ROOT.parent / 'shared')
    if fault is not None:
      make(fault, folder)
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p']
    command += [
      'no:cacheprovider',
      *(f'tests/{x}' for x in tests.split()),
    ]
    done = subprocess.run(
      command,
      cwd=folder,
      env=os.environ | {'PYTHONPATH': str(folder)},
      capture_output=True,
      text=True,
      check=False,
    )
  lines = done.stdout.splitlines()
  found = [line for line in lines if line.startswith(('FAILED', 'ERROR'))]
  if done.returncode == 1 and found:
    return found[0].split(' - ')[0].removeprefix('FAILED ')
  if done.returncode:
    raise RuntimeError(f'pytest could not run:\n{done.stdout}{done.stderr}')
  return ''


def main() -> None:
  """Makes the faults and says what noticed them."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('word', nargs='?', default='', help='of a description')
  args = parser.parse_args()
  faults = [fault for fault in FAULTS if args.word in fault.name]
  if not faults:
    parser.error(f'no fault is described with {args.word!r}.')
  unnoticed = 0
  files = sorted({name for fault in faults for name in fault.tests.split()})
  cores = len(os.sched_getaffinity(0))
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    # A test that fails by itself notices nothing.
    for failed in pool.map(functools.partial(outcome, None), files):
      if failed:
        raise SystemExit(f'{failed} fails without a fault.')
    print(f'{len(files)} files of tests pass without a fault.', flush=True)
    found = pool.map(lambda fault: outcome(fault, fault.tests), faults)
    for fault, test in zip(faults, found, strict=True):
      unnoticed += not test
      print(f'{fault.name}: {test or "NOT NOTICED"}', flush=True)
  print(f'{len(faults) - unnoticed} of {len(faults)} faults noticed.')
  raise SystemExit(unnoticed > 0)


if __name__ == '__main__':
  main()
