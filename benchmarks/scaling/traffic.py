"""Bytes that an optimizer's update moves in the memory of a GPU, by XLA's text.

The update is compiled for an H100 by XLA's own GPU compiler, without a GPU
(extra ``cuda``), and its text read: every kernel moves its operands and its
results.

  python -m benchmarks.scaling.traffic

Weights and gradients are bfloat16. `moved` is for a step at which no basis is
refitted: loops whose length is not known, which refit what is due, count as
nothing, and of a branch the one that moves less. A kernel that takes a part of
an operand is counted with all of it, so that figures are upper bounds. `floor`
is what must move: gradients and bases read, weights and the other state read
and written, each once. `copies` are kernels that only copy or transpose.
"""

import functools
import math
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from benchmarks import report
from benchmarks.common import cases, harness
from benchmarks.common.tables import of_columns
from benchmarks.scaling.state_bytes import shapes_of
from gnlorp_jax import optim
from gnlorp_jax.disk import extras
from gnlorp_jax.optim import inspect
from gnlorp_jax.plan import accelerators, collectives

RESULTS = pathlib.Path('benchmarks/results/traffic.json')
PAGE = pathlib.Path('docs/results/scaling.md')
PART, DEVICE = 'update', 'h100'
RANKS = {'130m': 256, '1b': 512}  # A third, and a quarter of the width.
_BITS = {'moment_bits': 8, 'basis_bits': 8}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  'optax.adamw': ('', {}),
  'adamw': ('adamw', {}),
  'galore': ('galore', {}),
  'apollo': ('apollo', {}),
  'fira': ('fira', {}),
  'gradnormlorp': ('gradnormlorp', {}),
  'adamw, 8 bits': ('adamw', {'moment_bits': 8}),
  'galore, 8 bits': ('galore', _BITS),
  'gradnormlorp, 8 bits': ('gradnormlorp', _BITS),
}
# Instructions that launch nothing.
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast')
_FREE += ('after-all', 'partition-id', 'replica-id')
_BODY = re.compile(r'body=%?([\w.\-]+)')


class Traffic(NamedTuple):
  """What one execution of a program moves.

  Attributes:
    moved: Bytes.
    kernels: Number of kernels and library calls.
    copies: Bytes of those that only copy or transpose.
  """

  moved: int = 0
  kernels: int = 0
  copies: int = 0

  def plus(self, other: 'Traffic', times: int = 1) -> 'Traffic':
    """The sum with another one, so many times."""
    return Traffic(*(a + times * b for a, b in zip(self, other, strict=True)))


def traffic(hlo_text: str) -> Traffic:
  """What a program moves where nothing is due, see the head of this file."""
  computations, entry = collectives.parse(hlo_text)

  def of(name: str) -> Traffic:
    instructions = computations[name]
    total = Traffic()
    for instruction in instructions.values():
      opcode, line = instruction.opcode, instruction.line
      if opcode in _FREE or opcode.endswith('-done'):
        continue
      called = collectives.called(line)
      if opcode == 'while':
        times, body = collectives.trip_count(line), _BODY.findall(line)
        total = total.plus(of(body[0]), times or 0)
      elif opcode == 'conditional':
        total = total.plus(min(map(of, called)))
      elif opcode == 'call':
        total = total.plus(of(called[0]))
      else:
        operands = [
          instructions[name].bytes
          for name in instruction.operands
          if name in instructions
        ]
        size = instruction.bytes + sum(operands)
        is_copy = opcode.removesuffix('-start') in ('copy', 'transpose')
        total = total.plus(Traffic(size, 1, size if is_copy else 0))
    return total

  return of(entry)


def floor(shapes: Any, state: Any) -> int:
  """Bytes that a step must move, see the head of this file."""
  bases = inspect.state_bytes(state)['bases']
  weights = inspect.tree_bytes(shapes)
  return 3 * weights + 2 * inspect.tree_bytes(state) - bases


def compiled(tx: optax.GradientTransformation, shapes: Any) -> Any:
  """An update and its addition to the weights, compiled for a GPU."""
  card = accelerators.ACCELERATORS[DEVICE]
  (device,) = accelerators.described_devices(card, 1)
  sharding = jax.sharding.SingleDeviceSharding(device)

  def place(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )

  def update(grads: Any, state: Any, params: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  shapes, state = place(shapes), place(jax.eval_shape(tx.init, shapes))
  step = jax.jit(update, donate_argnums=(1, 2))
  return step.lower(shapes, state, shapes).compile()


def build(name: str, rank: int) -> optax.GradientTransformation:
  """An optimizer of the table; the guard against NaN is the training step's."""
  alias, options = METHODS[name]
  if not alias:
    return optax.adamw(1e-3)
  if alias != 'adamw':
    options = {**options, 'rank': rank}
  return getattr(optim, alias)(1e-3, skip_nonfinite=False, **options)


def row(size: str, name: str) -> cases.Row:
  """The traffic of a method."""
  shapes = shapes_of(size)
  tx = build(name, RANKS[size])
  program = compiled(tx, shapes)
  return {
    **traffic(program.as_text())._asdict(),
    'floor': floor(shapes, jax.eval_shape(tx.init, shapes)),
    'temporaries': program.memory_analysis().temp_size_in_bytes,
  }


def all_cases() -> Iterator[cases.Case]:
  """Every method at every size."""
  for size, rank in RANKS.items():
    for name in METHODS:
      key = {'size': size, 'rank': rank, 'optimizer': name}
      yield cases.Case(key, functools.partial(row, size, name))


COLUMNS = {
  'optimizer': lambda row: row['optimizer'],
  'moved, GB': lambda row: f'{row["moved"] / 1e9:.2f}',
  'floor': lambda row: f'{row["floor"] / 1e9:.2f}',
  'ratio': lambda row: f'{row["moved"] / row["floor"]:.2f}',
  'kernels': lambda row: str(row['kernels']),
  'copies, MB': lambda row: f'{row["copies"] / 1e6:.0f}',
  'temporaries, MB': lambda row: f'{row["temporaries"] / 1e6:.0f}',
}


def tables() -> dict[str, str]:
  """The tables of the page, one for each size."""
  rows = cases.rows(cases.load(RESULTS), PART)
  return {
    f'traffic of {size}': of_columns(
      [row for row in rows if row['size'] == size], COLUMNS
    )
    for size in RANKS
  }


def main() -> None:
  """Compiles, and writes the JSON file and the tables."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('scaling.traffic')
    return
  if not accelerators.compiler_is_installed():
    parser.error(f"XLA's GPU compiler is missing: {extras.install('cuda')}")
  jax.config.update('jax_platforms', 'cpu')
  found = cases.measure(
    *(PART, all_cases(), args.output), harness.Clock(math.inf), device=DEVICE
  )
  sys.stdout.write(of_columns(cases.rows(found, PART), COLUMNS))


if __name__ == '__main__':
  main()
