"""preprocessor_config.json, of all ages, to our preprocessing."""

import dataclasses
import json

import pytest

from clip_jax.config import ImageTowerConfig, UserError
from clip_jax.interop.huggingface_images import preprocessor_config, read_preprocessing

CLIP_TOWER = ImageTowerConfig(image_size=32, patch_size=16)
SIGLIP_TOWER = dataclasses.replace(CLIP_TOWER, pooling="attention", class_token=False)
NAFLEX_TOWER = dataclasses.replace(SIGLIP_TOWER, kind="naflex")
OLD_CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}
SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("tower", "values", "expected"),
    [
        (CLIP_TOWER, None, ("shortest", "bicubic", 0.48145466)),
        (SIGLIP_TOWER, None, ("squash", "bicubic", 0.5)),
        (NAFLEX_TOWER, None, ("squash", "bilinear", 0.5)),
        (CLIP_TOWER, OLD_CLIP, ("shortest", "bicubic", 0.48145466)),
        (
            CLIP_TOWER,
            {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "resample": 2},
            ("shortest", "bilinear", 0.48145466),
        ),
        (SIGLIP_TOWER, {"image_processor_type": "SiglipImageProcessor", "size": SQUARE}, None),
        (
            CLIP_TOWER,
            {"image_processor_type": "ViTImageProcessor", "size": 32, "image_mean": [0.1] * 3},
            ("squash", "bilinear", 0.1),
        ),
        (CLIP_TOWER, OLD_CLIP | {"do_normalize": False}, ("shortest", "bicubic", 0.0)),
    ],
)
def test_preprocessing(tower, values, expected, tmp_path):
    if values is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    fields = read_preprocessing(tmp_path, tower)
    found = (fields["resize"], fields["interpolation"], fields["mean"][0])
    assert found == (expected or ("squash", "bicubic", 0.5))


def test_preprocessing_out_of_a_processor_config(tmp_path):
    """Where transformers 5 keeps it."""
    values = {"image_processor": OLD_CLIP | {"image_std": [0.25, 0.5, 1]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    assert read_preprocessing(tmp_path, CLIP_TOWER)["std"] == (0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    ("tower", "values", "message"),
    [
        (CLIP_TOWER, OLD_CLIP | {"size": 40}, "'shortest_edge': 40.* cropped to 32 .*model's 32"),
        (CLIP_TOWER, OLD_CLIP | {"do_center_crop": False, "size": 224}, "'height': 224"),
        (CLIP_TOWER, OLD_CLIP | {"resample": 1}, "resample must be 2 .* got 1"),
        (CLIP_TOWER, OLD_CLIP | {"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
        (CLIP_TOWER, OLD_CLIP | {"do_resize": False}, "do_resize must be true"),
        (CLIP_TOWER, OLD_CLIP | {"image_std": [0.0, 1, 1]}, "image_std must be three numbers"),
        (CLIP_TOWER, {"image_processor_type": "BitImageProcessor"}, "unknown image processor 'Bit"),
        (
            NAFLEX_TOWER,
            {"image_processor_type": "SiglipImageProcessor"},
            "does not make the inputs",
        ),
        (
            NAFLEX_TOWER,
            {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 14},
            "patch_size 14 is not the model's 16",
        ),
    ],
)
def test_preprocessing_that_we_have_not(tower, values, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_preprocessing(tmp_path, tower)


@pytest.mark.parametrize(
    "tower",
    [
        CLIP_TOWER,
        dataclasses.replace(SIGLIP_TOWER, resize="squash", mean=(0.5, 0.25, 0.125)),
        dataclasses.replace(CLIP_TOWER, interpolation="bilinear", std=(0.1, 0.2, 0.3)),
        dataclasses.replace(NAFLEX_TOWER, max_num_patches=77, resize="squash"),
    ],
)
def test_what_is_written_is_read_again(tower, tmp_path):
    values = preprocessor_config(tower, "AnyProcessor")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert dataclasses.replace(tower, **read_preprocessing(tmp_path, tower)) == tower
