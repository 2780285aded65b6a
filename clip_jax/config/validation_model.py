"""Checks of the architecture: each failure is one line with the numbers and the remedy."""

import math

from clip_jax.config.errors import ConfigError, nearest_multiples
from clip_jax.config.schema import ImageTowerConfig, ModelConfig, TextTowerConfig

KINDS_WITH_HEADS = {"image": ("vit", "naflex"), "text": ("transformer", "bert")}
_TEXT_POOLINGS = {
    "transformer": ("eot", "last", "class_token", "mean", "attention"),
    "bert": ("class_token", "mean"),
    "cbow": ("mean",),
}


def check_model(model: ModelConfig) -> None:
    for tower, kinds in KINDS_WITH_HEADS.items():
        settings = getattr(model, tower)
        if settings.kind in kinds and settings.width % settings.num_heads:
            raise ConfigError(
                f"config.model.{tower}.width {settings.width} is not divisible by num_heads "
                f"{settings.num_heads}"
            )
    if model.logit_scale_init > model.logit_scale_max:
        raise ConfigError(
            f"config.model.logit_scale_init {model.logit_scale_init} is above logit_scale_max "
            f"{model.logit_scale_max}; it is the multiplier, not the temperature or its logarithm"
        )
    _check_image(model.image)
    _check_text(model.text)
    for tower in ("image", "text"):
        width = getattr(model, tower).width
        if tower == "image" and model.image.kind == "resnet":
            continue  # its pooling gives the embedding
        if getattr(model, f"{tower}_projection") == "none" and width != model.embed_dim:
            raise ConfigError(
                f"config.model.{tower}_projection 'none' needs a tower as wide as the embedding: "
                f"config.model.{tower}.width is {width}, embed_dim {model.embed_dim}"
            )


def _check_text(text: TextTowerConfig) -> None:
    if text.context_length < 3:
        raise ConfigError(
            f"config.model.text.context_length {text.context_length} has no room for a word "
            "between the begin and end of text; use 3 or more"
        )
    for name in ("eot_id", "pad_id"):
        token = getattr(text, name)
        if token is not None and not 0 <= token < text.vocab_size:
            raise ConfigError(
                f"config.model.text.{name} {token} is outside the vocabulary of "
                f"{text.vocab_size} tokens"
            )
    if text.pooling == "eot" and text.eot_id is None:
        raise ConfigError(
            "config.model.text.pooling 'eot' needs config.model.text.eot_id, the end of text"
        )
    poolings = _TEXT_POOLINGS[text.kind]
    if text.pooling not in poolings:
        raise ConfigError(
            f"config.model.text.pooling {text.pooling!r} is not one of kind {text.kind!r}: "
            f"{', '.join(poolings)}"
        )
    if text.pooler and text.pooling != "class_token":
        raise ConfigError("config.model.text.pooler needs config.model.text.pooling=class_token")


def _check_image(image: ImageTowerConfig) -> None:
    if any(s <= 0 for s in image.std):
        raise ConfigError(f"config.model.image.std must be positive, got {image.std}")
    if image.kind == "resnet":
        _check_resnet(image)
        return
    if image.pooling == "class_token" and not image.class_token:
        raise ConfigError(
            "config.model.image.pooling 'class_token' needs config.model.image.class_token=True"
        )
    if image.pooling == "none":
        raise ConfigError(
            "config.model.image.pooling 'none' gives no embedding to contrast; it is for towers "
            "used on their own"
        )
    if image.kind == "naflex" and (image.stem != "patch" or image.class_token):
        raise ConfigError(
            "config.model.image.kind 'naflex' takes patches as they are: "
            "config.model.image.stem=patch and config.model.image.class_token=False"
        )
    if image.position_embedding == "sincos2d" and image.width % 4:
        raise ConfigError(
            f"config.model.image.position_embedding 'sincos2d' needs a width divisible by 4, got "
            f"{image.width}"
        )
    crops = image.crop_to_patches and image.stem == "patch" and image.image_size > image.patch_size
    if image.image_size % image.patch_size and not crops:
        raise ConfigError(
            f"config.model.image.image_size {image.image_size} is not divisible by patch_size "
            f"{image.patch_size}; nearest: {nearest_multiples(image.image_size, image.patch_size)}"
        )
    if image.stem == "conv":
        widths, strides = image.stem_widths, image.stem_strides
        if not widths or len(widths) != len(strides) or min(*widths, *strides) < 1:
            raise ConfigError(
                "config.model.image.stem_widths and stem_strides must be one positive number for "
                f"each convolution of the stem, got {widths} and {strides}"
            )
        if image.patch_size % math.prod(strides):
            raise ConfigError(
                f"config.model.image.patch_size {image.patch_size} is not divisible by "
                f"{math.prod(strides)}, the product of stem_strides {strides}"
            )
    elif image.stem_widths:
        raise ConfigError(
            f"config.model.image.stem_widths {image.stem_widths} needs config.model.image.stem=conv"
        )


def _check_resnet(image: ImageTowerConfig) -> None:
    if len(image.resnet_layers) != 4 or min(image.resnet_layers) < 1:
        raise ConfigError(
            "config.model.image.resnet_layers must be the blocks of four stages, as (3, 4, 6, 3), "
            f"got {image.resnet_layers}"
        )
    if image.patch_size != 32 or image.image_size % 32:
        raise ConfigError(
            "config.model.image.kind 'resnet' has a stride of 32: patch_size must be 32 and "
            f"image_size a multiple of it, got {image.patch_size} and {image.image_size}"
        )
    if image.width % 2 or 32 * image.width % image.num_heads:
        raise ConfigError(
            f"config.model.image.width {image.width} must be even, and 32 x width divisible by "
            f"num_heads {image.num_heads}"
        )
