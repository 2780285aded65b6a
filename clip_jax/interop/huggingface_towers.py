"""Towers of transformers, each as one table of tensors and one of settings, used both ways.

Figures are those of transformers' config classes and modules of the same names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from clip_jax.config import ImageTowerConfig, TextTowerConfig, UserError
from clip_jax.interop.huggingface_files import Fields
from clip_jax.interop.table import (
    NdArray,
    Row,
    attention_out,
    linear,
    norm,
    patch_convolution,
    same,
    split_projections,
    transposed,
)

Tower = ImageTowerConfig | TextTowerConfig

# Ours to theirs; the first name is the one written.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
    "quick_gelu": ("quick_gelu",),
}

_PLAIN = {  # what no image tower of transformers' contrastive models has
    "stem": "patch",
    "position_embedding": "learned",
    "num_registers": 0,
    "layer_scale_init": None,
    "qk_norm": False,
    "norm_after_pooling": False,
}
CLIP_VISION = _PLAIN | {
    "kind": "vit",
    "patch_bias": False,
    "class_token": True,
    "pre_norm": True,
    "pooling": "class_token",
}
SIGLIP_VISION = _PLAIN | {
    "kind": "vit",
    "patch_bias": True,
    "class_token": False,
    "pre_norm": False,
    "pooling": "attention",
}
SIGLIP2_VISION = SIGLIP_VISION | {"kind": "naflex"}
CLIP_TEXT = {"kind": "transformer", "causal": True, "pooling": "eot"}
SIGLIP_TEXT = {"kind": "transformer", "causal": False, "pooling": "last"}
BERT = {"kind": "bert", "pooling": "class_token", "pooler": True}

_SIZES = {"num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_CLIP_ENCODER = _SIZES | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_ENCODER = _SIZES | {
    "hidden_size": 768,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_TOKENS = {"pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_VISION_DEFAULTS = _CLIP_ENCODER | {
    "hidden_size": 768,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
CLIP_TEXT_DEFAULTS = (
    _CLIP_ENCODER
    | _TOKENS
    | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    }
)
SIGLIP_VISION_DEFAULTS = _SIGLIP_ENCODER | {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "vision_use_head": True,
}
SIGLIP2_VISION_DEFAULTS = SIGLIP_VISION_DEFAULTS | {"num_patches": 256}
SIGLIP_TEXT_DEFAULTS = (
    _SIGLIP_ENCODER | _TOKENS | {"vocab_size": 32000, "max_position_embeddings": 64}
)
BERT_DEFAULTS = _SIZES | {
    "hidden_size": 768,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


# ---- Settings --------------------------------------------------------------------------------


def tower_settings(fields: Fields) -> dict[str, Any]:
    """What all towers share, as fields of our towers."""
    width, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    if width % num_heads:
        raise UserError(
            f"{fields.where}: hidden_size {width} is not divisible by num_attention_heads "
            f"{num_heads}"
        )
    return {
        "width": width,
        "depth": fields.positive("num_hidden_layers"),
        "num_heads": num_heads,
        "mlp_ratio": fields.positive("intermediate_size") / width,
        "activation": _activation(fields),
        "layer_norm_epsilon": fields.number("layer_norm_eps"),
    }


def tower_config(tower: Tower) -> dict[str, Any]:
    """`tower_settings` the other way."""
    if tower.activation not in _ACTIVATIONS:
        raise UserError(f"transformers' towers have no activation {tower.activation!r}")
    return {
        "hidden_size": tower.width,
        "intermediate_size": round(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "hidden_act": _ACTIVATIONS[tower.activation][0],
        "layer_norm_eps": tower.layer_norm_epsilon,
    }


def image_settings(fields: Fields) -> dict[str, Any]:
    """Of a tower for images of one size."""
    fields.expect("num_channels", 3)
    sizes: dict[str, Any] = {name: fields.side(name) for name in ("image_size", "patch_size")}
    if sizes["image_size"] % sizes["patch_size"]:
        sizes["crop_to_patches"] = True  # as the convolution there does
    return tower_settings(fields) | sizes


def image_config(tower: ImageTowerConfig) -> dict[str, Any]:
    sizes = {"image_size": tower.image_size, "patch_size": tower.patch_size, "num_channels": 3}
    return tower_config(tower) | sizes


def naflex_settings(fields: Fields) -> dict[str, Any]:
    """Of a tower for images of any size: `image_size` is that of its grid of positions."""
    fields.expect("num_channels", 3)
    patch_size, num_patches = fields.side("patch_size"), fields.positive("num_patches")
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise UserError(f"{fields.where}: num_patches {num_patches} is not a square")
    sizes = {"patch_size": patch_size, "image_size": side * patch_size}
    return tower_settings(fields) | sizes


def naflex_config(tower: ImageTowerConfig) -> dict[str, Any]:
    num_patches = (tower.image_size // tower.patch_size) ** 2
    sizes = {"patch_size": tower.patch_size, "num_patches": num_patches, "num_channels": 3}
    return tower_config(tower) | sizes


def text_settings(fields: Fields) -> dict[str, Any]:
    """Special tokens are left out: the tokenizer knows them better than old configs."""
    return tower_settings(fields) | {
        "vocab_size": fields.positive("vocab_size"),
        "context_length": fields.positive("max_position_embeddings"),
    }


def text_config(tower: TextTowerConfig, bos_id: int | None) -> dict[str, Any]:
    return tower_config(tower) | {
        "vocab_size": tower.vocab_size,
        "max_position_embeddings": tower.context_length,
        "bos_token_id": bos_id,
        "eos_token_id": tower.eot_id,
        "pad_token_id": tower.pad_id,
    }


def require(settings: Any, expected: Mapping[str, Any], *, where: str, target: str) -> None:
    """Raises UserError that names all settings which `target` has no way to say."""
    odd = [
        f"{where}.{name}={getattr(settings, name)!r} (it has {value!r})"
        for name, value in expected.items()
        if getattr(settings, name) != value
    ]
    if odd:
        raise UserError(f"{target} cannot express {', '.join(odd)}")


def _activation(fields: Fields) -> str:
    name = fields.text("hidden_act")
    for ours, theirs in _ACTIVATIONS.items():
        if name in theirs:
            return ours
    known = ", ".join(theirs for names in _ACTIVATIONS.values() for theirs in names)
    raise UserError(f"{fields.where}: unknown activation hidden_act {name!r}; known: {known}")


# ---- Tensors ---------------------------------------------------------------------------------


class VisionRows(Protocol):
    """Rows of an image tower whose names start with `theirs`, without a dot at the end."""

    def __call__(self, theirs: str, tower: ImageTowerConfig) -> list[Row]: ...


def clip_vision_rows(theirs: str, tower: ImageTowerConfig) -> list[Row]:
    embeddings = f"{theirs}.embeddings"
    patch = f"{embeddings}.patch_embedding.weight"
    return [
        patch_convolution("image/stem/project/kernel", patch, patch_size=tower.patch_size),
        same("image/class_embedding", f"{embeddings}.class_embedding"),
        same("image/position_embedding", f"{embeddings}.position_embedding.weight"),
        *norm("image/pre_norm", f"{theirs}.pre_layrnorm"),  # their spelling
        *_encoder_rows("image", theirs),
        *norm("image/final_norm", f"{theirs}.post_layernorm"),
    ]


def siglip_vision_rows(theirs: str, tower: ImageTowerConfig) -> list[Row]:
    patch = f"{theirs}.embeddings.patch_embedding"
    return [
        patch_convolution(
            "image/stem/project/kernel", f"{patch}.weight", patch_size=tower.patch_size
        ),
        same("image/stem/project/bias", f"{patch}.bias"),
        *_after_siglip_patches(theirs, tower),
    ]


def siglip2_vision_rows(theirs: str, tower: ImageTowerConfig) -> list[Row]:
    patches = linear("image/stem/project", f"{theirs}.embeddings.patch_embedding")
    return [*patches, *_after_siglip_patches(theirs, tower)]


def clip_text_rows(theirs: str) -> list[Row]:
    return [
        same("text/token_embedding", f"{theirs}.embeddings.token_embedding.weight"),
        same("text/position_embedding", f"{theirs}.embeddings.position_embedding.weight"),
        *_encoder_rows("text", theirs),
        *norm("text/final_norm", f"{theirs}.final_layer_norm"),
    ]


def bert_rows(theirs: str, *, pooler: bool = True) -> list[Row]:
    embeddings, layer = f"{theirs}.embeddings", f"{theirs}.encoder.layer.{{layer}}"
    rows = [
        same("text/token_embedding", f"{embeddings}.word_embeddings.weight"),
        same("text/position_embedding", f"{embeddings}.position_embeddings.weight"),
        same("text/segment_embedding", f"{embeddings}.token_type_embeddings.weight"),
        *norm("text/embedding_norm", f"{embeddings}.LayerNorm"),
        *split_projections(
            "text/blocks/attention/qkv",
            [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")],
        ),
        *attention_out("text/blocks/attention/out", f"{layer}.attention.output.dense"),
        *norm("text/blocks/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear("text/blocks/mlp/up", f"{layer}.intermediate.dense"),
        *linear("text/blocks/mlp/down", f"{layer}.output.dense"),
        *norm("text/blocks/mlp_norm", f"{layer}.output.LayerNorm"),
    ]
    return [*rows, *linear("text/pooler", f"{theirs}.pooler.dense")] if pooler else rows


def _encoder_rows(tower: str, theirs: str) -> list[Row]:
    """The blocks of CLIP and SigLIP, image and text."""
    ours, layer = f"{tower}/blocks", f"{theirs}.encoder.layers.{{layer}}"
    heads = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    return [
        *norm(f"{ours}/attention_norm", f"{layer}.layer_norm1"),
        *split_projections(f"{ours}/attention/qkv", heads),
        *attention_out(f"{ours}/attention/out", f"{layer}.self_attn.out_proj"),
        *norm(f"{ours}/mlp_norm", f"{layer}.layer_norm2"),
        *linear(f"{ours}/mlp/up", f"{layer}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{layer}.mlp.fc2"),
    ]


def _after_siglip_patches(theirs: str, tower: ImageTowerConfig) -> list[Row]:
    head = f"{theirs}.head"
    query, rest = _parts_of_in_proj(tower.width)
    weight, bias = (f"{head}.attention.in_proj_{name}" for name in ("weight", "bias"))
    return [
        same("image/position_embedding", f"{theirs}.embeddings.position_embedding.weight"),
        *_encoder_rows("image", theirs),
        *norm("image/final_norm", f"{theirs}.post_layernorm"),
        same("image/pooling/probe", f"{head}.probe", shape=(1, 1, -1)),
        transposed("image/pooling/query/kernel", weight + query),
        same("image/pooling/query/bias", bias + query, shape=(-1,)),
        transposed("image/pooling/key_value/kernel", weight + rest),
        same("image/pooling/key_value/bias", bias + rest, shape=(-1,)),
        *attention_out("image/pooling/out", f"{head}.attention.out_proj"),
        *norm("image/pooling/norm", f"{head}.layernorm"),
        *linear("image/pooling/mlp/up", f"{head}.mlp.fc1"),
        *linear("image/pooling/mlp/down", f"{head}.mlp.fc2"),
    ]


def _parts_of_in_proj(width: int) -> tuple[str, str]:
    """What rows of the query, and of key and value, are called in tables."""
    return f"[:{width}]", f"[{width}:]"


def split_in_proj(tensors: Mapping[str, NdArray], theirs: str, width: int) -> dict[str, NdArray]:
    """The attention pooling's one projection as two tensors: queries, which we keep by themselves.

    Tables are of one array of ours to one or more of theirs, and this is the other way round.
    """
    tensors = dict(tensors)
    for name in _in_proj_names(theirs):
        if name in tensors and tensors[name].ndim:
            whole = tensors.pop(name)
            query, rest = _parts_of_in_proj(width)
            tensors |= {name + query: whole[:width], name + rest: whole[width:]}
    return tensors


def join_in_proj(tensors: Mapping[str, NdArray], theirs: str, width: int) -> dict[str, NdArray]:
    """`split_in_proj` the other way."""
    tensors = dict(tensors)
    for name in _in_proj_names(theirs):
        parts = [tensors.pop(name + part) for part in _parts_of_in_proj(width)]
        tensors[name] = np.concatenate(parts)
    return tensors


def _in_proj_names(theirs: str) -> list[str]:
    return [f"{theirs}.head.attention.in_proj_{name}" for name in ("weight", "bias")]


@dataclasses.dataclass(frozen=True)
class Vision:
    """One kind of image tower of transformers."""

    model_type: str
    shape: Mapping[str, Any]
    defaults: Mapping[str, Any]
    rows: VisionRows

    @property
    def has_head(self) -> bool:
        return self.shape["pooling"] == "attention"

    def settings(self, fields: Fields) -> dict[str, Any]:
        if self.has_head and not fields.flag("vision_use_head"):
            raise UserError(f"{fields.where}: without vision_use_head there is no image embedding")
        read = naflex_settings if self.shape["kind"] == "naflex" else image_settings
        return {**self.shape, **read(fields)}

    def config(self, tower: ImageTowerConfig) -> dict[str, Any]:
        write = naflex_config if self.shape["kind"] == "naflex" else image_config
        head = {"vision_use_head": True} if self.has_head else {}
        return {"model_type": self.model_type, **write(tower), **head}


VISIONS = {
    vision.model_type: vision
    for vision in (
        Vision("clip_vision_model", CLIP_VISION, CLIP_VISION_DEFAULTS, clip_vision_rows),
        Vision("siglip_vision_model", SIGLIP_VISION, SIGLIP_VISION_DEFAULTS, siglip_vision_rows),
        Vision(
            "siglip2_vision_model", SIGLIP2_VISION, SIGLIP2_VISION_DEFAULTS, siglip2_vision_rows
        ),
    )
}
