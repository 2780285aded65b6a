"""What a fused attention kernel does not make of an attention that XLA compiled.

cuDNN's kernels cannot be compiled ahead of time, so plans for GPUs are compiled with XLA's
attention, which makes arrays of scores, [.., T, T], in each layer. The products stay: a fused one
makes the same, and in the backward pass the scores once more (Dao et al. 2022, section 3.1), which
is added to the FLOPs.
"""

from collections.abc import Callable
from typing import NamedTuple

from clip_jax.config import ExperimentConfig, ImageTowerConfig, TextTowerConfig
from clip_jax.config.schema_model import POOLS_ONE_TOKEN
from clip_jax.models import Execution
from clip_jax.planning.hlo import Program
from clip_jax.planning.hlo_arrays import Array
from clip_jax.planning.hlo_liveness import peak_bytes
from clip_jax.planning.traffic import Reader

TowerConfig = ImageTowerConfig | TextTowerConfig

_PADDED_TO = 8  # elements: cuBLAS wants 16 bytes


class Fused(NamedTuple):
    """Bytes on one device that a fused attention does without."""

    memory_bytes: int  # of the peak
    traffic_bytes: int  # read and written in a step


def fused_attention(program: Program, config: ExperimentConfig, execution: Execution) -> Fused:
    """What a program for a GPU has of them; nothing where the run would not fuse either.

    execution: that of the run, not the one that was compiled.
    """
    scores = unfused_arrays(config, execution, copies=False)
    left_out = unfused_arrays(config, execution)
    if scores is None or left_out is None:
        return Fused(0, 0)
    # Of q, k and v the copies may be all that is kept for the backward pass: they stay.
    memory = peak_bytes(program) - peak_bytes(program, scores)
    traffic = sum(work.num_bytes * times for work, times in Reader(program).work())
    traffic -= sum(work.num_bytes * times for work, times in Reader(program, left_out).work())
    return Fused(memory, traffic)


def unfused_arrays(
    config: ExperimentConfig, execution: Execution, *, copies: bool = True
) -> Callable[[Array], bool] | None:
    """Tells arrays that are there for want of a fused attention; None: no tower would be fused.

    Scores; and the copies of q, k, v and the output that cuBLAS wants: of all heads in a row,
    [B * N, T, H], with T filled up to a multiple of 8. A fused kernel takes them where they lie.
    Those of a last block with one query to a row are left out too, though it is not fused.
    """
    towers = _fused_towers(config, execution)
    lengths: set[int] = set()
    copied: set[tuple[int, int]] = set()
    for num_tokens, tower in towers:
        padded = -(-num_tokens // _PADDED_TO) * _PADDED_TO
        width = tower.width // tower.num_heads
        lengths |= {num_tokens, padded}
        copied |= {(num_tokens, width), (padded, width), (width, num_tokens), (width, padded)}

    def is_left_out(array: Array) -> bool:
        if len(array.dims) < 3:
            return False
        *outer, rows, columns = array.dims
        return (rows == columns and rows in lengths) or (
            copies and len(outer) == 1 and (rows, columns) in copied
        )

    return is_left_out if towers else None


def recomputed_scores(config: ExperimentConfig, execution: Execution) -> int:
    """FLOPs of one sample for the scores that fused backward passes compute once more.

    A last block that has one query to a row is not fused.
    """
    return sum(
        2 * num_tokens**2 * tower.width * (tower.depth - (tower.pooling in POOLS_ONE_TOKEN))
        for num_tokens, tower in _fused_towers(config, execution)
    )


def _fused_towers(config: ExperimentConfig, execution: Execution) -> list[tuple[int, TowerConfig]]:
    """Tokens of a row, and the tower, of which a sample is one row."""
    if execution.attention != "cudnn":
        return []
    image, text = config.model.image, config.model.text
    towers: list[tuple[int, TowerConfig]] = []
    if image.kind != "resnet" and _fuses(image):
        towers.append((_image_tokens(image), image))
    if text.kind != "cbow" and _fuses(text) and not config.data.packing.group_size:
        towers.append((text.context_length, text))
    return towers


def _fuses(tower: TowerConfig) -> bool:
    """As `clip_jax.models.layers.attention` decides."""
    return tower.width // tower.num_heads % 8 == 0


def _image_tokens(image: ImageTowerConfig) -> int:
    """Of a training step, in the blocks."""
    patches = (image.image_size // image.patch_size) ** 2
    if image.kind == "naflex":
        patches = image.max_num_patches
    patches = max(1, int(patches * (1 - image.patch_dropout)))
    return patches + image.num_registers + (image.kind == "vit" and image.class_token)
