"""Position embeddings of patches: the fixed sine-cosine table, and resampling to other grids.

Shape suffixes: B batch, T tokens (patches), G side of the table's grid, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def sincos2d(grid: tuple[int, int], width: int) -> Array:
    """Fixed embeddings [rows * columns, width], float32 (MoCo v3, Chen et al. 2021, section 4).

    Quarters of the width: sine and cosine of the column, sine and cosine of the row, at
    wavelengths from 2 pi to 10,000 * 2 pi, both included as in big_vision. `width` is a multiple
    of 4.
    """
    quarter = width // 4
    frequency_F = 10_000.0 ** -(jnp.arange(quarter) / max(quarter - 1, 1))
    row_T, column_T = (index.reshape(-1) for index in jnp.mgrid[: grid[0], : grid[1]])
    angles = [position_T[:, None] * frequency_F for position_T in (column_T, row_T)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)


def resample_position_embedding(
    table: Any, old_grid: tuple[int, int], new_grid: tuple[int, int], *, num_prefix: int
) -> np.ndarray:
    """A learned table for patches of another grid, on the host: what loading at another size does.

    table: [num_prefix + rows * columns, D] of `old_grid`, any array. The first `num_prefix` rows
    (the class token) stay as they are. Bicubic with antialiasing, half-pixel centres (Keys 1981,
    a = -0.5), as open_clip and timm do with PyTorch. Returns a NumPy array of the same dtype.
    """
    table = np.asarray(table)
    if old_grid == new_grid:
        return table
    prefix, patches = table[:num_prefix], table[num_prefix:].astype(np.float64)
    rows, columns = (
        _weights(np.arange(new), np.float64(new), old, _cubic)
        for new, old in zip(new_grid, old_grid, strict=True)
    )
    x = np.tensordot(rows, patches.reshape(*old_grid, -1), axes=(1, 0))
    x = np.tensordot(columns, x, axes=(1, 1)).swapaxes(0, 1)
    return np.concatenate([prefix, x.reshape(-1, table.shape[1]).astype(table.dtype)])


def stretch_position_embedding(table: Any, length: int) -> np.ndarray:
    """A learned table [T, D] for longer captions: [length, D] of the same dtype, on the host.

    Linear, half-pixel centres, the ends repeated, as open_clip's `resize_text_pos_embed`, with
    which CLIPA goes from 8 or 16 tokens to 32: the last position stays the last.
    """
    table = np.asarray(table)
    at = (np.arange(length) + 0.5) * len(table) / length - 0.5
    columns = (np.interp(at, np.arange(len(table)), column) for column in table.T)
    return np.stack(list(columns), axis=1).astype(table.dtype)


def resampled_per_sample(table_GGD: Array, spatial_shapes_B2: Array, num_tokens: int) -> Array:
    """Embeddings [B, T, D] of patches of images with grids of their own (SigLIP 2, NaFlex).

    table_GGD: embeddings of a G x G grid. spatial_shapes_B2: int32, rows and columns of patches
    of each image, at most `num_tokens` in all; patches lie row by row. Bilinear with
    antialiasing, half-pixel centres, as in transformers (except one column of several patches,
    where torch 2.13 on CPUs repeats the first row). What stands at padding is finite and means
    nothing.

    One product with a [T, G * G] matrix per image, made of the weights of rows and columns:
    shapes do not depend on the images, and no resampled grid is larger than its image.
    """
    G, _, D = table_GGD.shape
    rows_B1, columns_B1 = (jnp.maximum(size, 1)[:, None] for size in spatial_shapes_B2.T)
    position_T = jnp.arange(num_tokens)
    row_BT = jnp.minimum(position_T // columns_B1, rows_B1 - 1)  # beyond the image: its last row
    column_BT = position_T % columns_B1
    row_BTG = _weights(row_BT, rows_B1.astype(jnp.float32), G, _triangle)
    column_BTG = _weights(column_BT, columns_B1.astype(jnp.float32), G, _triangle)
    matrix = row_BTG[..., :, None] * column_BTG[..., None, :]
    return jnp.einsum(
        "btg,gd->btd",
        matrix.reshape(*row_BT.shape, G * G).astype(table_GGD.dtype),
        table_GGD.reshape(G * G, D),
        precision=jax.lax.Precision.HIGHEST,
    )


def _weights(position: Any, new_size: Any, old_size: int, kernel: Any) -> Any:
    """How much each of `old_size` samples counts at `position` of `new_size`: [..., old_size].

    NumPy or JAX arrays. Where the image shrinks, the kernel is widened by the same factor
    (antialiasing); where it is cut off at the border, the rest is scaled up to sum to 1.
    """
    scale = old_size / new_size
    centre = (position + 0.5) * scale
    distance = np.arange(old_size) + 0.5 - centre[..., None]
    weights = kernel(abs(distance / scale.clip(1)[..., None]))
    return weights / weights.sum(-1, keepdims=True)


def _triangle(x: Any) -> Any:
    return (1 - x).clip(0)


def _cubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
