"""Each finding where it is due, with its numbers, and nothing where all is well."""

import dataclasses

import pytest
from planning.plan_cases import (
    MIB,
    chip_named,
    config_of,
    estimate_of,
    step_of,
    topology_of,
)

from clip_jax.config import DataConfig, PackingConfig, SourceConfig, preset
from clip_jax.planning.compiling import ArrayInfo
from clip_jax.planning.estimate import Traffic
from clip_jax.planning.findings import find
from clip_jax.planning.findings_shapes import Shapes, shape_findings, tokens_of
from clip_jax.planning.findings_weights import WeightShapes
from clip_jax.planning.hlo import Collective

MESH = {"data": 4, "fsdp": 4, "tensor": 1}
TOPOLOGY = topology_of()


def found(step, topology=TOPOLOGY, **estimated):
    return {f.code: f for f in find(step, topology, estimate_of(step, **estimated))}


def step(**changes):
    config = config_of(mesh=(4, 4, 1), **changes.pop("config", {}))
    return step_of(config, **changes)


def array(path, shape, parts=1):
    num_bytes = 4
    for size in shape:
        num_bytes *= size
    return ArrayInfo(
        path=path,
        shape=shape,
        dtype="float32",
        spec="()",
        num_bytes=num_bytes,
        device_bytes=num_bytes // parts,
    )


# ---- Memory, parameters, communication -----------------------------------------------------------


def test_memory_that_is_too_small_or_nearly_full():
    assert "does-not-fit" not in found(step(total=94 * MIB))
    assert found(step(total=96 * MIB))["little-room"].level == "warning"
    lacking = found(step(total=128 * MIB))["does-not-fit"]
    assert lacking.level == "error"
    assert "needs 128 MiB of a device's memory, which has 100 MiB" in lacking.text
    assert (
        found(step(total=128 * MIB), topology_of(memory=None))
        .keys()
        .isdisjoint({"does-not-fit", "little-room"})
    )


