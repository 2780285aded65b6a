"""A small picture, and pictures as files."""

import io

import numpy as np
from PIL import Image


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth in both directions, so that resampling has something to be wrong about."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 120 * np.sin(x / 7), 127 + 120 * np.cos(y / 5), (x * 5 + y * 3) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x010F] = "maker of the camera"  # beyond its entry: more than four bytes
    data[0x0112] = orientation
    return data
