"""What a step holds in memory: by hand in a program of a few lines, and of compiled steps."""

import pytest

from clip_jax.planning import Program
from clip_jax.planning.memory import Allocated, activation_bytes, memory_of

NAMES = {
    "FORWARD": "jit(step)/jvp()",
    "BACK": "jit(step)/transpose(jvp())",
    "AGAIN": "jit(step)/transpose(jvp())/checkpoint/rematted_computation",
}


def program(text: str) -> Program:
    for short, name in NAMES.items():
        text = text.replace(short, name)
    return Program(text)


# `x` and `y`, of 1 kB, are kept; `z` is not, and `again` is made of `x` going back.
TWO_LAYERS = """
ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0), metadata={op_name="state.params['w']"}
  %m = f32[128]{0} parameter(1), metadata={op_name="state.opt_state[0].mu['w']"}
  %e = f32[64]{0} parameter(2), metadata={op_name="state.ema['w']"}
  %b = u8[100]{0} parameter(3), metadata={op_name="batch['image']"}
  %x = f32[256]{0} exponential(%p), metadata={op_name="FORWARD/exp"}
  %z = f32[999]{0} cosine(%x), metadata={op_name="FORWARD/cos"}
  %y = f32[256]{0} sine(%z), metadata={op_name="FORWARD/sin"}
  %moved = f32[256]{0} copy(%y)
  %dy = f32[256]{0} negate(%moved), metadata={op_name="BACK/neg"}
  %inner = f32[999]{0} sine(%x), metadata={op_name="AGAIN/sin"}
  %again = f32[256]{0} cosine(%inner), metadata={op_name="AGAIN/cos"}
  %dx = f32[256]{0} multiply(%again, %dy), metadata={op_name="BACK/mul"}
  ROOT %new = f32[256]{0} add(%p, %dx), metadata={op_name="jit(step)/add"}
}
"""
# Four layers in a loop, each of which makes 25 numbers again going back.
LOOPS = """
%forward (a: (s32[], f32[10], f32[4,10])) -> (s32[], f32[10], f32[4,10]) {
  %a = (s32[], f32[10]{0}, f32[4,10]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %w = f32[10]{0} get-tuple-element(%a), index=1
  %kept = f32[4,10]{1,0} get-tuple-element(%a), index=2
  %next = s32[] add(%i, %i)
  %more = f32[4,10]{1,0} dynamic-update-slice(%kept, %w, %i, %i), metadata={op_name="FORWARD/dus"}
  ROOT %r = (s32[], f32[10]{0}, f32[4,10]{1,0}) tuple(%next, %w, %more)
}

%backward (b: (s32[], f32[4,10])) -> (s32[], f32[4,10]) {
  %b = (s32[], f32[4,10]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %saved = f32[4,10]{1,0} get-tuple-element(%b), index=1
  %again = f32[25]{0} cosine(%saved), metadata={op_name="AGAIN/cos"}
  %d = f32[25]{0} negate(%again), metadata={op_name="BACK/neg"}
  ROOT %s = (s32[], f32[4,10]{1,0}) tuple(%j, %saved)
}

%test (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0), metadata={op_name="state.params['w']"}
  %zero = s32[] constant(0)
  %room = f32[4,10]{1,0} broadcast(%zero), metadata={op_name="broadcast.1"}
  %start = (s32[], f32[10]{0}, f32[4,10]{1,0}) tuple(%zero, %p, %room)
  %there = (s32[], f32[10]{0}, f32[4,10]{1,0}) while(%start), condition=%test, body=%forward, TIMES
  %weights = f32[10]{0} get-tuple-element(%there), index=1
  %stacked = f32[4,10]{1,0} get-tuple-element(%there), index=2
  %second = (s32[], f32[4,10]{1,0}) tuple(%zero, %stacked)
  %back = (s32[], f32[4,10]{1,0}) while(%second), condition=%test, body=%backward, SEMIT
  ROOT %last = f32[10]{0} negate(%weights), metadata={op_name="BACK/neg"}
}
"""
for short, name in (("TIMES", "FORWARD"), ("SEMIT", "BACK")):
    times = f'known_trip_count:{{"n":"4"}}, metadata={{op_name="{name}/while"}}'
    LOOPS = LOOPS.replace(short, times)


def test_what_is_kept_is_held_from_its_making_to_its_last_use():
    """`x` with `y` at first, then with what is made again: never the three of them."""
    assert activation_bytes(program(TWO_LAYERS)) == 2 * 1024
    # Made again before `y` was used for the last time: all three are held.
    lines = TWO_LAYERS.splitlines()
    dy, again = (
        next(i for i, line in enumerate(lines) if name in line) for name in ("%dy =", "%again =")
    )
    lines[dy], lines[again] = lines[again], lines[dy]
    assert activation_bytes(program("\n".join(lines))) == 3 * 1024


def test_parts_make_up_the_total():
    allocated = Allocated(
        arguments=1024 + 512 + 256 + 100 + 28, temporaries=5000, outputs=2000, aliased=1792, code=7
    )
    memory = memory_of(program(TWO_LAYERS), allocated)
    assert (memory.parameters, memory.optimizer) == (1024, 512)
    assert (memory.model_state, memory.batch) == (256, 100)
    assert memory.activations == 2048
    assert memory.output == 208
    # What is not kept, the program itself and the gaps between arguments.
    assert memory.temporaries == 5000 - 2048 + 7 + 28
    assert memory.total == 1920 + 5000 + 208 + 7


@pytest.mark.parametrize("scores", [500, 3000, 99999])
def test_scores_that_are_not_made_leave_the_activations_first(scores):
    allocated = Allocated(arguments=1892, temporaries=5000, outputs=0, aliased=0, code=0)
    whole = memory_of(program(TWO_LAYERS), allocated)
    fused = memory_of(program(TWO_LAYERS), allocated, attention_scores=scores)
    less = min(scores, 5000)
    assert fused.attention_scores == less
    assert whole.total - fused.total == less
    assert fused.activations == max(2048 - scores, 0)
    parts = fused.activations + fused.temporaries
    assert parts == 5000 - less
    assert fused.temporaries >= 0


def test_loops_keep_what_they_stack_and_one_layer_that_is_made_again():
    """The weights go through the loop as they are: they are no activations."""
    assert activation_bytes(program(LOOPS)) == 4 * (4 * 10 + 25)
