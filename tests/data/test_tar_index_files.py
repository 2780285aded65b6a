import io

import numpy as np
import pytest
from data.tars import pairs, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.sources.files import FileInfo
from clip_jax.data.sources.tar_index_files import TarIndex, fits, load, of_scan, save, with_version
from clip_jax.data.sources.tar_scan import scan
from clip_jax.data.sources.tar_versions import UNKNOWN

LOCAL = FileInfo(10240, "mtime_ns:5")
REMOTE = FileInfo(10240, "ETag:abc")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> TarIndex:
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", pairs(0, 3))
    return of_scan(scan(str(path)), LOCAL)


def test_written_and_read(index, tmp_path):
    save(tmp_path / "a.npy", index)
    read = load(tmp_path / "a.npy")
    assert read is not None
    assert read.head == index.head
    assert (read.rows == index.rows).all()
    assert np.load(tmp_path / "a.npy")["num_samples"].tolist() == [3]
    assert load(tmp_path / "b.npy") is None


@pytest.mark.parametrize(
    ("version", "here", "beside"),
    [
        (LOCAL, True, True),
        (None, True, True),  # gone
        (UNKNOWN, True, True),  # not looked up
        (LOCAL._replace(num_bytes=1), False, False),
        (LOCAL._replace(tag="mtime_ns:6"), False, False),
        (REMOTE, False, True),  # uploaded: the size tells
        (REMOTE._replace(num_bytes=1), False, False),
        (FileInfo(10240, ""), False, True),
    ],
)
def test_fits(index, version, here, beside):
    assert fits(index.head, version) == here
    assert fits(index.head, version, beside=True) == beside


def test_version_of_the_place(index):
    assert fits(with_version(index, REMOTE).head, REMOTE)
    assert fits(index.head, LOCAL)
    long = REMOTE._replace(tag="ETag:" + "ü" * 200)
    assert fits(with_version(index, long).head, long)


def test_another_version_of_the_format_does_not_fit(index):
    head = index.head.copy()
    head["version"] += 1
    assert not fits(head, LOCAL)
    assert not fits(head, None)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_index_files_are_made_anew(index, tmp_path_factory, data):
    stream = io.BytesIO()
    np.save(stream, np.array([index.head]))
    np.save(stream, index.rows)
    content = bytearray(stream.getvalue()[: data.draw(st.integers(0, len(stream.getvalue())))])
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.npy"
    file.write_bytes(content)
    read = load(file)
    assert read is None or read.rows.shape == (read.head["num_samples"], 10)
