"""Random crops, flips and colours, in torchvision's arithmetic.

The crop is that of Szegedy et al. 2015, the colour jitter that of Chen et al. 2020 (SimCLR). What
an option draws from the generator does not depend on the picture's content.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from clip_jax.config.schema import AugmentConfig
from clip_jax.data.decode import Box, Decode, open_picture
from clip_jax.data.rand_augment import rand_augment
from clip_jax.data.resample import Interpolation, Size, opencv

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


def random_view(
    data: bytes,
    config: AugmentConfig,
    image_size: int,
    rng: np.random.Generator,
    *,
    decode: Decode = "exact",
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Decode a picture and return a random view of it: uint8 [image_size, image_size, 3].

    Either `decode` takes the same box of the picture. Raises BadSampleError as `decode_image` does.
    """
    picture = open_picture(data)
    box = random_crop(picture.size, config, rng)
    size = (image_size, image_size)
    pixels = picture.view(box, size, decode=decode, interpolation=interpolation)
    return flip_and_recolor(pixels, config, rng)


def random_crop(size: Size, config: AugmentConfig, rng: np.random.Generator) -> Box:
    """A box in pixels, of random area and aspect ratio, of a picture of size (width, height)."""
    width, height = size
    draws = rng.random((_CROP_ATTEMPTS, 4)).tolist()  # all at once: the stream stays in step
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    for area_draw, ratio_draw, left_draw, top_draw in draws:
        smallest, largest = config.crop_scale
        area = width * height * (smallest + (largest - smallest) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(left_draw * (width - crop_width + 1))
            top = int(top_draw * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    # An elongated picture: the largest centred box with an allowed ratio.
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    crop_width = min(width, max(1, round(height * ratio)))
    crop_height = min(height, max(1, round(width / ratio)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def flip_and_recolor(
    pixels: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """What follows the crop: flip, RandAugment, colour jitter, grayscale; uint8 [height, width, 3].

    Pixels that nothing befalls are returned as they are.
    """
    flip, jitter, grayscale = rng.random(3).tolist()
    if flip < config.horizontal_flip:
        pixels = _mirrored(pixels)
    jitters, grays = jitter < config.color_jitter, grayscale < config.grayscale
    if not (config.rand_augment or jitters or grays):
        return pixels
    image = Image.fromarray(pixels)
    if config.rand_augment:
        image = rand_augment(image, config.rand_augment, config.rand_augment_magnitude, rng)
    if jitters:
        image = _jitter(image, config, rng)
    if grays:
        image = image.convert("L").convert("RGB")
    return np.asarray(image)


def _mirrored(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = opencv()
    if cv2 is None:
        return np.ascontiguousarray(pixels[:, ::-1])
    mirrored: NDArray[np.uint8] = cv2.flip(pixels, 1)  # 40 times as fast
    return mirrored


def _jitter(image: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order."""
    draws = (2 * rng.random(4) - 1).tolist()
    for operation in rng.permutation(4).tolist():
        draw = draws[operation]
        if operation == 0 and config.brightness:
            image = ImageEnhance.Brightness(image).enhance(max(0.0, 1 + config.brightness * draw))
        elif operation == 1 and config.contrast:
            image = ImageEnhance.Contrast(image).enhance(max(0.0, 1 + config.contrast * draw))
        elif operation == 2 and config.saturation:
            image = ImageEnhance.Color(image).enhance(max(0.0, 1 + config.saturation * draw))
        elif operation == 3 and config.hue:
            image = _turn_hue(image, config.hue * draw)
    return image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn all hues by a share of the circle, which has 256 steps here."""
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + round(255 * turn)) % 256
    channels = (Image.fromarray(turned.astype(np.uint8)), saturation, value)
    return Image.merge("HSV", channels).convert("RGB")
