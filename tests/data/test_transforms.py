import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from clip_jax.config.schema import AugmentConfig
from clip_jax.data import transforms
from clip_jax.data.transforms import augment, decode_image, evaluation_image, training_view

NOTHING = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """Smooth in both directions, so that resampling has something to be wrong about."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 120 * np.sin(x / 7), 127 + 120 * np.cos(y / 5), (x * 5 + y * 3) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def gray(pixel) -> bool:
    return pixel[0] == pixel[1] == pixel[2]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_pictures_come_back(format):
    image = photo()
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


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values))))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red in ink
    pixel = decode_image(encoded(image, "JPEG", quality=95)).getpixel((4, 4))
    assert pixel[0] > 240
    assert max(pixel[1:]) < 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(encoded(image, "PNG", exif=exif))
    assert turned.size == ((48, 32) if orientation < 5 else (32, 48))
    back = {
        1: lambda pixels: pixels,
        2: lambda pixels: pixels[:, ::-1],
        3: lambda pixels: pixels[::-1, ::-1],
        4: lambda pixels: pixels[::-1],
        5: lambda pixels: pixels.transpose(1, 0, 2),
        6: lambda pixels: np.rot90(pixels, -1),
        7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda pixels: np.rot90(pixels, 1),
    }[orientation]
    assert (np.asarray(turned) == back(np.asarray(image))).all()


@pytest.mark.parametrize(
    ("smallest_side", "size"),
    [(None, (640, 480)), (241, (640, 480)), (240, (320, 240)), (100, (160, 120)), (1, (80, 60))],
)
def test_scaled_jpeg_decode(smallest_side, size):
    data = encoded(photo(640, 480), "JPEG")
    assert decode_image(data, smallest_side=smallest_side).size == size


def test_scaled_decoding_gives_nearly_the_same_view():
    data = encoded(photo(640, 480).resize((640, 480)), "JPEG", quality=95)
    fast = dataclasses.replace(NOTHING, crop_ratio=(0.75, 1.34), scaled_jpeg_decode=True)
    exact = dataclasses.replace(fast, scaled_jpeg_decode=False)
    views = [
        training_view(data, "crop", c, 64, np.random.default_rng(0)).astype(float)
        for c in (fast, exact)
    ]
    assert 0 < np.abs(views[0] - views[1]).mean() < 4


def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="48 x 32 is over 1000 pixels"):
        decode_image(encoded(photo()))


def test_decompression_bomb():
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height in the PNG's first chunk
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(bytes(bomb))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        encoded(photo())[:200],
        encoded(photo(), "JPEG")[:300],
        encoded(photo(), "GIF"),
        encoded(photo(), "TIFF"),
    ],
)
def test_what_is_no_picture(data):
    with pytest.raises(ValueError, match=rf"cannot decode the image \({len(data)} bytes\)"):
        decode_image(data)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_pictures_decode_or_raise_value_error(data, format):
    content = bytearray(encoded(photo(), format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content))
    except ValueError:
        return
    assert image.mode == "RGB"


FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def reference_evaluation(image: Image.Image, size: int, resampling: int = 3) -> np.ndarray:
    """torchvision.transforms.Resize(size, BICUBIC) and CenterCrop(size), written out."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    image = image.resize((size, new_long) if width <= height else (new_long, size), resampling)
    top, left = (round((full - size) / 2.0) for full in (image.height, image.width))
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40), (101, 64), (9, 30), (300, 7)])
def test_evaluation_image(shape, size):
    image = photo(*shape)
    pixels = evaluation_image(image, size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (size, size, 3)
    assert (pixels == reference_evaluation(image, size)).all()


@pytest.mark.parametrize("interpolation", FILTERS)
def test_evaluation_interpolation_and_squash(interpolation):
    image, resampling = photo(101, 64), FILTERS[interpolation]
    pixels = evaluation_image(image, 16, interpolation=interpolation)
    assert (pixels == reference_evaluation(image, 16, resampling)).all()
    squashed = evaluation_image(image, 16, resize="squash", interpolation=interpolation)
    assert (squashed == np.asarray(image.resize((16, 16), resampling))).all()


def test_strips_are_not_resized_whole(monkeypatch):
    """A picture of 1 x 5000 pixels would become one of 224 x 1,120,000."""
    for shape in ((400, 7), (7, 400), (300, 200)):
        whole = evaluation_image(photo(*shape), 24).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "MAX_PIXELS", 24 * 24)
            middle = evaluation_image(photo(*shape), 24).astype(int)
        assert middle.shape == (24, 24, 3)
        assert np.abs(middle - whole).mean() < 0.5
    assert evaluation_image(photo(40_000, 1), 224).shape == (224, 224, 3)


