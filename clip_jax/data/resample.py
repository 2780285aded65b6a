"""Resampling of pictures: by Pillow where scores rest on it, by OpenCV where speed counts."""

import functools
import logging
import math
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

logger = logging.getLogger(__name__)

Interpolation = Literal["bicubic", "bilinear"]
Size = tuple[int, int]  # width, height

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Where a side shrinks by a factor f, a short blur before OpenCV's interpolation comes nearer to
# Pillow's antialiased filters than OpenCV's INTER_AREA, in less than half its time. The figures
# were fitted on seven photographs; benchmarks/decode.py measures the error that is left.
_THREE_TAPS_UP_TO = 2.6
_FIVE_TAPS_UP_TO = 3.3  # beyond it areas are averaged
_LINEAR_UP_TO = 3.0  # without a blur; beyond it pixels would be passed over
_LONGEST_SIDE = 2**16  # OpenCV's tables take some 24 bytes for each pixel of a side


def resized(
    image: Image.Image,
    size: Size,
    interpolation: Interpolation,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The image, or a box (left, top, right, bottom) of it, at size (width, height), antialiased.

    Pillow's filters, as torchvision uses them on PIL images. On tensors torchvision has its own,
    whose results are a grey level apart here and there.
    """
    return image.resize(size, _FILTERS[interpolation], box=box)


def resampled(
    pixels: NDArray[np.uint8], size: Size, interpolation: Interpolation, *, antialiased: bool
) -> NDArray[np.uint8]:
    """Pixels [height, width, 3] at size (width, height), by OpenCV where it is installed.

    antialiased: nearly as `resized` does it. Else pixels that shrink to no less than a third are
    interpolated linearly. Without OpenCV: `resized`, or its bilinear filter.
    """
    height, width = pixels.shape[:2]
    cv2 = opencv()
    if cv2 is None or max(width, height) > _LONGEST_SIDE:
        filter = interpolation if antialiased else "bilinear"
        return np.asarray(resized(Image.fromarray(pixels), size, filter))
    across, down = width / size[0], height / size[1]
    method = cv2.INTER_CUBIC if interpolation == "bicubic" else cv2.INTER_LINEAR
    if across <= 1 and down <= 1:
        return cv2.resize(pixels, size, interpolation=method)
    if not antialiased and across <= _LINEAR_UP_TO and down <= _LINEAR_UP_TO:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    if across > _FIVE_TAPS_UP_TO or down > _FIVE_TAPS_UP_TO:
        width = size[0] if across > _FIVE_TAPS_UP_TO else width
        height = size[1] if down > _FIVE_TAPS_UP_TO else height
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        across, down = width / size[0], height / size[1]
    if across > 1 or down > 1:
        edge = cv2.BORDER_REPLICATE
        pixels = cv2.sepFilter2D(pixels, -1, _blur(across), _blur(down), borderType=edge)
    return cv2.resize(pixels, size, interpolation=method)


@functools.cache
def opencv() -> ModuleType | None:
    """OpenCV, told to keep to the calling thread; None, with a line in the log, where it is not."""
    try:
        import cv2
    except ImportError as error:
        logger.warning(
            "training images are resampled by Pillow, which takes several times as long as "
            "OpenCV (%s); pip install 'clip-jax-training[fast]'",
            error,
        )
        return None
    # The pipeline has threads of its own; OpenCV's beside them would fight for the cores.
    cv2.setNumThreads(0)
    module: ModuleType = cv2
    return module


def _blur(factor: float) -> NDArray[np.float32]:
    """The kernel for a side that shrinks by `factor`."""
    if factor <= 1:
        return np.ones(1, np.float32)
    if factor <= _THREE_TAPS_UP_TO:
        outer = 0.2 * (factor - 0.9)
        return np.array([outer, 1 - 2 * outer, outer], np.float32)
    deviation = 0.45 * factor - 0.2
    near, far = (math.exp(-((step / deviation) ** 2) / 2) for step in (1, 2))
    kernel = np.array([far, near, 1, near, far], np.float32)
    return kernel / kernel.sum()
