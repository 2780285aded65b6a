"""What the named architectures cost and which public checkpoints fit them (`clip-jax models`)."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from clip_jax.config import PRESETS, ModelConfig
from clip_jax.config.presets import PRESET_FAMILIES
from clip_jax.models.clip import CLIP
from clip_jax.models.flops import forward_flops

_HEADER = (
    ("model", "params", "image", "text", "GFLOPs", "GFLOPs", "embed", "image", "context", "fits"),
    ("", "total M", "M", "M", "image", "text", "dim", "size", "length", ""),
)
_LEFT = (0, 9)  # columns of words; the others are numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One architecture: parameters, FLOPs of a forward pass of one sample, sizes, checkpoints."""

    name: str
    num_parameters: int
    image_parameters: int  # with its projection
    text_parameters: int  # with its projection
    image_flops: int  # 2 per multiply-add of the matrix products
    text_flops: int
    embed_dim: int
    image_size: int
    context_length: int
    family: tuple[str, ...]  # public checkpoints that fit


def model_row(model: ModelConfig, family: tuple[str, ...] = ()) -> ModelRow:
    """The row of one architecture. Nothing is allocated: shapes alone are computed."""
    sizes = dict.fromkeys(("image", "text", "other"), 0)
    num_patches = (model.image.image_size // model.image.patch_size) ** 2
    for path, shape in _shapes(_same_shapes(model)).items():
        size = math.prod(shape)
        if path.startswith("image/") and path.endswith("position_embedding"):
            size += (num_patches - 1) * shape[-1]
        if alike := re.match(r"image/stage_(\d)/block_1/", path):
            size *= model.image.resnet_layers[int(alike[1])] - 1
        part = path.split("/")[0].removesuffix("_projection")
        sizes[part if part in sizes else "other"] += size
    image_flops, text_flops = forward_flops(model)
    return ModelRow(
        name=model.name,
        num_parameters=sum(sizes.values()),
        image_parameters=sizes["image"],
        text_parameters=sizes["text"],
        image_flops=image_flops,
        text_flops=text_flops,
        embed_dim=model.embed_dim,
        image_size=model.image.image_size,
        context_length=model.text.context_length,
        family=family,
    )


def _same_shapes(model: ModelConfig) -> ModelConfig:
    """One model for many, as tracing takes a tenth of a second for each.

    What no shape depends on is as by default; an image is one patch; a stage of a ResNet has two
    blocks at most, the second for all after the first.
    """

    def changed(tower: Any, fields: tuple[str, ...]) -> dict[str, Any]:
        default = type(tower)()
        change = {name: getattr(default, name) for name in fields}
        return change if tower.activation == "swiglu" else {**change, "activation": "gelu"}

    image = dataclasses.replace(
        model.image,
        image_size=model.image.patch_size,
        resnet_layers=tuple(min(num_blocks, 2) for num_blocks in model.image.resnet_layers),
        **changed(model.image, ("mean", "std", "resize", "interpolation", "layer_norm_epsilon")),
    )
    text = dataclasses.replace(
        model.text, **changed(model.text, ("causal", "eot_id", "pad_id", "layer_norm_epsilon"))
    )
    return dataclasses.replace(model, name="", image=image, text=text)


@functools.cache
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by path."""
    abstract = jax.eval_shape(lambda key: CLIP(model, rngs=_OneKey(key)), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


class _OneKey(nnx.Rngs):
    """The same key for all arrays, whose values nobody reads: counting keys takes most time."""

    def __init__(self, key: jax.Array) -> None:
        self.key = key

    def params(self) -> jax.Array:
        return self.key


def model_rows(containing: str = "") -> list[ModelRow]:
    """The presets whose name or family has `containing` in it, whatever the case; '' is all."""
    wanted = containing.lower()
    return [
        model_row(model, PRESET_FAMILIES[name])
        for name, model in PRESETS.items()
        if wanted in f"{name} {_words(PRESET_FAMILIES[name])}".lower()
    ]


def model_table(rows: Iterable[ModelRow]) -> str:
    """The rows as aligned columns of plain text, with a header; parameters in millions."""
    cells = [*_HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if i in _LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _cells(row: ModelRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.num_parameters / 1e6:.2f}",
        f"{row.image_parameters / 1e6:.2f}",
        f"{row.text_parameters / 1e6:.2f}",
        f"{row.image_flops / 1e9:.2f}",
        f"{row.text_flops / 1e9:.2f}",
        str(row.embed_dim),
        str(row.image_size),
        str(row.context_length),
        _words(row.family),
    )


def _words(family: tuple[str, ...]) -> str:
    return "; ".join(family) or "-"
