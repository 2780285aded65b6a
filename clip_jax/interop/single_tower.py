"""Single towers, as starts for locked-image and locked-text tuning (Zhai et al. 2022).

Archives of vit_jax ("augreg", Steiner et al. 2022) and big_vision (`.npz`), and Hugging Face
directories of ViT, CLIP's and SigLIP's image towers and BERT. They are read only: what clip_jax
trains on has two towers.

Heads have no place in a tower and are left out, by name in a note: `head` and `pre_logits` of
archives; `classifier`, `pooler`, `decoder` and `mask_token` of ViT; `visual_projection` of CLIP;
`cls` of BERT, but not its pooler.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig, UserError
from clip_jax.interop.big_vision_towers import (
    archive_settings,
    current_names,
    image_rows,
    is_scanned,
    params_of,
)
from clip_jax.interop.checks import checked
from clip_jax.interop.huggingface_families import FAMILIES
from clip_jax.interop.huggingface_files import Fields, read_json, read_weights
from clip_jax.interop.huggingface_images import read_preprocessing
from clip_jax.interop.huggingface_towers import (
    BERT,
    BERT_DEFAULTS,
    VISIONS,
    bert_rows,
    image_settings,
    split_in_proj,
    text_settings,
)
from clip_jax.interop.table import (
    NdArray,
    Row,
    attention_out,
    linear,
    norm,
    patch_convolution,
    read_table,
    same,
    split_projections,
)
from clip_jax.interop.tensors import read_tensors
from clip_jax.interop.weights import Weights, model_shapes

_ARCHIVE_HEADS = r"(head|pre_logits)/.*"
_VIT_HEADS = r"(classifier|pooler|decoder)\..*|embeddings\.mask_token"
_VISION_HEADS = r"visual_projection\..*"
_BERT_HEADS = r"cls\..*"
# Indices that older versions saved with the weights: they hold no numbers of their own.
_BUFFERS = (r".*\.embeddings\.position_ids", r".*\.embeddings\.token_type_ids")
_OLD_BERT_NAMES = {"gamma": "weight", "beta": "bias"}  # of norms, in BERT's first releases
_VIT_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}


def read(path: Path) -> Weights:
    """The tower in an archive or directory. Raises UserError where it is none of those above."""
    if path.is_file():
        return read_npz(path)
    weights = read_huggingface(path)
    if weights is None:
        config = read_json(path / "config.json")
        known = ", ".join([*FAMILIES, "vit", "bert", *VISIONS])
        raise UserError(
            f"{path / 'config.json'}: unknown model_type {config.get('model_type')!r}; known: "
            f"{known}"
        )
    return weights


def write(weights: Weights, directory: Path) -> None:
    """Raises UserError: single towers are not written."""
    del directory
    raise UserError(
        f"these weights are of the {weights.parts[0]} tower alone, and single towers are not "
        "exported; train them in a model of two towers"
    )


def read_npz(path: Path) -> Weights:
    """An image tower in the layout of vit_jax or big_vision, of any of their ages.

    Pooling: by the class token or the attention pooling that the archive has, else the mean.
    """
    where = str(path)
    tensors, left_out = _without(current_names(params_of(read_tensors(path))), _ARCHIVE_HEADS)
    settings = archive_settings(tensors, where) | {"interpolation": "bilinear"}
    if settings.get("position_embedding") == "sincos2d":
        print(
            f"{where} has no position embeddings: taken as 2-D sine-cosine ones of "
            f"{settings['image_size']} pixels"
        )
    model = ModelConfig(image=ImageTowerConfig(**settings))
    rows = image_rows(model.image, "", scanned=is_scanned(tensors, "Transformer"))
    return _weights(model, "image", rows, tensors, left_out, where)


def read_huggingface(directory: Path) -> Weights | None:
    """A ViT, an image tower of CLIP or SigLIP, or a BERT; None for another `model_type`."""
    file = directory / "config.json"
    config = read_json(file)
    model_type = config.get("model_type")
    if model_type == "vit":
        return _read_vit(directory, config, str(file))
    if model_type == "bert":
        return _read_bert(directory, config, str(file))
    if model_type in VISIONS:
        return _read_vision(directory, config, str(file))
    return None


def _read_vit(directory: Path, config: dict[str, Any], where: str) -> Weights:
    fields = Fields(config, _VIT_DEFAULTS, where)
    fields.expect("qkv_bias", True)
    settings = image_settings(fields) | {"patch_bias": True, "pre_norm": False}
    settings |= read_preprocessing(directory, ImageTowerConfig(**settings), usual="ViT")
    model = ModelConfig(image=ImageTowerConfig(**settings))
    tensors, left_out = _without(_unprefixed(read_weights(directory), "vit."), _VIT_HEADS)
    return _weights(model, "image", _vit_rows(model.image), tensors, left_out, where)


def _read_vision(directory: Path, config: dict[str, Any], where: str) -> Weights:
    vision = VISIONS[config["model_type"]]
    settings = vision.settings(Fields(config, vision.defaults, where))
    settings |= read_preprocessing(directory, ImageTowerConfig(**settings))
    model = ModelConfig(image=ImageTowerConfig(**settings))
    tensors, left_out = _without(read_weights(directory), _VISION_HEADS)
    prefix = "vision_model"  # which directories have or lack with the version that wrote them
    tensors = _unprefixed(tensors, f"{prefix}.")
    tensors = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
    if vision.has_head:
        tensors = split_in_proj(tensors, prefix, model.image.width)
    rows = vision.rows(prefix, model.image)
    return _weights(model, "image", rows, tensors, left_out, where)


def _read_bert(directory: Path, config: dict[str, Any], where: str) -> Weights:
    from clip_jax.interop.huggingface import read_tokenizer  # which reads single towers, too

    fields = Fields(config, BERT_DEFAULTS, where)
    fields.expect("position_embedding_type", "absolute")
    fields.expect("is_decoder", False)
    tokenizer = read_tokenizer(directory)
    tensors, left_out = _without(_unprefixed(read_weights(directory), "bert."), _BERT_HEADS)
    tensors = {f"bert.{_current_bert_name(name)}": tensor for name, tensor in tensors.items()}
    has_pooler = "bert.pooler.dense.weight" in tensors
    settings: dict[str, Any] = BERT | text_settings(fields) | {"pooler": has_pooler}
    settings["num_segments"] = fields.positive("type_vocab_size")
    # Attention passes over what follows the end of text, which is the tokenizer's to know.
    settings["eot_id"] = None if tokenizer is None else tokenizer.eot_id
    pad_id = fields.token("pad_token_id") or 0
    settings["pad_id"] = pad_id if tokenizer is None else tokenizer.pad_id
    model = ModelConfig(text=TextTowerConfig(**settings))
    rows = bert_rows("bert", pooler=has_pooler)
    weights = _weights(model, "text", rows, tensors, left_out, where)
    return checked(dataclasses.replace(weights, tokenizer=tokenizer), where)


def _weights(
    model: ModelConfig,
    part: str,
    rows: list[Row],
    tensors: Mapping[str, NdArray],
    left_out: list[str],
    where: str,
) -> Weights:
    arrays = read_table(rows, tensors, model_shapes(model, (part,)), ignored=_BUFFERS)
    if left_out:
        print(f"{where}: left out, as no part of the tower: {', '.join(left_out)}")
    extras = {"left_out": left_out} if left_out else {}
    return Weights(model=model, arrays=arrays, parts=(part,), extras=extras)


def _without(tensors: Mapping[str, NdArray], pattern: str) -> tuple[dict[str, NdArray], list[str]]:
    """The tensors whose names do not match, and the names of those that do."""
    left_out = sorted(name for name in tensors if re.fullmatch(pattern, name))
    return {name: tensors[name] for name in tensors if name not in left_out}, left_out


def _unprefixed(tensors: Mapping[str, NdArray], prefix: str) -> dict[str, NdArray]:
    """Names without the prefix that a model with a head sets before its tower's."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _current_bert_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_OLD_BERT_NAMES[last]}" if last in _OLD_BERT_NAMES else name


