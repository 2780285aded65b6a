"""Shapes that a chip's matrix units do not fill: known from the config alone."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from clip_jax.config import ExperimentConfig, ImageTowerConfig, TextTowerConfig
from clip_jax.config.packing import why_not_packed
from clip_jax.models import forward_flops
from clip_jax.objectives.tiles import choose_tile_size
from clip_jax.parallel.chips import Chip

# Attention's products by rows of queries x columns of keys, and the widths of heads. TPUs: vector
# registers of 8 x 128, matrix units of 128 columns or more. GPUs: FlashAttention-2's blocks of 128
# x 128, heads in steps of 32 (Dao 2023), as cuDNN's kernels have them or nearly so.
_TILES = {"tpu": (8, 128), "gpu": (128, 128)}
_HEADS = {"tpu": 128, "gpu": 32}
_WASTE = 0.015  # of a step's FLOPs, from which on it is worth a line
_PADDED_TEXT = 0.05  # the same of padded captions
# Tokens of a web caption on average: 10 words in DataComp-1B, 20 in CC12M, 1.4 tokens to a word of
# CLIP's (docs/data.md, benchmarks/caption_lengths.py), start and end.
_WEB_TOKENS = 30
_LARGEST_TILE = 4096  # `objectives.tiles`: nothing is gained above
_TILE_SHARE = 0.05  # of a device's memory, for one tile of logits; some six live at once


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the checks below are given. rows: pairs of a device."""

    config: ExperimentConfig
    platform: Literal["tpu", "gpu", "cpu"]
    chip: Chip | None
    rows: int


