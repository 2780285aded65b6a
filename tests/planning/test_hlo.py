"""Counts read from programs' texts, against programs whose counts are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import mesh_of

from clip_jax.planning import Program
from clip_jax.planning.hlo_groups import device_groups
from clip_jax.planning.hlo_products import convolution_flops
from clip_jax.planning.traffic import Reader


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8], x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x",
            ((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", ((0, 2), (1, 3))),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) "
            "{'axis_0'}, x",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
        ("source_target_pairs={}, x", ()),
    ],
)
def test_every_spelling_of_groups(text, groups):
    assert device_groups(text) == groups


def test_an_unknown_spelling_is_an_error():
    with pytest.raises(ValueError, match="no groups of devices"):
        device_groups("replica_groups=everyone")


def test_a_scan_of_sharded_layers_counts_every_layer():
    """Three layers of gathered weights: FLOPs, bytes and axes, by hand."""
    mesh = mesh_of(data=2, fsdp=4)
    layers, rows, width = 3, 16, 32
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    whole = NamedSharding(mesh, PartitionSpec(None, None))

    def run(weights, x):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), by_row), None

        return jax.lax.scan(body, x, weights)[0].sum()

    shapes = (
        jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=by_row),
    )
    program = Program(jax.jit(run).lower(*shapes).compile().as_text())
    assert program.flops == layers * 2 * (rows // 8) * width * width
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == layers
    assert {c.axes(mesh.shape) for c in gathers} == {("fsdp",)}
    assert sum(c.sent_bytes for c in gathers) == layers * width * width * 4 * 3 // 4
    (total,) = [c for c in program.collectives if c.kind == "all-reduce"]
    assert total.axes(mesh.shape) == ("data", "fsdp")
    assert total.sent_bytes == 2 * (4 * 7 // 8)
    assert program.largest_array >= layers * width * width // 4


LOOP = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(8)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%fused (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  ROOT %sum = f32[8] all-reduce(%a), channel_id=7, replica_groups={{0,1}}, to_apply=%add
}

%also_fused (b: f32[8]) -> f32[8] {
  %b = f32[8] parameter(0)
  ROOT %sum.2 = f32[8] all-reduce(%b), channel_id=7, replica_groups={{0,1}}, to_apply=%add
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  %two = s32[] constant(2)
  %j = s32[] get-tuple-element(%q), index=0
  %x = f32[8] get-tuple-element(%q), index=1
  %next = s32[] add(%j, %two)
  %y = f32[8] fusion(%x), kind=kCustom, calls=%fused
  %z = f32[8] fusion(%y), kind=kCustom, calls=%also_fused
  ROOT %r = (s32[], f32[8]) tuple(%next, %z)
}

ENTRY %main (x0: f32[8]) -> (s32[], f32[8]) {
  %x0 = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %x0)
  ROOT %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
}
"""


def test_loops_of_tpus_count_by_two_and_spread_collectives_over_fusions():
    """As they write them: no trip count is noted, and one channel is one collective."""
    (collective,) = Program(LOOP).collectives
    assert collective.times == 4
    assert collective.sent_bytes == 4 * 2 * (8 * 4 // 2)


def test_a_loop_that_cannot_be_counted_is_an_error():
    with pytest.raises(ValueError, match="cannot tell the step of a loop"):
        _ = Program(LOOP.replace("add(%j, %two)", "multiply(%j, %two)")).flops


def test_flops_of_a_convolution_leave_padding_out():
    image, kernel = np.ones((1, 5, 5, 2), np.float32), np.ones((3, 3, 2, 4), np.float32)
    text = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    result = jax.lax.conv_general_dilated(
        image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # Of ones, each output is the number of its multiply-adds.
    flops = convolution_flops(text, image.shape, kernel.shape, result.shape)
    assert flops == 2 * int(result.sum())


def test_a_batched_product_written_as_a_convolution():
    """A window over the batch, with holes between: one place of it is inside."""
    batch, rows, inner, columns = 12, 5, 7, 3
    text = "window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=0bf_0oi->0bf"
    flops = convolution_flops(
        text, (batch, rows, inner), (batch, columns, inner), (batch, rows, columns)
    )
    assert flops == 2 * batch * rows * inner * columns


# A convolution of stride 2 as cuDNN is called for it, with its workspace.
CUDNN = """
ENTRY %main (x: bf16[4,9,9,3], k: bf16[8,3,3,3], y: bf16[4,5,5,8]) -> RESULT {
  %x = bf16[4,9,9,3]{3,2,1,0} parameter(0)
  %k = bf16[8,3,3,3]{3,2,1,0} parameter(1)
  %y = bf16[4,5,5,8]{3,2,1,0} parameter(2)
  ROOT %call = (RESULT{3,2,1,0}, u8[1024]{0}) custom-call(TAKEN), WINDOW, CALLED
}
""".replace(
    "WINDOW, CALLED",
    "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, "
    'custom_call_target="TARGET"',
)


@pytest.mark.parametrize(
    ("target", "taken", "result"),
    [
        ("__cudnn$convForward", "%x, %k", "bf16[4,5,5,8]"),
        ("__cudnn$convForwardGraph", "%x, %k", "bf16[4,5,5,8]"),
        ("__cudnn$convBiasActivationForward", "%x, %k, %y", "bf16[4,5,5,8]"),
        ("__cudnn$convBackwardInput", "%y, %k", "bf16[4,9,9,3]"),
        ("__cudnn$convBackwardFilter", "%x, %y", "bf16[8,3,3,3]"),
    ],
)
def test_flops_of_convolutions_by_cudnn(target, taken, result):
    text = CUDNN.replace("TARGET", target).replace("TAKEN", taken).replace("RESULT", result)
    # Of ones, each output is the number of its multiply-adds.
    image, kernel = np.ones((4, 9, 9, 3), np.float32), np.ones((8, 3, 3, 3), np.float32)
    made = jax.lax.conv_general_dilated(
        image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OHWI", "NHWC")
    )
    assert Program(text).flops == 2 * int(made.sum())
    ((work, _),) = Reader(Program(text)).work()
    assert work.flops == {"bf16": 2 * int(made.sum())}
    sizes = {"%x": 4 * 81 * 3, "%k": 8 * 27, "%y": 4 * 25 * 8}
    taken_bytes = 2 * sum(sizes[name] for name in taken.split(", "))
    made_bytes = 2 * next(sizes[n] for n in sizes if f"{n} = {result}" in text)
    assert work.num_bytes == taken_bytes + made_bytes  # its workspace is not touched


def test_other_calls_of_cudnn_multiply_nothing_that_is_known():
    text = (
        CUDNN.replace("TARGET", "__cudnn$norm").replace("TAKEN", "%x").replace("RESULT", "f32[4]")
    )
    assert Program(text).flops == 0