def _vit_rows(tower: ImageTowerConfig) -> list[Row]:
    """Of transformers' ViTModel."""
    embeddings, layer = "embeddings", "encoder.layer.{layer}"
    patches = f"{embeddings}.patch_embeddings.projection"
    heads = [f"{layer}.attention.attention.{name}" for name in ("query", "key", "value")]
    ours = "image/blocks"
    return [
        patch_convolution(
            "image/stem/project/kernel", f"{patches}.weight", patch_size=tower.patch_size
        ),
        same("image/stem/project/bias", f"{patches}.bias"),
        same("image/class_embedding", f"{embeddings}.cls_token", shape=(1, 1, -1)),
        same(
            "image/position_embedding",
            f"{embeddings}.position_embeddings",
            shape=(1, 1 + (tower.image_size // tower.patch_size) ** 2, -1),
        ),
        *norm(f"{ours}/attention_norm", f"{layer}.layernorm_before"),
        *split_projections(f"{ours}/attention/qkv", heads),
        *attention_out(f"{ours}/attention/out", f"{layer}.attention.output.dense"),
        *norm(f"{ours}/mlp_norm", f"{layer}.layernorm_after"),
        *linear(f"{ours}/mlp/up", f"{layer}.intermediate.dense"),
        *linear(f"{ours}/mlp/down", f"{layer}.output.dense"),
        *norm("image/final_norm", "layernorm"),
    ]
