"""Models of transformers here and back: the same embeddings, the same bytes."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from interop.hf_models import (
    VOCAB,
    clip_config,
    dual_config,
    features,
    random_model,
    siglip_config,
    torch,
    transformers,
)

from clip_jax.config import UserError
from clip_jax.interop import huggingface
from clip_jax.interop.embeddings import embed
from clip_jax.interop.tensors import read_tensors, write_safetensors
from clip_jax.interop.weights import model_shapes

CASES = {
    "ViT-B-32": lambda: clip_config(
        (768, 2, 12),
        (512, 2, 8),
        patch_size=32,
        image_size=224,
        projection_dim=512,
        activation="gelu",
    ),
    "ViT-B-32-quickgelu": lambda: clip_config(
        (768, 2, 12), (512, 2, 8), patch_size=32, image_size=224, projection_dim=512
    ),
    "ViT-L-14-336": lambda: clip_config(
        (1024, 1, 16), (768, 1, 12), patch_size=14, image_size=336, projection_dim=768
    ),
    "ViT-H-14": lambda: clip_config(
        (1280, 1, 16),
        (1024, 1, 16),
        patch_size=14,
        image_size=224,
        projection_dim=1024,
        activation="gelu",
    ),
    "SigLIP B/16": lambda: siglip_config(768, 12, 3072, depth=2, patch_size=16, image_size=224),
    "SigLIP So400m/14": lambda: siglip_config(
        1152, 16, 4304, depth=1, patch_size=14, image_size=224
    ),
    # As So400m/14 at 384 pixels: the last 6 of 48 are in no patch.
    "SigLIP, pixels left over": lambda: siglip_config(
        64, 2, 128, depth=1, patch_size=14, image_size=48
    ),
    "SigLIP 2 NaFlex": lambda: siglip_config(
        768, 12, 3072, depth=2, naflex=True, patch_size=16, num_patches=256
    ),
    "CLIP vision and BERT": lambda: dual_config(
        transformers.CLIPVisionConfig(num_hidden_layers=2, layer_norm_eps=1e-6)
    ),
    "SigLIP vision and BERT": lambda: dual_config(
        transformers.SiglipVisionConfig(num_hidden_layers=1), depth=1
    ),
}
SMALL = (32, 2, 2)
ROWS = 2


def small_clip():
    return random_model(clip_config(SMALL, SMALL, patch_size=16, image_size=32, projection_dim=16))


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    small_clip().save_pretrained(folder)
    return folder


@pytest.fixture
def edited(clip_directory, tmp_path):
    """A copy of the small CLIP with another config."""

    def edit(change, source=clip_directory):
        config = json.loads((source / "config.json").read_text())
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        return tmp_path

    return edit


def image_inputs(model, rng):
    """(ours, theirs)"""
    image = model.image
    if image.kind != "naflex":
        size = image.image_size
        pixels = rng.standard_normal((ROWS, size, size, 3)).astype(np.float32)
        return {"image": pixels}, {"pixel_values": pixels.transpose(0, 3, 1, 2)}
    shapes = np.array([[10, 20], [13, 9]])
    mask = np.arange(256) < shapes.prod(axis=1)[:, None]
    patches = rng.standard_normal((ROWS, 256, 3 * image.patch_size**2)).astype(np.float32)
    ours = {"patches": patches, "patch_mask": mask, "spatial_shapes": shapes.astype(np.int32)}
    theirs = {"pixel_values": patches, "pixel_attention_mask": mask.astype(np.int32)}
    return ours, theirs | {"spatial_shapes": shapes}


def text_inputs(model, rng):
    text = model.text
    length = text.context_length
    tokens = rng.integers(3, text.vocab_size - 2, (ROWS, length)).astype(np.int32)
    ends = np.array([length // 3, length])
    past = np.arange(length) >= ends[:, None]
    if text.pooling == "eot":
        tokens[np.arange(ROWS), ends - 1] = text.eot_id
    if text.pooling != "last":
        tokens[past] = 0
    theirs = {"input_ids": tokens.astype(np.int64)}
    if text.kind == "bert":
        theirs["attention_mask"] = (~past).astype(np.int64)
    return {"tokens": tokens}, theirs


LARGE = ("ViT-L-14-336", "ViT-H-14", "SigLIP So400m/14")  # of the same kinds as the others


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in LARGE else []) for case in CASES],
)
def test_transformers_here_and_back(case, tmp_path):
    peer = random_model(CASES[case]())
    peer.save_pretrained(tmp_path / "theirs")
    weights = huggingface.read(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    images, their_images = image_inputs(weights.model, rng)
    tokens, their_tokens = text_inputs(weights.model, rng)
    ours = embed(weights, images | tokens)
    theirs = {"image": features(peer, **their_images), "text": features(peer, **their_tokens)}
    for tower in ("image", "text"):
        assert np.abs(ours[tower] - theirs[tower]).max() <= 1e-5
        assert np.abs(theirs[tower][0] - theirs[tower][1]).max() > 1e-3  # rows tell inputs apart

    (tmp_path / "ours").mkdir()
    huggingface.write(weights, tmp_path / "ours")
    before, after = (
        read_tensors(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        assert after[name].tobytes() == tensor.tobytes()
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(again) is type(peer)
    np.testing.assert_array_equal(features(again, **their_tokens), theirs["text"])
    np.testing.assert_array_equal(features(again, **their_images), theirs["image"])
    reread = huggingface.read(tmp_path / "ours")
    assert reread.model == weights.model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_keep_their_bytes(clip_directory, tmp_path, dtype):
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    tensors = read_tensors(clip_directory / "model.safetensors")
    tensors = {name: tensor.astype(kind) for name, tensor in tensors.items()}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs/config.json").write_text((clip_directory / "config.json").read_text())
    write_safetensors(tmp_path / "theirs/model.safetensors", tensors)
    huggingface.write(huggingface.read(tmp_path / "theirs"), tmp_path / "ours")
    after = read_tensors(tmp_path / "ours/model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in after.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["torch_dtype"] == dtype
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == getattr(torch, dtype)


def test_shards_and_torch_files(clip_directory, tmp_path):
    whole = huggingface.read(clip_directory)
    peer = transformers.AutoModel.from_pretrained(clip_directory)
    peer.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    (tmp_path / "torch").mkdir()
    torch.save(peer.state_dict(), tmp_path / "torch/pytorch_model.bin")
    config = (clip_directory / "config.json").read_text()
    (tmp_path / "torch/config.json").write_text(config)
    for name in ("shards", "torch"):
        read = huggingface.read(tmp_path / name)
        assert read.model == whole.model
        for path, array in whole.arrays.items():
            np.testing.assert_array_equal(read.arrays[path], array)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"there is no file .*model-00002"):
        huggingface.read(tmp_path / "shards")


def test_buffers_of_older_versions_are_passed_over(clip_directory, tmp_path):
    tensors = read_tensors(clip_directory / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    (tmp_path / "config.json").write_text((clip_directory / "config.json").read_text())
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert (
        huggingface.read(tmp_path).arrays.keys() == huggingface.read(clip_directory).arrays.keys()
    )


@pytest.mark.parametrize("kind", ["CLIPConfig", "SiglipConfig", "Siglip2Config"])
def test_settings_left_out_are_those_of_the_config_class(kind, tmp_path):
    """Files on the hub say little more than the class: SigLIP's base model next to nothing."""
    full = getattr(transformers, kind)()
    bare = {"model_type": full.model_type, "text_config": {}, "vision_config": {}}
    tensors = {}
    with torch.device("meta"):
        for name, tensor in transformers.AutoModel.from_config(full).state_dict().items():
            tensors[name] = np.zeros(tuple(tensor.shape), np.float16)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(bare))
    model = huggingface.read(tmp_path).model
    vision, text = full.vision_config, full.text_config
    for ours, theirs in ((model.image, vision), (model.text, text)):
        assert (ours.width, ours.depth, ours.num_heads) == (
            theirs.hidden_size,
            theirs.num_hidden_layers,
            theirs.num_attention_heads,
        )
        assert round(ours.width * ours.mlp_ratio) == theirs.intermediate_size
        assert ours.layer_norm_epsilon == theirs.layer_norm_eps
        names = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
        assert ours.activation == names[theirs.hidden_act]
    assert model.text.context_length == text.max_position_embeddings
    assert model.image.patch_size == vision.patch_size


