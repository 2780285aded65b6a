import pickle

import fsspec
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data.source_checks import check_source, imported_by
from data.tars import png
from data.test_tf_example import serialised

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import array_record
from clip_jax.data.sources.array_record import ArrayRecordSource


def write(path, records, options="group_size:1"):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


@pytest.fixture
def path(tmp_path):
    for shard in range(3):
        numbers = range(10 * shard, 10 * shard + 3 + shard)
        records = [
            serialised({"image": [png(n)], "caption": [f" größe {n} ".encode()], "n": [n]})
            for n in numbers
        ]
        write(tmp_path / f"{shard}.array_record", records)
    return str(tmp_path / "{0..2}.array_record")


def test_records(path, monkeypatch):
    monkeypatch.setattr(array_record, "_MAX_OPEN", 2)
    numbers = [0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24]
    source = ArrayRecordSource(path)
    check_source(source, [(png(n), (f"größe {n}",)) for n in numbers])
    assert source.locate(4) == f"{path.replace('{0..2}', '1')}, record 1"
    assert imported_by(source, "tensorflow", "tensorflow_datasets", "jax") == []


def test_keys_and_weights(tmp_path):
    features = {"image/encoded": [b"image"], "long": [b"a", b"b"], "alt/text": [b"c"]}
    path = write(tmp_path / "a", [serialised(features), serialised(features | {"long": []})])
    source = ArrayRecordSource(path, caption_keys=("long", "alt.text"), caption_weights=(3, 1))
    assert source[0].captions == ("a", "b", "c")
    assert source[0].weights == pytest.approx((0.375, 0.375, 0.25))
    assert source[1].weights == (1.0,)
    with pytest.raises(UserError, match=r"no column 'x' \(image_key\).*alt/text, image/enc"):
        ArrayRecordSource(path, image_key="x", caption_keys=("long",))
    with pytest.raises(UserError, match=r"usual columns caption, .* name one with caption_keys"):
        ArrayRecordSource(path)


def test_bad_records(tmp_path):
    good = serialised({"image": [b"i"], "caption": [b"c"]})
    path = write(
        tmp_path / "a",
        [
            good,
            b"\xff\xff",
            serialised({"caption": [b"c"]}),
            serialised({"image": [b"i"], "caption": [b"\xff"]}),
            serialised({"image": [1], "caption": [b"c"]}),
        ],
    )
    source = ArrayRecordSource(path)
    reasons = []
    for index in range(1, 5):
        with pytest.raises(BadSampleError) as caught:
            source[index]
        reasons.append(caught.value.reason)
    assert reasons == ["archive", "image", "caption", "image"]


def test_damaged_and_vanished_files(tmp_path, path, caplog):
    record = serialised({"image": [png(0, 40)], "caption": [b"c"]})
    whole = write(tmp_path / "whole", [record] * 9)
    content = bytearray((tmp_path / "whole").read_bytes())
    content[content.index(png(0, 40)[-100:])] ^= 255  # of the first record
    (tmp_path / "whole").write_bytes(content)
    source = ArrayRecordSource(whole)
    with pytest.raises(BadSampleError, match="Corrupted") as caught:
        source[0]
    assert caught.value.reason == "archive"
    assert source[8].image == png(0, 40)

    (tmp_path / "2.array_record").write_bytes(b"no such thing" * 1000)
    with pytest.raises(UserError, match=r"2\.array_record: .*on_bad_sample"):
        ArrayRecordSource(path, on_bad_sample="fail")
    assert len(ArrayRecordSource(path)) == 7
    assert "2.array_record: left out" in caplog.text
    with pytest.raises(UserError, match=r"no record in 1 files \(1 cannot be read\)"):
        ArrayRecordSource(str(tmp_path / "2.array_record"))


def test_file_vanishes_while_in_use(path, tmp_path):
    source = pickle.loads(pickle.dumps(ArrayRecordSource(path)))  # without open files
    (tmp_path / "1.array_record").unlink()
    source[0]
    with pytest.raises(BadSampleError, match=r"1\.array_record.*FileNotFoundError") as caught:
        source[4]
    assert caught.value.reason == "read"


def test_what_is_no_example(tmp_path, caplog):
    path = write(tmp_path / "a", [b"hello"] * 3, "group_size:3")
    with pytest.raises(UserError, match=r"no tf\.Examples"):
        ArrayRecordSource(path)
    assert "groups of 3" in caplog.text
    fsspec.filesystem("memory").pipe("/a.array_record", b"")
    with pytest.raises(UserError, match="must be local"):
        ArrayRecordSource("memory://a.array_record")


def test_no_captions(tmp_path):
    path = write(tmp_path / "a", [serialised({"image": [b"i"], "caption": [b" "]})] * 3)
    with pytest.raises(UserError, match="none of the first 3 samples has a caption"):
        ArrayRecordSource(path)
