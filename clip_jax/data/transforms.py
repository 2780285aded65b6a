"""Pictures: from an encoded file to a uint8 array of the size that the model takes.

All image decoding of the project goes through `decode_image`, all resampling of photographs through
`resized`.
"""

import io
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from clip_jax.config.schema import AugmentConfig
from clip_jax.data.object_view import fitted_object, object_view

Framing = Literal["crop", "object"]
Resize = Literal["shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
WHITE = (255, 255, 255)
MAX_PIXELS = 2**26  # 67 million: larger ones are accidents or attacks. Pillow warns from 89 on

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_ORIENTATION = 0x0112
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


def decode_image(
    data: bytes, background: tuple[int, int, int] | None = WHITE, smallest_side: int | None = None
) -> Image.Image:
    """Decode a JPEG, PNG or WebP to an upright RGB image.

    background: RGB behind transparent pixels; None: a picture with transparency comes as RGBA.
    smallest_side: pixels; a JPEG may come at 1/2, 1/4 or 1/8 of its size if its shorter side keeps
    as many. 16-bit pictures keep their upper 8 bits.

    Raises ValueError if the data is no such picture, is cut short or has over MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is over {MAX_PIXELS} pixels")
        if smallest_side is not None:
            image.draft("RGB", (smallest_side, smallest_side))
        image.load()
        return upright_rgb(image, background)
    # Pillow raises half a dozen types, SyntaxError among them, on damaged files.
    except Exception as error:
        raise ValueError(f"cannot decode the image ({len(data)} bytes): {error}") from error


def upright_rgb(image: Image.Image, background: tuple[int, int, int] | None = WHITE) -> Image.Image:
    """Turn an image as its EXIF orientation says and convert it as `decode_image` does."""
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image, background)


def resized(
    image: Image.Image,
    size: tuple[int, int],
    interpolation: Interpolation,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The image, or a box (left, top, right, bottom) of it, at size (width, height), antialiased.

    Pillow's filters, as torchvision uses them on PIL images. On tensors torchvision has its own,
    whose results are a grey level apart here and there.
    """
    return image.resize(size, _FILTERS[interpolation], box=box)


def training_view(
    data: bytes,
    framing: Framing,
    config: AugmentConfig,
    image_size: int,
    rng: np.random.Generator,
    *,
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Decode a picture and return a random view of it: uint8 [image_size, image_size, 3].

    framing 'object' is always bilinear. Raises ValueError as `decode_image` does.
    """
    if framing == "object":
        return object_view(decode_image(data, background=None), config, image_size, rng)
    smallest_side = None
    if config.scaled_jpeg_decode:
        smallest_side = math.ceil(image_size / math.sqrt(config.crop_scale[0]))
    image = decode_image(data, smallest_side=smallest_side)
    return augment(image, config, image_size, rng, interpolation=interpolation)


def augment(
    image: Image.Image,
    config: AugmentConfig,
    image_size: int,
    rng: np.random.Generator,
    *,
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Return a random view of an RGB image: uint8 [image_size, image_size, 3].

    The crop is that of Szegedy et al. 2015, the colour jitter that of Chen et al. 2020 (SimCLR), in
    torchvision's arithmetic. What an option draws from `rng` does not depend on the image's
    content.
    """
    box = _random_crop(image.size, config, rng)
    image = resized(image, (image_size, image_size), interpolation, box)
    return np.asarray(flip_and_recolor(image, config, rng))


def flip_and_recolor(
    image: Image.Image, config: AugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """The part of `augment` after the crop: flip, colour jitter, grayscale."""
    flip, jitter, grayscale = rng.random(3)
    if flip < config.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter < config.color_jitter:
        image = _jitter(image, config, rng)
    if grayscale < config.grayscale:
        image = image.convert("L").convert("RGB")
    return image


def evaluation_image(
    image: Image.Image,
    image_size: int,
    framing: Framing = "crop",
    *,
    resize: Resize = "shortest",
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Return the view of an RGB image that scores rest on: uint8 [image_size, image_size, 3].

    framing 'crop': `resize` 'shortest' resizes the shorter side and crops the centre, with
    torchvision's rounding (`Resize`, `CenterCrop`), as open_clip evaluates; transformers' CLIP
    processors round half a margin down where torchvision rounds it to even. 'squash' resizes both
    sides, as SigLIP does. 'object': see `fitted_object`.
    """
    if framing == "object":
        return fitted_object(image, image_size)
    if resize == "squash":
        return np.asarray(resized(image, (image_size, image_size), interpolation))
    width, height = image.size
    if width <= height:
        size = (image_size, int(image_size * height / width))
    else:
        size = (int(image_size * width / height), image_size)
    left = round((size[0] - image_size) / 2)
    top = round((size[1] - image_size) / 2)
    if size[0] * size[1] > MAX_PIXELS:
        # A strip of a picture: only its middle is resized, a grey level apart here and there.
        scale = width / size[0], height / size[1]
        box = (left, top, left + image_size, top + image_size)
        part = (box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1])
        return np.asarray(resized(image, (image_size, image_size), interpolation, part))
    image = resized(image, size, interpolation)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        # Pillow's own conversion clips at 255 instead of scaling.
        upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if background is None:
        return image
    opaque = Image.new("RGB", image.size, background)
    opaque.paste(image, mask=image)
    return opaque


def _random_crop(
    size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) in pixels of random area and aspect ratio."""
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
