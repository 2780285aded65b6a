import dataclasses

import numpy as np
import pytest
from data.encoded import encoded, picture
from data.photos import photos
from PIL import Image, ImageEnhance

from clip_jax.config.schema import AugmentConfig
from clip_jax.data import augment
from clip_jax.data.augment import flip_and_recolor, random_crop, random_view
from clip_jax.data.decode import open_picture
from clip_jax.data.rand_augment import rand_augment

NOTHING = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def gray(pixel) -> bool:
    return pixel[0] == pixel[1] == pixel[2]


def test_no_augmentation_is_the_picture():
    image = picture(40, 40)
    pixels = random_view(encoded(image), NOTHING, 40, np.random.default_rng(0))
    assert (pixels == np.asarray(image)).all()
    assert flip_and_recolor(pixels, NOTHING, np.random.default_rng(0)) is pixels


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_view_is_taken_where_the_box_says(decode, format):
    config = AugmentConfig(crop_scale=(0.2, 0.6))
    data = encoded(picture(200, 160), format)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        opened = open_picture(data)
        box = random_crop(opened.size, config, rng)
        expected = opened.view(box, (32, 32), decode=decode)
        view = random_view(data, config, 32, np.random.default_rng(seed), decode=decode)
        assert (view == expected).all()


def test_fast_and_exact_take_the_same_box():
    config = AugmentConfig(crop_scale=(0.1, 1.0), horizontal_flip=0.5, grayscale=0.3)
    data = encoded(photos()[0].resize((400, 300)), "JPEG", quality=95)
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        fast, exact = (
            random_view(data, config, 32, rng, decode=decode).astype(int)
            for rng, decode in zip(rngs, ("fast", "exact"), strict=True)
        )
        assert np.abs(fast - exact).mean() < 6
        assert np.abs(fast - exact[::-1]).mean() > 12
        assert rngs[0].random() == rngs[1].random()


def crops(config: AugmentConfig, size: tuple[int, int], count: int = 400) -> np.ndarray:
    boxes = [random_crop(size, config, np.random.default_rng(i)) for i in range(count)]
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


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("horizontal_flip", lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        ("grayscale", lambda image: image.convert("L").convert("RGB")),
    ],
)
def test_probabilities(field, expected):
    image = picture(32, 32)
    changed = 0
    for seed in range(200):
        config = dataclasses.replace(NOTHING, **{field: 0.3})
        pixels = flip_and_recolor(np.asarray(image), config, np.random.default_rng(seed))
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
    image = picture(32, 32)
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = dataclasses.replace(NOTHING, color_jitter=1.0, **{**off, field: 0.4})
    pixels = flip_and_recolor(np.asarray(image), config, np.random.default_rng(6)).astype(float)
    candidates = [np.asarray(enhance(image).enhance(f), float) for f in np.linspace(0.6, 1.4, 801)]
    distances = [np.abs(pixels - candidate).mean() for candidate in candidates]
    assert min(distances) < 0.2
    assert np.abs(pixels - np.asarray(image, float)).mean() > 1


def test_hue_turns_colours_and_leaves_gray():
    image = Image.fromarray(np.array([[[255, 0, 0], [90, 90, 90]]], np.uint8))
    third = np.asarray(augment._turn_hue(image, 1 / 3))[0]
    assert third[0].argmax() == 1
    assert third[0].max() > 250
    assert gray(third[1])
    assert (np.asarray(augment._turn_hue(image, 0.0)) == np.asarray(image)).all()
    assert np.asarray(augment._turn_hue(image, -1 / 3))[0, 0].argmax() == 2


@pytest.mark.parametrize("operations", [1, 3])
def test_rand_augment_follows_the_flip(operations):
    image = picture(32, 32)
    config = dataclasses.replace(
        NOTHING, horizontal_flip=1.0, rand_augment=operations, rand_augment_magnitude=25
    )
    changed = 0
    for seed in range(10):
        rng, again = (np.random.default_rng(seed) for _ in range(2))
        pixels = flip_and_recolor(np.asarray(image), config, rng)
        again.random(3)
        flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = rand_augment(flipped, operations, 25, again)
        assert (pixels == np.asarray(expected)).all()
        changed += expected != flipped
    assert changed >= 5


def test_flip_without_opencv(monkeypatch):
    pixels = np.asarray(picture())
    mirrored = augment._mirrored(pixels)
    assert (mirrored == pixels[:, ::-1]).all()
    monkeypatch.setattr(augment, "opencv", lambda: None)
    assert (augment._mirrored(pixels) == mirrored).all()


def test_the_same_generator_gives_the_same_view():
    config = AugmentConfig(
        crop_scale=(0.4, 1.0), horizontal_flip=0.5, color_jitter=0.8, grayscale=0.2, rand_augment=1
    )
    data = encoded(picture(), "JPEG")
    views = [random_view(data, config, 24, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
