"""Single towers against transformers' models and against the formula of vit_jax's archives."""

import json
import math

import numpy as np
import pytest

from clip_jax.config import UserError
from clip_jax.interop import big_vision, huggingface, single_tower
from clip_jax.interop.embeddings import embed
from clip_jax.interop.transfer import export_weights

WIDTH, HEADS, DEPTH, MLP, PATCH, GRID = 32, 4, 2, 64, 8, 3
LIMIT = 1e-5  # of unit-length pooled features


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sample_images(count=3):
    side = GRID * PATCH
    return np.random.default_rng(3).standard_normal((count, side, side, 3), np.float32)


# ---- Archives of vit_jax ---------------------------------------------------------------------


def augreg_archive(seed=0):
    """Names as vit_jax's: those of flax's modules before 2021, heads included."""
    rng = np.random.default_rng(seed)
    head = WIDTH // HEADS
    shapes = {
        "cls": (1, 1, WIDTH),
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "Transformer/posembed_input/pos_embedding": (1, GRID**2 + 1, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "pre_logits/kernel": (WIDTH, WIDTH),
        "pre_logits/bias": (WIDTH,),
        "head/kernel": (WIDTH, 10),
        "head/bias": (10,),
    }
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (WIDTH, HEADS, head)
            shapes[f"{attention}/{part}/bias"] = (HEADS, head)
        shapes[f"{attention}/out/kernel"] = (HEADS, head, WIDTH)
        shapes[f"{attention}/out/bias"] = (WIDTH,)
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}/{name}/scale"] = shapes[f"{block}/{name}/bias"] = (WIDTH,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (WIDTH, MLP)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (MLP,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (MLP, WIDTH)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (WIDTH,)
    tensors = {name: 0.2 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: x + 1 if name.endswith("scale") else x for name, x in tensors.items()}


def layer_norm(x, tensors, name):
    centred = x - x.mean(-1, keepdims=True)
    unit_variance = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return unit_variance * tensors[f"{name}/scale"] + tensors[f"{name}/bias"]


