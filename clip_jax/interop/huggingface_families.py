"""Two-tower classes of transformers: which towers they join, and how."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax.config import ModelConfig, UserError
from clip_jax.interop.huggingface_files import group
from clip_jax.interop.huggingface_towers import (
    BERT,
    BERT_DEFAULTS,
    CLIP_TEXT,
    CLIP_TEXT_DEFAULTS,
    SIGLIP_TEXT,
    SIGLIP_TEXT_DEFAULTS,
    VISIONS,
    Vision,
    bert_rows,
    clip_text_rows,
)
from clip_jax.interop.table import NdArray, Row, linear, same, transposed

_LINEAR = {"image_projection": "linear", "text_projection": "linear"}
# SigLIP's training starts at a scale of 10 and a bias of -10 (Zhai et al. 2023, section 3.2) and
# sets the scale no limit: 117 is usual.
_SIGLIP = {
    "image_projection": "none",
    "text_projection": "linear_bias",
    "logit_scale_init": 10.0,
    "logit_scale_max": 1000.0,
    "logit_bias_init": -10.0,
}
_DUAL_VISIONS = ("clip_vision_model", "siglip_vision_model")


@dataclasses.dataclass(frozen=True)
class Family:
    """A two-tower class: what its models have in common, and its table."""

    model_type: str
    architecture: str
    processor: str
    vision: Vision
    text_type: str
    text_shape: Mapping[str, Any]
    text_defaults: Mapping[str, Any]
    shape: Mapping[str, Any]  # fields of ModelConfig

    @property
    def has_bias(self) -> bool:
        return "logit_bias_init" in self.shape

    @property
    def sees_mask(self) -> bool:
        """Whether its texts come with an attention mask; SigLIP was trained without."""
        return not self.has_bias

    @property
    def has_legacy_eos(self) -> bool:
        return self.model_type == "clip"

    @property
    def projections(self) -> dict[str, Any]:
        return {name: self.shape[name] for name in _LINEAR}

    @property
    def prefix(self) -> str:
        """Of the image tower's tensors, as all versions read them.

        Up to version 4 transformers has the towers of a dual encoder one level deeper.
        """
        return "vision_model.vision_model" if self.text_type == "bert" else "vision_model"

    def vision_prefix(self, tensors: Mapping[str, NdArray]) -> str:
        """The prefix of the image tower's tensors in a file."""
        deep = "vision_model.vision_model"
        return deep if any(name.startswith(f"{deep}.") for name in tensors) else "vision_model"

    def of(self, config: Mapping[str, Any], where: str) -> "Family":
        """This family, with the image tower that a dual encoder's config names."""
        if self.text_type != "bert":
            return self
        text_type = group(config, "text_config", where).get("model_type", "bert")
        if text_type != "bert":
            raise UserError(
                f"{where}: the text tower of a dual encoder must be a bert, got {text_type!r}"
            )
        name = group(config, "vision_config", where).get("model_type", "vit")
        name = "clip_vision_model" if name == "clip" else name
        if name in ("vit", "deit"):
            raise UserError(
                f"{where}: the image tower {name!r} of a dual encoder ends in a dense layer and a "
                f"tanh, which no image tower of clip_jax has; {' and '.join(_DUAL_VISIONS)} work"
            )
        if name not in _DUAL_VISIONS:
            known = " and ".join(_DUAL_VISIONS)
            raise UserError(f"{where}: unknown image tower {name!r}; known: {known}")
        return dataclasses.replace(self, vision=VISIONS[name])

    def rows(self, model: ModelConfig, prefix: str) -> list[Row]:
        """The table, for tensors of the image tower that start with `prefix`."""
        text = bert_rows if self.text_type == "bert" else clip_text_rows
        towers = [*self.vision.rows(prefix, model.image), *text("text_model")]
        if self.has_bias:
            return [
                *towers,
                *linear("text_projection", "text_model.head"),
                same("log_logit_scale", "logit_scale", shape=(1,)),
                same("logit_bias", "logit_bias", shape=(1,)),
            ]
        return [
            *towers,
            transposed("image_projection/kernel", "visual_projection.weight"),
            transposed("text_projection/kernel", "text_projection.weight"),
            same("log_logit_scale", "logit_scale"),
        ]


def _renamed(vision: str, model_type: str) -> Vision:
    return dataclasses.replace(VISIONS[vision], model_type=model_type)


_CLIP = Family(
    model_type="clip",
    architecture="CLIPModel",
    processor="CLIPProcessor",
    vision=VISIONS["clip_vision_model"],
    text_type="clip_text_model",
    text_shape=CLIP_TEXT,
    text_defaults=CLIP_TEXT_DEFAULTS,
    shape=_LINEAR,
)
_METACLIP2 = dataclasses.replace(
    _CLIP,
    model_type="metaclip_2",
    architecture="MetaClip2Model",
    vision=_renamed("clip_vision_model", "metaclip_2_vision_model"),
    text_type="metaclip_2_text_model",
)
_SIGLIP1 = Family(
    model_type="siglip",
    architecture="SiglipModel",
    processor="SiglipProcessor",
    vision=VISIONS["siglip_vision_model"],
    text_type="siglip_text_model",
    text_shape=SIGLIP_TEXT,
    text_defaults=SIGLIP_TEXT_DEFAULTS,
    shape=_SIGLIP,
)
_SIGLIP2 = dataclasses.replace(
    _SIGLIP1,
    model_type="siglip2",
    architecture="Siglip2Model",
    processor="Siglip2Processor",
    vision=VISIONS["siglip2_vision_model"],
    text_type="siglip2_text_model",
)
_DUAL = Family(
    model_type="vision-text-dual-encoder",
    architecture="VisionTextDualEncoderModel",
    processor="VisionTextDualEncoderProcessor",
    vision=VISIONS["clip_vision_model"],
    text_type="bert",
    text_shape=BERT,
    text_defaults=BERT_DEFAULTS,
    shape=_LINEAR,
)
FAMILIES = {family.model_type: family for family in (_CLIP, _METACLIP2, _SIGLIP1, _SIGLIP2, _DUAL)}


def family_of(model: ModelConfig) -> Family:
    """The class nearest to a model; whether it fits shows field by field."""
    image = "siglip_vision_model" if model.image.pooling == "attention" else "clip_vision_model"
    if model.text.kind == "bert":
        return dataclasses.replace(_DUAL, vision=VISIONS[image])
    if model.image.kind == "naflex":
        return _SIGLIP2
    if model.image.pooling == "attention" and model.image.kind == "vit":
        return _SIGLIP1
    # MetaClip2Model is CLIPModel without its special case for token 2 (see `huggingface.read`).
    return _METACLIP2 if model.text.eot_id == 2 else _CLIP
