"""The fields of open_clip's `open_clip_config.json`: their defaults, types, and which we have."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from clip_jax.config import ImageTowerConfig, ModelConfig, UserError

Fields = dict[str, Any]
T = TypeVar("T")

# Every key of CLIPVisionCfg, CLIPTextCfg and CLIP of open_clip 3.3.0, with its default there. None
# stands for 'not given', also where open_clip has a value for that.
_BLOCK: Fields = {
    "block_type": None,  # 'custom' has the names and the arithmetic of 'default'
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "qk_norm": False,
    "output_tokens": False,
    "ls_init_value": None,
    "mlp_ratio": 4.0,
    "act_kwargs": None,
    "norm_kwargs": None,
    "final_ln_after_pool": False,
}
DEFAULTS: dict[str, Fields] = {
    "vision_cfg": _BLOCK
    | {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop": 0.0,
        "timm_drop_path": None,
    },
    "text_cfg": _BLOCK
    | {
        "context_length": 77,
        "vocab_size": 49408,
        "hf_tokenizer_name": None,
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "embed_cls": False,
        "pad_id": None,
        "eos_id": None,
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "hf_model_name": None,
        "hf_model_pretrained": True,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    },
    "model_cfg": {
        "embed_dim": None,
        "vision_cfg": {},
        "text_cfg": {},
        "quick_gelu": False,
        "custom_text": False,
        "init_logit_scale": None,
        "init_logit_bias": None,
        "nonscalar_logit_scale": False,
        "multimodal_cfg": None,
        "output_dict": False,
        "cast_dtype": None,
    },
}
DEFAULT_EOS_ID = 2  # with pool_type 'eos'
_TYPES = {  # of those without a default
    "act_kwargs": dict,
    "block_type": str,
    "embed_dim": int,
    "eos_id": int,
    "hf_model_name": str,
    "hf_tokenizer_name": str,
    "init_logit_bias": float,
    "init_logit_scale": float,
    "ls_init_value": float,
    "norm_kwargs": dict,
    "pad_id": int,
    "timm_model_name": str,
    "tokenizer_kwargs": dict,
}
_NULLABLE = ("hf_pooler_type", "hf_proj_type", "patch_size")
_POSITIVE = (
    *("context_length", "embed_dim", "head_width", "heads", "image_size", "layers", "mlp_ratio"),
    *("patch_size", "vocab_size", "width"),
)
_SEVERAL = ("image_size", "layers", "patch_size")  # a number or a list of them
# What no tower of ours does, unless it is left at open_clip's default.
_OFF = {
    "vision_cfg": (
        *("attentional_pool", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"),
        *("scale_attn", "scale_fc", "pos_embed_type"),
    ),
    "text_cfg": (
        *("scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
        *("qk_norm", "ls_init_value", "embed_cls", "tokenizer_mode"),
    ),
    "model_cfg": ("multimodal_cfg",),
}
_PREPROCESS: Fields = {
    "mean": ImageTowerConfig.mean,
    "std": ImageTowerConfig.std,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "mode": "RGB",
}


def filled_in(where: str, given: Any) -> Fields:
    """One group of the config with its defaults. Raises UserError that names an odd field."""
    if not isinstance(given, dict):
        raise UserError(f"open_clip_config.json: {where} {given!r} is not an object")
    defaults = DEFAULTS[where]
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"open_clip_config.json: {where}.{key} {value!r} is unknown")
        if key in _OFF[where] and value != defaults[key]:
            raise unsupported(f"{where}.{key}", value)
        default = defaults[key]
        if value is None and (default is None or key in _NULLABLE):
            continue
        kind = _TYPES.get(key, object) if default is None else type(default)
        parts = value if key in _SEVERAL and isinstance(value, list) and value else [value]
        for part in parts:
            # bool is an int to Python, and JSON writes 4.0 as 4.
            fits = isinstance(part, int | float if kind is float else kind)
            if not fits or (isinstance(part, bool) and kind in (int, float)):
                raise unsupported(f"{where}.{key}", value)
            if key in _POSITIVE and part <= 0:
                raise unsupported(f"{where}.{key}", value)
    return defaults | given


def read_preprocess(given: Any) -> Fields:
    """Fields of the image tower's config for `preprocess_cfg`."""
    if not isinstance(given, dict):
        raise UserError(f"open_clip_config.json: preprocess_cfg {given!r} is not an object")
    cfg = _PREPROCESS | {key: given[key] for key in _PREPROCESS if given.get(key) is not None}
    for key in ("mean", "std"):
        values = cfg[key] if isinstance(cfg[key], list | tuple) else [cfg[key]] * 3
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise unsupported(f"preprocess_cfg.{key}", cfg[key])
        cfg[key] = tuple(float(value) for value in values)
    known("preprocess_cfg.mode", cfg["mode"], {"RGB": "RGB"})
    modes = {"shortest": "shortest", "squash": "squash"}
    # 'random' concerns training.
    interpolations = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
    interpolation = known("preprocess_cfg.interpolation", cfg["interpolation"], interpolations)
    return {
        "mean": cfg["mean"],
        "std": cfg["std"],
        "resize": known("preprocess_cfg.resize_mode", cfg["resize_mode"], modes),
        "interpolation": interpolation,
    }


def write_preprocess(image: ImageTowerConfig) -> Fields:
    return {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "resize_mode": image.resize,
    }


def known(field: str, value: Any, table: Mapping[Any, T]) -> T:
    """What stands for `value` in the table. Raises UserError that names the field."""
    if not isinstance(value, str | None) or value not in table:
        raise unsupported(field, value, f"; supported: {', '.join(map(repr, table))}")
    return table[value]


def unsupported(field: str, value: Any, more: str = "") -> UserError:
    return UserError(f"open_clip_config.json: {field} {value!r} is not supported{more}")


# ---- Settings of training, in a group of our own, where open_clip has no place for them ----------

OWN_GROUP = "clip_jax"
_OWN = (
    *("name", "logit_scale_max"),
    *("image.batch_norm", "image.batch_norm_group_size", "text.token_embedding_std"),
)


def write_own(model: ModelConfig) -> Fields:
    """Those that differ from their defaults."""
    values = {key: _get(model, key) for key in _OWN}
    return {key: value for key, value in values.items() if value != _get(ModelConfig(), key)}


def read_own(model: ModelConfig, given: Any) -> ModelConfig:
    """`model` with what `write_own` wrote."""
    for key, value in given.items() if isinstance(given, dict) else ():
        if key not in _OWN or not isinstance(value, type(_get(model, key))):
            raise unsupported(f"{OWN_GROUP}.{key}", value)
        group, _, name = key.rpartition(".")
        if group:
            tower = dataclasses.replace(getattr(model, group), **{name: value})
            model = dataclasses.replace(model, **{group: tower})
        else:
            model = dataclasses.replace(model, **{name: value})
    return model


def _get(model: ModelConfig, key: str) -> Any:
    group, _, name = key.rpartition(".")
    return getattr(getattr(model, group) if group else model, name)
