"""Headers as Pillow reads them, pixels as libjpeg scales them."""

import io
import struct

import numpy as np
import pytest
from data.encoded import encoded, exif, picture
from PIL import Image

from clip_jax.data import jpeg
from clip_jax.data.decode import decode_image


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"\xff\xda" * 200}])
def test_headers(options):
    header = jpeg.read_header(encoded(picture(50, 43), "JPEG", **options))
    assert header == jpeg.JpegHeader(50, 43, 1)


def with_exif(tiff: bytes) -> bytes:
    """A JPEG with this EXIF segment."""
    data, body = encoded(picture(), "JPEG"), b"Exif\0\0" + tiff
    return data[:20] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[20:]


def entry(tag: int, kind: int, count: int, value: int, order: str) -> bytes:
    return struct.pack(order + "HHI", tag, kind, count) + struct.pack(order + "HH", value, 0)


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientations(orientation, order):
    entries = entry(0x0100, 3, 1, 640, order) + entry(0x0112, 3, 1, orientation, order)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 2)
    data = with_exif(start + entries + bytes(4))
    found = jpeg.read_header(data).orientation
    assert found == (orientation if 1 <= orientation <= 8 else 1)
    turns = found >= 5
    assert decode_image(data).size == ((32, 48) if turns else (48, 32))
    assert jpeg.read_header(encoded(picture(), "JPEG", exif=exif(orientation))).orientation == found


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"II*\0",
        b"XX*\0\x08\0\0\0\0\0",
        b"II*\0" + struct.pack("<IH", 2**31, 1),
        b"II*\0" + struct.pack("<IH", 8, 3) + entry(0x0112, 3, 1, 6, "<"),  # two are missing
        b"II*\0" + struct.pack("<IH", 8, 1) + entry(0x0112, 2, 1, 6, "<"),  # no number
        b"II*\0" + struct.pack("<IH", 8, 1) + entry(0x0112, 3, 2, 6, "<"),  # two numbers
        b"II*\0" + struct.pack("<IHHHII", 8, 2, 0x010F, 2, 50, 900) + entry(0x0112, 3, 1, 6, "<"),
    ],
)
def test_odd_exif_is_left_to_pillow(tiff):
    assert jpeg.read_header(with_exif(tiff)) is None


def test_other_orientations_are_left_to_pillow():
    twice = with_exif(b"II*\0" + struct.pack("<IH", 8, 0))
    assert jpeg.read_header(twice).orientation == 1
    assert jpeg.read_header(twice[:20] + twice[20:38] + twice[20:]) is None
    xmp = encoded(picture(), "JPEG", xmp=b"<tiff:Orientation>6</tiff:Orientation>")
    assert jpeg.read_header(xmp) is None
    assert jpeg.read_header(encoded(picture(), "JPEG", xmp=b"<x/>")).orientation == 1


def test_what_turbojpeg_is_not_asked_to_decode():
    plain = encoded(picture(), "JPEG")
    frame = plain.find(b"\xff\xc0")
    assert jpeg.read_header(encoded(picture().convert("CMYK"), "JPEG")) is None
    assert jpeg.read_header(plain[:frame] + b"\xff" + plain[frame:]) is None  # fill bytes
    assert jpeg.read_header(plain[: frame + 12]) is None
    arithmetic = bytearray(plain)
    arithmetic[frame + 1] = 0xC9
    assert jpeg.read_header(bytes(arithmetic)) is None


def test_scans():
    plain = encoded(picture(), "JPEG")
    progressive = encoded(picture(), "JPEG", progressive=True)
    scan = progressive[progressive.rfind(b"\xff\xda") : -2]
    many = progressive[:-2] + scan * jpeg.MAX_SCANS + progressive[-2:]
    assert jpeg.read_header(many) is None
    assert jpeg.too_many_scans(many)
    assert not jpeg.too_many_scans(progressive)
    # Where the first scan holds everything, others are no more than noise behind the picture.
    assert not jpeg.too_many_scans(plain + scan * jpeg.MAX_SCANS)


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(64, 48), (61, 43), (9, 8)])
def test_scaled_pixels_are_those_of_pillows_draft(size, divisor):
    data = encoded(picture(*size), "JPEG", quality=95)
    pixels = jpeg.decode_jpeg(data, jpeg.read_header(data), divisor, fast=False)
    width, height = (-(-side // divisor) for side in size)
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (size[0] // divisor, size[1] // divisor))
    assert draft.size == (width, height)
    assert (pixels == np.asarray(draft)).all()


def test_fast_upsampling_differs_by_little():
    data = encoded(picture(), "JPEG", quality=95, subsampling="4:2:0")
    exact, fast = (
        jpeg.decode_jpeg(data, jpeg.read_header(data), 1, fast=fast).astype(int)
        for fast in (False, True)
    )
    assert 0 < np.abs(exact - fast).mean() < 20


def test_warnings_of_libjpeg_are_no_pixels():
    data = encoded(picture(), "JPEG")
    header = jpeg.read_header(data)
    assert jpeg.decode_jpeg(data[:-2], header, 1, fast=False) is None
    assert jpeg.decode_jpeg(data, header._replace(width=47), 1, fast=False) is None