def self_attention(x, tensors, name):
    q, k, v = (
        np.einsum("btd,dnh->bnth", x, tensors[f"{name}/{part}/kernel"])
        + tensors[f"{name}/{part}/bias"][None, :, None]
        for part in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(WIDTH // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return (
        np.einsum("bnth,nhd->btd", mixed, tensors[f"{name}/out/kernel"])
        + tensors[f"{name}/out/bias"]
    )


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def augreg_features(tensors, images):
    """The class token after the final norm, in float64 (Dosovitskiy et al. 2021, equations 1-4)."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    cut = images.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = cut.reshape(len(images), GRID**2, -1)
    x = patches @ tensors["embedding/kernel"].reshape(-1, WIDTH) + tensors["embedding/bias"]
    x = np.concatenate([np.repeat(tensors["cls"], len(x), 0), x], axis=1)
    x = x + tensors["Transformer/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        normed = layer_norm(x, tensors, f"{block}/LayerNorm_0")
        x = x + self_attention(normed, tensors, f"{block}/MultiHeadDotProductAttention_1")
        hidden, dense = layer_norm(x, tensors, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3/Dense"
        hidden = gelu_tanh(hidden @ tensors[f"{dense}_0/kernel"] + tensors[f"{dense}_0/bias"])
        x = x + hidden @ tensors[f"{dense}_1/kernel"] + tensors[f"{dense}_1/bias"]
    return layer_norm(x, tensors, "Transformer/encoder_norm")[:, 0]


def test_augreg_equals_the_formula_and_names_what_it_leaves_out(tmp_path, capsys):
    tensors = augreg_archive()
    np.savez(tmp_path / "augreg.npz", **tensors)
    weights = big_vision.read(tmp_path / "augreg.npz")  # the door of all archives
    heads = ["head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel"]
    assert weights.extras == {"left_out": heads}
    assert f"left out, as no part of the tower: {', '.join(heads)}" in capsys.readouterr().out
    assert weights.parts == ("image",)
    image = weights.model.image
    assert (image.image_size, image.mean, image.resize) == (24, (0.5, 0.5, 0.5), "squash")
    images = sample_images()
    ours = embed(weights, {"image": images})["image"]
    expected = unit(augreg_features(tensors, images))
    np.testing.assert_allclose(ours, expected, atol=LIMIT, rtol=0)


def test_towers_of_big_vision_alone(tmp_path):
    """Without a class token its position is dropped; without positions they are fixed ones."""
    tensors = augreg_archive()
    names = ("embedding/", "Transformer/")
    tensors = {f"params/{name}": x for name, x in tensors.items() if name.startswith(names)}
    np.savez(tmp_path / "gap.npz", **tensors)
    weights = single_tower.read_npz(tmp_path / "gap.npz")
    assert weights.model.image.pooling == "mean"
    positions = "params/Transformer/posembed_input/pos_embedding"
    np.testing.assert_array_equal(
        weights.arrays["image/position_embedding"], tensors[positions][0, 1:]
    )
    del tensors[positions]
    np.savez(tmp_path / "sincos.npz", **tensors)
    image = single_tower.read_npz(tmp_path / "sincos.npz").model.image
    assert (image.position_embedding, image.image_size) == ("sincos2d", 224)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conv_root/kernel", (7, 7, 3, 8), "hold 'conv_root/kernel'"),
        ("embedding/kernel", (1, 1, 64, WIDTH), "hybrid models"),
        ("cls", (1, 1, WIDTH + 1), r"'cls' has shape \(1, 1, 33\)"),
    ],
)
def test_odd_archives_give_one_line(name, shape, message, tmp_path):
    np.savez(tmp_path / "odd.npz", **augreg_archive() | {name: np.zeros(shape, np.float32)})
    with pytest.raises(UserError, match=message) as caught:
        single_tower.read_npz(tmp_path / "odd.npz")
    assert "\n" not in str(caught.value)


def test_single_towers_are_not_written(tmp_path):
    np.savez(tmp_path / "augreg.npz", **augreg_archive())
    weights = single_tower.read(tmp_path / "augreg.npz")
    for format in ("huggingface", "big_vision"):
        with pytest.raises(UserError, match="image tower"):
            export_weights(weights, format, tmp_path / "out")


# ---- transformers ----------------------------------------------------------------------------

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
}
IMAGE_SIZES = SIZES | {"image_size": GRID * PATCH, "patch_size": PATCH}
BERT_SIZES = SIZES | {"vocab_size": 40, "max_position_embeddings": 12}


def saved(kind, config, folder):
    """A random model of transformers, every parameter moved, and its directory."""
    from interop.hf_models import torch, transformers  # skips where there is none

    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config[0])(**config[1])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def features_of_vision(model, images):
    from interop.hf_models import torch

    with torch.no_grad():
        out = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
    return out


@pytest.mark.parametrize(
    ("kind", "config", "left_out"),
    [
        ("ViTModel", ("ViTConfig", IMAGE_SIZES), 2),
        ("ViTForImageClassification", ("ViTConfig", IMAGE_SIZES | {"hidden_act": "gelu_new"}), 2),
        ("SiglipVisionModel", ("SiglipVisionConfig", IMAGE_SIZES), 0),
        ("CLIPVisionModel", ("CLIPVisionConfig", IMAGE_SIZES), 0),
        ("CLIPVisionModelWithProjection", ("CLIPVisionConfig", IMAGE_SIZES), 1),
    ],
)
def test_image_towers_equal_transformers(kind, config, left_out, tmp_path):
    model = saved(kind, config, tmp_path)
    weights, images = huggingface.read(tmp_path), sample_images()
    assert weights.parts == ("image",)
    assert len(weights.extras.get("left_out", [])) == left_out
    base = {"ViTForImageClassification": "vit", "CLIPVisionModelWithProjection": "vision_model"}
    model = getattr(model, base[kind]) if kind in base else model
    out = features_of_vision(model, images)
    # transformers' ViT has a pooler of its own; the tower ends in the class token's features.
    pooled = out.last_hidden_state[:, 0] if kind.startswith("ViT") else out.pooler_output
    ours = embed(weights, {"image": images})["image"]
    np.testing.assert_allclose(ours, unit(pooled.numpy()), atol=LIMIT, rtol=0)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_bert_equals_transformers(kind, tmp_path):
    model = saved(kind, ("BertConfig", BERT_SIZES), tmp_path)
    from interop.hf_models import torch

    weights = huggingface.read(tmp_path)
    assert (weights.parts, weights.model.text.pooler) == (("text",), kind == "BertModel")
    tokens = np.random.default_rng(1).integers(1, 40, (3, 12), dtype=np.int32)
    for row, length in zip(tokens, (12, 5, 1), strict=True):
        row[length:] = 0
    bert = model.bert if kind == "BertForMaskedLM" else model
    with torch.no_grad():
        out = bert(torch.tensor(tokens), attention_mask=torch.tensor(tokens != 0))
    pooled = out.pooler_output if kind == "BertModel" else out.last_hidden_state[:, 0]
    ours = embed(weights, {"tokens": tokens})["text"]
    np.testing.assert_allclose(ours, unit(pooled.numpy()), atol=LIMIT, rtol=0)


def test_first_names_of_berts_norms(tmp_path):
    from clip_jax.interop.tensors import read_tensors, write_safetensors

    saved("BertModel", ("BertConfig", BERT_SIZES), tmp_path)
    expected = huggingface.read(tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in tensors.items()
    }
    old["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    old["bert.embeddings.position_ids"] = np.arange(12)[None]
    assert "bert.embeddings.LayerNorm.gamma" in old
    write_safetensors(tmp_path / "model.safetensors", old)
    weights = huggingface.read(tmp_path)
    assert weights.extras["left_out"] == ["cls.seq_relationship.bias"]
    for path, array in expected.arrays.items():
        np.testing.assert_array_equal(weights.arrays[path], array)


def test_preprocessing_of_vit(tmp_path):
    """Its own where nothing is said, and what its file says, with or without the class named."""
    saved("ViTModel", ("ViTConfig", IMAGE_SIZES), tmp_path)
    image = single_tower.read_huggingface(tmp_path).model.image
    assert (image.resize, image.interpolation, image.std) == ("squash", "bilinear", (0.5, 0.5, 0.5))
    file = tmp_path / "preprocessor_config.json"
    file.write_text(
        json.dumps({"size": GRID * PATCH, "image_mean": [0.1, 0.2, 0.3], "resample": 3})
    )
    image = single_tower.read_huggingface(tmp_path).model.image
    assert (image.resize, image.interpolation, image.mean) == ("squash", "bicubic", (0.1, 0.2, 0.3))


def test_other_directories_are_none_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert single_tower.read_huggingface(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mobilenet_v2"}, "unknown model_type 'mobilenet_v2'; known: .*clip.*vit"),
        ({"hidden_act": "swish"}, "unknown activation hidden_act 'swish'"),
        ({"qkv_bias": False}, "qkv_bias must be true"),
        ({"num_hidden_layers": 3}, r"lack 'encoder\.layer\.2"),
    ],
)
def test_odd_directories_give_one_line(change, message, tmp_path):
    saved("ViTModel", ("ViTConfig", IMAGE_SIZES), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        huggingface.read(tmp_path)
    assert "\n" not in str(caught.value)
