import os
import time

import numpy as np
import pytest
from data.tars import END, header, padded, pairs, png, write_tar

from clip_jax.config.errors import UserError
from clip_jax.data.sources import tar_index
from clip_jax.data.sources.tar_index import build_indexes, scan, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"0001.jpg", (b"0001", b"jpg")),
        (b"dir.d/0001.JPG", (b"dir.d/0001", b"jpg")),
        (b"0001.seg.png", (b"0001", b"seg.png")),
        (b"./0001.txt", (b"./0001", b"txt")),
        (b"README", None),
        (b"._0001.jpg", None),
        (b"a/.hidden", None),
        (b"__info__.json", None),
    ],
)
def test_key_rule(name, expected):
    assert split_name(name) == expected


def test_samples_without_image_or_caption_are_counted(tmp_path):
    members = [
        ("a.png", png(0)),
        ("a.txt", b"kept"),
        ("b.png", png(1)),  # no caption
        ("c.txt", b"no image"),
        ("d.json", b'{"caption": "kept"}'),
        ("d.cls", b"7"),
        ("d.webp", png(2)),
        ("README", b"no sample"),
        ("e.seg.png", png(3)),  # webdataset: extension seg.png
        ("e.txt", b"x"),
    ]
    rows, skipped = scan(str(write_tar(tmp_path / "a.tar", members)))
    assert (len(rows), skipped) == (2, 3)
    assert rows["text_bytes"].tolist() == [512 + 4, 0]


def test_index_is_reused(tmp_path, monkeypatch):
    tar = str(write_tar(tmp_path / "a.tar", pairs(0, 3)))
    build_indexes([tar], tmp_path / "index")
    monkeypatch.setattr(tar_index, "walk", lambda *_: pytest.fail("scanned again"))
    assert build_indexes([tar], tmp_path / "index").counts.tolist() == [3]
    # The tar's own index serves another list of tars too.
    assert build_indexes([tar, tar], tmp_path / "index").counts.tolist() == [3, 3]


def test_index_of_a_changed_tar_is_built_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(0, 3))
    old = build_indexes([str(path)], tmp_path / "index").rows_file
    size = path.stat().st_size
    time.sleep(0.01)
    write_tar(path, pairs(10, 3))
    assert path.stat().st_size == size  # only the modification time tells
    os.utime(path)
    new = build_indexes([str(path)], tmp_path / "index").rows_file
    assert new != old
    assert new.exists()


def test_no_temporary_files_are_left(tmp_path):
    tars = [str(write_tar(tmp_path / f"{i}.tar", pairs(0, 2))) for i in range(12)]
    build_indexes(tars, tmp_path / "index")
    names = [file.name for file in (tmp_path / "index").iterdir()]
    assert len(names) == 12 + 2  # one each, and the rows and counts of the list
    assert all(name.endswith(".npy") and not name.startswith(".") for name in names)


def test_joined_rows_are_those_of_the_tars(tmp_path):
    tars = [str(write_tar(tmp_path / f"{i}.tar", pairs(0, 2 + i))) for i in range(3)]
    index = build_indexes(tars, tmp_path / "index")
    expected = np.concatenate([scan(tar)[0] for tar in tars])
    assert (np.load(index.rows_file, mmap_mode="r") == expected).all()
    assert index.counts.tolist() == [2, 3, 4]


@pytest.mark.parametrize("cut", [700, 1100, 2000])
def test_truncated_tar_says_what_is_whole(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", pairs(0, 4))
    whole = path.read_bytes()
    two = scan(str(path))[0]["image_start"][2].item()
    path.write_bytes(whole[: two + cut])
    with pytest.raises(UserError, match=rf"{path}: the file ends .* after 2 whole samples; ") as e:
        scan(str(path))
    assert "\n" not in str(e.value)


def test_sample_in_progress_is_not_counted_as_whole(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(
        header(b"a.png", 3) + padded(b"abc") + header(b"a.cls", 1) + padded(b"a") + b"\x01" * 512
    )
    with pytest.raises(UserError, match="at byte 2048, after 0 whole samples"):
        scan(str(path))


def test_same_name_twice(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 1), ("s0000.txt", b"again")])
    with pytest.raises(UserError, match=r"the name s0000.txt twice"):
        scan(str(path))


def test_missing_end_marker_is_only_a_warning(tmp_path, caplog):
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"a.png", 3) + padded(b"abc") + header(b"a.txt", 1) + padded(b"a"))
    assert len(scan(str(path))[0]) == 1
    assert "no end marker" in caplog.text
    path.write_bytes(path.read_bytes() + END)
    caplog.clear()
    scan(str(path))
    assert not caplog.text
