"""Towers of big_vision: names and shapes of their arrays, read off into settings, and as tables.

An archive names arrays by their path in nested modules of flax, with '/' between the names. The
layout holds shapes of heads and grids, so that architecture is read off it. What it does not hold
are facts of the family (big_vision's `models/vit.py` and `text_transformer.py`, vit_jax's
`models_vit.py`): tanh-GELU, as flax's `gelu` is; layer-norm epsilon 1e-6, flax's default; pre-norm
blocks; pixels in [-1, 1].
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.config import ImageTowerConfig, UserError
from clip_jax.interop.table import NdArray, Row, same

Tensors = Mapping[str, NdArray]

HALF = (0.5, 0.5, 0.5)
TRANSFORMER: dict[str, Any] = {"activation": "gelu_tanh", "layer_norm_epsilon": 1e-6}
VIT: dict[str, Any] = TRANSFORMER | {
    "stem": "patch",
    "patch_bias": True,
    "pre_norm": False,
    "num_registers": 0,
    "layer_scale_init": None,
    "qk_norm": False,
    "norm_after_pooling": False,
    "mean": HALF,
    "std": HALF,
    "resize": "squash",
}
_BLOCK = "encoderblock"
_ATTENTION = "MultiHeadDotProductAttention_0"
_PARTS = ("query", "key", "value")
# The second parts of a block as flax numbered modules before 2021, in vit_jax's archives.
_OLD_PARTS = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_OLD_PART = re.compile(rf"(Transformer/{_BLOCK}_\d+/)({'|'.join(_OLD_PARTS)})(/.*)")
_SIDE_WITHOUT_POSITIONS = 224  # pixels: models with sine-cosine positions do not say their size


# ---- Archives --------------------------------------------------------------------------------


def params_of(tensors: Tensors) -> dict[str, NdArray]:
    """The weights of a checkpoint, without 'params/' before their names and optimizer state."""
    if not any(name.startswith("params/") for name in tensors):
        return {name: tensor for name, tensor in tensors.items() if not _is_leftover(name)}
    odd = [name for name in tensors if not name.startswith("params/") and not _is_leftover(name)]
    if odd:
        raise UserError(f"the archive holds {odd[0]!r} beside params/ and opt/: what is it?")
    params = {name: tensor for name, tensor in tensors.items() if name.startswith("params/")}
    return {name.removeprefix("params/"): tensor for name, tensor in params.items()}


def _is_leftover(name: str) -> bool:
    """Of training: optimizer state, step count and clock."""
    return name.split("/", maxsplit=1)[0] in ("opt", "extra", "chrono", "accum_train_time")


def group(tensors: Tensors, name: str) -> dict[str, NdArray]:
    """The arrays below a module, by what follows its name."""
    prefix = f"{name}/"
    below = {path: tensor for path, tensor in tensors.items() if path.startswith(prefix)}
    return {path.removeprefix(prefix): tensor for path, tensor in below.items()}


def current_names(tensors: Tensors) -> dict[str, NdArray]:
    """An image tower under the names that big_vision gives its arrays now.

    Older archives, vit_jax's among them, have other names of the position embedding, of the parts
    of blocks and of the attention pooling. A class token gets its position in front of the others',
    zero where the archive has none, as our towers have it; without the token it is dropped.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if match := _OLD_PART.fullmatch(name):
            name = match[1] + _OLD_PARTS[match[2]] + match[3]
        if name in ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"):
            name = "pos_embedding"
        if name.split("/", maxsplit=1)[0] in ("probe", "LayerNorm_0", "MlpBlock_0", _ATTENTION):
            name = f"MAPHead_0/{name}"  # of the time of ViT-G
        renamed[name] = tensor
    positions = renamed.get("pos_embedding")
    if positions is not None and positions.ndim == 3 and "embedding/kernel" in renamed:
        if renamed["embedding/kernel"].ndim == 2:
            return renamed  # NaFlex: a grid of positions, no class token
        num_patches = math.isqrt(positions.shape[1]) ** 2
        if "cls" in renamed and positions.shape[1] == num_patches:
            none = np.zeros_like(positions[:, :1])
            renamed["pos_embedding"] = np.concatenate([none, positions], axis=1)
        elif "cls" not in renamed and positions.shape[1] == num_patches + 1:
            renamed["pos_embedding"] = positions[:, 1:]
    return renamed


