import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clip_jax.config.schema import AugmentConfig, ObjectViewConfig
from clip_jax.data.object_view import fitted_object, object_view

STILL = ObjectViewConfig(scale=(0.5, 0.5))


def thing(mode: str = "RGBA", ground=(255, 255, 255)) -> Image.Image:
    """A red bar of 40 x 20 pixels on a clear ground of 100 x 80, far from its middle."""
    image = Image.new("RGBA", (100, 80), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((55, 5, 94, 24), fill=(200, 30, 30, 255))
    if mode == "RGB":
        opaque = Image.new("RGB", image.size, ground)
        opaque.paste(image, mask=image)
        return opaque
    return image


def box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width, height of what is not white."""
    rows, columns = np.nonzero((pixels < 200).any(axis=-1))
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top


def views(view: ObjectViewConfig, count: int = 100, image: Image.Image | None = None, **augment):
    config = AugmentConfig(object_view=view, **augment)
    image = image or thing()
    return [object_view(image, config, 40, np.random.default_rng(i)) for i in range(count)]


def test_fitted_object_is_centred_at_92_percent():
    pixels = fitted_object(thing("RGB"), 50)
    assert pixels.shape == (50, 50, 3)
    assert box(pixels) == (2, 13, 46, 23)  # 46 = 0.92 x 50, half as high
    assert pixels[25, 25].tolist() == [200, 30, 30]


def test_margins_do_not_matter():
    cropped = thing("RGB").crop((50, 0, 98, 30))
    assert (fitted_object(cropped, 48) == fitted_object(thing("RGB"), 48)).all()


def test_nearly_white_margins_are_ground():
    assert (box(fitted_object(thing("RGB", (250, 250, 250)), 50))) == (2, 13, 46, 23)
    assert fitted_object(thing("RGB", (200, 200, 200)), 50)[25, 3].tolist() == [200] * 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_empty_picture_is_white(mode):
    empty = Image.new(mode, (9, 7), (255, 255, 255, 0)[: len(mode)])
    assert (object_view(empty, AugmentConfig(), 16, np.random.default_rng(0)) == 255).all()
    if mode == "RGB":
        assert (fitted_object(empty, 16) == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_by_default_size_and_place_alone_vary(mode):
    boxes = np.array([box(pixels) for pixels in views(ObjectViewConfig(), 300, thing(mode))])
    left, top, width, height = boxes.T
    assert 29 <= width.min() <= 31
    assert width.max() == 40
    assert np.abs(width / height - 2).max() < 0.2
    for start, extent in ((left, width), (top, height)):
        assert start.min() == 0
        assert (start + extent).max() == 40
    assert {tuple(color_of(pixels)) for pixels in views(STILL, 9)} == {(200, 30, 30)}


def test_stretch():
    _, _, width, height = np.array(
        [box(p) for p in views(dataclasses.replace(STILL, stretch=0.6))]
    ).T
    ratio = width / height
    # Both sides change by exp(+-0.3): the ratio by exp(+-0.6).
    assert 2 * np.exp(-0.6) * 0.9 < ratio.min() < 1.4
    assert 2.8 < ratio.max() < 2 * np.exp(0.6) * 1.1


def test_objects_stay_whole_and_visible():
    thin = Image.new("RGBA", (200, 80), (0, 0, 0, 0))
    ImageDraw.Draw(thin).rectangle((0, 40, 199, 41), fill=(0, 0, 0, 255))
    for pixels in views(ObjectViewConfig(scale=(0.9, 1.0), stretch=0.5), 50, thin):
        assert box(pixels)[3] == 4
        assert box(pixels)[2] <= 40


@pytest.mark.parametrize("probability", [0.0, 0.4])
def test_rotation(probability):
    view = dataclasses.replace(STILL, rotation=probability, angle=0.5)
    # An upright bar has full corners; a turned one has not.
    turned = 0
    for pixels in views(view, 200):
        left, top, width, _ = box(pixels)
        corners = pixels[top, left], pixels[top, left + width - 1]
        turned += any((corner > 100).all() for corner in corners)
    assert turned == 0 if probability == 0 else 50 < turned < 110


def test_rotation_brings_in_ground_not_black():
    view = dataclasses.replace(STILL, rotation=1.0, angle=0.6, shear=0.3)
    for mode in ("RGB", "RGBA"):
        for pixels in views(view, 40, thing(mode)):
            assert pixels[..., 0].min() >= 195  # the bar's red is 200, the ground's 255


def test_flip():
    image = thing()
    image.paste((20, 200, 20, 255), (55, 5, 75, 25))
    still = dataclasses.replace(STILL, scale=(1.0, 1.0))
    flipped = 0
    for pixels in views(still, 200, image, horizontal_flip=0.3):
        left, top, _, height = box(pixels)
        flipped += pixels[top + height // 2, left + 2].argmax() == 0
    assert 40 < flipped < 80


def color_of(pixels: np.ndarray) -> np.ndarray:
    left, top, width, height = box(pixels)
    return pixels[top + height // 2, left + width // 2].astype(int)


ONLY = {"hue": 0.0, "saturation": (1.0, 1.0), "contrast": 0.0, "brightness": 0.0}


def test_colors_change_on_the_object_alone():
    view = dataclasses.replace(STILL, color=0.5)
    images = views(view, 200)
    for pixels in images:
        ground = (pixels == 255).all(axis=-1).mean()
        assert ground > 0.7
    changed = np.mean([tuple(color_of(pixels)) != (200, 30, 30) for pixels in images])
    assert 0.4 < changed < 0.6


def test_color_switched_on_with_no_strength_changes_nothing():
    for pixels in views(dataclasses.replace(STILL, color=1.0, **ONLY), 10):
        assert np.abs(color_of(pixels) - [200, 30, 30]).max() <= 1


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        ({"brightness": 0.1}, lambda u: np.array([200, 30, 30]) + 25.5 * u),
        ({"contrast": 0.2}, lambda u: (np.array([200, 30, 30]) - 127.5) * (1 + 0.2 * u) + 127.5),
    ],
)
def test_brightness_and_contrast(strength, expected):
    view = dataclasses.replace(STILL, color=1.0, **{**ONLY, **strength})
    colors = np.array([color_of(pixels) for pixels in views(view)])
    ends = np.array([expected(-1.0), expected(1.0)])
    assert (colors >= ends.min(axis=0) - 1).all()
    assert (colors <= ends.max(axis=0) + 1).all()
    assert (np.ptp(colors, axis=0) > 0.7 * np.ptp(ends, axis=0)).all()


def test_hue_keeps_the_luma():
    view = dataclasses.replace(STILL, color=1.0, **{**ONLY, "hue": 0.3})
    luma = np.array([color_of(pixels) @ [0.299, 0.587, 0.114] for pixels in views(view)])
    red = np.array([200, 30, 30]) @ [0.299, 0.587, 0.114]
    assert np.median(np.abs(luma - red)) < 1.5
    assert len({tuple(color_of(pixels)) for pixels in views(view)}) > 50


def test_grayscale_is_a_share_of_the_color_changes():
    view = dataclasses.replace(STILL, color=1.0, grayscale=0.3, **ONLY)
    gray = [np.ptp(color_of(pixels)) <= 1 for pixels in views(view, 300)]
    assert 0.22 < np.mean(gray) < 0.38


def test_pale_spares_dark_lines():
    image = thing()
    image.paste((20, 20, 20, 255), (70, 5, 80, 25))
    view = dataclasses.replace(STILL, scale=(1.0, 1.0), pale=1.0)
    for pixels in views(view, 30, image):
        dark = pixels.reshape(-1, 3).min(axis=0)
        assert (np.abs(dark.astype(int) - 20) <= 1).all()
    greens = [pixels[..., 1].astype(int) for pixels in views(view, 30)]
    darkest = [green.min() for green in greens]
    assert min(darkest) < 60
    assert max(darkest) > 180


def test_the_same_generator_gives_the_same_view():
    view = ObjectViewConfig(stretch=0.3, rotation=0.5, color=0.8, grayscale=0.15, pale=0.2)
    assert all((a == b).all() for a, b in zip(views(view, 20), views(view, 20), strict=True))
