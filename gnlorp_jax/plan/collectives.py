"""What a compiled program sends between devices, read from its text.

XLA prints a program as computations of instructions. Loops, branches and calls
name the computations they run; so the communication of one execution is that of
the entry, with everything in a loop taken as often as the loop runs.
"""

import collections
import math
import re
from typing import NamedTuple

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)

# A computation begins in the first column: `%name (args) -> type {`.
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)'
  r'=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Bits of the types whose names do not end in them.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}


class Collective(NamedTuple):
  """Equal collective operations at equal places in a program."""

  kind: str  # One of `KINDS`.
  bytes_each: int  # Of the whole array that is reduced, gathered or sent.
  instructions: int  # Number of such instructions in the program.
  loops: tuple[int | None, ...]  # Trip counts of enclosing loops, inward.
  conditionals: int  # Number of enclosing conditionals.

  @property
  def bytes_per_step(self) -> int | None:
    """Bytes per execution, every branch taken; None if a loop is unknown."""
    if None in self.loops:
      return None
    return self.instructions * self.bytes_each * math.prod(self.loops)


class Instruction(NamedTuple):
  """An instruction of a program."""

  opcode: str
  bytes: int  # Of its result.
  operands: tuple[str, ...]
  line: str


def collectives(hlo_text: str) -> list[Collective]:
  """Lists the collective operations of a compiled program.

  Args:
    hlo_text: What `jax.stages.Compiled.as_text` returns.

  Returns:
    One row for each kind, size and place, in the order of the program. Bytes
    are those of the larger side, on one device: the array before a
    reduce-scatter, after an all-gather, and on both sides of the others.

  Note:
    What crosses a wire depends on the algorithm: in a ring of n devices every
    one sends (n - 1) / n of these bytes, and twice that in an all-reduce.
  """
  computations, entry = parse(hlo_text)
  rows: collections.Counter[tuple] = collections.Counter()

  def walk(name, loops, conditionals):
    instructions = computations.get(name, {})
    for instruction in instructions.values():
      opcode, line = instruction.opcode, instruction.line
      kind = opcode.removesuffix('-start')
      if kind in KINDS:
        sent = sum(
          instructions[operand].bytes
          for operand in instruction.operands
          if operand in instructions
        )
        size = max(sent, _received(instruction, sent))
        rows[kind, size, loops, conditionals] += 1
        continue
      inner_loops = loops
      if opcode == 'while':
        inner_loops = (*loops, trip_count(line))
      inner_conditionals = conditionals + (opcode == 'conditional')
      for name in called(line):
        walk(name, inner_loops, inner_conditionals)

  walk(entry, (), 0)
  return [
    Collective(kind, size, count, loops, conditionals)
    for (kind, size, loops, conditionals), count in rows.items()
  ]


def _received(instruction: Instruction, sent: int) -> int:
  """Bytes of a collective's result, without operands that come with it."""
  # These two return their operands as well.
  if instruction.opcode == 'all-gather-start':
    return instruction.bytes - sent
  if instruction.opcode == 'collective-permute-start':
    return sent
  return instruction.bytes


def trip_count(line: str) -> int | None:
  """How often a loop runs, where XLA knows it."""
  trips = _TRIP_COUNT.search(line)
  return int(trips[1]) if trips else None


def called(line: str) -> list[str]:
  """Names of the computations that an instruction runs."""
  names = _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    names += [name.strip().lstrip('%') for name in branches.split(',')]
  return names


def parse(hlo_text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """The instructions of every computation by name, and the entry's name."""
  computations: dict[str, dict[str, Instruction]] = {}
  current: dict[str, Instruction] = {}
  entry = ''
  for line in hlo_text.splitlines():
    if header := _HEADER.match(line):
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif found := _INSTRUCTION.match(line):
      current[found[1]] = Instruction(
        opcode=found[3],
        bytes=_bytes(found[2]),
        operands=_operands(line[found.end() :]),
        line=line,
      )
  return computations, entry


def _operands(rest: str) -> tuple[str, ...]:
  """Names up to the parenthesis that closes an instruction's operands."""
  depth = 1
  for position, character in enumerate(rest):
    depth += (character == '(') - (character == ')')
    if not depth:
      return tuple(re.findall(r'%([\w.\-]+)', rest[:position]))
  return ()


def _bytes(shape: str) -> int:
  """Bytes of a printed shape, an array's or a tuple's."""
  total = 0
  for name, sizes in _ARRAY.findall(shape):
    elements = math.prod(int(size) for size in sizes.split(',') if size)
    # f8e4m3fn has 8 bits: the number after the first letters counts.
    bits = _BITS[name] if name in _BITS else int(re.findall(r'\d+', name)[0])
    total += -(-elements * bits // 8)
  return total
