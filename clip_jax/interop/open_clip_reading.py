"""From open_clip's config to ours."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from clip_jax.config import (
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
    UserError,
)
from clip_jax.config.schema import Activation, Projection
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.open_clip_fields import (
    DEFAULT_EOS_ID,
    OWN_GROUP,
    Fields,
    filled_in,
    known,
    read_own,
    read_preprocess,
    unsupported,
)
from clip_jax.interop.open_clip_trunks import TRUNK_EPSILON, read_bert, trunk_named

IMAGE_POOLINGS: dict[str, Literal["class_token", "mean"]] = {"tok": "class_token", "avg": "mean"}
TEXT_POOLINGS: dict[str, Literal["eot", "last", "class_token"]] = {
    "argmax": "eot",
    "eos": "eot",
    "last": "last",
    "first": "class_token",
}
BERT_POOLERS: dict[
    str, tuple[Literal["class_token", "mean"], bool]
] = {  # the pooling, and whether BERT's dense layer follows
    "cls_pooler": ("class_token", True),
    "cls_last_hidden_state_pooler": ("class_token", False),
    "mean_pooler": ("mean", False),
}
BERT_PROJECTIONS: dict[str | None, Projection] = {"linear": "linear", "mlp": "mlp", None: "none"}
# SigLIP sets the scale no limit, and 117 is usual; training in open_clip cuts it to 100.
_SIGMOID_SCALE_MAX = 1000.0
RESNET_CHANNELS = 32  # of the last stage, per channel of the first


def read_config(
    content: Mapping[str, Any], directory: Path, tokenizer: Tokenizer | None
) -> ModelConfig:
    """The model of the `open_clip_config.json` of `directory`.

    tokenizer: the model's, where it is known; it knows which token ends a text. Raises UserError
    that names the field and its value where clip_jax has nothing of the kind.
    """
    if "model_cfg" not in content:
        raise UserError("open_clip_config.json has no model_cfg")
    cfg = filled_in("model_cfg", content["model_cfg"])
    if cfg["embed_dim"] is None:
        raise UserError("open_clip_config.json: model_cfg has no embed_dim")
    vision, text = (filled_in(name, cfg[name]) for name in ("vision_cfg", "text_cfg"))
    preprocess = read_preprocess(content.get("preprocess_cfg") or {})
    quick = cfg["quick_gelu"]
    image_tower, image_projection = _read_image(vision, quick, preprocess)
    text_tower, text_projection = _read_text(text, quick, directory, tokenizer)
    scale, bias = cfg["init_logit_scale"], cfg["init_logit_bias"]
    model = ModelConfig(
        image=image_tower,
        text=text_tower,
        embed_dim=cfg["embed_dim"],
        image_projection=image_projection,
        text_projection=text_projection,
        logit_scale_init=ModelConfig.logit_scale_init if scale is None else _exponential(scale),
        logit_scale_max=ModelConfig.logit_scale_max if bias is None else _SIGMOID_SCALE_MAX,
        logit_bias_init=None if bias is None else float(bias),
    )
    return read_own(model, content.get(OWN_GROUP))


# ---- Image towers ----------------------------------------------------------------------------


def _read_image(
    cfg: Fields, quick: bool, preprocess: Fields
) -> tuple[ImageTowerConfig, Projection]:
    size, width = _square(cfg, "image_size"), cfg["width"]
    if cfg["timm_model_name"] is not None:
        return _read_trunk(cfg, size, preprocess)
    if isinstance(cfg["layers"], list):
        return _read_resnet(cfg, size, quick, preprocess), "none"  # its pooling projects
    patch_size = _square(cfg, "patch_size")
    if width % cfg["head_width"]:
        raise unsupported("vision_cfg.head_width", cfg["head_width"], f": does not divide {width}")
    tower = ImageTowerConfig(
        image_size=size,
        patch_size=patch_size,
        width=width,
        depth=cfg["layers"],
        num_heads=width // cfg["head_width"],
        mlp_ratio=_mlp_ratio(cfg),
        activation=_read_activation("vision_cfg", cfg, quick),
        layer_norm_epsilon=_read_epsilon("vision_cfg", cfg),
        layer_scale_init=cfg["ls_init_value"],
        qk_norm=cfg["qk_norm"],
        pre_norm=not cfg["no_ln_pre"],
        pooling=known("vision_cfg.pool_type", cfg["pool_type"], IMAGE_POOLINGS),
        norm_after_pooling=cfg["final_ln_after_pool"],
        patch_dropout=float(cfg["patch_dropout"]),
        **preprocess,
    )
    return tower, "linear"


def _read_resnet(cfg: Fields, size: int, quick: bool, preprocess: Fields) -> ImageTowerConfig:
    width = cfg["width"]
    if len(cfg["layers"]) != 4:
        raise unsupported("vision_cfg.layers", cfg["layers"])
    num_heads = max(1, RESNET_CHANNELS * width // cfg["head_width"])
    return ImageTowerConfig(
        kind="resnet",
        image_size=size,
        resnet_layers=tuple(cfg["layers"]),
        width=width,
        num_heads=num_heads,
        activation="quick_gelu" if quick else "gelu",  # the text tower's: not used
        class_token=False,
        pre_norm=False,
        pooling="attention",
        **preprocess,
    )


def _read_trunk(cfg: Fields, size: int, preprocess: Fields) -> tuple[ImageTowerConfig, Projection]:
    name = cfg["timm_model_name"]
    trunk = trunk_named(name)
    for key, value, only in (
        ("image_size", size, (trunk.image_size,)),
        ("timm_pool", cfg["timm_pool"], ("map",)),
        ("timm_proj", cfg["timm_proj"], ("none", "linear")),
    ):
        if value not in only:
            spelled = " or ".join(map(repr, only))
            more = f" with timm_model_name {name!r}, which takes {spelled}"
            raise unsupported(f"vision_cfg.{key}", value, more)
    tower = ImageTowerConfig(
        image_size=size,
        patch_size=trunk.patch_size,
        patch_bias=True,
        width=trunk.width,
        depth=trunk.depth,
        num_heads=trunk.num_heads,
        mlp_ratio=trunk.mlp_width / trunk.width,
        activation=trunk.activation,
        layer_norm_epsilon=TRUNK_EPSILON,
        class_token=False,
        pre_norm=False,
        pooling="attention",
        patch_dropout=float(cfg["patch_dropout"]),
        **preprocess,
    )
    if cfg["timm_proj"] == "none":
        return tower, "none"
    return tower, "linear_bias" if cfg["timm_proj_bias"] else "linear"


# ---- Text towers -----------------------------------------------------------------------------


def _read_text(
    cfg: Fields, quick: bool, directory: Path, tokenizer: Tokenizer | None
) -> tuple[TextTowerConfig, Projection]:
    if cfg["hf_model_name"] is not None:
        return _read_bert_text(cfg, directory, tokenizer)
    known("text_cfg.proj_type", cfg["proj_type"], {"linear": 1, "none": 0})
    pad_id = tokenizer.pad_id if tokenizer and cfg["pad_id"] is None else cfg["pad_id"]
    tower = TextTowerConfig(
        causal=not cfg["no_causal_mask"],
        vocab_size=cfg["vocab_size"],
        context_length=cfg["context_length"],
        eot_id=_read_eot_id(cfg, tokenizer),
        pad_id=pad_id or 0,
        pooling=known("text_cfg.pool_type", cfg["pool_type"], TEXT_POOLINGS),
        width=cfg["width"],
        depth=cfg["layers"],
        num_heads=cfg["heads"],
        mlp_ratio=_mlp_ratio(cfg),
        activation=_read_activation("text_cfg", cfg, quick),
        layer_norm_epsilon=_read_epsilon("text_cfg", cfg),
    )
    if cfg["proj_type"] == "none":
        return tower, "none"
    return tower, "linear_bias" if cfg["proj_bias"] else "linear"


def _read_eot_id(cfg: Fields, tokenizer: Tokenizer | None) -> int | None:
    if cfg["pool_type"] == "argmax":  # the highest id of a row
        last = int(tokenizer.vocab_size if tokenizer else cfg["vocab_size"]) - 1
        if tokenizer and tokenizer.eot_id != last:
            raise UserError(
                "open_clip_config.json: text_cfg.pool_type 'argmax' looks at the token with the "
                f"highest id, but the tokenizer's end of text is {tokenizer.eot_id}, below {last}"
            )
        return last
    if cfg["eos_id"] is not None:
        return int(cfg["eos_id"])
    if cfg["pool_type"] == "eos":
        return DEFAULT_EOS_ID
    return tokenizer.eot_id if tokenizer else None


def _read_bert_text(
    cfg: Fields, directory: Path, tokenizer: Tokenizer | None
) -> tuple[TextTowerConfig, Projection]:
    fields = read_bert(directory, cfg["hf_model_name"])
    pooler = cfg["hf_pooler_type"] or "cls_pooler"  # open_clip's own choice for BERT
    pooling, has_dense = known("text_cfg.hf_pooler_type", pooler, BERT_POOLERS)
    eot_id = tokenizer.eot_id if tokenizer and cfg["eos_id"] is None else cfg["eos_id"]
    tower = TextTowerConfig(**fields, pooling=pooling, pooler=has_dense, eot_id=eot_id)
    return tower, known("text_cfg.hf_proj_type", cfg["hf_proj_type"], BERT_PROJECTIONS)


# ---- Fields ----------------------------------------------------------------------------------


def _read_activation(where: str, cfg: Fields, quick: bool) -> Activation:
    given = cfg["act_kwargs"] or {}
    if set(given) - {"approximate"} or (quick and given):
        raise unsupported(f"{where}.act_kwargs", given, " with quick_gelu" if quick else "")
    if quick:
        return "quick_gelu"
    activations: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = given.get("approximate", "none")
    return known(f"{where}.act_kwargs.approximate", approximate, activations)


def _read_epsilon(where: str, cfg: Fields) -> float:
    given = cfg["norm_kwargs"] or {}
    epsilon = given.get("eps", ImageTowerConfig.layer_norm_epsilon)  # torch's default too
    if set(given) - {"eps"} or not isinstance(epsilon, int | float):
        raise unsupported(f"{where}.norm_kwargs", given)
    return float(epsilon)


def _mlp_ratio(cfg: Fields) -> float:
    """open_clip cuts the MLP's width off where we round it, and its ratios are rounded."""
    return float(int(cfg["width"] * cfg["mlp_ratio"]) / cfg["width"])


def _square(cfg: Fields, key: str) -> int:
    value = cfg[key]
    sides = set(value if isinstance(value, list) else [value])
    if len(sides) != 1 or None in sides:
        raise unsupported(f"vision_cfg.{key}", value)
    return int(sides.pop())


def _exponential(value: float) -> float:
    """exp(value), without the rounding of a logarithm: ln 10 gives 10."""
    result = math.exp(value)
    short = float(f"{result:.12g}")
    return short if math.log(short) == value else result
