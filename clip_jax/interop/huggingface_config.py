"""The config.json of a two-tower model of transformers, to and from ours."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig, UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.huggingface_families import Family
from clip_jax.interop.huggingface_files import Fields, group
from clip_jax.interop.huggingface_images import read_preprocessing
from clip_jax.interop.huggingface_towers import require, text_config, text_settings
from clip_jax.interop.table import NdArray

# CLIPModel takes this id of an end of text for a mistake of old configs, and pools at the largest
# id of a row instead.
_LEGACY_EOS = 2
_CLIP_SCALE_INIT = 2.6592  # ln(1 / 0.07) = 2.65926, as their config cuts it off
_SAME_SCALE = 1e-4


def read_model(
    family: Family, config: dict[str, Any], where: str, path: Path, tokenizer: Tokenizer | None
) -> ModelConfig:
    image_fields = Fields(
        _tower_values(family, config, "vision_config", where),
        family.vision.defaults,
        f"{where} vision_config",
    )
    text_fields = Fields(
        _tower_values(family, config, "text_config", where),
        family.text_defaults,
        f"{where} text_config",
    )
    image = family.vision.settings(image_fields)
    text = {**family.text_shape, **text_settings(text_fields)}
    if family.text_type == "bert":
        text["num_segments"] = text_fields.positive("type_vocab_size")
    text |= _special_tokens(family, text_fields, text, tokenizer)
    top = Fields(config, {"projection_dim": 512, "logit_scale_init_value": _CLIP_SCALE_INIT}, where)
    shape = dict(family.shape)
    if family.has_bias:
        embed_dim = image["width"]
        said = "projection_size" in text_fields
        projected = text_fields.positive("projection_size") if said else text["width"]
        if projected != embed_dim:
            raise UserError(
                f"{where}: texts are projected to {projected} numbers, but image embeddings have "
                f"{embed_dim}"
            )
    else:
        embed_dim = top.positive("projection_dim")
        scale = top.number("logit_scale_init_value")
        is_usual = abs(scale - _CLIP_SCALE_INIT) < _SAME_SCALE
        shape["logit_scale_init"] = 1 / 0.07 if is_usual else math.exp(scale)
        shape["logit_scale_max"] = max(100.0, shape["logit_scale_init"])
    preprocessing = read_preprocessing(path, ImageTowerConfig(**image))
    return ModelConfig(
        image=ImageTowerConfig(**(image | preprocessing)),
        text=TextTowerConfig(**text),
        embed_dim=embed_dim,
        **shape,
    )


def _tower_values(family: Family, config: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    values = group(config, name, where)
    if isinstance(values.get(name), dict):  # a whole CLIP's config where a tower's belongs
        values = values[name]
    # Configs of 2022 say it twice; what they mean is this group, in full.
    older = group(config, f"{name}_dict", where)
    if older:
        defaults = family.text_defaults if name == "text_config" else family.vision.defaults
        values = {**values, **defaults, **older}
    return values


def _special_tokens(
    family: Family, fields: Fields, text: dict[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """eot_id and pad_id: the tokenizer's, or the config's where they are tokens at all."""
    said = fields.token("eos_token_id")
    size = text["vocab_size"]
    if tokenizer is None:
        if said == _LEGACY_EOS and family.has_legacy_eos:
            said = size - 1
        pad_id = fields.token("pad_token_id")
        # The defaults of SigLIP's text config are CLIP's tokens, which its vocabulary has not.
        eot_id = None if said is None or said >= size else said
        return {"eot_id": eot_id, "pad_id": 0 if pad_id is None or pad_id >= size else pad_id}
    if text["pooling"] == "eot":
        if said == _LEGACY_EOS and family.has_legacy_eos:
            if tokenizer.eot_id != tokenizer.vocab_size - 1:
                raise UserError(
                    f"{fields.where}: with eos_token_id {_LEGACY_EOS} texts are pooled at their "
                    f"largest token, but the tokenizer ends them with {tokenizer.eot_id}, which is "
                    f"not the largest of {tokenizer.vocab_size}"
                )
        elif said != tokenizer.eot_id:
            raise UserError(
                f"{fields.where}: eos_token_id is {said}, but the tokenizer ends a text with token "
                f"{tokenizer.eot_id}"
            )
    return {"eot_id": tokenizer.eot_id, "pad_id": tokenizer.pad_id}


def model_config(
    family: Family, model: ModelConfig, tokenizer: Tokenizer | None, arrays: dict[str, NdArray]
) -> dict[str, Any]:
    target = f"transformers' {family.architecture}"
    require(model.image, family.vision.shape, where="model.image", target=target)
    require(model.text, family.text_shape, where="model.text", target=target)
    require(model, family.projections, where="model", target=target)
    if (model.logit_bias_init is None) == family.has_bias:
        has = "a" if family.has_bias else "no"
        raise UserError(
            f"{target} cannot express model.logit_bias_init={model.logit_bias_init} (it has {has} "
            "bias)"
        )
    bos_id = None if tokenizer is None else tokenizer.start_id
    text = {"model_type": family.text_type, **text_config(model.text, bos_id)}
    if family.text_type == "bert":
        text["type_vocab_size"] = model.text.num_segments
    if family.has_bias:
        text["projection_size"] = model.embed_dim
        top: dict[str, Any] = {}
    else:
        scale = math.log(model.logit_scale_init)
        scale = _CLIP_SCALE_INIT if abs(scale - _CLIP_SCALE_INIT) < _SAME_SCALE else scale
        top = {"projection_dim": model.embed_dim, "logit_scale_init_value": scale}
    sizes = Counter[str]()
    for array in arrays.values():
        sizes[array.dtype.name] += array.size
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": sizes.most_common(1)[0][0],  # `dtype` since 4.56, which reads both
        **top,
        "text_config": text,
        "vision_config": family.vision.config(model.image),
    }
