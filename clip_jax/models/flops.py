"""Analytic floating-point operations of the towers: matrix products only, as MFU counts them."""

import math

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig


def forward_flops(model: ModelConfig) -> tuple[int, int]:
    """FLOPs of one image and of one text through tower and projection (2 per multiply-add)."""
    image, text = model.image, model.text
    num_patches = (image.image_size // image.patch_size) ** 2
    image_tokens = num_patches + image.class_token
    image_flops = _blocks(image, image_tokens) + _stem(image) + _attention_pooling(image)
    image_flops += 2 * image.width * model.embed_dim
    text_flops = _blocks(text, text.context_length) + 2 * text.width * model.embed_dim
    return image_flops, text_flops


def _blocks(tower: ImageTowerConfig | TextTowerConfig, num_tokens: int) -> int:
    hidden = round(tower.width * tower.mlp_ratio)
    per_token = 2 * tower.width * (4 * tower.width + 2 * hidden)
    attention = 4 * num_tokens**2 * tower.width  # scores and mixing; causal ones count in full
    return tower.depth * (num_tokens * per_token + attention)


def _stem(image: ImageTowerConfig) -> int:
    num_patches = (image.image_size // image.patch_size) ** 2
    if image.stem == "patch":
        return 2 * num_patches * 3 * image.patch_size**2 * image.width
    fold = image.patch_size // math.prod(image.stem_strides)
    flops, channels, size = 0, 3 * fold**2, image.image_size // fold
    for width, stride in zip(image.stem_widths, image.stem_strides, strict=True):
        size //= stride
        flops += 2 * size**2 * 9 * channels * width
        channels = width
    return flops + 2 * num_patches * channels * image.width


def _attention_pooling(image: ImageTowerConfig) -> int:
    if image.pooling != "attention":
        return 0
    num_tokens = (image.image_size // image.patch_size) ** 2
    hidden = round(image.width * image.mlp_ratio)
    per_token = 4 * image.width**2  # keys and values
    once = 2 * image.width * (2 * image.width + 2 * hidden)  # query, output, MLP
    return num_tokens * (per_token + 4 * image.width) + once