def test_old_eos_means_the_largest_token(edited, tmp_path):
    weights = huggingface.read(edited(lambda c: c["text_config"].update(eos_token_id=2)))
    assert weights.model.text.eot_id == VOCAB - 1
    peer = transformers.AutoModel.from_pretrained(tmp_path)
    tokens, theirs = text_inputs(weights.model, np.random.default_rng(0))
    np.testing.assert_allclose(
        embed(weights, tokens)["text"], features(peer, **theirs), atol=1e-5, rtol=0
    )


def test_token_2_as_end_of_text_needs_metaclip(edited, tmp_path):
    """Our own tokenizers end texts with token 2, which CLIPModel takes for an old mistake."""
    weights = huggingface.read(edited(lambda c: None))
    text = dataclasses.replace(weights.model.text, eot_id=2)
    weights = dataclasses.replace(weights, model=dataclasses.replace(weights.model, text=text))
    (tmp_path / "ours").mkdir()
    huggingface.write(weights, tmp_path / "ours")
    peer = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(peer) is transformers.MetaClip2Model
    tokens, theirs = text_inputs(weights.model, np.random.default_rng(0))
    np.testing.assert_allclose(
        embed(weights, tokens)["text"], features(peer, **theirs), atol=1e-5, rtol=0
    )
    assert huggingface.read(tmp_path / "ours").model == weights.model


