"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.plan.collectives import Collective, collectives

# Written by hand: a loop of 5 turns with an all-gather whose start returns its
# operand too; in it a loop of unknown length; a conditional with two branches;
# a reduce-scatter inside an asynchronous call.
HLO = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8])->f32[8]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: bf16[4,2]) -> bf16[4,2] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %sent = bf16[4,2]{1,0} collective-permute(%p), channel_id=1
}

%inner_condition (q: bf16[4,2]) -> pred[] {
  %q = bf16[4,2]{1,0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

%body (c: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %c = (s32[], /*index=1*/bf16[4,2]{1,0:T(8,128)}) parameter(0)
  %x = bf16[4,2]{1,0} get-tuple-element(%c), index=1
  %start = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) all-gather-start(%x)
  %done = bf16[16,2]{1,0} all-gather-done(%start)
  %loop = bf16[4,2]{1,0} while(%x), condition=%inner_condition, body=%inner_body
  ROOT %out = (s32[], bf16[4,2]{1,0}) tuple(%x, %loop)
}

%condition (d: (s32[], bf16[4,2])) -> pred[] {
  %d = (s32[], bf16[4,2]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%branch (e: f32[8]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  ROOT %reduced = f32[8]{0} all-reduce(f32[8]{0} %e), to_apply=%add
}

%other (g: f32[8]) -> f32[8] {
  ROOT %g = f32[8]{0} parameter(0)
}

%scatter (h: f32[8]) -> f32[2] {
  %h = f32[8]{0} parameter(0)
  ROOT %piece = f32[2]{0} reduce-scatter(%h), dimensions={0}, to_apply=%add
}

ENTRY %main (v: f32[8], w: (s32[], bf16[4,2])) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  %w = (s32[], bf16[4,2]{1,0}) parameter(1)
  %one = f32[8]{0} all-reduce(%v), to_apply=%add
  %two = f32[8]{0} all-reduce-start(%one), to_apply=%add
  %three = f32[8]{0} all-reduce-done(%two)
  %i = s32[] constant(0)
  %turns = (s32[], bf16[4,2]{1,0}) while(%w), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %either = f32[8]{0} conditional(%i, %three, %v), \
branch_computations={%other, %branch}
  %begun = ((f32[8]{0}), f32[2]{0}) async-start(%either), calls=%scatter
  %ended = f32[2]{0} async-done(%begun)
  ROOT %result = f32[8]{0} copy(%either)
}
"""


def test_hand_written_program():
  assert collectives(HLO) == [
    Collective('all-reduce', 32, 2, (), 0),
    Collective('all-gather', 64, 1, (5,), 0),
    Collective('collective-permute', 16, 1, (5, None), 0),
    Collective('all-reduce', 32, 1, (), 1),
    Collective('reduce-scatter', 32, 1, (), 0),
  ]
  per_step = [row.bytes_per_step for row in collectives(HLO)]
  assert per_step == [64, 320, None, 32, 32]


def test_program_without_collectives():
  text = jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()
  assert collectives(text) == []


def test_compiled_program_on_four_devices():
  """A sum over devices in each of 7 turns, then a gather: known bytes."""
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,))

  def gather(x):
    def body(_, x):
      return x + jax.lax.psum(jnp.sin(x), 'x')

    x = jax.lax.fori_loop(0, 7, body, x)
    return jax.lax.all_gather(x, 'x')

  program = jax.shard_map(
    gather, mesh=mesh, in_specs=P('x'), out_specs=P(), check_vma=False
  )
  x = jax.ShapeDtypeStruct(
    (4 * 16, 24), jnp.float32, sharding=NamedSharding(mesh, P('x'))
  )
  rows = collectives(jax.jit(program).lower(x).compile().as_text())
  shard = 16 * 24 * 4
  assert rows == [
    Collective('all-reduce', shard, 1, (7,), 0),
    Collective('all-gather', 4 * shard, 1, (), 0),
  ]
  assert [row.bytes_per_step for row in rows] == [7 * shard, 4 * shard]
