"""Pillow is the oracle: of what is a picture, of its size, and, resampled in float, of its view."""

import numpy as np
import pytest
from data.encoded import encoded, exif, picture
from data.photos import photos
from PIL import Image, ImageOps

from clip_jax.config.schema import AugmentConfig
from clip_jax.data import decode, jpeg
from clip_jax.data.augment import random_crop
from clip_jax.data.decode import decode_image, open_picture

# ---- By Pillow ---------------------------------------------------------------------------------


def gray(pixel) -> bool:
    return pixel[0] == pixel[1] == pixel[2]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_pictures_come_back(format):
    image = picture()
    decoded = decode_image(encoded(image, format, lossless=True))
    assert decoded.mode == "RGB"
    assert (np.asarray(decoded) == np.asarray(image)).all()


def test_transparency_is_laid_over_the_background():
    image = Image.new("RGBA", (3, 1))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    data = encoded(image)
    over_white = np.asarray(decode_image(data))[0]
    assert over_white.tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    over_blue = np.asarray(decode_image(data, background=(0, 0, 255)))[0]
    assert over_blue.tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 127]]


@pytest.mark.parametrize("mode", ["P", "LA", "L", "RGB"])
def test_transparency_of_every_mode(mode):
    image = Image.new("L", (2, 1), 0)
    image.putpixel((1, 0), 90)
    if mode == "LA":
        image = image.convert("LA")
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        data = encoded(image)
    else:
        transparent = (0, 0, 0) if mode == "RGB" else 0
        image = image.convert(mode)
        if mode == "P":
            transparent = image.getpixel((0, 0))
        data = encoded(image, transparency=transparent)
    pixels = np.asarray(decode_image(data))[0]
    assert pixels[0].tolist() == [255, 255, 255]
    assert gray(pixels[1])
    assert abs(int(pixels[1][0]) - 90) <= 1


def test_gray_and_black_and_white():
    assert np.asarray(decode_image(encoded(Image.new("L", (2, 2), 77)))).tolist()[0][0] == [77] * 3
    assert np.asarray(decode_image(encoded(Image.new("1", (2, 2), 1)))).tolist()[0][0] == [255] * 3


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_sixteen_bits_are_scaled_not_clipped(dtype):
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype))
    if dtype == np.uint16:
        image = decode_image(encoded(image))
    assert np.asarray(decode.upright_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red in ink
    data = encoded(image, "JPEG", quality=95)
    view = open_picture(data).view((0, 0, 8, 8), (8, 8))
    for pixel in (decode_image(data).getpixel((4, 4)), view[4, 4]):
        assert pixel[0] > 240
        assert max(pixel[1:]) < 20


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation):
    image = picture()
    image.getexif()[0x0112] = orientation
    turned = decode_image(encoded(image, "PNG", exif=exif(orientation)))
    assert (np.asarray(turned) == np.asarray(ImageOps.exif_transpose(image))).all()


@pytest.mark.parametrize(
    ("smallest_side", "size"),
    [(None, (640, 480)), (241, (640, 480)), (240, (320, 240)), (100, (160, 120)), (1, (80, 60))],
)
def test_thumbnails(smallest_side, size):
    data = encoded(picture(640, 480), "JPEG")
    assert decode_image(data, smallest_side=smallest_side).size == size


# ---- Views -------------------------------------------------------------------------------------


def photo_files(side: int, **options) -> list[bytes]:
    files = []
    for photo in photos():
        scale = side / max(photo.size)
        smaller = photo.resize((round(photo.width * scale), round(photo.height * scale)), 1)
        files.append(encoded(smaller, "JPEG", quality=95, subsampling="4:2:0", **options))
    return files


CROPS = AugmentConfig(crop_scale=(0.5, 1.0))


def reference(data: bytes, box, size: tuple[int, int]) -> np.ndarray:
    """The picture decoded whole and cropped, by Pillow's antialiased bicubic filter in float."""
    channels = [
        np.asarray(channel.convert("F").resize(size, Image.Resampling.BICUBIC))
        for channel in decode_image(data).crop(box).split()
    ]
    return np.clip(np.stack(channels, -1), 0, 255)