def test_what_jax_leaves_of_a_gpu_is_named_where_it_would_do(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    gpu = topology_of(chip="H100 SXM")
    text = found(step(total=80 * MIB, platform="gpu"), gpu)["does-not-fit"].text
    assert "which has 75 MiB (75% of 100 MiB); XLA_CLIENT_MEM_FRACTION=0.95" in text
    text = found(step(total=99 * MIB, platform="gpu"), gpu)["does-not-fit"].text
    assert "MEM_FRACTION" not in text
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    assert "does-not-fit" not in found(step(total=80 * MIB, platform="gpu"), gpu)


def test_large_parameters_that_lie_whole_though_the_mesh_splits():
    whole = array("params/text/token_embedding", (49409, 511))
    split = array("params/image/blocks/mlp/up/kernel", (12, 768, 3072), parts=4)
    moments = array("opt_state/1/mu/text/token_embedding", (49409, 511))
    small = array("params/text/position_embedding", (77, 511))
    arrays = (whole, split, moments, small)
    finding = found(step(arrays=arrays))["replicated-parameters"]
    assert finding.text.startswith("1 parameter over 1 MiB (101 MB) lie whole")
    assert "though fsdp is 4, the largest params/text/token_embedding (49409, 511)" in finding.text
    assert "replicated-parameters" not in found(step(arrays=(split, small)))
    alone = step(arrays=arrays, mesh={"data": 16, "fsdp": 1, "tensor": 1})
    assert "replicated-parameters" not in found(alone)


def test_a_step_bound_by_what_it_sends_names_the_most_of_it():
    slow = Traffic(
        kind="all-gather",
        axes=("data", "fsdp"),
        num_bytes=3 * 10**9,
        times=24,
        link="DCN",
        seconds=0.5,
        asynchronous=0.0,
    )
    finding = found(step(), bound_by="communication", communication_seconds=0.5, traffic=(slow,))[
        "communication-bound"
    ]
    assert "sending takes 500.0 ms of a step and computing 80.0" in finding.text
    assert "all-gather over data+fsdp on DCN, 3 GB; keep fsdp inside a slice" in finding.text
    assert "communication-bound" not in found(step())


# ---- What moves ----------------------------------------------------------------------------------

B16 = [
    array("params/image/blocks/attention/qkv/kernel", (12, 768, 3, 12, 64)),
    array("params/image/blocks/attention/out/kernel", (12, 12, 64, 768)),
    array("params/image/blocks/mlp/up/kernel", (12, 768, 3072)),
    array("params/image/position_embedding", (197, 768)),
    array("params/image/stem/project/kernel", (768, 768)),
    array("params/text/blocks/attention/qkv/kernel", (12, 512, 3, 8, 64)),
    array("params/text/token_embedding", (49408, 512)),
    array("params/text_projection/kernel", (512, 512)),
    array("opt_state/mu/image/blocks/mlp/up/kernel", (12, 999, 999)),
]


@pytest.mark.parametrize(
    ("mesh", "dims"),
    [
        # As compilers for v5e:4x4 and eight H100s spell them (benchmarks/collectives.py).
        ((1, 16, 1), (1, 12, 64, 48)),
        ((1, 16, 1), (1, 48, 3, 12, 64)),
        ((1, 16, 1), (48, 3072)),
        ((1, 16, 1), (49408, 32)),
        ((1, 16, 1), (3088, 512)),
        ((1, 8, 1), (96, 64, 12)),
        ((1, 8, 1), (96, 197)),
        ((2, 2, 2), (384, 3, 6, 64)),
        ((2, 2, 2), (24704, 256)),
        ((2, 2, 2), (256, 3, 4, 64)),
        ((1, 1, 1), (768, 196)),
        ((1, 1, 1), (768, 3 * 12 * 64)),
        ((1, 8, 1), (12 * 96, 3072)),
    ],
)
def test_weights_are_known_whole_split_by_the_layer_and_merged(mesh, dims):
    weights = WeightShapes(B16, dict(zip(MESH, mesh, strict=True)))
    assert dims in weights


@pytest.mark.parametrize(
    "dims", [(136, 197, 768), (136, 77, 512), (26792, 768), (16, 197, 64), (999, 999), (136, 512)]
)
def test_activations_are_none(dims):
    for mesh in ((1, 16, 1), (2, 2, 2), (16, 1, 1)):
        assert dims not in WeightShapes(B16, dict(zip(MESH, mesh, strict=True)))


def program_with(kind, dims, op_name, extra=""):
    """A collective over the fsdp axis of 4 x 4 devices."""
    shape = f"bf16[{','.join(map(str, dims))}]"
    groups = "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}"
    if kind == "collective-permute":
        groups = "source_target_pairs={{0,1},{1,0}}"
    return f"""
ENTRY %main (a: {shape}) -> {shape} {{
  %a = {shape} parameter(0)
  ROOT %c = {shape} {kind}(%a), {groups}, {extra}metadata={{op_name="{op_name}"}}
}}
"""


@pytest.mark.parametrize("kind", ["all-gather", "collective-permute"])
def test_gathers_and_permutes_of_activations_are_found_and_those_of_weights_are_not(kind):
    def codes(dims, op_name="jit(step)/dot_general"):
        text = program_with(kind, dims, op_name)
        return found(step(program=text, arrays=tuple(B16)))

    finding = codes((136, 197, 768))["gathered-activations"]
    assert "1 gather or exchange of activations in a step" in finding.text
    assert "over fsdp of bf16[136, 197, 768] (jit(step)/dot_general)" in finding.text
    assert "gathered-activations" not in codes((192, 3072))
    assert "gathered-activations" not in codes((136, 8))  # 2 kB: keys or statistics
    # The loss sends embeddings round the ring, by its own code.
    assert "gathered-activations" not in codes((4096, 512), "jit(step)/shard_map/ppermute")


def test_every_all_to_all_is_found():
    text = program_with("all-to-all", (16, 64), "jit(step)/transpose")
    finding = found(step(program=text, arrays=tuple(B16)))["all-to-all"]
    assert "1 all-to-all in a step, 1.54 kB sent by a device" in finding.text
    assert "all-to-all" not in found(step())


def test_bytes_of_others_leave_weights_out():
    collective = Collective(
        "all-gather",
        "c",
        "",
        0,
        (("bf16", (48, 3072)), ("f32", (10, 10))),
        ((0, 1),),
        1,
    )
    weights = WeightShapes(B16, {"data": 1, "fsdp": 16, "tensor": 1})
    assert weights.bytes_of_others(collective) == 400


def test_float32_products_are_told_from_those_of_the_loss():
    def program(op_name):
        return f"""
ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {{
  %a = f32[8,16] parameter(0)
  %b = f32[16,4] parameter(1)
  ROOT %dot = f32[8,4] dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, \
metadata={{op_name="{op_name}"}}
}}
"""

    towers = found(step(program=program("jit(step)/mlp/dot_general")))
    assert "100.0% of the FLOPs" in towers["float32-products"].text
    assert towers["float32-products"].text.endswith("the largest: jit(step)/mlp/dot_general")
    assert "float32-loss" not in towers
    loss = found(step(program=program("jit(step)/shard_map/dot_general")))
    assert "--config.loss.product_dtype=bfloat16" in loss["float32-loss"].text
    assert "float32-products" not in loss
    asked_for = found(step(program=program("jit(step)/mlp/dot_general"), dtype="float32"))
    assert "float32-products" not in asked_for
    assert not {"float32-products", "float32-loss"} & found(step()).keys()


# ---- Shapes --------------------------------------------------------------------------------------


def shapes_of(name, *, chip="TPU v5e", rows=64, **changes):
    model = preset(name)
    config = config_of(model=model, **changes)
    platform = "tpu" if chip.startswith("TPU") else "gpu"
    return dict(shape_findings(Shapes(config, platform, chip_named(chip), rows)))


def test_257_tokens_open_another_tile():
    text = shapes_of("ViT-L-14")["padded-image-tokens"]
    assert text.startswith("257 image tokens fill tiles of 8 x 128 to 65%")  # 257^2 / (264 x 384)
    assert "model.image.class_token=False" in text
    # 256 tokens fill them.
    model = preset("ViT-L-14")
    image = dataclasses.replace(model.image, class_token=False, pooling="mean")
    config = config_of(model=dataclasses.replace(model, image=image))
    shapes = Shapes(config, "tpu", chip_named("TPU v5e"), 64)
    assert "padded-image-tokens" not in dict(shape_findings(shapes))
    on_gpu = shapes_of("ViT-L-14", chip="H100 SXM")["padded-image-tokens"]
    assert "tiles of 128 x 128 to 45%" in on_gpu


def with_text(context_length, *, text=(), **changes):
    model = preset("ViT-B-16")
    text = dataclasses.replace(model.text, context_length=context_length, **dict(text))
    data = DataConfig(
        sources={"pairs": SourceConfig(path="x")}, packing=PackingConfig(group_size=0)
    )
    config = config_of(model=dataclasses.replace(model, text=text), **{"data": data} | changes)
    return dict(shape_findings(Shapes(config, "gpu", chip_named("H100 SXM"), 64)))


def test_what_fills_a_tile_and_costs_more_than_it_saves_is_not_advised():
    # 197 tokens take two tiles of 128; 256 tokens would take 30% more of the tower.
    text = shapes_of("ViT-L-16", chip="H100 SXM")["padded-image-tokens"]
    assert "256 tokens would fill them and take 27.0% more" in text
    assert text.endswith("more: nothing is gained with this model")
    text = with_text(129)["padded-text-tokens"]
    assert "256 tokens would fill them and take 22.1% more" in text
    assert text.endswith("packed captions, exact as well, have fewer rows to pad")
    packed = DataConfig(
        sources={"pairs": SourceConfig(path="x")}, packing=PackingConfig(group_size=64, rows=60)
    )
    text = with_text(129, data=packed)["padded-text-tokens"]
    assert text.endswith("nothing is gained with this model")


def test_what_fills_a_tile_and_costs_less_is_advised():
    """Attention is most of a tower that is narrow for the length of its sequences."""
    narrow = {"width": 64, "num_heads": 2, "depth": 48}
    text = with_text(1025, text=narrow)["padded-text-tokens"]
    assert "a model.text.context_length of 1152 fills them for" in text


def test_tokens_of_less_than_a_tile_cannot_be_mended():
    for length in (12, 77, 128):
        assert "padded-text-tokens" not in with_text(length)
    # 50 tokens of a tile of 128 are a sixth of it.
    assert "padded-image-tokens" not in shapes_of("ViT-B-32", chip="H100 SXM")


def test_tokens_count_as_the_towers_see_them():
    b16 = preset("ViT-B-16").image
    assert tokens_of(b16) == 197
    assert tokens_of(dataclasses.replace(b16, patch_dropout=0.5, num_registers=4)) == 98 + 5
    assert tokens_of(preset("RN50").image) == 0
    assert tokens_of(preset("ViT-B-16").text) == 77


def test_narrow_heads_are_told_of_the_chip_that_minds_them():
    tpu = shapes_of("ViT-SO400M-14-SigLIP-378")["narrow-image-heads"]
    assert "heads of 72 fill 56% of the 128 columns" in tpu
    assert "9 heads of 128: --config.model.image.num_heads=9" in tpu
    assert "narrow-image-heads" not in shapes_of("ViT-B-16", chip="H100 SXM")


def test_padded_captions_are_worth_packing_where_that_is_exact():
    text = shapes_of("ViT-B-32")["padded-text"]
    assert text.startswith("the text tower is 40% of the FLOPs")
    assert "some 30 of its 77 tokens: 25% of a step is padding" in text
    assert "padded-text" not in shapes_of("ViT-B-16-SigLIP")  # it reads the padding
    packed = DataConfig(
        sources={"pairs": SourceConfig(path="x")}, packing=PackingConfig(group_size=64, rows=24)
    )
    assert "padded-text" not in shapes_of("ViT-B-32", data=packed)


def test_few_rows_leave_the_matrix_units_waiting():
    # A v5e computes 197e12 / 819e9 = 240 FLOPs in the time of a byte: 240 rows of bfloat16.
    assert "few-image-rows" not in shapes_of("ViT-B-16", rows=2)
    text = shapes_of("ViT-B-16", rows=1)["few-image-rows"]
    assert "have 197 rows on a device (1 pairs, 1 microbatches)" in text
    assert "from 241 on; give a device 2 pairs or more" in text
    many = shapes_of("ViT-B-16", rows=64, microbatches=64)
    assert "give a device 128 pairs or more" in many["few-image-rows"]


def test_a_loss_tile_larger_than_pays():
    large = config_of()
    large = dataclasses.replace(large, loss=dataclasses.replace(large.loss, tile_size=8192))

    def codes(config, rows):
        return dict(shape_findings(Shapes(config, "tpu", chip_named("TPU v5e"), rows)))

    assert "tiles of 8192 x 8192 logits, 256 MiB each" in codes(large, 8192)["loss-tile"]
    assert "loss-tile" not in codes(large, 4096)
    assert "loss-tile" not in codes(config_of(), 65536)


def test_errors_come_first():
    levels = [f.level for f in find(step(total=128 * MIB), TOPOLOGY, estimate_of(step()))]
    assert levels == sorted(levels)
