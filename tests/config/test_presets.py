import importlib.util
import json
from pathlib import Path

import pytest

from clip_jax.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    SourceConfig,
    TokenizerConfig,
    preset,
    validate,
)
from clip_jax.config.presets import PRESET_FAMILIES

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Shapes of timm's towers that open_clip's configs only name: width, depth, heads, MLP width.
TIMM_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}


def open_clip_configs():
    """By name; empty where open_clip is not installed. Nothing of it is imported."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def size(tower):
    return tower.width, tower.depth, tower.num_heads, round(tower.width * tower.mlp_ratio)


def their_size(config, heads):
    width = config["width"]
    return width, config["layers"], heads, int(width * config.get("mlp_ratio", 4.0))


def test_keys_are_names_and_every_preset_has_its_family():
    assert all(name == model.name for name, model in PRESETS.items())
    assert list(PRESET_FAMILIES) == list(PRESETS)
    assert all(isinstance(family, tuple) for family in PRESET_FAMILIES.values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name):
    model = preset(name)
    loss = "softmax" if model.logit_bias_init is None else "sigmoid"
    config = ExperimentConfig(
        model=model,
        loss=LossConfig(kind=loss),
        data=DataConfig(
            sources={"pairs": SourceConfig(path="pairs-{000..009}.tar")},
            tokenizer=TokenizerConfig(kind="file", path="tokenizer.json"),
        ),
    )
    assert validate(config) is config


@pytest.mark.parametrize("name", PRESETS)
def test_towers_are_those_of_the_open_clip_config_of_that_name(name):
    configs = open_clip_configs()
    if not configs:
        pytest.skip("open_clip is not installed (pip install 'clip-jax-training[verify]')")
    if name not in configs:
        pytest.skip("a name of our own")
    model, theirs = preset(name), configs[name]
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    assert model.embed_dim == theirs["embed_dim"]
    assert model.logit_bias_init == theirs.get("init_logit_bias")
    assert (model.text.activation == "quick_gelu") == theirs.get("quick_gelu", False)
    assert model.image.image_size == vision["image_size"]
    if "timm_model_name" in vision:
        _, kind, patch, _, _ = vision["timm_model_name"].split("_")
        assert size(model.image) == TIMM_SIZES[kind]
        assert model.image.patch_size == int(patch.removeprefix("patch"))
        assert (vision["timm_pool"], model.image.pooling) == ("map", "attention")
        assert (vision["timm_proj"], model.image_projection) == ("none", "none")
    elif isinstance(vision["layers"], list):
        assert model.image.kind == "resnet"
        assert model.image.resnet_layers == tuple(vision["layers"])
        assert model.image.width == vision["width"]
        assert model.image.num_heads == vision["width"] * 32 // 64
    else:
        heads = vision["width"] // vision.get("head_width", 64)
        assert size(model.image) == their_size(vision, heads)
        assert model.image.patch_size == vision["patch_size"]
        assert model.image.pre_norm is not vision.get("no_ln_pre", False)
        pooling = {"tok": "class_token", "avg": "mean"}[vision.get("pool_type", "tok")]
        assert model.image.pooling == pooling
        assert model.image.norm_after_pooling == vision.get("final_ln_after_pool", False)
        assert model.image.layer_scale_init == vision.get("ls_init_value")
        assert model.image.activation == model.text.activation
    assert size(model.text) == their_size(text, text["heads"])
    assert model.text.context_length == text["context_length"]
    assert model.text.vocab_size == text["vocab_size"]
    assert model.text.causal is not text.get("no_causal_mask", False)
    pooling = {"argmax": "eot", "eos": "eot", "last": "last"}[text.get("pool_type", "argmax")]
    assert model.text.pooling == pooling
    if "eos_id" in text:
        assert model.text.eot_id == text["eos_id"]
    assert model.text.layer_norm_epsilon == text.get("norm_kwargs", {}).get("eps", 1e-5)
    projection = "linear_bias" if text.get("proj_bias") else text.get("proj_type", "linear")
    assert model.text_projection == projection


@pytest.mark.parametrize(
    ("name", "mean", "std", "resize", "interpolation"),
    # From `pretrained.py` of open_clip 3.3.0; naflex: the image processor of transformers.
    [
        ("RN50-quickgelu", OPENAI_MEAN, OPENAI_STD, "shortest", "bicubic"),
        ("ViT-B-32-quickgelu", OPENAI_MEAN, OPENAI_STD, "shortest", "bicubic"),
        ("ViT-H-14", OPENAI_MEAN, OPENAI_STD, "shortest", "bicubic"),
        ("ViT-H-14-378-quickgelu", OPENAI_MEAN, OPENAI_STD, "squash", "bicubic"),
        ("ViT-H-14-worldwide-quickgelu", OPENAI_MEAN, OPENAI_STD, "shortest", "bicubic"),
        ("ViT-H-14-worldwide-378", OPENAI_MEAN, OPENAI_STD, "squash", "bicubic"),
        ("ViT-bigG-14-worldwide", OPENAI_MEAN, OPENAI_STD, "shortest", "bicubic"),
        ("ViT-bigG-14-worldwide-378", OPENAI_MEAN, OPENAI_STD, "squash", "bicubic"),
        ("ViT-L-14-CLIPA", IMAGENET_MEAN, IMAGENET_STD, "squash", "bilinear"),
        ("ViT-bigG-14-CLIPA-336", IMAGENET_MEAN, IMAGENET_STD, "squash", "bilinear"),
        ("ViT-B-16-SigLIP", HALF, HALF, "squash", "bicubic"),
        ("ViT-gopt-16-SigLIP2-384", HALF, HALF, "squash", "bicubic"),
        ("ViT-B-16-SigLIP2-NaFlex", HALF, HALF, "squash", "bilinear"),
    ],
)
def test_preprocessing_is_that_of_the_released_models(name, mean, std, resize, interpolation):
    image = preset(name).image
    assert (image.mean, image.std) == (mean, std)
    assert (image.resize, image.interpolation) == (resize, interpolation)


@pytest.mark.parametrize("name", [name for name in PRESETS if "SigLIP" in name])
def test_siglip_is_as_in_transformers(name):
    # Defaults of `SiglipConfig`, `Siglip2Config` and their tokenizers (transformers 5).
    model = preset(name)
    for tower in (model.image, model.text):
        assert tower.activation == "gelu_tanh"
        assert tower.layer_norm_epsilon == 1e-6
    assert model.image.patch_bias
    assert not model.image.class_token
    assert not model.image.pre_norm
    assert model.text.eot_id == 1
    assert model.text.pad_id == (0 if "SigLIP2" in name else 1)
    assert (model.logit_scale_init, model.logit_bias_init) == (10.0, -10.0)
    assert model.logit_scale_max > 117.33  # the scale of siglip-base-patch16-224


def test_end_of_text_of_the_others():
    assert preset("ViT-B-32").text.eot_id == 49407
    assert preset("ViT-L-14-CLIPA").text.eot_id is None  # its tokenizer strips [SEP]
    assert preset("LiT-B-16-BERT-B").text.eot_id == 102
    assert (preset("ViT-H-14-worldwide-378").text.pad_id) == 1


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean ViT-B-32\? \(`clip-jax models`"):
        preset("vit-b-32")
