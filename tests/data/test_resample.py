"""The oracle is Pillow's antialiased resampling, in floating point."""

import logging
import sys

import numpy as np
import pytest
from data.photos import photos
from PIL import Image

from clip_jax.data import resample
from clip_jax.data.resample import opencv, resampled, resized

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.fixture
def without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    opencv.cache_clear()
    yield
    opencv.cache_clear()


def reference(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    channels = [
        np.asarray(channel.convert("F").resize(size, FILTERS[interpolation]))
        for channel in Image.fromarray(pixels).split()
    ]
    return np.clip(np.stack(channels, -1), 0, 255)


def error(pixels, size, interpolation="bicubic", *, antialiased=True) -> float:
    view = resampled(pixels, size, interpolation, antialiased=antialiased)
    assert view.shape == (*size[::-1], 3)
    assert view.dtype == np.uint8
    return float(np.abs(view - reference(pixels, size, interpolation)).mean())


def crops() -> list[np.ndarray]:
    return [np.asarray(photo)[20:320, 30:350] for photo in photos()]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0, 2.3, 2.59, 2.7, 3.2])
def test_antialiased_resampling_is_near_pillows(factor, interpolation):
    """Sharper detail than of 512 px photographs: hence up to 1.6 levels here."""
    size = round(320 / factor), round(300 / factor)
    errors = [error(crop, size, interpolation) for crop in crops()]
    assert np.mean(errors) < (1.2 if interpolation == "bilinear" else 1.6)
    assert factor != 1 or max(errors) == 0


@pytest.mark.parametrize(
    ("size", "bound"), [((100, 400), 1.6), ((40, 600), 2.2), ((600, 90), 2.5), ((30, 20), 2.8)]
)
def test_sides_shrink_each_by_its_own_factor(size, bound):
    assert np.mean([error(crop, size) for crop in crops()]) < bound


def test_without_a_blur():
    errors = {
        antialiased: np.mean([error(c, (200, 190), antialiased=antialiased) for c in crops()])
        for antialiased in (True, False)
    }
    assert errors[True] < 1.6 < errors[False] < 3
    # Where linear interpolation would pass over pixels, it is not used.
    far = [resampled(crops()[0], (60, 60), "bicubic", antialiased=a) for a in (True, False)]
    assert (far[0] == far[1]).all()


def test_slices_are_fine():
    whole = np.asarray(photos()[0])
    part = whole[10:210, 20:320]
    for antialiased in (True, False):
        views = [
            resampled(pixels, (77, 50), "bicubic", antialiased=antialiased)
            for pixels in (part, np.ascontiguousarray(part))
        ]
        assert (views[0] == views[1]).all()


def test_opencv_starts_no_threads():
    cv2 = opencv()
    if cv2 is None:
        pytest.skip("OpenCV is not installed")
    assert cv2.getNumThreads() == 1


def test_without_opencv_pillow_resamples(without_opencv, caplog):
    crop = crops()[0]
    with caplog.at_level(logging.WARNING):
        for interpolation in FILTERS:
            expected = np.asarray(resized(Image.fromarray(crop), (90, 70), interpolation))
            assert (resampled(crop, (90, 70), interpolation, antialiased=True) == expected).all()
            linear = np.asarray(resized(Image.fromarray(crop), (90, 70), "bilinear"))
            assert (resampled(crop, (90, 70), interpolation, antialiased=False) == linear).all()
    messages = [r.getMessage() for r in caplog.records if r.name == resample.__name__]
    assert len(messages) == 1
    assert "cv2" in messages[0]
    assert "pip install 'clip-jax-training[fast]'" in messages[0]


def test_resized_takes_a_box():
    image = photos()[0]
    for interpolation, filter in FILTERS.items():
        expected = image.resize((40, 30), filter, box=(10, 20.5, 90, 70))
        view = resized(image, (40, 30), interpolation, (10, 20.5, 90, 70))
        assert (np.asarray(view) == np.asarray(expected)).all()
