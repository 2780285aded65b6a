"""Sample images and texts for the parity gate: made here, the same each time."""

import math

import numpy as np
from PIL import Image

from clip_jax.config import ImageTowerConfig

TEXTS = (
    "a photo of a cat",
    "Two dogs are running on a beach at sunset.",
    "a",
    "12 red apples and 3 pears on a wooden table",
    " ".join(["a long caption that no context holds"] * 80),
)
# Where libraries clean texts in ways of their own; for comparing a tokenizer with itself.
TRICKY_TEXTS = (
    "",
    "  blanks\tand\nlines  ",
    "l'été à la plage, naïve façade",
    "日本語のキャプション 🐱👍🏽",
    "fish &amp; chips &lt;3 snake_case",
    "Don't STOP: #1 (really)!",
)


def exact_images(image: ImageTowerConfig) -> list[Image.Image]:
    """Images that no preprocessing resizes, for their size is the model's."""
    if image.kind == "naflex":
        # The shape of the largest square, and one that fills the sequence with wide rows.
        side = math.isqrt(image.max_num_patches)
        shapes = [(side, side)] if side * side == image.max_num_patches else []
        shapes += [(rows, image.max_num_patches // rows) for rows in _divisors(image)]
        sizes = [(columns * image.patch_size, rows * image.patch_size) for rows, columns in shapes]
        return [_picture(*size, seed) for seed, size in enumerate(sizes[:2])]
    return [_picture(image.image_size, image.image_size, seed) for seed in range(2)]


def other_images(image: ImageTowerConfig) -> list[Image.Image]:
    """A wide and a high one, larger and smaller than the model's."""
    (wide, low), (high, narrow) = other_sizes(image.image_size)
    return [_picture(wide, low, 2), _picture(narrow, high, 3)]


def other_sizes(side: int) -> list[tuple[int, int]]:
    """Longer and shorter side, in pixels, of two images for a model that takes `side` x `side`.

    Of an odd margin torchvision and open_clip crop half, rounded to even, where transformers rounds
    down. It shifts an image by one pixel where the margin is 3 more than a multiple of 4: such
    margins are left out.
    """
    sizes = []
    for long, short in ((2 * side, side + side // 2), (side - side // 8, side - side // 4)):
        while (side * long // short - side) % 4 == 3:
            long += 1
        sizes.append((long, short))
    return sizes


def _divisors(image: ImageTowerConfig) -> list[int]:
    """Numbers of rows, from nearly square on, that leave no patch over."""
    side = math.isqrt(image.max_num_patches)
    return [rows for rows in range(side - 1, 1, -1) if image.max_num_patches % rows == 0] or [1]


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with some noise, as in photographs: both survive resizing to some degree."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-20, 21, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
