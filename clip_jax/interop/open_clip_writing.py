"""From our config to open_clip's."""

import math
from typing import Any

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig, UserError
from clip_jax.interop.open_clip_fields import OWN_GROUP, Fields, write_own, write_preprocess
from clip_jax.interop.open_clip_reading import (
    BERT_POOLERS,
    BERT_PROJECTIONS,
    IMAGE_POOLINGS,
    RESNET_CHANNELS,
)
from clip_jax.interop.open_clip_tables import is_timm
from clip_jax.interop.open_clip_trunks import TRUNK_EPSILON, name_of_trunk, write_bert

_TEXT_POOLINGS = {"last": "last", "class_token": "first"}


def write_config(model: ModelConfig, *, custom_text: bool, vector_scalars: bool) -> Fields:
    """The content of `open_clip_config.json`, without what the tokenizer adds to it.

    Raises UserError that names the setting for which open_clip has no place.
    """
    vision_cfg, text_cfg = _write_image(model), _write_text(model)
    cfg: Fields = {"embed_dim": model.embed_dim}
    if _is_quick(model):
        cfg["quick_gelu"] = True
    if custom_text and model.text.kind != "bert":  # which makes it so by itself
        cfg["custom_text"] = True
    if model.logit_scale_init != ModelConfig.logit_scale_init:
        cfg["init_logit_scale"] = math.log(model.logit_scale_init)
    if model.logit_bias_init is not None:
        cfg["init_logit_bias"] = model.logit_bias_init
    if vector_scalars:
        cfg["nonscalar_logit_scale"] = True
    own = write_own(model)
    return {
        "model_cfg": {**cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": write_preprocess(model.image),
        **({OWN_GROUP: own} if own else {}),
    }


def _is_quick(model: ModelConfig) -> bool:
    """The one flag for both towers, for those that open_clip builds itself."""
    image, text = model.image, model.text
    activations = set()
    if image.kind == "vit" and not is_timm(image):
        activations.add(image.activation)
    if text.kind == "transformer":
        activations.add(text.activation)
    if "quick_gelu" in activations and len(activations) > 1:
        raise UserError(
            "open_clip has one quick_gelu for both towers, but model.image.activation is "
            f"{image.activation!r} and model.text.activation {text.activation!r}"
        )
    return "quick_gelu" in activations


# ---- Image towers ----------------------------------------------------------------------------


def _write_image(model: ModelConfig) -> Fields:
    image = model.image
    _refuse("model.image", image, kind=("vit", "resnet"))
    if image.kind == "resnet":
        return _write_resnet(model)
    _refuse(
        "model.image",
        image,
        stem=("patch",),
        num_registers=(0,),
        position_embedding=("learned",),
        activation=("gelu", "gelu_tanh", "quick_gelu"),
    )
    if is_timm(image):
        return _write_trunk(model)
    _refuse(
        "model.image",
        image,
        class_token=(True,),
        pooling=tuple(IMAGE_POOLINGS.values()),
        patch_bias=(False,),
    )
    _refuse("model", model, image_projection=("linear",))
    poolings: dict[str, str] = {ours: theirs for theirs, ours in IMAGE_POOLINGS.items()}
    cfg: Fields = {
        "image_size": image.image_size,
        "layers": image.depth,
        "width": image.width,
        "head_width": image.width // image.num_heads,
        "patch_size": image.patch_size,
        **_write_block(image),
    }
    if image.pooling != "class_token":
        cfg["pool_type"] = poolings[image.pooling]
    for key, value in (
        ("no_ln_pre", not image.pre_norm),
        ("final_ln_after_pool", image.norm_after_pooling),
        ("qk_norm", image.qk_norm),
        ("patch_dropout", image.patch_dropout),
    ):
        if value:
            cfg[key] = value
    if image.layer_scale_init is not None:
        cfg["ls_init_value"] = image.layer_scale_init
    return cfg


def _write_trunk(model: ModelConfig) -> Fields:
    image = model.image
    _refuse(
        "model.image",
        image,
        patch_bias=(True,),
        pre_norm=(False,),
        norm_after_pooling=(False,),
        layer_scale_init=(None,),
        qk_norm=(False,),
        layer_norm_epsilon=(TRUNK_EPSILON,),
    )
    _refuse("model", model, image_projection=("none", "linear", "linear_bias"))
    has_projection = model.image_projection != "none"
    cfg: Fields = {
        "image_size": image.image_size,
        "timm_model_name": name_of_trunk(image),
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "linear" if has_projection else "none",
    }
    if model.image_projection == "linear_bias":
        cfg["timm_proj_bias"] = True
    if image.patch_dropout:
        cfg["patch_dropout"] = image.patch_dropout
    return cfg


def _write_resnet(model: ModelConfig) -> Fields:
    image = model.image
    _refuse("model", model, image_projection=("none",))
    return {
        "image_size": image.image_size,
        "layers": list(image.resnet_layers),
        "width": image.width,
        "head_width": RESNET_CHANNELS * image.width // image.num_heads,
        "patch_size": None,
    }


# ---- Text towers -----------------------------------------------------------------------------


def _write_text(model: ModelConfig) -> Fields:
    text = model.text
    _refuse("model.text", text, kind=("transformer", "bert"))
    if text.kind == "bert":
        return _write_bert_text(model)
    _refuse(
        "model.text",
        text,
        pooling=("eot", *_TEXT_POOLINGS),
        activation=("gelu", "gelu_tanh", "quick_gelu"),
    )
    _refuse("model", model, text_projection=("linear", "linear_bias", "none"))
    cfg: Fields = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        **_write_block(text),
    }
    if text.pooling != "eot":
        cfg["pool_type"] = _TEXT_POOLINGS[text.pooling]
    elif text.eot_id != text.vocab_size - 1:  # 'argmax' takes the highest id
        cfg["pool_type"] = "eos"
    if text.eot_id is not None and cfg.get("pool_type"):
        cfg["eos_id"] = text.eot_id
    if text.pad_id:
        cfg["pad_id"] = text.pad_id
    if not text.causal:
        cfg["no_causal_mask"] = True
    if model.text_projection == "linear_bias":
        cfg["proj_bias"] = True
    elif model.text_projection == "none":
        cfg["proj_type"] = "none"
    return cfg


def _write_bert_text(model: ModelConfig) -> Fields:
    text = model.text
    poolers: dict[tuple[str, bool], str] = {ours: theirs for theirs, ours in BERT_POOLERS.items()}
    projections = {ours: theirs for theirs, ours in BERT_PROJECTIONS.items()}
    _refuse("model.text", text, activation=("gelu", "gelu_tanh", "quick_gelu"))
    _refuse("model", model, text_projection=tuple(projections))
    cfg: Fields = {
        "hf_model_name": write_bert(text)[0],
        "hf_model_pretrained": False,
        "hf_pooler_type": poolers[text.pooling, text.pooler],
        "hf_proj_type": projections[model.text_projection],
    }
    return cfg if text.eot_id is None else cfg | {"eos_id": text.eot_id}


# ---- Fields ----------------------------------------------------------------------------------


def _write_block(tower: ImageTowerConfig | TextTowerConfig) -> Fields:
    cfg: Fields = {}
    hidden = round(tower.width * tower.mlp_ratio)
    ratio = tower.mlp_ratio
    if int(tower.width * ratio) != hidden:  # open_clip cuts off
        ratio = hidden / tower.width
        while int(tower.width * ratio) < hidden:
            ratio = math.nextafter(ratio, math.inf)
    if ratio != ImageTowerConfig.mlp_ratio:
        cfg["mlp_ratio"] = ratio
    if tower.layer_norm_epsilon != ImageTowerConfig.layer_norm_epsilon:
        cfg["norm_kwargs"] = {"eps": tower.layer_norm_epsilon}
    if tower.activation == "gelu_tanh":
        cfg["act_kwargs"] = {"approximate": "tanh"}
    return cfg


def _refuse(where: str, config: Any, **accepted: tuple[Any, ...]) -> None:
    """Raises UserError where a setting has a value other than those that open_clip can have."""
    for name, values in accepted.items():
        value = getattr(config, name)
        if value not in values:
            spelled = " or ".join(map(repr, values))
            raise UserError(
                f"{where}.{name} {value!r} cannot be expressed in open_clip's format, which has "
                f"{spelled} here"
            )