def test_configs_of_2022_say_it_twice(edited):
    """`text_config_dict` is what counts, with the class's defaults for what it leaves out."""

    def older(config):
        config["text_config_dict"] = {
            name: config["text_config"][name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "vocab_size",
                "eos_token_id",
            )
        }
        config["text_config"] |= {"layer_norm_eps": 1e-3}

    assert huggingface.read(edited(older)).model.text.layer_norm_epsilon == 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["text_config"].update(hidden_act="mish"),
            "unknown activation .*'mish'; known:",
        ),
        (
            lambda c: c["vision_config"].update(hidden_size="32"),
            "hidden_size must be a whole number",
        ),
        (lambda c: c["vision_config"].update(num_attention_heads=3), "32 is not divisible by .* 3"),
        (
            lambda c: c["vision_config"].update(image_size=[32, 48]),
            "image_size must be the side of",
        ),
        (lambda c: c["vision_config"].update(image_size=48), "image/position_embedding|shape"),
        (lambda c: c["vision_config"].update(num_channels=1), "num_channels must be 3"),
        (
            lambda c: c["text_config"].update(num_hidden_layers=3),
            "lack 'text_model.encoder.layers.2",
        ),
        (lambda c: c["text_config"].update(num_hidden_layers=1), "hold 'text_model.*no place for"),
        (lambda c: c.update(projection_dim=8), r"shape \(16, 32\), but the model needs \(8, 32\)"),
        (lambda c: c.update(text_config=3), "text_config must be a group of settings"),
    ],
)
def test_odd_configs_are_one_line(edited, change, message):
    with pytest.raises(UserError, match=message) as error:
        huggingface.read(edited(change))
    assert "\n" not in str(error.value)


def test_heads_that_are_not_there(tmp_path):
    vision = transformers.ViTConfig().to_dict()
    config = {"model_type": "vision-text-dual-encoder", "vision_config": vision, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the image tower 'vit' .*dense layer and a tanh"):
        huggingface.read(tmp_path)
    siglip = {"model_type": "siglip", "vision_config": {"vision_use_head": False}}
    (tmp_path / "config.json").write_text(json.dumps(siglip))
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(1)})
    with pytest.raises(UserError, match="without vision_use_head there is no image embedding"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize(
    ("tower", "fields", "named"),
    [
        ("image", {"pooling": "mean"}, "image.pooling='mean' .*'class_token'"),
        ("image", {"activation": "swiglu"}, "no activation 'swiglu'"),
        ("image", {"layer_scale_init": 0.1}, "image.layer_scale_init=0.1"),
        ("image", {"num_registers": 4}, "image.num_registers=4"),
        ("image", {"qk_norm": True}, "image.qk_norm=True"),
        ("image", {"pre_norm": False}, "image.pre_norm=False"),
        ("image", {"kind": "resnet"}, "image.kind='resnet'"),
        ("text", {"causal": False}, "text.causal=False"),
        ("text", {"pooling": "mean"}, "text.pooling='mean'"),
        ("", {"text_projection": "mlp"}, "model.text_projection='mlp'"),
        ("", {"logit_bias_init": -10.0}, "logit_bias_init=-10.0 .*no bias"),
    ],
)
def test_what_transformers_cannot_say_is_refused(clip_directory, tmp_path, tower, fields, named):
    weights = huggingface.read(clip_directory)
    model = weights.model
    if tower:
        fields = {tower: dataclasses.replace(getattr(model, tower), **fields)}
    weights = dataclasses.replace(weights, model=dataclasses.replace(model, **fields))
    with pytest.raises(UserError, match=f"transformers.*{named}"):
        huggingface.write(weights, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_array_has_a_place(clip_directory):
    weights = huggingface.read(clip_directory)
    shapes = {path: array.shape for path, array in weights.arrays.items()}
    assert shapes == model_shapes(weights.model)