def without_class_position(tensors: Tensors, theirs: str) -> dict[str, NdArray]:
    """`current_names` the other way for the class token's position, where that is zero.

    Where it is not, big_vision still reads it in front of the others', as it once wrote it.
    """
    written = dict(tensors)
    name = f"{theirs}/pos_embedding"
    if f"{theirs}/cls" in written and not written[name][:, 0].any():
        written[name] = np.ascontiguousarray(written[name][:, 1:])
    return written


# ---- Settings --------------------------------------------------------------------------------


def archive_settings(tensors: Tensors, where: str) -> dict[str, Any]:
    """Fields of our image tower, read off an image tower under its current names."""
    kernel = shape_of(tensors, "embedding/kernel", where)
    blocks = encoder_settings(tensors, "Transformer", where)
    if "MAPHead_0/probe" in tensors:
        pooling = "attention"
    else:
        pooling = "class_token" if "cls" in tensors else "mean"
    fields = VIT | blocks | {"class_token": "cls" in tensors, "pooling": pooling}
    if len(kernel) == 2:
        patch_size = math.isqrt(kernel[0] // 3)
        grid = shape_of(tensors, "pos_embedding", where)
        if 3 * patch_size**2 != kernel[0] or len(grid) != 3 or grid[0] != grid[1]:
            raise UserError(
                f"{where}: not a NaFlex tower of square patches: embedding/kernel {kernel}, "
                f"pos_embedding {grid}"
            )
        size = grid[0] * patch_size
        # Of naflex, as transformers' and big_vision's own evaluation resize.
        fields |= {"kind": "naflex", "interpolation": "bilinear"}
        return fields | {"patch_size": patch_size, "image_size": size}
    if len(kernel) != 4 or kernel[0] != kernel[1] or kernel[2] != 3:
        raise UserError(
            f"{where}: embedding/kernel has shape {kernel}, not that of square patches of 3 "
            "channels [P, P, 3, D] (hybrid models, with a ResNet before the ViT, are not supported)"
        )
    if "pos_embedding" not in tensors:
        sincos = {"position_embedding": "sincos2d", "image_size": _SIDE_WITHOUT_POSITIONS}
        return fields | sincos | {"patch_size": kernel[0]}
    num_patches = shape_of(tensors, "pos_embedding", where)[-2] - ("cls" in tensors)
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise UserError(f"{where}: {num_patches} position embeddings are not those of a square")
    return fields | {"patch_size": kernel[0], "image_size": side * kernel[0]}


def encoder_settings(tensors: Tensors, encoder: str, where: str) -> dict[str, Any]:
    """width, depth, num_heads and mlp_ratio of the Transformer in a module."""
    scanned = is_scanned(tensors, encoder)
    block = f"{encoder}/{_BLOCK}" if scanned else f"{encoder}/{_BLOCK}_0"
    query = shape_of(tensors, f"{block}/{_ATTENTION}/query/kernel", where)
    up = shape_of(tensors, f"{block}/MlpBlock_0/Dense_0/kernel", where)
    depth = query[0]
    if not scanned:
        layers = {name.split("/")[1] for name in tensors if name.startswith(f"{encoder}/{_BLOCK}_")}
        depth = len(layers)
    width, num_heads, head_width = query[-3:] if len(query) >= 3 else (0, 0, 0)
    if width != num_heads * head_width or not width or len(up) < 2:
        raise UserError(
            f"{where}: {block}/{_ATTENTION}/query/kernel has shape {query}, not [width, heads, "
            "width / heads]"
        )
    return {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": up[-1] / width,
    }


def is_scanned(tensors: Tensors, encoder: str) -> bool:
    """Whether layers are stacked on a leading axis, as for SigLIP 2, or named one by one."""
    return any(name.startswith(f"{encoder}/{_BLOCK}/") for name in tensors)


def shape_of(tensors: Tensors, name: str, where: str) -> tuple[int, ...]:
    """Raises UserError where there is no such array."""
    if name not in tensors:
        raise UserError(f"{where} lacks {name!r}, which such a model has")
    return tensors[name].shape


# ---- Tables ----------------------------------------------------------------------------------


def image_rows(tower: ImageTowerConfig, theirs: str, *, scanned: bool) -> list[Row]:
    """An image tower below `theirs` ('params/img/' or '')."""
    patch, grid = tower.patch_size, tower.image_size // tower.patch_size
    kernel = None if tower.kind == "naflex" else (patch, patch, 3, -1)
    rows = [
        same("image/stem/project/kernel", f"{theirs}embedding/kernel", shape=kernel),
        same("image/stem/project/bias", f"{theirs}embedding/bias"),
        *_encoder_rows("image", f"{theirs}Transformer", scanned),
    ]
    if tower.position_embedding == "learned":
        shape = (grid, grid, -1) if tower.kind == "naflex" else (1, grid**2 + tower.class_token, -1)
        rows.append(same("image/position_embedding", f"{theirs}pos_embedding", shape=shape))
    if tower.class_token:
        rows.append(same("image/class_embedding", f"{theirs}cls", shape=(1, 1, -1)))
    if tower.pooling == "attention":
        rows += _pooling_rows("image/pooling", f"{theirs}MAPHead_0")
    return rows


def text_rows(theirs: str, *, pooling: str, context_length: int, scanned: bool) -> list[Row]:
    """A text tower below `theirs` ('params/txt/')."""
    positions, shape = f"{theirs}pos_embedding", (1, context_length, -1)
    rows = [
        same("text/token_embedding", f"{theirs}Embed_0/embedding"),
        same("text/position_embedding", positions, shape=shape),
        *_encoder_rows("text", f"{theirs}Encoder_0", scanned),
    ]
    return (
        rows + _pooling_rows("text/pooling", f"{theirs}MAPHead_0")
        if pooling == "attention"
        else rows
    )


def _encoder_rows(tower: str, encoder: str, scanned: bool) -> list[Row]:
    """Our layers are stacked; so are theirs where they are scanned."""
    ours = f"{tower}/blocks"
    block = f"{encoder}/{_BLOCK}" if scanned else f"{encoder}/{_BLOCK}_{{layer}}"
    parts = [f"{block}/{_ATTENTION}/{name}" for name in _PARTS]
    return [
        *_norm(f"{ours}/attention_norm", f"{block}/LayerNorm_0"),
        # The axis of query, key and value follows that of the input, and of the layers.
        _split(f"{ours}/attention/qkv/kernel", parts, "kernel", axis=1 + scanned),
        _split(f"{ours}/attention/qkv/bias", parts, "bias", axis=scanned),
        *dense_rows(f"{ours}/attention/out", f"{block}/{_ATTENTION}/out"),
        *_norm(f"{ours}/mlp_norm", f"{block}/LayerNorm_1"),
        *_mlp(f"{ours}/mlp", f"{block}/MlpBlock_0"),
        *_norm(f"{tower}/final_norm", f"{encoder}/encoder_norm"),
    ]


def _pooling_rows(ours: str, head: str) -> list[Row]:
    parts = [f"{head}/{_ATTENTION}/{name}" for name in _PARTS]
    return [
        same(f"{ours}/probe", f"{head}/probe", shape=(1, 1, -1)),
        *dense_rows(f"{ours}/query", parts[0]),
        _split(f"{ours}/key_value/kernel", parts[1:], "kernel", axis=1),
        _split(f"{ours}/key_value/bias", parts[1:], "bias", axis=0),
        *dense_rows(f"{ours}/out", f"{head}/{_ATTENTION}/out"),
        *_norm(f"{ours}/norm", f"{head}/LayerNorm_0"),
        *_mlp(f"{ours}/mlp", f"{head}/MlpBlock_0"),
    ]


def _split(ours: str, theirs: list[str], name: str, *, axis: int) -> Row:
    """An array of ours whose `axis` counts arrays of theirs."""
    return Row(
        ours=ours,
        theirs=tuple(f"{part}/{name}" for part in theirs),
        write=lambda array: list(np.moveaxis(array, axis, 0)),
        read=lambda tensors: np.stack(tensors, axis=axis),
    )


def dense_rows(ours: str, theirs: str) -> list[Row]:
    """A linear layer with a bias: flax's and ours have the same layout."""
    return [same(f"{ours}/{name}", f"{theirs}/{name}") for name in ("kernel", "bias")]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [same(f"{ours}/{name}", f"{theirs}/{name}") for name in ("scale", "bias")]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return [
        *dense_rows(f"{ours}/up", f"{theirs}/Dense_0"),
        *dense_rows(f"{ours}/down", f"{theirs}/Dense_1"),
    ]
