"""RandAugment (Cubuk et al. 2020): operations drawn from 14, all at one magnitude.

The operations, their ranges and their arithmetic on PIL images are torchvision's: magnitude 0 to 30
goes from nothing to the end of each range, neighbours are taken without interpolation, and what
comes in from outside is black.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

NUM_LEVELS = 31
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)

_SHEAR = 0.3
_TRANSLATE = 150 / 331  # of the side: 150 pixels of the paper's 331
_DEGREES = 30.0
_ENHANCE = 0.9
_BITS, _WHITE = 8, 255
_POSTERIZE = 4  # bits
_ENHANCERS: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def rand_augment(
    image: Image.Image, num_operations: int, magnitude: int, rng: np.random.Generator
) -> Image.Image:
    """Apply `num_operations` random operations to an RGB image, at `magnitude` of 30."""
    for kind, sign in rng.random((num_operations, 2)).tolist():
        operation = OPERATIONS[int(kind * len(OPERATIONS))]
        image = apply_operation(image, operation, magnitude, negative=sign < 0.5)
    return image


def apply_operation(
    image: Image.Image, operation: str, magnitude: int, *, negative: bool = False
) -> Image.Image:
    """Apply one of OPERATIONS at `magnitude` of 30; negative: the other way, where it has two."""
    share = magnitude / (NUM_LEVELS - 1)
    signed = -share if negative else share
    if operation == "shear_x":
        return _affine(image, (1, signed * _SHEAR, 0, 0, 1, 0))
    if operation == "shear_y":
        return _affine(image, (1, 0, 0, signed * _SHEAR, 1, 0))
    if operation == "translate_x":
        return _affine(image, (1, 0, -int(signed * _TRANSLATE * image.width), 0, 1, 0))
    if operation == "translate_y":
        return _affine(image, (1, 0, 0, 0, 1, -int(signed * _TRANSLATE * image.height)))
    if operation == "rotate":
        return image.rotate(signed * _DEGREES)
    if operation in _ENHANCERS:
        return _ENHANCERS[operation](image).enhance(1 + signed * _ENHANCE)
    if operation == "posterize":
        return ImageOps.posterize(image, _BITS - round(share * _POSTERIZE))
    if operation == "solarize":
        return ImageOps.solarize(image, _WHITE - magnitude * _WHITE // (NUM_LEVELS - 1))
    if operation == "autocontrast":
        return ImageOps.autocontrast(image)
    if operation == "equalize":
        return ImageOps.equalize(image)
    assert operation == "identity", operation
    return image


def _affine(image: Image.Image, output_to_input: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, output_to_input)
