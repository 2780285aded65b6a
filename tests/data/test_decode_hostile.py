"""Pictures that are damaged or mean harm: rejected by rule, in bounded memory, as Pillow would."""

import os
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from data.encoded import encoded, exif, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import decode, jpeg
from clip_jax.data.decode import decode_image, open_picture
from clip_jax.data.record import BadSampleError


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_too_many_pixels(format, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 48 * 32)
    open_picture(encoded(picture(), format))
    monkeypatch.setattr(decode, "MAX_PIXELS", 48 * 32 - 1)
    for read in (decode_image, open_picture):
        with pytest.raises(BadSampleError, match="48 x 32 is over 1535 pixels") as error:
            read(encoded(picture(), format))
        assert error.value.reason == "image"


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header."""
    changed = bytearray(data)
    if data.startswith(b"\xff\xd8"):
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        changed[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    elif data.startswith(b"RIFF"):
        assert data[12:16] == b"VP8X"
        changed[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    else:
        changed[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(changed)


BOMBS = [
    with_size(encoded(picture(), "JPEG"), 20_000, 20_000),
    with_size(encoded(picture(), "JPEG", progressive=True), 65_500, 65_500),
    with_size(encoded(Image.new("1", (8, 8))), 60_000, 60_000),
    with_size(encoded(Image.new("1", (8, 8))), 2**31 - 1, 2**31 - 1),
    with_size(encoded(picture(), "WEBP", exif=exif(1)), 2**24, 255),
    with_size(encoded(picture(), "WEBP", exif=exif(1)), 16_383, 16_383),
]


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_bombs_are_rejected_by_their_headers(number):
    for read in (decode_image, open_picture):
        with pytest.raises(BadSampleError, match=r"is over 67108864 pixels"):
            read(BOMBS[number])


_LIMITED = """
import resource, sys
import simplejpeg
from clip_jax.data.decode import open_picture
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        open_picture(open(path, "rb").read())
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_take_no_memory(tmp_path):
    paths = []
    for number, data in enumerate(BOMBS):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LIMITED, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.count("is over 67108864 pixels") == len(BOMBS)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def test_compressed_bombs_in_png_chunks():
    """Pillow stops at a megabyte; the picture is rejected, however small."""
    zeros = zlib.compress(bytes(20 * 2**20), 9)
    plain = encoded(Image.new("1", (8, 8)))
    start = 8 + 25  # signature and IHDR
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        with pytest.raises(BadSampleError, match="too large"):
            open_picture(plain[:start] + png_chunk(kind, head + zeros) + plain[start:])


def test_jpegs_of_endless_scans():
    """Each scan takes time for the whole picture: 67 million pixels a thousand times over."""
    data = encoded(picture(), "JPEG", progressive=True)
    scan = data.rfind(b"\xff\xda")
    last = data[scan:-2]
    count = data.count(b"\xff\xda")
    repeated = data[:-2] + last * (jpeg.MAX_SCANS - count + 1) + data[-2:]
    for read in (decode_image, open_picture):
        with pytest.raises(BadSampleError, match="over 100 scans"):
            read(repeated)


def test_animations_show_their_first_frame():
    frames = [picture(), Image.new("RGB", (48, 32))]
    for format in ("WEBP", "PNG"):
        options = {"lossless": True, "save_all": True, "append_images": frames[1:]}
        opened = open_picture(encoded(frames[0], format, **options))
        assert (opened.view((0, 0, 48, 32), (48, 32)) == np.asarray(frames[0])).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 9), (8, 8)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_tiny_pictures(format, shape):
    opened = open_picture(encoded(picture(*shape), format))
    assert opened.size == shape
    for mode in ("fast", "exact"):
        for size in ((1, 1), (3, 2), (24, 24)):
            assert opened.view((0, 0, *shape), size, decode=mode).shape == (*size[::-1], 3)


def test_a_side_too_long_for_opencv():
    opened = open_picture(encoded(Image.new("L", (100_000, 2), 90)))
    assert (opened.view((0, 0, 100_000, 2), (16, 4)) == 90).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xda\x00\x00",
        b"RIFF\0\0\0\0WEBPVP8X",
        b"<html>not found</html>",
        encoded(picture())[:200],
        encoded(picture(), "JPEG")[:300],
        encoded(picture(), "GIF"),
        encoded(picture(), "TIFF"),
    ],
)
def test_what_is_no_picture(data):
    for read in (decode_image, open_picture):
        with pytest.raises(BadSampleError, match=rf"cannot decode the image \({len(data)} bytes\)"):
            read(data)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_rejected_as_by_pillow(progressive):
    data = encoded(picture(), "JPEG", progressive=progressive)
    seen = set()
    for length in range(len(data) - 120, len(data) + 1):
        results = []
        for read in (lambda cut: open_picture(cut).view((0, 0, 16, 16), (16, 16)), decode_image):
            try:
                read(data[:length])
                results.append(True)
            except BadSampleError:
                results.append(False)
        assert results[0] == results[1], length
        seen.add(results[0])
    assert seen == {True, False}


ALL_FORMATS = [
    encoded(picture(), "JPEG"),
    encoded(picture(), "JPEG", progressive=True, exif=exif(6)),
    encoded(picture().convert("L"), "JPEG", restart_marker_blocks=2),
    encoded(picture().convert("CMYK"), "JPEG"),
    encoded(picture(), "PNG", exif=exif(5)),
    encoded(picture().convert("RGBA"), "PNG"),
    encoded(picture().convert("P"), "PNG"),
    encoded(picture(), "WEBP"),
    encoded(picture(), "WEBP", lossless=True),
]
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.sampled_from("=+-x")),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes) -> bytes:
    content = bytearray(data)
    for place, value, kind in changes:
        position = int(place * len(content)) if content else 0
        if kind == "+":
            content[position:position] = bytes([value, 255 - value])
        elif kind == "-":
            del content[position : position + 1 + value % 8]
        elif kind == "x" and value > 200:
            del content[position:]
        elif content:
            content[position] = value
    return bytes(content)


@settings(max_examples=600, deadline=5000)  # milliseconds
@given(format=st.sampled_from(ALL_FORMATS), variants=st.lists(CHANGES, min_size=4, max_size=6))
def test_damaged_pictures_decode_or_are_bad_samples(format, variants):
    """Some 3000 of them; whatever decodes them, the same ones are rejected."""
    for changes in variants:
        data = changed(format, changes)
        results = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about EXIF data
            for mode in ("fast", "exact", None):
                try:
                    if mode is None:
                        results.append(decode_image(data).size)
                        continue
                    opened = open_picture(data)
                    view = opened.view((0, 0, *opened.size), (12, 10), decode=mode)
                    assert view.shape == (10, 12, 3)
                    results.append(opened.size)
                except BadSampleError:
                    results.append(None)
        assert results[0] == results[1] == results[2]
