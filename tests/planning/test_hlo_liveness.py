"""What a program holds at once, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.planning import Program
from clip_jax.planning.hlo_liveness import peak_bytes

CHAIN = """
ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100] parameter(0)
  %b = f32[100] negate(%a)
  %c = f32[200] concatenate(%b, %b), dimensions={0}
  %d = f32[50] slice(%c), slice={[0:50]}
  %e = f32[100] concatenate(%d, %d), dimensions={0}
  ROOT %f = f32[100] add(%e, %a)
}
"""


def test_an_array_lives_from_where_it_is_made_to_its_last_use():
    assert peak_bytes(Program(CHAIN)) == 4 * (100 + 200)  # b and c
    longer = CHAIN.replace("add(%e, %a)", "add(%e, %b)")
    assert peak_bytes(Program(longer)) == 4 * (100 + 200 + 50)
    kept = CHAIN.replace("concatenate(%d, %d)", "concatenate(%d, %c)")
    assert peak_bytes(Program(kept)) == 4 * (200 + 50 + 100)


def test_a_name_keeps_nothing_alive_that_nobody_uses():
    """A tuple of c, and an element of it, when c is no longer needed."""
    named = CHAIN.replace(
        "  ROOT",
        "  %t = (f32[200], f32[50]) tuple(%c, %d)\n"
        "  %g = f32[200] get-tuple-element(%t), index=0\n  ROOT",
    )
    assert peak_bytes(Program(named)) == peak_bytes(Program(CHAIN))
    used = named.replace("add(%e, %a)", "add(%e, %g)")
    assert peak_bytes(Program(used)) == 4 * (200 + 50 + 100)


def test_what_is_left_out_takes_no_room():
    assert peak_bytes(Program(CHAIN), lambda array: array.dims == (200,)) == 4 * (50 + 100)


NAMES = """
%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[100] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %wide = f32[400] broadcast(%next), dimensions={}
  %y = f32[100] slice(%wide), slice={[0:100]}
  ROOT %r = (s32[], f32[100]) tuple(%next, %y)
}

%condition (q: (s32[], f32[100])) -> pred[] {
  %q = (s32[], f32[100]) parameter(0)
  %limit = s32[] constant(3)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100] parameter(0)
  %zero = s32[] constant(0)
  %b = f32[100] negate(%a)
  %side = f32[10] slice(%b), slice={[0:10]}
  %start = (s32[], f32[100]) tuple(%zero, %b)
  %loop = (s32[], f32[100]) while(%start), condition=%condition, body=%body
  %end = f32[100] get-tuple-element(%loop), index=1
  %again = f32[100] bitcast(%end)
  ROOT %f = f32[100] add(%again, %side)
}
"""


def test_loops_hold_what_they_carry_and_what_their_body_makes():
    body = 4 * 400  # `wide`; what a body returns takes the place of what it was given
    assert peak_bytes(Program(NAMES)) == 4 * (100 + 10) + body


def test_a_chain_of_products_holds_what_the_compiler_allocates():
    def run(weights, x):
        kept = []
        for w in weights:
            x = jnp.tanh(x @ w)
            kept.append(x)
        return sum((a * b).sum() for a, b in zip(kept, reversed(kept), strict=True))

    shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    compiled = jax.jit(run).lower([shape] * 6, shape).compile()
    allocated = compiled.memory_analysis().temp_size_in_bytes
    assert peak_bytes(Program(compiled.as_text())) == pytest.approx(allocated, rel=0.2)
