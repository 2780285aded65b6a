import os

import pytest
from data.source_checks import check_source
from data.tars import png

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.folder import FolderSource


def fill(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def test_images_with_texts(tmp_path):
    root = fill(
        tmp_path / "set",
        {
            "b/2.JPG": png(2),
            "b/2.txt": "two\nlines\n",
            "a 1.png": png(0),
            "a 1.txt": " größe ",
            "b/a/3.webp": png(3),
            "b/a/3.txt": b"\xef\xbb\xbfwith a mark",
            "a.b.jpeg": png(1),
            "a.b.txt": "dots",
            "README.txt": "not an image's",
            ".hidden.png": png(9),
            ".cache/x.png": png(9),
        },
    )
    source = FolderSource(root, tmp_path / "index")
    texts = ["größe", "dots", "two\nlines", "with a mark"]
    check_source(source, [(png(n), (text,)) for n, text in enumerate(texts)])
    assert [source[index].key for index in range(4)] == [
        "a 1.png",
        "a.b.jpeg",
        "b/2.JPG",
        "b/a/3.webp",
    ]
    assert source.shard(3) == f"{root}/b/a"
    assert source.locate(0) == f"{root}/a 1.png"


def test_classes(tmp_path):
    root = fill(
        tmp_path / "set",
        {
            "tabby_cat/1.png": png(0),
            "tabby_cat/more/0.png": png(1),
            "zebra/0.png": png(2),
            "zebra/notes.txt": "of no image",
            "LICENSE": "free",
        },
    )
    source = FolderSource(root, tmp_path / "index", templates=("a {}", "one {}"))
    cat, zebra = ("a tabby cat", "one tabby cat"), ("a zebra", "one zebra")
    check_source(source, [(png(0), cat), (png(1), cat), (png(2), zebra)])
    assert FolderSource(root, tmp_path / "index").captions(2) == ("zebra",)


def test_order_is_that_of_names_whatever_the_disk_says(tmp_path, monkeypatch):
    root = fill(tmp_path / "set", {f"{c}/{n}.png": png(n) for c in "xyab" for n in range(9)})
    source = FolderSource(root, tmp_path / "index")
    keys = [source[index].key for index in range(36)]
    assert keys == sorted(keys)

    scandir = os.scandir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(
        os, "scandir", lambda path: Reversed(sorted(scandir(path), key=lambda e: e.name)[::-1])
    )
    again = FolderSource(root, tmp_path / "index")
    assert [again[index].key for index in range(36)] == keys


def test_new_images_are_seen(tmp_path):
    root = fill(tmp_path / "set", {"x/1.png": png(1)})
    old = FolderSource(root, tmp_path / "index")
    fill(tmp_path / "set", {"x/0.png": png(0)})
    assert len(FolderSource(root, tmp_path / "index")) == 2
    assert old[0].image == png(1)


def test_links(tmp_path):
    root = fill(tmp_path / "set", {"x/1.png": png(1)})
    fill(tmp_path / "other", {"2.png": png(2)})
    os.symlink(tmp_path / "other", tmp_path / "set" / "y")
    os.symlink(tmp_path / "set", tmp_path / "set" / "x" / "circle")
    os.symlink(tmp_path / "gone", tmp_path / "set" / "x" / "gone.png")
    source = FolderSource(root, tmp_path / "index")
    assert [source[index].key for index in (0, 2)] == ["x/1.png", "y/2.png"]
    with pytest.raises(BadSampleError) as caught:
        source[1]
    assert caught.value.reason == "read"


def test_names_that_are_no_utf8(tmp_path):
    root = os.fsencode(tmp_path / "set" / "caf")
    os.makedirs(root + b"\xe9")
    with open(root + b"\xe9/\xff\n.png", "wb") as file:
        file.write(png(0))
    fill(tmp_path / "set", {"dog/1.png": png(1)})
    source = FolderSource(str(tmp_path / "set"), tmp_path / "index")
    assert source[1].captions == ("dog",)
    with pytest.raises(BadSampleError, match="surrogate") as caught:  # no text that can be learnt
        source[0]
    assert caught.value.reason == "caption"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no image .* among its 0 files"),
        ({"a/x.gif": b"x", "a/x.txt": "x"}, "no image .* among its 2 files"),
        ({"1.png": b"x", "a/2.png": b"x"}, "1 of 2 images lie in it without a .txt beside them"),
        (
            {"a/1.png": b"x", "a/1.txt": "x", "a/2.png": b"", "b/3.png": b""},
            "1 images with a .txt beside them and 2 without",
        ),
        ({"1.png": b"x", "1.txt": " "}, "none of the first 1 samples has a caption"),
    ],
)
def test_nothing_to_learn_from(tmp_path, files, message):
    (tmp_path / "set").mkdir()
    root = fill(tmp_path / "set", files)
    with pytest.raises(UserError, match=message) as caught:
        FolderSource(root, tmp_path / "index")
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        FolderSource(str(tmp_path / "none"), tmp_path / "index")
    with pytest.raises(UserError, match="must be local"):
        FolderSource("gs://bucket/folder", tmp_path / "index")


def test_images_without_a_text_are_left_out(tmp_path, caplog):
    files = {f"{n}.png": png(n) for n in range(3)} | {"0.txt": "zero", "2.txt": "two"}
    source = FolderSource(fill(tmp_path / "set", files), tmp_path / "index")
    assert [source[index].captions for index in range(2)] == [("zero",), ("two",)]
    assert source.num_skipped == 1
    assert "1 images without a .txt left out, 2 kept" in caplog.text


def test_files_vanish(tmp_path):
    files = {f"{n}.{kind}": png(n) for n in range(2) for kind in ("png", "txt")}
    root = fill(tmp_path / "set", files | {"0.txt": "zero", "1.txt": "one"})
    source = FolderSource(root, tmp_path / "index")
    os.unlink(f"{root}/0.png")
    os.unlink(f"{root}/1.txt")
    for index in range(2):
        with pytest.raises(BadSampleError) as caught:
            source[index]
        assert caught.value.reason == "read"
