"""Pictures out of encoded files: the one place where anything is decoded.

`decode_image` is Pillow's, for evaluation and for all that is no plain JPEG. `open_picture` is for
training, which wants a box of a picture at a small size: it reads the size, and decodes as much as
the box asks for.

Rules for what comes from the web. JPEG, PNG and WebP are taken; of animations the first frame.
Pictures over MAX_PIXELS are rejected by their header, before anything is allocated; below that a
picture takes at most some 20 bytes of memory a pixel while it is decoded. A JPEG that libjpeg
finds fault with goes to Pillow, which rejects truncated ones and takes those with a few damaged
bytes: so both paths reject the same files. CMYK is converted, transparency laid on white, 16 bits
keep their upper 8, EXIF orientation is honoured.
"""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from clip_jax.data import jpeg
from clip_jax.data.jpeg import STEPS_UPRIGHT, Divisor, JpegHeader
from clip_jax.data.record import BadSampleError
from clip_jax.data.resample import Interpolation, Size, resampled

Decode = Literal["fast", "exact"]
Box = tuple[int, int, int, int]  # left, top, right, bottom
WHITE = (255, 255, 255)
MAX_PIXELS = 2**26  # 67 million: larger ones are accidents or attacks. Pillow warns from 89 on

_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DIVISORS: tuple[Divisor, ...] = (8, 4, 2)
_BLOCK = 8  # pixels a side, of JPEG; below it the scales are not all different


def decode_image(
    data: bytes, background: tuple[int, int, int] | None = WHITE, smallest_side: int | None = None
) -> Image.Image:
    """Decode a JPEG, PNG or WebP to an upright RGB image.

    background: RGB behind transparent pixels; None: a picture with transparency comes as RGBA.
    smallest_side: pixels; a JPEG may come at 1/2, 1/4 or 1/8 of its size if its shorter side keeps
    as many, for thumbnails and checks.

    Raises BadSampleError if the data is no such picture, is cut short or has over MAX_PIXELS.
    """
    try:
        _check_header(data)
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image.size)
        if smallest_side is not None:
            image.draft("RGB", (smallest_side, smallest_side))
        image.load()
        return upright_rgb(image, background)
    # Pillow raises half a dozen types, SyntaxError among them, on damaged files.
    except Exception as error:
        # Its message for what it does not know names the buffer by its address in memory.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a JPEG, PNG or WebP" if unknown else error
        message = f"cannot decode the image ({len(data)} bytes): {reason}"
        raise BadSampleError("image", message) from error


def upright_rgb(image: Image.Image, background: tuple[int, int, int] | None = WHITE) -> Image.Image:
    """Turn an image as its EXIF orientation says and convert it as `decode_image` does."""
    # Not ImageOps.exif_transpose: it also writes the EXIF data anew, and fails where they are odd.
    turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    if turn is not None:
        image = image.transpose(turn)
    return _to_rgb(image, background)


