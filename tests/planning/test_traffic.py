"""Bytes of memory that a program moves, against hand counts and the compiler's own."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.planning import Program
from clip_jax.planning.hlo_arrays import ON_CHIP, arrays_of
from clip_jax.planning.traffic import Reader


def bytes_by_name(text, **settings):
    """Of all runs of each instruction."""
    return {
        work.name: times * work.num_bytes
        for work, times in Reader(Program(text), **settings).work()
    }


def test_without_loops_it_is_what_xla_counts():
    def update(weights, x, y):
        def loss(weights):
            h = x
            for w in weights:
                h = jnp.tanh(h @ w)
            return jnp.mean((h - y) ** 2)

        gradients = jax.grad(loss)(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    arguments = [shape(128, 256), shape(256, 64)], shape(32, 128), shape(32, 64)
    compiled = jax.jit(update).lower(*arguments).compile()
    counted = sum(bytes_by_name(compiled.as_text()).values())
    assert counted == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=1e-3)


def test_a_scan_reads_a_layer_at_a_time_and_a_table_its_rows():
    layers, width, rows, words = 5, 32, 16, 1000

    def run(weights, table, ids):
        def body(x, w):
            return jnp.tanh(x @ w), x.sum()

        return jax.lax.scan(body, table[ids], weights)

    compiled = (
        jax.jit(run)
        .lower(
            jax.ShapeDtypeStruct((layers, width, width), jnp.float32),
            jax.ShapeDtypeStruct((words, width), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        )
        .compile()
    )
    moved = sum(bytes_by_name(compiled.as_text()).values())
    layer, activations = 4 * width * width, 4 * rows * width
    # Of each layer the weights, sliced out and multiplied; activations multiplied, summed and put
    # through tanh, perhaps copied.
    least = 2 * activations + layers * (3 * layer + 5 * activations)
    assert least <= moved < least + layers * 3 * activations


PARTS = """
%sliced (a: f32[10,64], i: s32[]) -> f32[64] {
  %a = f32[10,64] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %twice = f32[10,64] add(%a, %a)
  %row = f32[1,64] dynamic-slice(%twice, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64] bitcast(%row)
}

%updated (b: f32[10,64], j: s32[], u: f32[1,64]) -> f32[10,64] {
  %b = f32[10,64] parameter(0)
  %j = s32[] parameter(1)
  %u = f32[1,64] parameter(2)
  %nil = s32[] constant(0)
  ROOT %new = f32[10,64] dynamic-update-slice(%b, %u, %j, %nil)
}

%passing (c: f32[10,64], d: f32[64]) -> (f32[10,64], f32[64]) {
  %c = f32[10,64] parameter(0)
  %d = f32[64] parameter(1)
  %minus = f32[64] negate(%d)
  ROOT %both = (f32[10,64], f32[64]) tuple(%c, %minus)
}

ENTRY %main (x: f32[10,64], k: s32[], v: f32[64]) -> f32[64] {
  %x = f32[10,64] parameter(0)
  %k = s32[] parameter(1)
  %v = f32[64] parameter(2)
  %slice = f32[64] fusion(%x, %k), kind=kLoop, calls=%sliced
  %rows = f32[1,64] bitcast(%slice)
  %update = f32[10,64] fusion(%x, %k, %rows), kind=kLoop, calls=%updated
  %pass = (f32[10,64], f32[64]) fusion(%update, %v), kind=kLoop, calls=%passing
  %first = f32[64] get-tuple-element(%pass), index=1
  %gemm = (f32[64], s8[1000]) custom-call(%first, %v), custom_call_target="other"
  ROOT %last = f32[64] copy(%first)
}
"""
ROW = 4 * 64


def test_a_fusion_moves_the_parts_that_it_needs():
    moved = bytes_by_name(PARTS)
    assert moved["slice"] == 2 * ROW + 4  # a row of x, the result, the index
    assert moved["update"] == 2 * ROW + 4  # in place
    assert moved["pass"] == 2 * ROW  # what is passed on is not touched
    assert moved["last"] == 2 * ROW
    assert moved["gemm"] == 3 * ROW + 1000
    assert set(moved) == {"slice", "update", "pass", "gemm", "last"}


def test_arrays_can_be_left_out():
    moved = bytes_by_name(PARTS, leave_out=lambda array: array.dims == (64,))
    assert moved["slice"] == ROW + 4
    assert moved["last"] == 0


NESTED = """
%doing (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  ROOT %minus = f32[64] negate(%p)
}

%taken (q: f32[64]) -> f32[64] {
  %q = f32[64] parameter(0)
  ROOT %root = f32[64] sqrt(%q)
}

