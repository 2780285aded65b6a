import numpy as np
import pytest
from data.encoded import encoded, picture
from PIL import Image

from clip_jax.config.schema import AugmentConfig
from clip_jax.data import transforms
from clip_jax.data.augment import random_view
from clip_jax.data.decode import decode_image
from clip_jax.data.object_view import object_view
from clip_jax.data.transforms import evaluation_image, training_view

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
    image = picture(*shape)
    pixels = evaluation_image(image, size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (size, size, 3)
    assert (pixels == reference_evaluation(image, size)).all()


@pytest.mark.parametrize("interpolation", FILTERS)
def test_evaluation_interpolation_and_squash(interpolation):
    image, resampling = picture(101, 64), FILTERS[interpolation]
    pixels = evaluation_image(image, 16, interpolation=interpolation)
    assert (pixels == reference_evaluation(image, 16, resampling)).all()
    squashed = evaluation_image(image, 16, resize="squash", interpolation=interpolation)
    assert (squashed == np.asarray(image.resize((16, 16), resampling))).all()


def test_strips_are_not_resized_whole(monkeypatch):
    """A picture of 1 x 5000 pixels would become one of 224 x 1,120,000."""
    for shape in ((400, 7), (7, 400), (300, 200)):
        whole = evaluation_image(picture(*shape), 24).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "MAX_PIXELS", 24 * 24)
            middle = evaluation_image(picture(*shape), 24).astype(int)
        assert middle.shape == (24, 24, 3)
        assert np.abs(middle - whole).mean() < 0.5
    assert evaluation_image(picture(40_000, 1), 224).shape == (224, 224, 3)


def test_object_framing_has_its_own_resizing():
    image = picture(40, 30)
    views = [
        evaluation_image(image, 16, "object", resize=resize, interpolation=interpolation)
        for resize in ("shortest", "squash")
        for interpolation in FILTERS
    ]
    assert all((view == views[0]).all() for view in views)


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_training_views_by_framing(decode):
    config = AugmentConfig(crop_scale=(0.4, 1.0), horizontal_flip=0.5)
    data = encoded(picture(150, 120), "JPEG")
    for seed in range(5):
        rngs = [np.random.default_rng(seed) for _ in range(4)]
        crop = training_view(data, "crop", config, 24, rngs[0], decode=decode)
        assert (crop == random_view(data, config, 24, rngs[1], decode=decode)).all()
        view = training_view(data, "object", config, 24, rngs[2], decode=decode)
        assert (view == object_view(decode_image(data), config, 24, rngs[3])).all()
