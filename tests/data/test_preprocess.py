"""The oracles are open_clip's evaluation transform (torchvision) and transformers' processors."""

import dataclasses
import io
import pickle
import random

import numpy as np
import pytest
from data.photos import photos, processors_or_skip
from peers import open_clip_or_skip
from PIL import Image, ImageOps

from clip_jax.config.schema import AugmentConfig, ImageTowerConfig
from clip_jax.data.preprocess import Preprocess, blank_inputs, evaluation_inputs, training_inputs
from clip_jax.data.record import BadSampleError
from clip_jax.data.transforms import evaluation_image, training_view

VIT = ImageTowerConfig(image_size=24, patch_size=8)
NAFLEX = ImageTowerConfig(
    kind="naflex", image_size=32, patch_size=4, max_num_patches=43, interpolation="bilinear"
)
STILL = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
HALVES = (0.5, 0.5, 0.5)


def drawing(width: int = 48, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 5 % 256, y * 8 % 256, (x * y) % 256]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def normalized(image: np.ndarray, config: ImageTowerConfig) -> np.ndarray:
    """As the tower does it."""
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return (image.astype(np.float32) / 255 - mean) / std


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all((left[k] == right[k]).all() for k in left)


# ---- Peers -------------------------------------------------------------------------------------

SHAPES = [(640, 427), (427, 640), (224, 224), (225, 224), (333, 77), (6, 400), (400, 3), (1, 1)]


def views_of(shape: tuple[int, int]):
    for photo in photos():
        if shape[1] > shape[0]:
            photo = photo.transpose(Image.Transpose.ROTATE_90)
        yield photo.crop((0, 0, *shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_open_clip_sees_the_same(resize, interpolation, shape):
    open_clip_or_skip()
    from open_clip.transform import image_transform

    for size in (224, 33):
        config = ImageTowerConfig(image_size=size, resize=resize, interpolation=interpolation)
        reference = image_transform(
            size,
            is_train=False,
            mean=config.mean,
            std=config.std,
            resize_mode=resize,
            interpolation=interpolation,
        )
        for view in (*views_of(shape), next(views_of(shape)).convert("L")):
            theirs = reference(view).numpy().transpose(1, 2, 0)
            ours = normalized(Preprocess(config)(view)["image"], config)
            assert np.abs(ours - theirs).max() <= 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_siglip_processor_sees_the_same(shape):
    module = processors_or_skip("siglip")
    config = ImageTowerConfig(image_size=224, resize="squash", mean=HALVES, std=HALVES)
    for view in views_of(shape):
        theirs = module.SiglipImageProcessorPil()(
            images=[view], return_tensors="np", input_data_format="channels_last"
        )
        ours = normalized(Preprocess(config)(view)["image"], config)
        theirs = theirs["pixel_values"][0].transpose(1, 2, 0)
        assert np.abs(ours - theirs).max() <= 1e-6


def test_clip_processor_sees_the_same_but_for_the_margin():
    """transformers rounds half a margin down, torchvision to even: a pixel, where they differ."""
    module = processors_or_skip("clip")
    processor = module.CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    rng, seen = random.Random(0), set()
    for _ in range(40):
        width, height = rng.randint(30, 640), rng.randint(30, 427)
        view = photos()[0].crop((0, 0, width, height))
        theirs = processor(images=[view], return_tensors="np")["pixel_values"][0]
        same = (Preprocess(ImageTowerConfig())(view)["image"] == theirs.transpose(1, 2, 0)).all()
        margin = int(224 * max(width, height) / min(width, height)) - 224
        assert same == (margin % 4 != 3)
        seen.add(bool(same))
    assert seen == {True, False}


# ---- What users call ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [VIT, NAFLEX], ids=["vit", "naflex"])
@pytest.mark.parametrize("framing", ["crop", "object"])
def test_pictures_paths_and_bytes_are_the_same(config, framing, tmp_path):
    preprocess = pickle.loads(pickle.dumps(Preprocess(config, framing)))
    image = drawing()
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    inputs = preprocess(image)
    for other in (data, path, str(path)):
        assert equal(preprocess(other), inputs)
    assert equal(inputs, evaluation_inputs(image, config, framing))


def test_stacked_inputs_are_a_batch():
    for config in (VIT, NAFLEX):
        samples = [Preprocess(config)(drawing(width)) for width in (20, 48, 70)]
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        blank = blank_inputs(config, 3)
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            name: (value.dtype, value.shape) for name, value in blank.items()
        }


def test_pictures_are_turned_upright_and_laid_on_white():
    turned = ImageOps.exif_transpose
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.open(io.BytesIO(encoded(drawing(), exif=exif)))
    expected = Preprocess(VIT)(turned(rotated))
    assert equal(Preprocess(VIT)(rotated), expected)
    assert not equal(Preprocess(VIT)(drawing()), expected)
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    assert (Preprocess(VIT)(clear)["image"] == 255).all()


def test_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="cannot decode"):
        Preprocess(VIT)(b"none")
    with pytest.raises(FileNotFoundError):
        Preprocess(VIT)(tmp_path / "none.png")


# ---- NaFlex ------------------------------------------------------------------------------------