%sent (r: f32[64]) -> f32[32] {
  %r = f32[64] parameter(0)
  ROOT %part = f32[32] reduce-scatter(%r), replica_groups={{0,1}}, dimensions={0}, to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[64], k: s32[]) -> f32[32] {
  %x = f32[64] parameter(0)
  %k = s32[] parameter(1)
  %call = f32[64] call(%x), to_apply=%doing
  %one = f32[64] conditional(%k, %call, %call), branch_computations={%doing, %taken}
  %begin = ((f32[64]), f32[32]) async-start(%one), calls=%sent
  ROOT %end = f32[32] async-done(%begin), calls=%sent
}
"""


def test_calls_branches_and_what_runs_aside_count_as_often_as_they_run():
    moved = bytes_by_name(NESTED)
    assert moved == {"minus": 2 * 2 * ROW, "root": 2 * ROW, "part": ROW + ROW // 2}


TILED = """
ENTRY %main (x: bf16[3,100]) -> f32[3,100] {
  %x = bf16[3,100]{@} parameter(0)
  %near = (bf16[3,100]{@S(1)}, bf16[3,100]{@}, u32[]{:S(2)}) copy-start(%x)
  %here = bf16[3,100]{@S(1)} copy-done(%near)
  %wide = f32[3,100]{@S(1)} convert(%here)
  %far = (f32[3,100]{@S(5)}, f32[3,100]{@S(1)}, u32[]{:S(2)}) copy-start(%wide)
  %there = f32[3,100]{@S(5)} copy-done(%far)
  ROOT %out = f32[3,100]{@} copy(%wide)
}
""".replace("@", "1,0:T(8,128)")


def test_of_tpus_memory_on_the_chip_counts_nothing_and_tiles_are_full():
    program = Program(TILED)
    work = {work.name: work for work, _ in Reader(program).work()}
    tile = 8 * 128
    assert work["near"].num_bytes == 2 * tile
    assert work["wide"].num_bytes == 0
    assert work["far"].host_bytes == 4 * tile
    assert work["far"].num_bytes == 0
    assert work["out"].num_bytes == 4 * tile
    (array,) = program.computations["main"]["here"].arrays
    assert array.space == ON_CHIP
    assert array.num_bytes == 2 * 3 * 100


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("pred[7]{0}", 7),
        ("f8e4m3fn[4,4]", 16),
        ("f32[]", 4),
        ("bf16[5,200]{0,1:T(8,128)}", 2 * 128 * 200),  # the first dim is the fastest
        ("f32[300]{0:T(1024)}", 4 * 1024),
        ("f32[2,3,5]{2,1,0:T(1,128)}", 4 * 2 * 3 * 128),
    ],
)
def test_bytes_of_an_array_as_it_lies(text, num_bytes):
    (array,) = arrays_of(text)
    assert array.padded_bytes == num_bytes


PRODUCTS = """
%fused (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16] parameter(0)
  %b = f32[16,4] parameter(1)
  ROOT %c = f32[8,4] dot(%a, %b), DIMS
}

ENTRY %main (x: f32[8,16], y: f32[16,4], z: bf16[4,8]) -> bf16[8,8] {
  %x = f32[8,16] parameter(0)
  %y = f32[16,4] parameter(1)
  %z = bf16[4,8] parameter(2)
  %one = f32[8,4] fusion(%x, %y), kind=kOutput, calls=%fused
  %two = f32[8,4] dot(%x, %y), DIMS, operand_precision={highest,highest}
  %low = bf16[8,4] convert(%one)
  %gemm = (bf16[8,8], s8[4096]) custom-call(%low, %z), CUBLAS
  ROOT %r = bf16[8,8] get-tuple-element(%gemm), index=0
}
""".replace("DIMS", "lhs_contracting_dims={1}, rhs_contracting_dims={0}").replace(
    "CUBLAS",
    'custom_call_target="__cublas$gemm", backend_config={"lhs_contracting_dimensions":["1"]}',
)


def test_flops_go_by_the_dtype_of_the_operands():
    work = {work.name: work for work, _ in Reader(Program(PRODUCTS)).work()}
    assert work["one"].flops == {"f32": 2 * 8 * 16 * 4}
    assert work["two"].flops == {"f32 exact": 2 * 8 * 16 * 4}
    assert work["gemm"].flops == {"bf16": 2 * 8 * 8 * 4}
    assert work["gemm"].num_bytes == 2 * (8 * 4 + 4 * 8 + 8 * 8)  # its workspace is not touched
