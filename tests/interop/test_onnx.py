"""ONNX files in onnxruntime against the model itself, for every kind of tower."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig, UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop import onnx as export
from clip_jax.interop.embeddings import embed
from clip_jax.interop.onnx import export_onnx
from clip_jax.interop.weights import Weights, flatten
from clip_jax.models import CLIP

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from clip_jax.interop import onnx_graph  # noqa: E402 - it takes onnx
from clip_jax.interop.onnx_primitives import add_function  # noqa: E402

LIMIT = 1e-5  # tighter than the gate's 1e-4: that is what small models reach
ROWS = 5  # a batch that the gate does not try
IMAGE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
TEXT = {"width": 32, "depth": 2, "num_heads": 2, "vocab_size": 60, "context_length": 9}
TEXT |= {"eot_id": 59}
BERT = TEXT | {"kind": "bert", "pooling": "class_token", "pooler": True, "pad_id": 3}

CASES = {
    "clip": ({}, {"activation": "quick_gelu"}, {}),
    "options": (
        {
            "pooling": "attention",
            "num_registers": 2,
            "layer_scale_init": 0.1,
            "qk_norm": True,
            "activation": "swiglu",
            "position_embedding": "sincos2d",
            "patch_bias": True,
        },
        {"causal": False, "pooling": "mean", "eot_id": None, "activation": "gelu_tanh"},
        {"image_projection": "mlp", "text_projection": "linear_bias"},
    ),
    "conv stem": (
        {"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 2), "pooling": "mean"},
        {"causal": False, "pooling": "attention", "depth": 1},
        {},
    ),
    "resnet": (
        {
            "kind": "resnet",
            "image_size": 64,
            "patch_size": 32,
            "width": 8,
            "resnet_layers": (1, 2, 1, 1),
        },
        {"kind": "cbow", "pooling": "mean"},
        {"image_projection": "none"},
    ),
    "naflex": (
        {
            "kind": "naflex",
            "class_token": False,
            "pooling": "attention",
            "max_num_patches": 12,
            "activation": "gelu_tanh",
        },
        BERT,
        {"logit_bias_init": -10.0},
    ),
    "siglip": (
        {"class_token": False, "pre_norm": False, "pooling": "mean", "norm_after_pooling": True},
        {"causal": False, "pooling": "last"},
        {},
    ),
}


def random_weights(case):
    image, text, model = CASES[case]
    config = ModelConfig(
        name=case,
        embed_dim=16,
        image=ImageTowerConfig(**IMAGE | image),
        text=TextTowerConfig(**TEXT | text),
        **model,
    )
    state = nnx.state(jax.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def random(path, shape):
        values = 0.15 * rng.standard_normal(shape, np.float32)
        return np.abs(values) + 0.5 if path.endswith(("scale", "var")) else values

    arrays = {path: random(path, leaf.shape) for path, leaf in flatten(state).items()}
    return Weights(model=config, arrays=arrays)


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["embedding"], inputs)[0]


def sample_tokens(text):
    rng = np.random.default_rng(5)
    tokens = rng.integers(4, text.vocab_size - 1, (ROWS, text.context_length), dtype=np.int32)
    for row, length in zip(tokens, (1, 2, 5, 8, 9), strict=True):
        row[length - 1] = TEXT["eot_id"]
        row[length:] = text.pad_id
    return tokens


def sample_images(image):
    """As the file takes them, and as the model does."""
    rng = np.random.default_rng(6)
    if image.kind == "naflex":
        num_patches, side = image.max_num_patches, image.patch_size
        shapes = np.array([[3, 4], [1, 1], [12, 1], [2, 3], [1, 7]], np.int32)
        inputs = {
            "patches": rng.standard_normal((ROWS, num_patches, 3 * side**2), np.float32),
            "patch_mask": np.arange(num_patches) < shapes.prod(1)[:, None],
            "spatial_shapes": shapes,
        }
        return inputs, inputs
    images = rng.standard_normal((ROWS, image.image_size, image.image_size, 3), np.float32)
    return {"image": images.transpose(0, 3, 1, 2)}, {"image": images}


@pytest.mark.parametrize("case", CASES)
def test_towers_in_onnxruntime(case, tmp_path):
    weights = random_weights(case)
    lines = export_onnx(weights, tmp_path / "out")
    assert [line.split(":")[0] for line in lines] == ["image.onnx", "text.onnx"]
    theirs, ours = sample_images(weights.model.image)
    tokens = sample_tokens(weights.model.text)
    expected = embed(weights, ours | {"tokens": tokens})
    image = run(tmp_path / "out" / "image.onnx", theirs)
    text = run(tmp_path / "out" / "text.onnx", {"tokens": tokens})
    np.testing.assert_allclose(image, expected["image"], atol=LIMIT, rtol=0)
    np.testing.assert_allclose(text, expected["text"], atol=LIMIT, rtol=0)
    for name in ("image", "text"):
        onnx.checker.check_model(str(tmp_path / "out" / f"{name}.onnx"), full_check=True)


def test_files_beside_the_graphs_and_weights_outside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "MOST_INLINE_BYTES", 1000)
    tokenizer = Tokenizer.train(["a cat", "two dogs"], vocab_size=300, lowercase=True)
    weights = random_weights("resnet")
    text = dataclasses.replace(
        weights.model.text, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id
    )
    table = np.random.default_rng(1).standard_normal((tokenizer.vocab_size, 32), np.float32)
    weights = dataclasses.replace(
        weights,
        model=dataclasses.replace(weights.model, text=text),
        arrays=weights.arrays | {"text/token_embedding": table.astype(jnp.bfloat16)},
        tokenizer=tokenizer,
    )
    export_onnx(weights, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "image.onnx",
        "image.onnx.data",
        "text.onnx",
        "text.onnx.data",
        "preprocess.json",
        "tokenizer.json",
    }
    assert (tmp_path / "out" / "image.onnx.data").stat().st_size > 4 * 10_000
    settings = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    assert settings["image"]["image_size"] == 64
    assert settings["image"]["layout"] == "NCHW"
    assert settings["text"]["context_length"] == TEXT["context_length"]
    scale = np.exp(weights.arrays["log_logit_scale"])
    assert settings["logit_scale"] == pytest.approx(float(scale))
    tokens = Tokenizer.load(tmp_path / "out" / "tokenizer.json")(["two dogs"], 9)
    expected = embed(weights, {"tokens": tokens})["text"]
    found = run(tmp_path / "out" / "text.onnx", {"tokens": tokens})
    np.testing.assert_allclose(found, expected, atol=LIMIT, rtol=0)
    graph = onnx.load(str(tmp_path / "out" / "text.onnx"), load_external_data=False).graph
    assert "text/token_embedding" in {tensor.name for tensor in graph.initializer}


def test_refusals_leave_nothing(tmp_path, monkeypatch):
    weights = random_weights("resnet")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_onnx(weights, full)
    with pytest.raises(UserError, match="a single image tower has no projection"):
        export_onnx(dataclasses.replace(weights, parts=("image",)), tmp_path / "out")
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"image.onnx differs from the model by .* nothing is writ"):
        export_onnx(weights, tmp_path / "out")
    nan = weights.arrays | {"image/pooling/out/bias": np.full(16, np.nan, np.float32)}
    with pytest.raises(UserError, match="differs from the model by nan"):
        export_onnx(dataclasses.replace(weights, arrays=nan), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"takes onnxruntime: pip install .*\[onnx\]"):
        export_onnx(weights, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# ---- Primitives ------------------------------------------------------------------------------

TABLE = np.random.default_rng(2).standard_normal((7, 4)).astype(np.float32)
KERNEL = np.random.default_rng(3).standard_normal((3, 3, 1, 6)).astype(np.float32)
FUNCTIONS = {
    "gather rows": lambda x: jnp.asarray(TABLE)[x.argmax(1)],
    "gather columns": lambda x: jnp.asarray(TABLE.T)[:, x.argmax(1)],
    "gather from three axes": lambda x: jax.lax.gather(
        jnp.asarray(TABLE[:6].reshape(2, 3, 4)),
        (x.argmax(1) % 4)[:, None],
        jax.lax.GatherDimensionNumbers((1, 2), (2,), (2,)),
        (2, 3, 1),
        mode="promise_in_bounds",
    ),
    "take along": lambda x: jnp.take_along_axis(x, (x > 0).argmax(1)[:, None], axis=1),
    "slices": lambda x: x[:, 2:5] + x[:, 3][:, None],
    "unstack": lambda x: sum(jnp.unstack(x.reshape(-1, 2, 3), axis=1)),
    "remainders": lambda x: (10 * x).astype(jnp.int32) % 7 + (10 * x).astype(jnp.int32) // 3,
    "remainders with the sign of the dividend": lambda x: jax.lax.rem(
        (10 * x).astype(jnp.int32), 7
    ),
    "choice of bools": lambda x: jnp.where(x > 0, x > 1, x < -1),
    "any": lambda x: (x > 1.5).any(axis=1) | (x < 9).all(axis=1),
    "cumulative": lambda x: jnp.cumsum(x > 0, axis=1),
    "powers": lambda x: x**3 + jnp.abs(x) ** 0.5 + jax.lax.rsqrt(x * x + 1),
    "errors": lambda x: jax.lax.erfc(x) + jax.lax.erf(x) + jnp.sign(x) + jnp.clip(x, -1, 1),
    "batched product": lambda x: jnp.einsum("bij,bkj->bik", *2 * [x.reshape(-1, 2, 3)]),
    "two axes summed": lambda x: jnp.einsum(
        "bij,ijk->bk", x.reshape(-1, 2, 3), TABLE[:6].reshape(2, 3, 4)
    ),
    "rows repeated": lambda x: jnp.broadcast_to(TABLE[0], (x.shape[0], 4)),
    "grouped convolution": lambda x: jax.lax.conv_general_dilated(
        jnp.broadcast_to(x[:, :, None, None], (*x.shape, 5, 3)),
        KERNEL.repeat(1, axis=2),
        window_strides=(2, 1),
        padding=((1, 1), (0, 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    ),
    "scan": lambda x: jax.lax.scan(lambda h, w: (h * w + x, None), x, TABLE[:3, 0], reverse=True)[
        0
    ],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_primitives_mean_what_they_mean_in_jax(name, tmp_path):
    function = FUNCTIONS[name]
    (batch,) = jax.export.symbolic_shape(onnx_graph.BATCH)
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, 6), jnp.float32))
    graph = onnx_graph.Graph()
    given = graph.input("x", (onnx_graph.BATCH, 6), np.float32)
    (value,) = add_function(graph, closed, [given])
    graph.output("embedding", value)
    graph.save(tmp_path / "f.onnx", {})
    for rows in (1, 4):
        x = np.random.default_rng(rows).standard_normal((rows, 6), np.float32)
        found, expected = run(tmp_path / "f.onnx", {"x": x}), np.asarray(function(x))
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


def test_unknown_primitives_are_named():
    closed = jax.make_jaxpr(jnp.sort)(jax.ShapeDtypeStruct((3,), jnp.float32))
    graph = onnx_graph.Graph()
    given = graph.input("x", (3,), np.float32)
    with pytest.raises(UserError, match="computes 'sort', which the ONNX export does not know"):
        add_function(graph, closed, [given])
