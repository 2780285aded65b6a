import json

from data.tars import pairs, png, write_tar
from data.test_array_record import write
from data.test_tf_example import serialised

from clip_jax.config.schema import SourceConfig
from clip_jax.data.check_schema import describe_schema
from clip_jax.data.sources import open_source


def described(folder, kind, path, **fields) -> list[str]:
    config = SourceConfig(kind=kind, path=str(path), **fields)
    return describe_schema(kind, open_source(config, folder / "cache"))


def test_tars(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [*pairs(0, 3), ("x.png", png(9)), ("__meta__.json", b"{}")])
    assert described(tmp_path, "webdataset", tar) == ["members of the first 7: png 4, txt 3"]
    document = json.dumps({"caption": "x", "url": "y"}).encode()
    tar = write_tar(tmp_path / "b.tar", [("a.png", png(0)), ("a.json", document)])
    assert described(tmp_path, "webdataset", tar) == [
        "members of the first 2: png 1, json 1",
        "fields of the first json: caption, url",
    ]


def test_the_end_of_a_damaged_tar_is_not_told_of(tmp_path):
    tar = write_tar(tmp_path / "a.tar", pairs(0, 3))
    tar.write_bytes(tar.read_bytes()[:6000])
    [line] = described(tmp_path, "webdataset", tar)
    assert line.startswith("members of the first ")


def test_tables(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    table = tmp_path / "a.tsv"
    table.write_bytes(b"\xef\xbb\xbffilepath\ttitle\tsource\na.png\tx\ty\n")
    assert described(tmp_path, "table", table) == ["columns: filepath, title, source"]
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "caption": "x", "n": 1}) + "\n")
    assert described(tmp_path, "table", rows) == ["fields of the first row: image, caption, n"]


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [png(0)], "captions": [["x", "y"]], "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    [line] = described(tmp_path, "parquet", tmp_path / "a.parquet")
    assert line.startswith("columns: image (binary), captions (list<")
    assert line.endswith("), n (int64)")


def test_features(tmp_path):
    record = serialised({"image": [png(0)], "captions": [b"x", b"y"], "label": [3]})
    path = write(tmp_path / "a.array_record", [record])
    assert described(tmp_path, "array_record", path) == [
        "features: captions (2 bytes), image (bytes), label (integers)"
    ]


def test_folders(tmp_path):
    (tmp_path / "f" / "cat").mkdir(parents=True)
    (tmp_path / "f" / "cat" / "1.png").write_bytes(png(0))
    assert described(tmp_path, "folder", tmp_path / "f") == ["captions from names of folders"]
    (tmp_path / "f" / "cat" / "1.txt").write_text("a cat")
    assert described(tmp_path, "folder", tmp_path / "f") == ["captions from .txt files"]


def test_a_file_that_has_gone(tmp_path):
    tar = write_tar(tmp_path / "a.tar", pairs(0, 3))
    source = open_source(SourceConfig(path=str(tar)), tmp_path / "cache", retries=0)
    tar.unlink()
    [line] = describe_schema("webdataset", source)
    assert line.startswith("the file of the first sample cannot be read: ")
