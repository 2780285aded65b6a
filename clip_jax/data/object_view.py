"""Views of a single thing on a clear ground: trimmed, set on white, whole.

A crop of an emoji or an icon loses what it is about, and its margins differ from artist to artist.
So the ground is trimmed off, and the object is scaled and placed; colours change on the object
alone.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_jax.config.schema import AugmentConfig, ObjectViewConfig

_GROUND = 247  # gray levels from here on up are white ground: JPEG's ripples stay below 8 levels
_FILL = 0.92  # of the image's side, in evaluation: what training sees is 0.75 to 1
_DARK = 0.25  # luma of lines that stay dark where a picture is washed out
_MEDIUM = 0.5

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as the matrix below
_RGB_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32
)
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ).astype(np.float32)

Box = tuple[int, int, int, int]  # left, top, right, bottom


def fitted_object(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """Trim an RGB image's white margins and centre the rest: uint8 [image_size, image_size, 3]."""
    box = _content_box(image)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = image_size * _FILL / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    fitted = image.resize(size, Image.Resampling.BILINEAR, box=box)
    left, top = (image_size - size[0]) // 2, (image_size - size[1]) // 2
    return _on_white(np.asarray(fitted), left, top, image_size)


def object_view(
    image: Image.Image, config: AugmentConfig, image_size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return a random view of an RGB or RGBA image: uint8 [image_size, image_size, 3].

    The object is trimmed, stretched, turned and scaled, changes its colours and lies anywhere
    whole within the image. What is drawn from `rng` does not depend on the image.
    """
    view = config.object_view
    (scale, stretch, rotate, angle, shear, flip, left, top) = rng.random(8).tolist()
    box = _content_box(image)
    if rotate < view.rotation:
        turn = (2 * angle - 1) * view.angle
        image = _rotate(image, box, turn, (2 * shear - 1) * view.shear)
    size = _scaled_size(box, view, image_size, scale, stretch)
    image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    if flip < config.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = _recolor(image, view, rng)
    left, top = int(left * (image_size - size[0] + 1)), int(top * (image_size - size[1] + 1))
    return _on_white(pixels, left, top, image_size)


def _content_box(image: Image.Image) -> Box:
    """The smallest box around what is not transparent, or not white."""
    if image.mode == "RGBA":
        box = image.getchannel("A").getbbox()
    else:
        box = image.convert("L").point(lambda level: 255 * (level < _GROUND)).getbbox()
    return box or (0, 0, *image.size)


def _scaled_size(
    box: Box, view: ObjectViewConfig, image_size: int, scale: float, stretch: float
) -> tuple[int, int]:
    width, height = box[2] - box[0], box[3] - box[1]
    smallest, largest = view.scale
    factor = image_size * (smallest + (largest - smallest) * scale) / max(width, height)
    ratio = math.exp(view.stretch * (stretch - 0.5))
    # Four pixels: thinner things would vanish.
    return (
        min(image_size, max(4, round(width * factor * ratio))),
        min(image_size, max(4, round(height * factor / ratio))),
    )


def _rotate(image: Image.Image, box: Box, turn: float, shear: float) -> Image.Image:
    """Turn and shear about the middle of the box; what comes in from outside is ground."""
    cosine, sine = math.cos(turn), math.sin(turn)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    across = sine + shear
    output_to_input = (
        cosine,
        across,
        x - cosine * x - across * y,
        -sine,
        cosine,
        y + sine * x - cosine * y,
    )
    ground = (255, 255, 255) if image.mode == "RGB" else None  # None: transparent
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        output_to_input,
        Image.Resampling.BILINEAR,
        fillcolor=ground,
    )


def _recolor(
    image: Image.Image, view: ObjectViewConfig, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Change the colours and lay the object on white: uint8 [height, width, 3]."""
    color, gray, saturation, contrast, brightness, pale, wash = rng.random(7).tolist()
    turn = view.hue * rng.standard_normal()
    channels = np.asarray(image, np.float32) / 255
    pixels = channels[..., :3]
    if color < view.color:
        low, high = view.saturation
        factor = 0.0 if gray < view.grayscale else low + (high - low) * saturation
        pixels = pixels @ _hue_and_saturation(turn, factor).T
        gain = 1 + view.contrast * (2 * contrast - 1)
        shift = view.brightness * (2 * brightness - 1)
        pixels = np.clip((pixels - _MEDIUM) * gain + _MEDIUM + shift, 0, 1)
    if pale < view.pale:
        light = (pixels @ _LUMA > _DARK)[..., None]
        pixels = np.where(light, pixels + (1 - pixels) * wash, pixels)
    if channels.shape[-1] == 4:
        pixels = 1 + (pixels - 1) * channels[..., 3:]
    return (pixels * 255 + 0.5).astype(np.uint8)


def _hue_and_saturation(turn: float, factor: float) -> NDArray[np.float32]:
    """The 3 x 3 matrix that turns the colour plane of YIQ by an angle and scales it."""
    cosine, sine = factor * math.cos(turn), factor * math.sin(turn)
    plane = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]], np.float32)
    return (_YIQ_TO_RGB @ plane @ _RGB_TO_YIQ).astype(np.float32)


def _on_white(pixels: NDArray[np.uint8], left: int, top: int, size: int) -> NDArray[np.uint8]:
    canvas = np.full((size, size, 3), 255, np.uint8)
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas
