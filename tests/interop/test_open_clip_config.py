"""open_clip's configs and ours, both ways."""

import dataclasses
from pathlib import Path

import pytest
from peers import open_clip_or_skip

from clip_jax.config import PRESETS, UserError
from clip_jax.interop.open_clip_reading import read_config
from clip_jax.interop.open_clip_writing import write_config


def test_configs_of_open_clip():
    """Each is read and written back alike, or refused by name; ours of the same name is equal."""
    open_clip = open_clip_or_skip()
    read, presets = {}, 0
    for name in open_clip.list_models():
        content = {"model_cfg": open_clip.get_model_config(name)}
        try:
            model = read_config(content, Path("nowhere"), None)
        except UserError:
            continue
        read[name] = model
        custom_text = content["model_cfg"].get("custom_text", False)
        again = write_config(model, custom_text=custom_text, vector_scalars=False)
        assert read_config(again, Path("nowhere"), None) == model, name
        if name in PRESETS and "SigLIP" not in name:
            assert shape_of(PRESETS[name]) == shape_of(model), name
            presets += 1
    assert presets >= 50
    # What is left are other trunks of timm, other text encoders of transformers, and CoCa.
    for name in set(open_clip.list_models()) - set(read):
        cfg = open_clip.get_model_config(name)
        trunk = cfg["vision_cfg"].get("timm_model_name", "")
        odd_image = trunk and ("_siglip_" not in trunk or trunk.endswith("patch14_siglip_384"))
        assert odd_image or "hf_model_name" in cfg["text_cfg"] or "multimodal_cfg" in cfg, name


def test_a_scale_beyond_100_stays_under_the_sigmoid_loss():
    cfg = {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {}}
    for change, highest in (({}, 100.0), ({"init_logit_bias": -10}, 1000.0)):
        model = read_config({"model_cfg": cfg | change}, Path("nowhere"), None)
        assert model.logit_scale_max == highest


def shape_of(model):
    """All but what only the file of weights says: preprocessing, and the tokenizer's ids."""
    image = dataclasses.replace(
        model.image, mean=(0,) * 3, std=(1,) * 3, resize="squash", interpolation="bicubic"
    )
    text = dataclasses.replace(model.text, eot_id=0, pad_id=0)
    return dataclasses.replace(model, name="", image=image, text=text)


REFUSED = [
    ("vision_cfg", {"attentional_pool": True}),
    ("vision_cfg", {"act_kwargs": {"approximate": "sigmoid"}}),
    ("vision_cfg", {"act_kwargs": {"inplace": True}}),
    ("vision_cfg", {"norm_kwargs": {"bias": False}}),
    ("vision_cfg", {"pool_type": "none"}),
    ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}),
    ("vision_cfg", {"timm_model_name": "convnext_base"}),
    ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "avg"}),
    ("vision_cfg", {"image_size": [224, 112]}),
    ("vision_cfg", {"width": "768"}),
    ("vision_cfg", {"head_width": 100}),
    ("vision_cfg", {"layers": [1, 2, 3]}),
    ("vision_cfg", {"depth": 12}),
    ("vision_cfg", {"scale_heads": True}),
    ("text_cfg", {"embed_cls": True}),
    ("text_cfg", {"ls_init_value": 0.1}),
    ("text_cfg", {"pool_type": "none"}),
    ("text_cfg", {"proj_type": "mlp"}),
    ("text_cfg", {"heads": 0}),
    ("text_cfg", {"hf_model_name": "roberta-base"}),
    ("text_cfg", {"hf_model_name": "bert-base-uncased", "hf_pooler_type": "max_pooler"}),
    ("model_cfg", {"multimodal_cfg": {"width": 512}}),
    ("model_cfg", {"embed_dim": None}),
    ("preprocess_cfg", {"resize_mode": "longest"}),
    ("preprocess_cfg", {"interpolation": "nearest"}),
    ("preprocess_cfg", {"mean": [0.5, 0.5]}),
]


@pytest.mark.parametrize(("group", "fields"), REFUSED, ids=lambda value: str(value)[:50])
def test_odd_fields_are_named(group, fields):
    cfg = {"embed_dim": 64, "vision_cfg": {}, "text_cfg": {}}
    content = {"model_cfg": cfg, "preprocess_cfg": {}}
    ({"model_cfg": cfg, **content}[group] if group in content else cfg[group]).update(fields)
    field = list(fields)[-1]
    with pytest.raises(UserError, match=field) as caught:
        read_config(content, Path("nowhere"), None)
    assert "\n" not in str(caught.value)


UNWRITABLE = [
    ("image", {"activation": "swiglu"}, "swiglu"),
    ("image", {"activation": "quick_gelu"}, "one quick_gelu for both"),
    ("image", {"num_registers": 4}, "num_registers 4"),
    ("image", {"class_token": False, "pooling": "mean"}, "class_token False"),
    ("image", {"patch_bias": True}, "patch_bias True"),
    ("image", {"position_embedding": "sincos2d"}, "sincos2d"),
    ("image", {"kind": "naflex"}, "naflex"),
    ("text", {"pooling": "mean"}, "pooling 'mean'"),
    ("text", {"kind": "cbow"}, "cbow"),
    ("text", {"activation": "swiglu"}, "swiglu"),
    (None, {"text_projection": "mlp"}, "text_projection 'mlp'"),
    (None, {"image_projection": "none"}, "image_projection 'none'"),
]


@pytest.mark.parametrize(("tower", "changes", "named"), UNWRITABLE)
def test_what_open_clip_does_not_have_is_named(tower, changes, named):
    model = PRESETS["ViT-B-32"]
    if tower:
        changes = {tower: dataclasses.replace(getattr(model, tower), **changes)}
    with pytest.raises(UserError, match=named) as caught:
        write_config(dataclasses.replace(model, **changes), custom_text=False, vector_scalars=False)
    assert "\n" not in str(caught.value)


def test_the_activation_of_a_siglip_trunk_is_named():
    """timm runs the first SigLIP with the exact GELU, with which it was not trained."""
    with pytest.raises(UserError, match=r"vit_base_patch16_siglip_224.*activation 'gelu_tanh'"):
        write_config(PRESETS["ViT-B-16-SigLIP"], custom_text=True, vector_scalars=False)
