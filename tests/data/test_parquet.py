import json
import os
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.source_checks import check_source, imported_by
from data.tars import png
from data.test_arrow_files import KINDS, write

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import parquet
from clip_jax.data.sources.parquet import ParquetSource

N = 10
STRUCT = [{"bytes": png(n), "path": f"{n}.png"} for n in range(N)]  # Hugging Face's datasets
EXPECTED = [(png(n), (f"größe {n}",)) for n in range(N)]
TEXTS = [f" größe {n}" for n in range(N)]


@pytest.mark.parametrize("kind", KINDS)
def test_records(tmp_path, kind):
    data = pa.table({"n": range(N), "image": STRUCT, "text": TEXTS})
    for shard, (first, last) in enumerate([(0, 6), (6, 6), (6, N)]):
        write(tmp_path / f"{shard}.data", kind, data[first:last])
    path = str(tmp_path / "*.data")
    for _ in range(2):  # the second time by the index
        source = ParquetSource(path, tmp_path / "index")
        check_source(source, EXPECTED)
    assert source.locate(7) == f"{tmp_path}/2.data, row 1"
    assert imported_by(source, "jax", "pandas", "tensorflow") == []


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("jpg", [png(n) for n in range(N)]),  # img2dataset
        ("image", pa.array([png(n) for n in range(N)], pa.large_binary())),
        ("image_path", [f"pictures/{n}.png" for n in range(N)]),
        ("image", [{"bytes": None, "path": f"pictures/{n}.png"} for n in range(N)]),
    ],
)
def test_kinds_of_image_columns(tmp_path, name, column):
    (tmp_path / "pictures").mkdir()
    for n in range(N):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(png(n))
    path = write(tmp_path / "a", "parquet", pa.table({"caption": TEXTS, name: column}))
    check_source(ParquetSource(path, tmp_path / "index"), EXPECTED)


def test_captions(tmp_path):
    data = {
        "image": STRUCT[:2],
        "long": ["a", None],
        "alt": [["b", "c"], ["b", "d"]],
        "made": [{"raw": ["e"]}, {"raw": []}],
        "dot.ted": ["f", "f"],
    }
    path = write(tmp_path / "a", "parquet", pa.table(data))
    keys = ("long", "alt", "made.raw", "dot.ted")
    source = ParquetSource(
        path, tmp_path / "index", caption_keys=keys, caption_weights=(4, 2, 1, 1)
    )
    assert source[0].captions == ("a", "b", "c", "e", "f")
    assert source[0].weights == pytest.approx((1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8))
    assert source[1].captions == ("b", "d", "f")
    assert source[1].weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    with pytest.raises(UserError, match=r"no column 'x' \(caption_keys\); there are: image, long"):
        ParquetSource(path, tmp_path / "index", caption_keys=("x",))
    with pytest.raises(UserError, match=r"usual columns caption, .*name one with caption_keys"):
        ParquetSource(path, tmp_path / "index")
    with pytest.raises(UserError, match=r"column 'alt' is of type list.*; images are bytes, paths"):
        ParquetSource(path, tmp_path / "index", image_key="alt", caption_keys=("long",))


