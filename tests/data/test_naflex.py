import random

import numpy as np
import pytest
from data.photos import photos, processors_or_skip
from PIL import Image

from clip_jax.data.naflex import naflex_patches, naflex_size, patch_sequence


def test_sizes():
    patches = {"patch_size": 16, "max_num_patches": 256}
    assert naflex_size(500, 500, **patches) == (256, 256)
    assert naflex_size(16, 16, **patches) == (256, 256)  # small ones are enlarged
    assert naflex_size(640, 320, **patches) == (352, 176)
    width, height = naflex_size(4000, 30, **patches)
    assert (width // 16) * (height // 16) <= 256
    assert height == 16
    with pytest.raises(ValueError, match="1 x 60000000 pixels do not fit 2 patches"):
        naflex_size(1, 60_000_000, patch_size=16, max_num_patches=2)


def test_order_of_patches_and_values():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches, mask, shape = patch_sequence(pixels, patch_size=2, max_num_patches=8)
    assert shape == (2, 3)
    assert mask.tolist() == [True] * 6 + [False] * 2
    assert not patches[6:].any()
    for row in range(2):
        for column in range(3):
            block = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert patches[3 * row + column].tolist() == block.reshape(-1).tolist()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing(interpolation):
    image = photos()[0]
    size = naflex_size(*image.size, patch_size=16, max_num_patches=64)
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    pixels = np.asarray(image.resize(size, filter[interpolation]))
    sequence = naflex_patches(image, patch_size=16, max_num_patches=64, interpolation=interpolation)
    expected = patch_sequence(pixels, patch_size=16, max_num_patches=64)
    assert (sequence.patches == expected.patches).all()
    assert sequence.spatial_shape == (size[1] // 16, size[0] // 16)


# ---- transformers' Siglip2ImageProcessor -------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return processors_or_skip("siglip2")


def test_reference_gives_the_same_sizes(reference):
    rng = random.Random(0)
    for trial in range(500):
        width, height = rng.randint(1, 2000), rng.randint(1, 2000)
        if trial % 3 == 0:
            width, height = rng.randint(1, 60_000), rng.randint(1, 6000)
        patch_size, most = rng.choice([14, 16, 32]), rng.choice([16, 64, 196, 256, 576, 1024])
        theirs = reference.get_image_size_for_max_num_patches(height, width, patch_size, most)
        ours = naflex_size(width, height, patch_size=patch_size, max_num_patches=most)
        assert ours == theirs[::-1], (width, height, patch_size, most)


@pytest.mark.parametrize("shape", [(640, 427), (427, 427), (333, 77), (5, 400), (1, 1), (17, 16)])
@pytest.mark.parametrize(("patch_size", "most"), [(16, 256), (14, 100)])
def test_reference_gives_the_same_patches(reference, shape, patch_size, most):
    processor = reference.Siglip2ImageProcessorPil(
        patch_size=patch_size, max_num_patches=most, do_rescale=False, do_normalize=False
    )
    for image in photos():
        image = image.crop((0, 0, *shape))
        theirs = processor(images=[image], return_tensors="np")
        patches, mask, spatial_shape = naflex_patches(
            image, patch_size=patch_size, max_num_patches=most
        )
        np.testing.assert_array_equal(patches, theirs["pixel_values"][0])
        np.testing.assert_array_equal(mask, theirs["pixel_attention_mask"][0])
        assert spatial_shape == tuple(theirs["spatial_shapes"][0])
