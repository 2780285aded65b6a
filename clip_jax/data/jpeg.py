"""JPEGs by TurboJPEG: their headers, and their pixels at full size or at 1/2, 1/4 or 1/8.

What is unusual about a file makes these functions return None: Pillow then decides about it.
"""

import re
import struct
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Divisor = Literal[1, 2, 4, 8]

MAX_SCANS = 100  # encoders make about ten; each takes time for every pixel, however short it is

_START = b"\xff\xd8"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; not lossless, not arithmetic
_PROGRESSIVE = 0xC2
_START_OF_SCAN = 0xDA
_APP1 = 0xE1
_WITH_LENGTH = {*_FRAMES, 0xC4, 0xDB, 0xDD, _START_OF_SCAN, *range(0xE0, 0xF0), 0xFE}
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')  # as Pillow looks for it


class JpegHeader(NamedTuple):
    """What is known of a JPEG before it is decoded."""

    width: int  # as stored, not turned
    height: int
    orientation: int  # 1 to 8, of its EXIF data: see `STEPS_UPRIGHT`


class Steps(NamedTuple):
    """What turns a picture upright, in this order."""

    transpose: bool
    mirror: bool  # left to right
    flip: bool  # top to bottom


# By orientation (Exif 2.3, section 4.6.4, tag 0x0112).
STEPS_UPRIGHT = {
    1: Steps(False, False, False),
    2: Steps(False, True, False),
    3: Steps(False, True, True),
    4: Steps(False, False, True),
    5: Steps(True, False, False),
    6: Steps(True, True, False),
    7: Steps(True, True, True),
    8: Steps(True, False, True),
}


def is_jpeg(data: bytes) -> bool:
    return data.startswith(_START)


def stored_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG as libjpeg reads them, without decoding anything."""
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return int(width), int(height)


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG that TurboJPEG may decode: RGB or gray, 8 bits, nothing odd in it."""
    size = stored_size(data)
    segments = _segments(data)
    if size is None or segments is None or segments.num_components not in (1, 3):
        return None
    if not segments.single_scan and _over_max_scans(data):
        return None
    orientation = _orientation(segments.app1)
    return None if orientation is None else JpegHeader(*size, orientation)


def too_many_scans(data: bytes) -> bool:
    """Whether a JPEG repeats itself so often that decoding it takes minutes."""
    segments = _segments(data)
    return (segments is None or not segments.single_scan) and _over_max_scans(data)


def decode_jpeg(
    data: bytes, header: JpegHeader, divisor: Divisor, *, fast: bool
) -> NDArray[np.uint8] | None:
    """The pixels as stored, at 1 / divisor of their size rounded up: uint8 [height, width, 3].

    The scales in between, n/8, have no vector code in libjpeg-turbo: they take longer than the full
    size. fast: chroma is not smoothed between its samples. Returns None where libjpeg so much as
    warns.
    """
    import simplejpeg

    height, width = -(-header.height // divisor), -(-header.width // divisor)
    smallest = {} if divisor == 1 else {"min_height": height, "min_width": width}
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", fastupsample=fast, **smallest
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _over_max_scans(data: bytes) -> bool:
    return data.count(b"\xff\xda") > MAX_SCANS


class _Segments(NamedTuple):
    """What stands before the first scan."""

    num_components: int
    single_scan: bool  # the first scan holds everything
    app1: list[bytes]


def _segments(data: bytes) -> _Segments | None:
    position, app1 = len(_START), list[bytes]()
    frame, num_components = 0, 0
    while position + 10 < len(data):  # 10: to the number of components in a frame's header
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker not in _WITH_LENGTH:
            return None
        body = position + 4
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if marker == _START_OF_SCAN:
            whole = frame != _PROGRESSIVE and data[body] == num_components
            return _Segments(num_components, whole, app1) if frame else None
        if marker == _APP1:
            app1.append(data[body:end])
        elif marker in _FRAMES:
            if frame:
                return None
            frame, num_components = marker, data[body + 5]
        position = end
    return None


def _orientation(app1: list[bytes]) -> int | None:
    """The orientation that Pillow would find; None where that takes more than a look."""
    exif = [segment[len(_EXIF) :] for segment in app1 if segment.startswith(_EXIF)]
    if len(exif) > 1:
        return None
    found = _exif_orientation(exif[0]) if exif else 0
    if found != 0:
        return found
    for segment in app1:
        if segment.startswith(_XMP) and _XMP_ORIENTATION.search(segment):
            return None
    return 1


def _exif_orientation(tiff: bytes) -> int | None:
    """1 to 8; 0 where there is none; None where the data is odd (Exif 2.3, section 4.6.2)."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * count]
    if len(entries) != 12 * count:
        return None
    for tag, kind, length, upper, lower in struct.iter_unpack(order + "HHIHH", entries):
        size = _TYPE_SIZES.get(kind, 0) * length
        if size > 4:
            place = upper << 16 | lower if order == ">" else lower << 16 | upper
            if place + size > len(tiff):
                return None  # Pillow gives up here
        elif tag == _ORIENTATION_TAG:
            if kind != _SHORT or length != 1:
                return None
            return upper if upper in STEPS_UPRIGHT else 1  # unknown ones turn nothing
    return 0