class Picture:
    """A picture of known size, upright, of which boxes can be had."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self.size: Size = image.size

    def aligned(self, box: Box, size: Size) -> Box:
        """The box that `view` shows: the same, or by less than two of its pixels apart."""
        del size
        return box

    def view(
        self,
        box: Box,
        size: Size,
        *,
        decode: Decode = "exact",
        interpolation: Interpolation = "bicubic",
    ) -> NDArray[np.uint8]:
        """A box of the picture at size (width, height): uint8 [height, width, 3].

        'exact': nearly Pillow's antialiased resampling of the whole picture. 'fast': a JPEG is
        decoded at the least of 1, 1/2, 1/4 and 1/8 of its size that gives the box as many pixels as
        the view has, and interpolated linearly. Raises BadSampleError as `decode_image` does.
        """
        del decode  # there is nothing to decode
        pixels = np.asarray(self._image.crop(box))
        return resampled(pixels, size, interpolation, antialiased=True)


class _Jpeg(Picture):
    """Decoded at `view`, not before."""

    def __init__(self, data: bytes, header: JpegHeader) -> None:
        self._data = data
        self._header = header
        self._steps = STEPS_UPRIGHT[header.orientation]
        width, height = header.width, header.height
        self.size = (height, width) if self._steps.transpose else (width, height)

    def aligned(self, box: Box, size: Size) -> Box:
        stored, _ = self._aligned(box, size)
        if self._steps.transpose:
            stored = _transposed(stored)
        return self._turned(stored)

    def view(
        self,
        box: Box,
        size: Size,
        *,
        decode: Decode = "exact",
        interpolation: Interpolation = "bicubic",
    ) -> NDArray[np.uint8]:
        (left, top, right, bottom), divisor = self._aligned(box, size)
        fast = decode == "fast"
        if not fast:
            divisor = 1
        # Unsmoothed chroma averages out where pixels shrink, and shows where they grow.
        shrinks = box[2] - box[0] >= size[0] and box[3] - box[1] >= size[1]
        pixels = jpeg.decode_jpeg(self._data, self._header, divisor, fast=fast and shrinks)
        if pixels is None:
            return self._by_pillow(box, size, interpolation)
        pixels = pixels[top // divisor : bottom // divisor, left // divisor : right // divisor]
        transpose, mirror, flip = self._steps
        stored_size = size[::-1] if transpose else size
        pixels = resampled(pixels, stored_size, interpolation, antialiased=not fast)
        if self._header.orientation == 1:
            return pixels
        if transpose:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])

    def _by_pillow(self, box: Box, size: Size, interpolation: Interpolation) -> NDArray[np.uint8]:
        image = decode_image(self._data)
        if image.size != self.size:
            raise BadSampleError("image", f"a JPEG of {self.size} pixels decoded to {image.size}")
        return Picture(image).view(self.aligned(box, size), size, interpolation=interpolation)

    def _aligned(self, box: Box, size: Size) -> tuple[Box, Divisor]:
        """The box as stored, and by what the picture may be divided for it.

        Its corners lie where pixels of the divided picture begin. In between, a view would have to
        be interpolated once more: boxes are random, so they move instead, for either way to decode.
        """
        box = self._turned(box)
        if self._steps.transpose:
            box, size = _transposed(box), (size[1], size[0])
        left, top, right, bottom = box
        for divisor in _DIVISORS:
            columns, rows = (right - left) // divisor, (bottom - top) // divisor
            if columns >= size[0] and rows >= size[1] and min(columns, rows) * divisor >= _BLOCK:
                left, top = left // divisor * divisor, top // divisor * divisor
                return (left, top, left + columns * divisor, top + rows * divisor), divisor
        return box, 1

    def _turned(self, box: Box) -> Box:
        """Mirrored and flipped as the picture is when it is turned upright; and back."""
        left, top, right, bottom = box
        width, height = self.size
        if self._steps.mirror:
            left, right = width - right, width - left
        if self._steps.flip:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


def open_picture(data: bytes) -> Picture:
    """Read an encoded picture as far as it takes to know its size.

    Raises BadSampleError as `decode_image` does, now or at `Picture.view`.
    """
    if jpeg.is_jpeg(data):
        header = jpeg.read_header(data)
        if header is not None and header.width * header.height <= MAX_PIXELS:
            return _Jpeg(data, header)
    return Picture(decode_image(data))  # which also says what is wrong with it


def _transposed(box: Box) -> Box:
    left, top, right, bottom = box
    return top, left, bottom, right


def _check_header(data: bytes) -> None:
    """Rejects what Pillow would allocate for, or warn about, while it reads the header."""
    size = None
    if jpeg.is_jpeg(data):
        size = jpeg.stored_size(data)
        if jpeg.too_many_scans(data):
            raise ValueError(f"a JPEG of over {jpeg.MAX_SCANS} scans")
    elif data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR":
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _webp_size(data)
    if size is not None:
        _check_size(size)


def _check_size(size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} is over {MAX_PIXELS} pixels")


def _webp_size(data: bytes) -> Size | None:
    """The size of a WebP, of its canvas where it has one (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return _little(data[24:27]) + 1, _little(data[27:30]) + 1
    if kind == b"VP8L":
        sides = _little(data[21:25])
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF
    return None


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        # Pillow's own conversion clips at 255 instead of scaling.
        levels = np.asarray(image)
        if levels.dtype.kind == "f":
            levels = levels.astype(np.int32)
        upper = np.clip(levels >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(upper).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if background is None:
        return image
    opaque = Image.new("RGB", image.size, background)
    opaque.paste(image, mask=image)
    return opaque