def test_classes(tmp_path):
    names = {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"}
    schema = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    data = pa.table({"image": STRUCT[:3], "label": [1, 0, -1]})
    data = data.replace_schema_metadata({"huggingface": json.dumps(schema)})
    path = write(tmp_path / "a", "parquet", data)
    source = ParquetSource(path, tmp_path / "index", templates=("a {}", "the {}"))
    assert source[1].captions == ("a tabby cat", "the tabby cat")
    with pytest.raises(BadSampleError, match="label -1 is none of 2 classes"):
        source[2]
    path = write(tmp_path / "b", "parquet", data.replace_schema_metadata({"huggingface": "{"}))
    with pytest.raises(UserError, match="there are: image, label"):
        ParquetSource(path, tmp_path / "index")


def test_memory_is_bounded(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    data = pa.table({"image": [rng.bytes(10_000) for _ in range(40)], "text": ["x"] * 40})
    pq.write_table(data, tmp_path / "a", row_group_size=2)
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 100_000)
    source = ParquetSource(str(tmp_path / "a"), tmp_path / "index")
    for index in rng.permutation(40).tolist():
        assert source[index].image == data["image"][index].as_py()
    assert source._cache._num_bytes <= 100_000
    assert 3 <= len(source._cache._entries) <= 5


def test_large_row_groups_are_told(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "a", "parquet", pa.table({"image": STRUCT, "text": TEXTS}))
    ParquetSource(path, tmp_path / "index")
    assert "row groups" not in caplog.text
    monkeypatch.setattr(parquet, "_LARGE_PART", 1000)
    ParquetSource(path, tmp_path / "index")
    assert caplog.text.count("row_group_size=100") == 1


def test_damaged_files(tmp_path, caplog):
    data = pa.table({"image": STRUCT, "text": TEXTS})
    for name in "ab":
        write(tmp_path / name, "parquet", data)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-50])
    path = f"{tmp_path}/a,{tmp_path}/b"
    with pytest.raises(UserError, match=r"/a: .*on_bad_sample to 'skip'"):
        ParquetSource(path, tmp_path / "index", on_bad_sample="fail")
    check_source(ParquetSource(path, tmp_path / "index"), EXPECTED)
    assert "/a: left out: " in caplog.text
    with pytest.raises(UserError, match="none of 1 files can be read"):
        ParquetSource(f"{tmp_path}/a", tmp_path / "index")

    content = bytearray((tmp_path / "b").read_bytes())
    middle = content.index(png(5)[50:]) - 60  # within the header of a page, or its data
    content[middle : middle + 100] = bytes(100)
    (tmp_path / "b").write_bytes(content)
    source = ParquetSource(f"{tmp_path}/b", tmp_path / "index")
    reasons = set()
    for index in range(4, 8):
        try:
            source[index]
        except BadSampleError as error:
            reasons.add(error.reason)
    assert reasons <= {"archive", "caption", "image"}
    assert source[0].image == png(0)


def test_files_vanish(tmp_path):
    path = write(tmp_path / "a", "parquet", pa.table({"image": STRUCT, "text": TEXTS}))
    source = ParquetSource(path, tmp_path / "index")
    os.unlink(path)
    with pytest.raises(BadSampleError) as caught:
        source[9]
    assert caught.value.reason == "read"
    with pytest.raises(UserError, match="do not exist"):
        ParquetSource(path, tmp_path / "index")


def test_nothing_to_learn_from(tmp_path):
    empty = pa.table({"image": STRUCT, "text": TEXTS})[:0]
    with pytest.raises(UserError, match="no row in 1 files"):
        ParquetSource(write(tmp_path / "a", "parquet", empty), tmp_path / "index")
    silent = pa.table({"image": STRUCT, "text": pa.nulls(N, pa.string())})
    with pytest.raises(UserError, match="none of the first 10 samples has a caption"):
        ParquetSource(write(tmp_path / "b", "parquet", silent), tmp_path / "index")
    blind = pa.table({"image": [None, *STRUCT[1:]], "text": TEXTS})
    source = ParquetSource(write(tmp_path / "c", "parquet", blind), tmp_path / "index")
    with pytest.raises(BadSampleError, match="no image in column 'image'") as caught:
        source[0]
    assert caught.value.reason == "image"
    (tmp_path / "d.parquet").write_text("path,caption\n")
    with pytest.raises(UserError, match="none of 1 files can be read"):
        ParquetSource(str(tmp_path / "d.parquet"), tmp_path / "index")


def test_remote(tmp_path):
    path = write(tmp_path / "a", "parquet", pa.table({"path": ["x/1.png"], "text": ["one"]}))
    store = fsspec.filesystem("memory")
    store.pipe("/hf/a.parquet", (tmp_path / "a").read_bytes())
    store.pipe("/hf/x/1.png", png(1))
    assert os.path.exists(path)
    source = ParquetSource("memory://hf/*.parquet", tmp_path / "index")
    assert source[0][:2] == (png(1), ("one",))


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        ParquetSource(str(tmp_path), tmp_path / "index")


@pytest.mark.parametrize("other", ["text", "image"])
def test_files_of_other_columns(tmp_path, other):
    """All files are looked at, the last as well, by the columns that are needed."""
    data = pa.table({"image": STRUCT[:2], "text": TEXTS[:2]})
    for number in range(3):
        more = data.append_column("n", pa.array([1, 2])) if number == 1 else data
        write(tmp_path / f"{number}.data", "parquet", more)
    path = str(tmp_path / "*.data")
    assert len(ParquetSource(path, tmp_path / "index")) == 6
    names = {"image": "image", "text": "text", other: "renamed"}
    write(tmp_path / "2.data", "parquet", data.rename_columns([names["image"], names["text"]]))
    for _ in range(2):  # the second time by the index
        listed = ", ".join([names["image"], names["text"]])
        message = rf"0.data has image, text; .*2.data has {listed}; make a source of each"
        with pytest.raises(UserError, match=message):
            ParquetSource(path, tmp_path / "index")