def unpatched(inputs, config: ImageTowerConfig) -> np.ndarray:
    """The image that the patches were cut from."""
    (rows, columns), side = inputs["spatial_shapes"], config.patch_size
    patches = inputs["patches"][inputs["patch_mask"]].reshape(rows, columns, side, side, 3)
    return patches.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)


def assert_near(view: np.ndarray, expected: np.ndarray, bound: float = 1.5) -> None:
    """Training resamples nearly as Pillow does; turned about, the view is something else."""
    assert view.shape == expected.shape
    distance, turned = (np.abs(x - expected.astype(float)).mean() for x in (view, view[::-1]))
    assert distance < bound < turned


def test_naflex_inputs_keep_the_aspect_ratio():
    inputs = evaluation_inputs(drawing(90, 30), NAFLEX, "crop")
    assert inputs["patches"].shape == (43, 48)
    assert inputs["spatial_shapes"].tolist() == [4, 10]
    assert inputs["patch_mask"].sum() == 40
    expected = drawing(90, 30).resize((40, 16), Image.Resampling.BILINEAR)
    assert (unpatched(inputs, NAFLEX) == np.asarray(expected)).all()


def test_naflex_training_is_the_whole_picture():
    data, crops = encoded(drawing(90, 30)), AugmentConfig(crop_scale=(0.1, 0.2))
    rng = np.random.default_rng(0)
    inputs = training_inputs(data, NAFLEX, "crop", crops, rng)
    evaluated = evaluation_inputs(drawing(90, 30), NAFLEX, "crop")
    for name in ("patch_mask", "spatial_shapes"):
        assert (inputs[name] == evaluated[name]).all()
    assert_near(unpatched(inputs, NAFLEX), unpatched(evaluated, NAFLEX))


@pytest.mark.parametrize("decode", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(512, 342), (342, 512), (90, 60), (11, 7), (400, 21)])
def test_naflex_training_views_of_jpegs(shape, decode):
    stream = io.BytesIO()
    photos()[1].resize(shape).save(stream, "JPEG", quality=95)
    config = dataclasses.replace(NAFLEX, patch_size=8, max_num_patches=400)
    rng = np.random.default_rng(0)
    inputs = training_inputs(stream.getvalue(), config, "crop", STILL, rng, decode=decode)
    evaluated = Preprocess(config)(stream.getvalue())
    assert (inputs["spatial_shapes"] == evaluated["spatial_shapes"]).all()
    assert_near(unpatched(inputs, config), unpatched(evaluated, config), 3)


def test_naflex_training_rejects_what_does_not_fit():
    one = dataclasses.replace(NAFLEX, max_num_patches=1)
    data = encoded(Image.new("L", (4_200_000, 1)))
    with pytest.raises(BadSampleError, match="do not fit 1 patches") as error:
        training_inputs(data, one, "crop", STILL, np.random.default_rng(0))
    assert error.value.reason == "image"


def test_naflex_training_flips_and_recolors():
    data = encoded(drawing(90, 30))
    rng = np.random.default_rng(0)
    plain = unpatched(training_inputs(data, NAFLEX, "crop", STILL, rng), NAFLEX)
    flipped, gray = (
        unpatched(
            training_inputs(
                data,
                NAFLEX,
                "crop",
                dataclasses.replace(STILL, **{field: 1.0}),
                np.random.default_rng(0),
            ),
            NAFLEX,
        )
        for field in ("horizontal_flip", "grayscale")
    )
    assert (flipped == plain[:, ::-1]).all()
    assert (gray[..., 0] == gray[..., 2]).all()
    assert (gray != plain).any()


def test_naflex_views_of_objects_are_squares():
    inputs = evaluation_inputs(drawing(90, 30), NAFLEX, "object")
    assert inputs["spatial_shapes"].tolist() == [6, 6]
    assert (unpatched(inputs, NAFLEX) == evaluation_image(drawing(90, 30), 24, "object")).all()
    data = encoded(drawing(90, 30))
    training = training_inputs(data, NAFLEX, "object", STILL, np.random.default_rng(0))
    view = training_view(data, "object", STILL, 24, np.random.default_rng(0))
    assert (unpatched(training, NAFLEX) == view).all()


def test_training_views_use_the_towers_interpolation():
    data, views = encoded(drawing()), set()
    for interpolation in ("bicubic", "bilinear"):
        config = dataclasses.replace(VIT, interpolation=interpolation)
        for decode in ("fast", "exact"):
            way = {"decode": decode, "interpolation": interpolation}
            rngs = [np.random.default_rng(0) for _ in range(2)]
            inputs = training_inputs(data, config, "crop", STILL, rngs[0], decode=decode)
            view = training_view(data, "crop", STILL, 24, rngs[1], **way)
            assert (inputs["image"] == view).all()
            views.add(view.tobytes())
    assert len(views) == 2  # a PNG is decoded exactly either way


def test_blank_sequences_are_not_empty():
    blank = blank_inputs(NAFLEX, 2)
    assert blank["patch_mask"].sum(axis=1).tolist() == [1, 1]
    assert blank["spatial_shapes"].tolist() == [[1, 1], [1, 1]]
