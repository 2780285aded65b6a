import pickle

import numpy as np
import pytest

from clip_jax.data.sources.stored_arrays import StoredArray, replacing, write_header


def test_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "file"

    def write(content, fails):
        with replacing(file) as stream:
            stream.write(content)
            if fails:
                raise RuntimeError("stopped")

    write(b"old", False)
    with pytest.raises(RuntimeError):
        write(b"new", True)
    assert [path.read_bytes() for path in file.parent.iterdir()] == [b"old"]


def test_arrays(tmp_path):
    (tmp_path / "a").write_bytes(np.arange(5, dtype="<i8").tobytes())
    array = StoredArray(tmp_path / "a", "<i8")
    assert array().tolist() == [0, 1, 2, 3, 4]
    assert len(pickle.dumps(array)) < 500
    assert pickle.loads(pickle.dumps(array))().tolist() == array().tolist()
    (tmp_path / "b").write_bytes(b"")
    assert StoredArray(tmp_path / "b", [("x", "<i4")])().dtype.names == ("x",)


def test_header_is_as_long_for_any_length(tmp_path):
    file = tmp_path / "a.npy"
    dtype = np.dtype([("start", "<i8"), ("size", "<u4")])
    rows = np.array([(1, 2), (3, 4)], dtype)
    with file.open("wb") as stream:
        write_header(stream, dtype, 0)
        stream.write(rows.tobytes())
        stream.seek(0)
        write_header(stream, dtype, 2)
    assert np.load(file, mmap_mode="r").tolist() == rows.tolist()
