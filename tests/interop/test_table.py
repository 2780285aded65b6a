"""Tables of names: every tensor is consumed, every fault is named, no byte changes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.config import UserError
from clip_jax.interop.table import (
    attention_out,
    convolution,
    fused_projection,
    linear,
    norm,
    patch_convolution,
    read_table,
    same,
    split_projections,
    transposed,
    write_table,
)

WIDTH, HEADS, HEAD, LAYERS = 6, 2, 3, 2
BLOCK = "blocks.{layer}"
ROWS = [
    same("embedding", "emb.weight"),
    same("probe", "probe", shape=(1, 1, -1)),
    *norm("blocks/norm", f"{BLOCK}.ln"),
    *split_projections("blocks/qkv", [f"{BLOCK}.{name}" for name in "qkv"]),
    *fused_projection("blocks/fused", f"{BLOCK}.in_proj_weight", f"{BLOCK}.in_proj_bias"),
    *attention_out("blocks/out", f"{BLOCK}.out"),
    *linear("up", "up"),
    transposed("projection/kernel", "proj"),
    convolution("stage/kernel", "conv.weight"),
    patch_convolution("stem/kernel", "patch.weight", patch_size=2),
]
SHAPES = {
    "embedding": (5, WIDTH),
    "probe": (1, WIDTH),
    "blocks/norm/scale": (LAYERS, WIDTH),
    "blocks/norm/bias": (LAYERS, WIDTH),
    "blocks/qkv/kernel": (LAYERS, WIDTH, 3, HEADS, HEAD),
    "blocks/qkv/bias": (LAYERS, 3, HEADS, HEAD),
    "blocks/fused/kernel": (LAYERS, WIDTH, 3, HEADS, HEAD),
    "blocks/fused/bias": (LAYERS, 3, HEADS, HEAD),
    "blocks/out/kernel": (LAYERS, HEADS, HEAD, WIDTH),
    "blocks/out/bias": (LAYERS, WIDTH),
    "up/kernel": (WIDTH, 4),
    "up/bias": (4,),
    "projection/kernel": (WIDTH, 3),
    "stage/kernel": (3, 2, 4, 5),
    "stem/kernel": (12, WIDTH),
}


def arrays(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()}


def test_tensors_mean_the_same_to_torch():
    """Each layout against the product that the foreign module computes."""
    ours = arrays()
    theirs = write_table(ROWS, ours)
    x = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    for layer in range(LAYERS):
        kernel, bias = ours["blocks/qkv/kernel"][layer], ours["blocks/qkv/bias"][layer]
        expected = np.einsum("d,dknh->knh", x, kernel) + bias
        for i, name in enumerate("qkv"):
            weight = theirs[f"blocks.{layer}.{name}.weight"]
            found = weight @ x + theirs[f"blocks.{layer}.{name}.bias"]
            np.testing.assert_allclose(found, expected[i].reshape(-1), rtol=1e-5)
        kernel, bias = ours["blocks/fused/kernel"][layer], ours["blocks/fused/bias"][layer]
        expected = np.einsum("d,dknh->knh", x, kernel) + bias
        fused = theirs[f"blocks.{layer}.in_proj_weight"] @ x
        found = fused + theirs[f"blocks.{layer}.in_proj_bias"]
        np.testing.assert_allclose(found, expected.reshape(-1), rtol=1e-5)
        mixed = x.reshape(HEADS, HEAD)
        expected = np.einsum("nh,nhd->d", mixed, ours["blocks/out/kernel"][layer])
        np.testing.assert_allclose(theirs[f"blocks.{layer}.out.weight"] @ x, expected, rtol=1e-5)
    np.testing.assert_allclose(theirs["up.weight"] @ x, x @ ours["up/kernel"], rtol=1e-5)
    np.testing.assert_array_equal(theirs["proj"], ours["projection/kernel"].T)
    assert theirs["conv.weight"][4, 3, 2, 1] == ours["stage/kernel"][2, 1, 3, 4]
    # Pixels of a patch by rows, columns, channels: channel 2 of row 1, column 0.
    assert theirs["patch.weight"][5, 2, 1, 0] == ours["stem/kernel"][(1 * 2 + 0) * 3 + 2, 5]
    assert theirs["probe"].shape == (1, 1, WIDTH)


@given(seed=st.integers(0, 5), dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_there_and_back_keeps_every_byte(seed, dtype):
    ours = arrays(seed, dtype)
    theirs = write_table(ROWS, ours)
    assert all(tensor.flags.c_contiguous and tensor.base is None for tensor in theirs.values())
    again = read_table(ROWS, theirs, SHAPES)
    assert again.keys() == ours.keys()
    for path, array in ours.items():
        assert again[path].dtype == array.dtype
        assert again[path].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.k.weight"), "lack 'blocks.1.k.weight'.*shape (6, 6)"),
        (
            lambda t: t.update({"up.bias": np.zeros(5, np.float32)}),
            "'up.bias' has shape (5,), but the model needs (4,)",
        ),
        (
            lambda t: t.update({"up.bias": np.array([0, 1, np.nan, 1], np.float32)}),
            "'up.bias' has values that are not finite",
        ),
        (
            lambda t: t.update({"up.bias": np.array([np.inf, -np.inf, 0, 0], ml_dtypes.bfloat16)}),
            "'up.bias' has values that are not finite",
        ),
        (lambda t: t.update({"up.bias": np.zeros(4, np.int64)}), "'up.bias' is of type int64"),
        (lambda t: t.update(more=np.zeros(1)), "hold 'more', which the model has no place for"),
        (
            lambda t: t.update({"a": np.zeros(1), "b": np.zeros(1)}),
            "hold 'a' and 1 more, which the model has no place for",
        ),
        (lambda t: t.update({"blocks.2.q.weight": np.zeros(1)}), "hold 'blocks.2.q.weight'"),
    ],
)
def test_faults_are_named(change, message):
    tensors = write_table(ROWS, arrays())
    change(tensors)
    with pytest.raises(UserError) as error:
        read_table(ROWS, tensors, SHAPES)
    start, _, end = message.partition(".*")
    assert start in str(error.value)
    assert end in str(error.value)
    assert "\n" not in str(error.value)


def test_large_finite_numbers_pass():
    ours = arrays()
    ours["up/bias"] = np.full(4, 3e38, np.float32)  # their sum is no float32
    np.testing.assert_array_equal(
        read_table(ROWS, write_table(ROWS, ours), SHAPES)["up/bias"], ours["up/bias"]
    )


def test_buffers_may_be_passed_over():
    tensors = write_table(ROWS, arrays()) | {"text.position_ids": np.arange(3)}
    with pytest.raises(UserError, match="position_ids"):
        read_table(ROWS, tensors, SHAPES, ignored=["position_ids"])  # the whole name counts
    assert read_table(ROWS, tensors, SHAPES, ignored=[r".*\.position_ids"]).keys() == SHAPES.keys()


def test_tables_are_complete():
    with pytest.raises(AssertionError, match="differ in"):
        write_table(ROWS[1:], arrays())
    with pytest.raises(AssertionError, match="two rows for one array"):
        write_table([*ROWS, ROWS[0]], arrays())
    rows, more = [*ROWS, same("other", "emb.weight")], {"other": np.zeros(1, np.float32)}
    with pytest.raises(AssertionError, match=r"two rows write emb\.weight"):
        write_table(rows, arrays() | more)


def test_tensors_of_several_dtypes_share_one(caplog):
    tensors = write_table(ROWS, arrays(dtype=np.float16))
    tensors["blocks.0.q.weight"] = tensors["blocks.0.q.weight"].astype(ml_dtypes.bfloat16)
    tensors["blocks.1.out.weight"] = tensors["blocks.1.out.weight"].astype(np.float64)
    read = read_table(ROWS, tensors, SHAPES)
    assert read["blocks/qkv/kernel"].dtype == np.float32  # no 16 bits hold both
    assert read["blocks/out/kernel"].dtype == np.float64
    assert read["up/kernel"].dtype == np.float16
    assert "blocks/qkv/kernel are of bfloat16 and float16: all become float32" in caplog.text
    written = write_table(ROWS, read)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name].astype(np.float64), tensor.astype(np.float64))