def errors(files: list[bytes], decode_mode: str, size: tuple[int, int], count: int = 3):
    """Mean absolute differences of random crops."""
    found = []
    for number, data in enumerate(files):
        opened, rng = open_picture(data), np.random.default_rng(number)
        for _ in range(count):
            box = random_crop(opened.size, CROPS, rng)
            view = opened.view(box, size, decode=decode_mode)
            assert view.shape == (*size[::-1], 3)
            assert view.dtype == np.uint8
            expected = reference(data, opened.aligned(box, size), size)
            found.append(np.abs(view - expected).mean())
    return found


@pytest.mark.parametrize(("mode", "bound"), [("fast", 3.0), ("exact", 1.0)])
@pytest.mark.parametrize("side", [512, 256])
def test_error_of_views(side, mode, bound):
    assert np.mean(errors(photo_files(side), mode, (224, 224))) <= bound


@pytest.mark.parametrize(("mode", "bound"), [("fast", 3.3), ("exact", 1.9)])
@pytest.mark.parametrize("size", [(150, 150), (75, 80), (40, 36)], ids=str)
def test_error_of_small_views(size, mode, bound):
    """Of pictures at 1/2, 1/4, 1/8. With boxes rounded to their pixels it would be 4.2 to 8."""
    files = photo_files(512)
    opened = open_picture(files[0])
    box = opened.aligned((3, 1, 459, 340), size)
    divisor = {150: 2, 75: 4, 40: 8}[size[0]]
    assert all(edge % divisor == 0 for edge in box)
    assert np.mean(errors(files, mode, size, 6)) <= bound


def test_fast_never_enlarges_what_the_box_has(monkeypatch):
    """The divisor is the largest of 1, 2, 4, 8 that leaves the box as many pixels as the view."""
    used = []
    real = jpeg.decode_jpeg

    def spy(data, header, divisor, **options):
        used.append(divisor)
        return real(data, header, divisor, **options)

    monkeypatch.setattr(jpeg, "decode_jpeg", spy)
    opened = open_picture(encoded(picture(400, 300), "JPEG"))
    for width, height in ((400, 300), (127, 64), (128, 64), (300, 128), (256, 256), (50, 300)):
        for left, top in ((0, 0), (400 - width, 300 - height)):
            box = (left, top, left + width, top + height)
            opened.view(box, (32, 32), decode="fast")
            fitting = [d for d in (1, 2, 4, 8) if min(width, height) // d >= 32]
            assert used.pop() == max(fitting, default=1)
            aligned = opened.aligned(box, (32, 32))
            assert aligned[2] - aligned[0] >= min(width, 32)
            assert max(abs(new - old) for new, old in zip(aligned, box, strict=True)) < 2 * 8
            opened.view(box, (32, 32), decode="exact")
            assert used.pop() == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("size", [(20, 33), (90, 70)])
def test_views_of_turned_jpegs(size, mode, orientation):
    upright = photos()[1].resize((200, 150), 1)
    data = encoded(upright, "JPEG", quality=95, exif=exif(orientation))
    opened = open_picture(data)
    turned = decode_image(data)
    assert opened.size == turned.size
    box = (10, 20, 110, 145)
    view = opened.view(box, size, decode=mode)
    assert view.flags.c_contiguous
    expected = reference(data, opened.aligned(box, size), size)
    difference = np.abs(view - expected).mean()
    assert difference < 5 < np.abs(view[::-1] - expected).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"restart_marker_blocks": 3},
        {"exif": exif(3)},
        {"keep_rgb": True, "subsampling": "4:4:4"},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_whole_jpegs_are_pillows_to_the_bit(mode, options):
    data = encoded(picture(50, 43).convert(mode), "JPEG", **options)
    opened = open_picture(data)
    assert isinstance(opened, decode._Jpeg)
    assert (opened.view((0, 0, 50, 43), (50, 43)) == np.asarray(decode_image(data))).all()


def test_other_formats_and_odd_jpegs_are_left_to_pillow():
    for data in (
        encoded(picture()),
        encoded(picture(), "WEBP"),
        encoded(picture().convert("CMYK"), "JPEG"),
        encoded(picture(), "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    ):
        opened = open_picture(data)
        assert type(opened) is decode.Picture
        image = decode_image(data)
        assert opened.size == image.size
        box = (3, 2, 3 + 20, 2 + 20)
        views = [opened.view(box, (20, 20), decode=mode) for mode in ("fast", "exact")]
        assert all((view == np.asarray(image.crop(box))).all() for view in views)
