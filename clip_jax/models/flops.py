"""Analytic floating-point operations of the towers: matrix products only, as MFU counts them."""

import math

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_jax.config.schema_model import POOLS_ONE_TOKEN

TowerConfig = ImageTowerConfig | TextTowerConfig


def forward_flops(
    model: ModelConfig,
    *,
    rows_per_text: float = 1.0,
    training: bool = False,
    least: bool = False,
) -> tuple[int, int]:
    """FLOPs of one image and of one text through tower and projection (2 per multiply-add).

    Of whole blocks, as the field counts them; least: of what the pooled features need, which is
    what is computed (`blocks.run_blocks_to_tokens`; queries of packed texts also look at the other
    rows of their group, which is not counted).
    training: with patch dropout. A naflex image is a full sequence of patches, padding and all, and
    a text `rows_per_text` rows of `context_length` tokens: what is computed, whatever is padding.
    """
    image, text = model.image, model.text
    image_flops = (
        _resnet(image, model.embed_dim)
        if image.kind == "resnet"
        else _image_transformer(image, image.patch_dropout if training else 0.0, least=least)
    )
    image_width = model.embed_dim if image.kind == "resnet" else image.width
    image_flops += _projection(model.image_projection, image_width, model.embed_dim)
    text_flops = _text(text, rows_per_text, least=least)
    text_flops += _projection(model.text_projection, text.width, model.embed_dim)
    return image_flops, text_flops


def _projection(kind: str, width: int, embed_dim: int) -> int:
    if kind == "none":
        return 0
    if kind == "mlp":
        return 2 * (width + embed_dim) * ((width + embed_dim) // 2)
    return 2 * width * embed_dim


def _image_transformer(image: ImageTowerConfig, patch_dropout: float, *, least: bool) -> int:
    grid_size = (image.image_size // image.patch_size) ** 2
    if image.kind == "naflex":
        num_patches = image.max_num_patches
        flops = 2 * num_patches * grid_size * image.width  # resampled position embeddings
    else:
        num_patches, flops = grid_size, 0
    num_prefix = image.num_registers + (image.kind == "vit" and image.class_token)
    flops += _stem(image, num_patches)
    num_patches = max(1, int(num_patches * (1 - patch_dropout)))
    flops += _blocks(image, num_patches + num_prefix)
    if least:
        flops -= _left_out(image, num_patches + num_prefix)
    if image.pooling == "attention":
        flops += _attention_pooling(image, num_patches)
    return flops


def _text(text: TextTowerConfig, rows: float, *, least: bool) -> int:
    """Of one text that fills so many rows."""
    if text.kind == "cbow":
        return 0  # sums alone
    flops = _blocks(text, text.context_length)
    if text.pooling == "attention":
        flops += _attention_pooling(text, text.context_length)
    if text.kind == "bert" and text.pooler:
        flops += 2 * text.width**2
    flops = round(flops * rows)
    return flops - _left_out(text, text.context_length, rows) if least else flops


def _left_out(tower: TowerConfig, num_tokens: int, rows: float = 1.0) -> int:
    """What the last block need not do for tokens that are not pooled: all but keys and values."""
    if tower.pooling not in POOLS_ONE_TOKEN:
        return 0
    per_token = 4 * tower.width**2 + _mlp(tower)  # queries, output; MLP
    per_query = 4 * num_tokens * tower.width  # scores and mixing
    return round((num_tokens * rows - 1) * (per_token + per_query))


def _mlp(tower: TowerConfig) -> int:
    """Of one token."""
    num_matrices = 3 if tower.activation == "swiglu" else 2
    return 2 * num_matrices * tower.width * round(tower.width * tower.mlp_ratio)


def _blocks(tower: TowerConfig, num_tokens: int) -> int:
    per_token = 8 * tower.width**2 + _mlp(tower)
    attention = 4 * num_tokens**2 * tower.width  # scores and mixing; causal ones count in full
    return tower.depth * (num_tokens * per_token + attention)


def _attention_pooling(tower: TowerConfig, num_tokens: int) -> int:
    per_token = 4 * tower.width**2 + 4 * tower.width  # keys and values; scores and mixing
    # The query is projected once for the whole batch; then the output and the MLP of one token.
    return num_tokens * per_token + 2 * tower.width**2 + _mlp(tower)


def _stem(image: ImageTowerConfig, num_patches: int) -> int:
    if image.stem == "patch":
        return 2 * num_patches * 3 * image.patch_size**2 * image.width
    fold = image.patch_size // math.prod(image.stem_strides)
    flops, channels, size = 0, 3 * fold**2, image.image_size // fold
    for width, stride in zip(image.stem_widths, image.stem_strides, strict=True):
        size //= stride
        flops += _convolution(size, 3, channels, width)
        channels = width
    return flops + 2 * num_patches * channels * image.width


def _convolution(size: int, kernel: int, channels: int, channels_out: int) -> int:
    """`size` is the output's; the padding counts as if it were image."""
    return 2 * size**2 * kernel**2 * channels * channels_out


def _resnet(image: ImageTowerConfig, embed_dim: int) -> int:
    """The layers of `models/resnet.py`: stem, four stages of bottlenecks, attention pooling."""
    size, width = image.image_size // 2, image.width
    flops = _convolution(size, 3, 3, width // 2) + _convolution(size, 3, width // 2, width // 2)
    flops += _convolution(size, 3, width // 2, width)
    size, channels = size // 2, width
    for stage, num_blocks in enumerate(image.resnet_layers):
        for block in range(num_blocks):
            halves = stage > 0 and block == 0  # after the 3x3 convolution
            inner, outer = width * 2**stage, 4 * width * 2**stage
            flops += _convolution(size, 1, channels, inner) + _convolution(size, 3, inner, inner)
            size = size // 2 if halves else size
            flops += _convolution(size, 1, inner, outer)
            if block == 0:
                flops += _convolution(size, 1, channels, outer)  # the shortcut
            channels = outer
    num_tokens = size**2 + 1
    flops += num_tokens * (4 * channels**2 + 4 * channels)  # keys and values; scores and mixing
    return flops + 2 * channels**2 + 2 * channels * embed_dim  # one query; output
