"""Images of any shape as padded sequences of patches (SigLIP 2, Tschannen et al. 2025, NaFlex).

Shape suffixes: N patches of a sequence, D values of a patch.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_jax.data.record import BadSampleError
from clip_jax.data.resample import Interpolation, resized

# Of the search for the scale. They decide sizes at the edge, so they are those of the reference,
# transformers' `Siglip2ImageProcessor`.
_SMALLEST_SCALE, _LARGEST_SCALE, _SCALE_STEP = 1e-6, 100.0, 1e-5


class PatchSequence(NamedTuple):
    """One image. Patches go row by row; padding, at the end, is 0 with mask False."""

    patches: NDArray[np.uint8]  # [N, D], D = rows, columns and channels of a patch
    mask: NDArray[np.bool_]  # [N]
    spatial_shape: tuple[int, int]  # rows and columns of patches


def naflex_size(
    width: int, height: int, *, patch_size: int, max_num_patches: int
) -> tuple[int, int]:
    """The size (width, height) in pixels to which an image is resized.

    Both sides are whole patches, at least one, in number at most `max_num_patches`; the aspect
    ratio is kept up to that rounding. As the reference finds it: by halving an interval of scales.

    Raises BadSampleError for an image so elongated that its longer side alone has more patches.
    """

    def patches(scale: float) -> tuple[int, int]:
        columns, rows = (max(1, math.ceil(side * scale / patch_size)) for side in (width, height))
        return columns, rows

    low, high = _SMALLEST_SCALE, _LARGEST_SCALE
    while high - low >= _SCALE_STEP:
        middle = (low + high) / 2
        columns, rows = patches(middle)
        if columns * rows <= max_num_patches:
            low = middle
        else:
            high = middle
    columns, rows = patches(low)
    if columns * rows > max_num_patches:
        message = f"{width} x {height} pixels do not fit {max_num_patches} patches"
        raise BadSampleError("image", message)
    return columns * patch_size, rows * patch_size


def naflex_patches(
    image: Image.Image,
    *,
    patch_size: int,
    max_num_patches: int,
    interpolation: Interpolation = "bilinear",
) -> PatchSequence:
    """Resize an RGB image to at most `max_num_patches` patches and cut it into them.

    Sizes, order and values are those of transformers' `Siglip2ImageProcessor` with PIL, before its
    normalisation. Raises BadSampleError as `naflex_size` does.
    """
    size = naflex_size(*image.size, patch_size=patch_size, max_num_patches=max_num_patches)
    pixels = np.asarray(resized(image, size, interpolation))
    return patch_sequence(pixels, patch_size=patch_size, max_num_patches=max_num_patches)


def patch_sequence(
    pixels: NDArray[np.uint8], *, patch_size: int, max_num_patches: int
) -> PatchSequence:
    """Cut uint8 [height, width, 3], both sides whole patches, into patches, and pad them."""
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    grid = pixels.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 1, 3, 4)
    patches_ND = np.zeros((max_num_patches, patch_size * patch_size * 3), np.uint8)
    patches_ND[: rows * columns] = grid.reshape(rows * columns, -1)
    return PatchSequence(patches_ND, np.arange(max_num_patches) < rows * columns, (rows, columns))