def shape_findings(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Codes and texts."""
    yield from _loss_tile(shapes)
    if shapes.platform == "cpu":
        return
    for name in ("image", "text"):
        yield from _attention(shapes, name)
    yield from _padded_text(shapes)
    yield from _few_rows(shapes)


def tokens_of(tower: ImageTowerConfig | TextTowerConfig) -> int:
    """Tokens that attend to each other in training; 0 of towers without attention throughout."""
    if isinstance(tower, TextTowerConfig):
        return 0 if tower.kind == "cbow" else tower.context_length
    if tower.kind == "resnet":
        return 0
    if tower.kind == "naflex":
        return tower.max_num_patches + tower.num_registers
    patches = (tower.image_size // tower.patch_size) ** 2
    return max(1, int(patches * (1 - tower.patch_dropout))) + _prefix(tower)


def _prefix(tower: ImageTowerConfig) -> int:
    return tower.num_registers + tower.class_token


def _text_rows(config: ExperimentConfig) -> float:
    """Rows of tokens to a caption; at most one."""
    packing = config.data.packing
    return (packing.rows or packing.group_size) / packing.group_size if packing.group_size else 1.0


def _shares(shapes: Shapes) -> dict[str, tuple[float, float]]:
    """Of each tower: its share of the FLOPs, and that of its attention's two products."""
    config = shapes.config
    model, rows = config.model, _text_rows(config)
    image, text = forward_flops(model, rows_per_text=rows, training=True)
    attention = [
        4.0 * tower.depth * tokens_of(tower) ** 2 * tower.width
        for tower in (model.image, model.text)
    ]
    total = image + text
    return {
        "image": (image / total, attention[0] / total),
        "text": (text / total, attention[1] * rows / total),
    }


def _attention(shapes: Shapes, name: str) -> Iterator[tuple[str, str]]:
    tower: ImageTowerConfig | TextTowerConfig = getattr(shapes.config.model, name)
    tokens, (of_tower, share) = tokens_of(tower), _shares(shapes)[name]
    if tokens == 0:
        return
    rows, columns = _TILES[shapes.platform]
    padded = _up(tokens, rows) * _up(tokens, columns)
    waste = (padded / tokens**2 - 1) * share
    # Fewer tokens than a tile has columns are one however many they are.
    if waste > _WASTE and tokens > columns:
        more = (_up(tokens, columns) / tokens - 1) * of_tower
        yield (
            f"padded-{name}-tokens",
            f"{tokens} {name} tokens fill tiles of {rows} x {columns} to {tokens**2 / padded:.0%}: "
            f"attention, {share:.1%} of the FLOPs, computes another {waste:.1%} in vain; "
            f"{_remedy(shapes, tower, columns, waste=waste, more=more)}",
        )
    head, wide = tower.width // tower.num_heads, _HEADS[shapes.platform]
    waste = (_up(head, wide) / head - 1) * share
    if waste > _WASTE:
        fewer = max(1, tower.width // _up(head, wide))
        yield (
            f"narrow-{name}-heads",
            f"heads of {head} fill {head / _up(head, wide):.0%} of the {wide} columns of a matrix "
            f"unit: attention, {share:.1%} of the FLOPs, computes another {waste:.1%} in vain; "
            f"another model has {fewer} heads of {tower.width // fewer}: "
            f"--config.model.{name}.num_heads={fewer}",
        )


def _remedy(
    shapes: Shapes,
    tower: ImageTowerConfig | TextTowerConfig,
    tile: int,
    *,
    waste: float,
    more: float,
) -> str:
    """more: of the FLOPs, what tokens that fill the last tile take."""
    tokens = tokens_of(tower)
    filled = _up(tokens, tile)
    over = tokens % tile
    if isinstance(tower, ImageTowerConfig) and 0 < over <= _prefix(tower):
        return (
            f"{_prefix(tower)} beside the patches open another tile: mean pooling without them "
            "(model.image.class_token=False) fills it"
        )
    if more < waste:
        if isinstance(tower, TextTowerConfig):
            return f"a model.text.context_length of {filled} fills them for {more:.1%} more"
        return f"an image_size or patch_size of {filled} tokens fills them for {more:.1%} more"
    costs = f"{filled} tokens would fill them and take {more:.1%} more"
    if (
        isinstance(tower, TextTowerConfig)
        and shapes.config.data.packing.group_size == 0
        and why_not_packed(tower) is None
    ):
        return f"{costs}; packed captions, exact as well, have fewer rows to pad"
    return f"{costs}: nothing is gained with this model"


def _padded_text(shapes: Shapes) -> Iterator[tuple[str, str]]:
    config = shapes.config
    text, share = config.model.text, _shares(shapes)["text"][0]
    # None: a run packs them by itself where that saves rows.
    if config.data.packing.group_size != 0 or why_not_packed(text) is not None:
        return
    waste = share * (1 - min(1.0, _WEB_TOKENS / text.context_length))
    if waste > _PADDED_TEXT:
        yield (
            "padded-text",
            f"the text tower is {share:.0%} of the FLOPs, and a caption of the web fills some "
            f"{_WEB_TOKENS} of its {text.context_length} tokens: {waste:.0%} of a step is padding; "
            "captions are packed, exactly, where data.packing.group_size is left out and 8 or more "
            "divides the pairs of a device in a microbatch",
        )


def _few_rows(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Products of so few rows that reading the weights takes longer than using them."""
    chip, config = shapes.chip, shapes.config
    if chip is None:
        return
    # A product of R rows does 2 R FLOPs for each weight of 2 bytes (bfloat16) or 4.
    dtype = config.precision
    num_bytes = {"bfloat16": 2, "float32": 4}[dtype]
    ridge = chip.peak_tflops[dtype] * 1e12 / chip.memory_bandwidth * num_bytes / 2
    for name in ("image", "text"):
        tower = getattr(config.model, name)
        tokens = tokens_of(tower) * (_text_rows(config) if name == "text" else 1.0)
        rows = round(shapes.rows / config.microbatches * tokens)
        if 0 < rows < ridge:
            needed = math.ceil(ridge / tokens) * config.microbatches
            yield (
                f"few-{name}-rows",
                f"the {name} tower's products have {rows} rows on a device ({shapes.rows} pairs, "
                f"{config.microbatches} microbatches), and a {chip.name} reads weights as fast as "
                f"it computes from {ridge:.0f} on; give a device {needed} pairs or more, by a "
                "larger batch, fewer microbatches or fewer devices",
            )


def _loss_tile(shapes: Shapes) -> Iterator[tuple[str, str]]:
    config = shapes.config
    rows = shapes.rows
    chosen = choose_tile_size(rows, config.model.embed_dim)
    tile = min(config.loss.tile_size or chosen, rows)
    memory = None if shapes.chip is None else shapes.chip.memory_bytes / shapes.chip.num_devices
    too_much = memory is not None and 4 * tile**2 > _TILE_SHARE * memory
    if tile > _LARGEST_TILE or too_much:
        yield (
            "loss-tile",
            f"the loss holds tiles of {tile} x {tile} logits, {4 * tile**2 / 2**20:,.0f} MiB each; "
            f"--config.loss.tile_size=None takes {chosen}",
        )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
