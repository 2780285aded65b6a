"""What fused attention saves, read from the text of a program that has none."""

import dataclasses

import pytest
from small import small_config

from clip_jax.config import PackingConfig
from clip_jax.models import Execution
from clip_jax.planning import Program
from clip_jax.planning.attention import fused_attention, unfused_arrays
from clip_jax.planning.hlo_arrays import Array

FUSES = Execution(attention="cudnn")
# The small model: 5 tokens of an image, 8 of a text, heads of 16.
ROWS, HEADS = 6, 2

PROGRAM = """
ENTRY %main (q: bf16[6,5,2,16], w: bf16[32,32]) -> bf16[12,16,8] {
  %q = bf16[6,5,2,16] parameter(0)
  %w = bf16[32,32] parameter(1)
  %filled = bf16[12,8,16] fusion(%q), kind=kLoop, calls=%padded
  %scores = f32[12,8,8] custom-call(%filled, %filled), custom_call_target="other"
  %shares = bf16[12,5,5] fusion(%scores), kind=kLoop, calls=%softmax
  %mixed = bf16[12,16,5] custom-call(%filled, %shares), custom_call_target="other"
  ROOT %out = bf16[12,16,8] custom-call(%mixed, %w), custom_call_target="other"
}

%padded (p: bf16[6,5,2,16]) -> bf16[12,8,16] {
  %p = bf16[6,5,2,16] parameter(0)
  %turned = bf16[12,5,16] reshape(%p)
  %nil = bf16[] constant(0)
  ROOT %fill = bf16[12,8,16] pad(%turned, %nil), padding=0_0x0_3x0_0
}

%softmax (s: f32[12,8,8]) -> bf16[12,5,5] {
  %s = f32[12,8,8] parameter(0)
  %cut = f32[12,5,5] slice(%s), slice={[0:12], [0:5], [0:5]}
  ROOT %low = bf16[12,5,5] convert(%cut)
}
"""


def config_of(**image):
    config = small_config()
    model = config.model
    changed = dataclasses.replace(model.image, **image)
    return dataclasses.replace(config, model=dataclasses.replace(model, image=changed))


def test_scores_and_copies_of_q_and_k_are_not_moved_or_held():
    fused = fused_attention(Program(PROGRAM), config_of(), FUSES)
    scores, shares = 12 * 8 * 8 * 4, 12 * 5 * 5 * 2
    filled, mixed = 12 * 8 * 16 * 2, 12 * 16 * 5 * 2
    # Of the scores a part is read by what makes the shares.
    moved = scores + 12 * 5 * 5 * 4 + 2 * shares + (1 + 2 + 1) * filled + 2 * mixed + filled
    assert fused.traffic_bytes == moved
    # The copies stay; filled and the scores were the most, now filled and mixed are.
    assert fused.memory_bytes == (filled + scores + shares) - (filled + mixed)


def test_nothing_where_the_run_would_not_fuse():
    program = Program(PROGRAM)
    assert fused_attention(program, config_of(), Execution()) == (0, 0)
    assert fused_attention(program, config_of(), FUSES) != (0, 0)
    odd = dataclasses.replace(small_config().model.text, num_heads=8)  # heads of 4
    config = config_of(num_heads=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=odd))
    assert fused_attention(program, config, FUSES) == (0, 0)


@pytest.mark.parametrize(
    ("array", "is_left_out"),
    [
        (Array("f32", (ROWS, HEADS, 5, 5)), True),  # an image's
        (Array("bf16", (2, ROWS, HEADS, 8, 8)), True),  # a text's, of all layers
        (Array("bf16", (ROWS * HEADS, 16, 5)), True),  # a copy for cuBLAS
        (Array("bf16", (ROWS, HEADS, 5, 16)), False),  # q where it lies
        (Array("pred", (8, 8)), False),  # the causal mask
        (Array("bf16", (ROWS, 5, 32)), False),
        (Array("bf16", (ROWS, 8, 8, 3)), False),
    ],
)
def test_which_arrays(array, is_left_out):
    left_out = unfused_arrays(config_of(), FUSES)
    assert left_out is not None
    assert left_out(array) == is_left_out


def test_packed_texts_are_not_fused():
    config = config_of()
    packed = dataclasses.replace(config.data, packing=PackingConfig(group_size=8, rows=2))
    left_out = unfused_arrays(dataclasses.replace(config, data=packed), FUSES)
    assert left_out is not None
    assert left_out(Array("f32", (ROWS, HEADS, 5, 5)))
    # 8 is what 5 is filled up to.
    assert left_out(Array("f32", (ROWS, HEADS, 8, 8)))
    longer = dataclasses.replace(config.model.text, context_length=24)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=longer))
    assert unfused_arrays(config, FUSES)(Array("f32", (ROWS, HEADS, 24, 24)))
    config = dataclasses.replace(config, data=packed)
    assert not unfused_arrays(config, FUSES)(Array("f32", (ROWS, HEADS, 24, 24)))


def test_tokens_of_a_training_step():
    kept = config_of(image_size=32, patch_dropout=0.5, num_registers=1)  # 16 patches, 8 kept
    left_out = unfused_arrays(kept, FUSES)
    assert left_out(Array("f32", (ROWS, HEADS, 10, 10)))
    assert not left_out(Array("f32", (ROWS, HEADS, 17, 17)))
