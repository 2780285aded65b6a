import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.source_checks import check_source, imported_by
from data.tars import png
from data.test_tf_example import serialised
from tensorflow_datasets.core import dataset_info, sequential_writer

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.tfds import TfdsSource

F = tfds.features
COCO = {
    "image": F.Image(encoding_format="png"),
    "image/filename": F.Text(),
    "captions": F.Sequence({"id": F.Scalar(np.int64), "text": F.Text()}),
    "title": F.Text(),
}


def prepare(folder, name, features, examples, *, file_format="array_record", raw=()):
    """Write a set as tfds does, which without TensorFlow it can where images are bytes already.

    raw: serialised examples of the split 'train', of what tfds cannot serialise without it.
    """
    path = folder / name / "1.0.0"
    path.mkdir(parents=True)
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(path), module_name=__name__
    )
    info = dataset_info.DatasetInfo(builder=identity, features=F.FeaturesDict(features))
    writer = sequential_writer.SequentialWriter(
        info, max_examples_per_shard=3, file_format=file_format
    )
    writer.initialize_splits(list(examples))
    if file_format == "array_record":
        writer.add_examples(examples)
    for example in raw:
        writer._splits["train"].add_example(example)
    writer.close_all()
    return str(folder)


def coco(n):
    return {
        "image": png(n),
        "image/filename": f"{n}.png",
        "captions": [{"id": i, "text": f"größe {n} {i}"} for i in range(1 + n % 3)],
        "title": f"title {n}",
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return prepare(
        folder, "my_coco", COCO, {"train": [coco(n) for n in range(7)], "test": [coco(9)]}
    )


def from_tfds(data_dir, split="train"):
    skip = {"image": tfds.decode.SkipDecoding()}
    return tfds.data_source("my_coco", split=split, data_dir=data_dir, decoders=skip)


def test_records_equal_those_of_tfds(data_dir):
    source = TfdsSource("my_coco", data_dir=data_dir, caption_keys=("captions.text",))
    theirs = [
        (row["image"], tuple(text.decode() for text in row["captions"]["text"]))
        for row in from_tfds(data_dir)
    ]
    check_source(source, theirs)
    assert source.shard(4).endswith("my_coco-train.array_record-00001")
    assert source.locate(4).endswith("00001, record 1")
    assert imported_by(source, "tensorflow", "tensorflow_datasets", "jax") == []


@pytest.mark.parametrize("split", ["train[2:5]", "train[50%:]", "test", "train[:2]+test"])
def test_parts_of_splits(data_dir, split):
    source = TfdsSource("my_coco:1.0.0", split=split, data_dir=data_dir)
    assert [record.image for record in (source[i] for i in range(len(source)))] == [
        row["image"] for row in from_tfds(data_dir, split)
    ]


def test_keys(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert TfdsSource("my_coco", split="test").captions(0) == ("größe 9 0",)  # before the title
    keys = ("title", "captions.text")
    source = TfdsSource("my_coco", caption_keys=keys, caption_weights=(2, 2))
    assert source[1].captions == ("title 1", "größe 1 0", "größe 1 1")
    assert source[1].weights == pytest.approx((1 / 2, 1 / 4, 1 / 4))
    with pytest.raises(UserError, match=r"no column 'nothing' \(caption_keys\); there.*title"):
        TfdsSource("my_coco", caption_keys=("nothing",))
    with pytest.raises(UserError, match=r"no column 'photo' \(image_key\); there are: image,"):
        TfdsSource("my_coco", image_key="photo")


def test_lists_of_lists_and_of_dicts_of_lists(tmp_path):
    features = {
        "nested": {"image": F.Image()},
        "texts": F.Sequence(F.Sequence(F.Text())),
        "regions": F.Sequence({"texts": F.Sequence(F.Text())}),
    }
    # As tfds' serialiser writes them: see its `_add_ragged_fields`.
    raw = serialised(
        {
            "nested/image": [png(0)],
            "texts/ragged_flat_values": [b"a", b"b"],
            "texts/ragged_row_lengths_0": [1, 0, 1],
            "regions/texts/ragged_flat_values": [b"c"],
            "regions/texts/ragged_row_lengths_0": [1],
        }
    )
    folder = prepare(tmp_path, "ragged", features, {"train": []}, raw=[raw])
    skip = {"nested": {"image": tfds.decode.SkipDecoding()}}
    (row,) = tfds.data_source("ragged", split="train", data_dir=folder, decoders=skip)
    assert [list(texts) for texts in row["texts"]] == [[b"a"], [], [b"b"]]
    keys = ("texts", "regions.texts")
    source = TfdsSource("ragged", data_dir=folder, caption_keys=keys)
    assert source[0].captions == ("a", "b", "c")
    assert source[0].image == row["nested"]["image"] == png(0)


def test_classes(tmp_path):
    features = {"picture": F.Image(), "label": F.ClassLabel(names=["tabby_cat", "dog"])}
    examples = [{"picture": png(n), "label": label} for n, label in enumerate([1, 0, -1])]
    folder = prepare(tmp_path, "animals", features, {"train": examples})
    templates = ("a photo of a {}", "a drawing of a {}")
    source = TfdsSource("animals", data_dir=folder, templates=templates)
    assert source[1].image == png(1)
    assert source[1].captions == ("a photo of a tabby cat", "a drawing of a tabby cat")
    assert TfdsSource("animals", data_dir=folder).captions(0) == ("dog",)
    with pytest.raises(BadSampleError, match="label -1 is none of 2 classes"):
        source[2]


def test_nothing_to_learn_from(tmp_path):
    folder = prepare(tmp_path, "pictures", {"image": F.Image()}, {"train": [{"image": png(0)}]})
    with pytest.raises(UserError, match=r"usual columns caption, .*there are: none; name one"):
        TfdsSource("pictures", data_dir=folder)
    features = {"image": F.Image(), "text": F.Text()}
    examples = [{"image": png(n), "text": " "} for n in range(2)]
    folder = prepare(tmp_path, "silent", features, {"train": examples, "empty": []})
    with pytest.raises(UserError, match="none of the first 2 samples has a caption"):
        TfdsSource("silent", data_dir=folder)
    with pytest.raises(UserError, match="split 'empty' is empty"):
        TfdsSource("silent", split="empty", data_dir=folder)


def test_not_prepared(data_dir, tmp_path):
    build = "tfds build {} --file_format=array_record --data_dir={}"
    for name in ("mnist", "no_such_set", "my_coco:2.0.0", "bad name"):
        with pytest.raises(UserError) as caught:
            TfdsSource(name, data_dir=data_dir)
        message = str(caught.value)
        assert message.endswith(build.format(name, data_dir)), message
        assert "\n" not in message
        assert len(message) < 500
    with pytest.raises(UserError, match=r"no split 'dev'.*there are: test, train|train, test"):
        TfdsSource("my_coco", split="dev", data_dir=data_dir)
    with pytest.raises(UserError, match=r"no folder .*set TFDS_DATA_DIR"):
        TfdsSource("my_coco", data_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match="must be local"):
        TfdsSource("my_coco", data_dir="gs://bucket/tfds")
    prepare(tmp_path, "records", COCO, {"train": []}, file_format="tfrecord")
    with pytest.raises(UserError, match="tfrecord, which has no random access; prepare it where"):
        TfdsSource("records", data_dir=str(tmp_path))


def test_shard_vanishes(tmp_path):
    folder = prepare(tmp_path, "my_coco", COCO, {"train": [coco(n) for n in range(7)]})
    source = TfdsSource("my_coco", data_dir=folder)
    os.unlink(source.shard(6))
    with pytest.raises(BadSampleError) as caught:
        source[6]
    assert caught.value.reason == "read"
