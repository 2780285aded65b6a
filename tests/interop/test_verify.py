"""The gate lets no silent mismatch through: each of them is tried."""

import dataclasses
import json

import numpy as np
import pytest
from interop import hf_models  # noqa: F401 - skips where transformers is not installed
from interop.small_weights import small_weights

from clip_jax.config import UserError
from clip_jax.data.preprocess import Preprocess
from clip_jax.interop import huggingface
from clip_jax.interop.samples import exact_images, other_images, other_sizes
from clip_jax.interop.verify import Report, check_again, check_peer, described


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    huggingface.write(small_weights("clip"), folder)
    return folder


def changed(weights, **fields):
    """Weights with other settings, by their name below `model`."""
    model = weights.model
    for name, value in fields.items():
        tower, _, field = name.rpartition("__")
        if tower:
            value = dataclasses.replace(getattr(model, tower), **{field: value})
        model = dataclasses.replace(model, **{tower or field: value})
    return dataclasses.replace(weights, model=model)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image__activation": "quick_gelu"}, "model.image.activation"),
        ({"text__layer_norm_epsilon": 1e-6}, "model.text.layer_norm_epsilon"),
        ({"image__pooling": "mean"}, "model.image.pooling"),
        ({"text__eot_id": 1}, "model.text.eot_id"),
        ({"image__mean": (0.5, 0.5, 0.5)}, "model.image.mean"),
        ({"image__std": (0.5, 0.5, 0.5)}, "model.image.std"),
        ({"image__resize": "squash"}, "model.image.resize"),
        ({"image__interpolation": "bilinear"}, "model.image.interpolation"),
        ({"image__image_size": 64}, "model.image.image_size"),
        ({"image__mlp_ratio": 2.0}, "model.image.mlp_ratio"),
        ({"text_projection": "mlp"}, "model.text_projection"),
        ({"logit_bias_init": -10.0}, "model.logit_bias_init"),
    ],
)
def test_settings_that_came_back_otherwise(fields, named):
    weights = small_weights("clip")
    with pytest.raises(UserError, match=f"read back, {named} is"):
        check_again(weights, changed(weights, **fields))


def test_settings_of_training_do_not_count():
    weights = small_weights("clip")
    again = changed(
        weights, name="x", logit_scale_init=3.0, image__patch_dropout=0.5, text__pad_id=7
    )
    assert check_again(weights, again)
    naflex = small_weights("naflex")
    assert check_again(naflex, changed(naflex, image__resize="shortest"))
    with pytest.raises(UserError, match=r"model.image.max_num_patches is 30, not 20"):
        check_again(naflex, changed(naflex, image__max_num_patches=30))
    bert = small_weights("bert")
    with pytest.raises(UserError, match=r"model.text.pad_id is 7"):
        check_again(bert, changed(bert, text__pad_id=7))
    # The same hidden width by another quotient.
    ratio = np.nextafter(weights.model.image.mlp_ratio, 5.0)
    assert check_again(weights, changed(weights, image__mlp_ratio=float(ratio)))


def with_arrays(weights, **arrays):
    return dataclasses.replace(weights, arrays=weights.arrays | arrays)


def test_arrays_that_came_back_otherwise():
    weights = small_weights("clip")
    name = "image/class_embedding"
    array = weights.arrays[name]
    less = {path: a for path, a in weights.arrays.items() if path != name}
    for again, message in (
        (with_arrays(weights, **{name: np.nextafter(array, 9)}), f"{name} has other numbers"),
        (with_arrays(weights, **{name: array.astype(np.float16)}), f"{name} is float16"),
        (with_arrays(weights, **{name: array[None]}), rf"{name} is float32 \(1, 32\), not"),
        (with_arrays(weights, more=array), "there is more too"),
        (dataclasses.replace(weights, arrays=less), f"{name} is missing"),
        (dataclasses.replace(weights, parts=("image",)), "became"),
    ):
        with pytest.raises(UserError, match=message):
            check_again(weights, again)