def test_object_framing_has_its_own_resizing():
    image = photo(40, 30)
    views = [
        evaluation_image(image, 16, "object", resize=resize, interpolation=interpolation)
        for resize in ("shortest", "squash")
        for interpolation in FILTERS
    ]
    assert all((view == views[0]).all() for view in views)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_no_augmentation_is_a_resize(interpolation):
    image = photo(40, 40)
    pixels = augment(image, NOTHING, 24, np.random.default_rng(0), interpolation=interpolation)
    assert (pixels == np.asarray(image.resize((24, 24), FILTERS[interpolation]))).all()
    data = encoded(image)
    rng = np.random.default_rng(0)
    view = training_view(data, "crop", NOTHING, 24, rng, interpolation=interpolation)
    assert (view == pixels).all()


def crops(config: AugmentConfig, size: tuple[int, int], count: int = 400) -> np.ndarray:
    boxes = [transforms._random_crop(size, config, np.random.default_rng(i)) for i in range(count)]
    left, top, right, bottom = np.array(boxes, float).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= size[0]
    assert bottom.max() <= size[1]
    return np.stack([left, top, right - left, bottom - top])


def test_crop_area_and_ratio():
    config = AugmentConfig(crop_scale=(0.3, 0.8), crop_ratio=(0.5, 2.0))
    left, top, width, height = crops(config, (400, 300))
    area, ratio = width * height / (400 * 300), width / height
    assert 0.29 < area.min() < 0.32 < 0.7 < area.max() < 0.81
    assert 0.49 < ratio.min() < 0.6 < 1.5 < ratio.max() < 2.02
    assert left.max() > 100
    assert top.max() > 80
    # Ratios are uniform in the logarithm: as many tall as wide ones before the frame cuts in.
    small = AugmentConfig(crop_scale=(0.05, 0.1), crop_ratio=(0.5, 2.0))
    _, _, width, height = crops(small, (300, 300))
    assert 0.4 < (width > height).mean() < 0.6


def test_elongated_pictures_get_a_centred_crop():
    config = AugmentConfig(crop_scale=(0.9, 1.0))
    left, top, width, height = crops(config, (1000, 10), 5)
    assert set(height) == {10}
    assert set(width) == {13}  # 10 x 4/3
    assert set(left) == {493}
    assert set(top) == {0}
    assert crops(config, (1, 1), 3)[2:].tolist() == [[1] * 3] * 2


def test_crop_is_taken_where_the_box_says():
    config = AugmentConfig(crop_scale=(0.2, 0.2), crop_ratio=(1.0, 1.0))
    image = photo(200, 200)
    box = transforms._random_crop(image.size, config, np.random.default_rng(3))
    pixels = augment(image, config, 32, np.random.default_rng(3)).astype(float)
    cropped = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    # Filters at the edge see a little beyond the box: hence not to the bit.
    assert np.abs(pixels - np.asarray(cropped, float))[2:-2, 2:-2].mean() < 0.5


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("horizontal_flip", lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        ("grayscale", lambda image: image.convert("L").convert("RGB")),
    ],
)
def test_probabilities(field, expected):
    image = photo(32, 32)
    changed = 0
    for seed in range(200):
        config = dataclasses.replace(NOTHING, **{field: 0.3})
        pixels = augment(image, config, 32, np.random.default_rng(seed))
        if not (pixels == np.asarray(image)).all():
            changed += 1
            assert (pixels == np.asarray(expected(image))).all()
    assert 40 <= changed <= 80


@pytest.mark.parametrize(
    ("field", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_jitter_is_torchvisions_blend(field, enhance):
    image = photo(32, 32)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = dataclasses.replace(NOTHING, color_jitter=1.0, **{**off, field: 0.4})
    pixels = augment(image, config, 32, np.random.default_rng(6)).astype(float)
    candidates = [np.asarray(enhance(image).enhance(f), float) for f in np.linspace(0.6, 1.4, 801)]
    distances = [np.abs(pixels - candidate).mean() for candidate in candidates]
    assert min(distances) < 0.2
    assert np.abs(pixels - np.asarray(image, float)).mean() > 1


def test_hue_turns_colours_and_leaves_gray():
    image = Image.fromarray(np.array([[[255, 0, 0], [90, 90, 90]]], np.uint8))
    third = np.asarray(transforms._turn_hue(image, 1 / 3))[0]
    assert third[0].argmax() == 1
    assert third[0].max() > 250
    assert gray(third[1])
    assert (np.asarray(transforms._turn_hue(image, 0.0)) == np.asarray(image)).all()
    assert np.asarray(transforms._turn_hue(image, -1 / 3))[0, 0].argmax() == 2


def test_the_same_generator_gives_the_same_view():
    config = AugmentConfig(
        crop_scale=(0.4, 1.0), horizontal_flip=0.5, color_jitter=0.8, grayscale=0.2
    )
    views = [augment(photo(), config, 24, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
