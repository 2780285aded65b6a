"""The oracle is torchvision's RandAugment: its table of magnitudes and its functions on images."""

import importlib.util

import numpy as np
import pytest
from data.photos import photos
from peers import define_missing_operators

from clip_jax.data.rand_augment import NUM_LEVELS, OPERATIONS, apply_operation, rand_augment

# Our names, theirs, and whether the operation has two directions.
THEIRS = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}


@pytest.fixture(scope="module")
def autoaugment():
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    define_missing_operators(torch)
    from torchvision.transforms import autoaugment

    return autoaugment


def small_photo():
    return photos()[1].resize((61, 47)).crop((0, 0, 61, 47))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_torchvision_does_the_same(autoaugment, operation):
    image = small_photo()
    table = autoaugment.RandAugment()._augmentation_space(NUM_LEVELS, (image.height, image.width))
    assert list(THEIRS) == list(OPERATIONS)
    assert list(table) == list(THEIRS.values())
    magnitudes, signed = table[THEIRS[operation]]
    # Their magnitudes are rounded to float32: where a blend of pixels is a whole number, it falls
    # to either side of it.
    allowed = 1 if operation in ("brightness", "color", "contrast", "sharpness") else 0
    changed = 0
    for level in range(NUM_LEVELS):
        for negative in (False, True):
            value = float(magnitudes[level]) if magnitudes.ndim else 0.0
            theirs = autoaugment._apply_op(
                image,
                THEIRS[operation],
                -value if signed and negative else value,
                interpolation=autoaugment.InterpolationMode.NEAREST,
                fill=None,
            )
            ours = apply_operation(image, operation, level, negative=negative)
            difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max()
            assert difference <= allowed, level
            changed += ours != image
    assert (changed == 0) == (operation == "identity")


def test_operations_are_drawn_uniformly_in_both_directions():
    image = small_photo()
    outcomes = {}
    for operation in OPERATIONS:
        for negative in (False, True):
            result = apply_operation(image, operation, 9, negative=negative).tobytes()
            outcomes.setdefault(result, set()).add(operation)
    counts = dict.fromkeys(OPERATIONS, 0)
    seen = set()
    for seed in range(1400):
        result = rand_augment(image, 1, 9, np.random.default_rng(seed)).tobytes()
        seen.add(result)
        for operation in outcomes[result]:
            counts[operation] += 1
    assert seen == set(outcomes)
    assert all(60 <= count <= 145 for count in counts.values()), counts


def test_several_operations_follow_one_another():
    image = small_photo()
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    twice = rand_augment(image, 2, 20, rng)
    draws = again.random((2, 2))
    expected = image
    for kind, sign in draws:
        operation = OPERATIONS[int(kind * 14)]
        expected = apply_operation(expected, operation, 20, negative=sign < 0.5)
    assert twice == expected
    assert twice != image
    assert rng.random() == again.random()  # what is drawn depends on the number alone
    assert rand_augment(image, 0, 20, rng) is image