def test_tokenizers_that_came_back_otherwise():
    weights = small_weights("clip")
    bare = dataclasses.replace(weights, tokenizer=None)
    assert "no place for the tokenizer" in check_again(weights, bare)[-1]
    assert "no tokenizer came" in check_again(bare, bare)[-1]
    assert "the same on 11 texts" in check_again(weights, weights)[-1]
    for rules in ({"start_id": 5}, {"clean": "canonicalize"}):
        other = dataclasses.replace(weights, tokenizer=weights.tokenizer.with_rules(**rules))
        with pytest.raises(UserError, match="read back, the tokenizer has other tokens for"):
            check_again(weights, other)


def test_the_peer_agrees(written):
    lines, differences = check_peer(
        small_weights("clip"), written, huggingface, library="transformers"
    )
    assert differences.keys() == {"image", "text"}
    assert [line.split(",")[0] for line in lines] == [
        "transformers: 4 image embeddings",
        "transformers: 5 text embeddings",
    ]


@pytest.mark.parametrize(
    ("file", "group", "values", "message"),
    [
        (
            "config.json",
            "vision_config",
            {"hidden_act": "quick_gelu"},
            "image embeddings .* differ",
        ),
        ("config.json", "text_config", {"layer_norm_eps": 1e-3}, "text embeddings .* differ"),
        ("config.json", "text_config", {"eos_token_id": 1}, "text embeddings .* differ"),
        ("preprocessor_config.json", None, {"image_mean": [0.5] * 3}, "image embeddings .* differ"),
        ("preprocessor_config.json", None, {"resample": 2}, "differ .*: it is resizing"),
        (
            "preprocessor_config.json",
            None,
            {"size": {"height": 32, "width": 32}, "do_center_crop": False},
            "differ .*: it is resizing",
        ),
        (
            "config.json",
            "text_config",
            {"max_position_embeddings": 3},
            "transformers cannot run it",
        ),
    ],
)
def test_the_peer_disagrees(written, tmp_path, file, group, values, message):
    for source in written.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    content = json.loads((tmp_path / file).read_text())
    (content if group is None else content[group]).update(values)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        check_peer(small_weights("clip"), tmp_path, huggingface, library="transformers")
    assert "\n" not in str(error.value)


def test_tokens_that_the_peer_makes_otherwise(written):
    weights = small_weights("clip")
    tokenizer = weights.tokenizer.with_rules(start_id=5)
    other = dataclasses.replace(weights, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"text embeddings .*first for the text 'a photo of a cat'"):
        check_peer(other, written, huggingface, library="transformers")


class NoPeer:
    """A format whose library is not installed."""

    read, write = staticmethod(huggingface.read), staticmethod(huggingface.write)

    def peer_embeddings(self, directory, images, texts):
        return None


def test_without_the_library_it_says_so(written):
    lines, differences = check_peer(small_weights("clip"), written, NoPeer(), library="somewhere")
    assert lines == ["self-check only: somewhere cannot be imported (extra: verify)"]
    assert not differences


@pytest.mark.parametrize("kind", ["clip", "siglip", "naflex"])
def test_sample_images(kind):
    """The first are not resized, the others are, and transformers crops their same pixels."""
    image = small_weights(kind).model.image
    preprocess = Preprocess(image)
    for sample in exact_images(image):
        made = preprocess(sample)
        if kind != "naflex":
            np.testing.assert_array_equal(made["image"], np.asarray(sample))
        else:
            rows, columns = made["spatial_shapes"]
            assert (columns * 8, rows * 8) == sample.size
    assert all(sample.width != sample.height for sample in other_images(image))
    assert len({sample.width > sample.height for sample in other_images(image)}) == 2


def test_margins_that_libraries_crop_alike():
    """torchvision rounds half of a margin to even, transformers down."""
    for side in range(14, 600, 2):
        for long, short in other_sizes(side):
            margin = int(side * long / short) - side
            assert round(margin / 2) == margin // 2
            assert long > short


def test_reports_read_well(tmp_path):
    weights = small_weights("clip")
    report = Report(
        format="huggingface",
        path=tmp_path / "out",
        model=weights.model,
        parts=weights.parts,
        checks=("a", "b"),
        differences={},
    )
    assert str(report) == f"{tmp_path / 'out'}: custom\n  a\n  b"


def test_single_towers_are_described_alone():
    tower = dataclasses.replace(small_weights("clip"), parts=("text",))
    names = described(tower)
    assert "text.pooling" in names
    assert not any(name.startswith("image.") for name in names)
