import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.arrow_files import PartCache, open_parts
from clip_jax.data.sources.files import Files


def table(n=10):
    return pa.table(
        {
            "image": [b"x" * 50 + b"%d" % i for i in range(n)],
            "text": [f"größe {i}" for i in range(n)],
            "n": list(range(n)),
        }
    )


def write(path, kind, data):
    if kind == "parquet":
        pq.write_table(data, path, row_group_size=4)
    elif kind == "stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data, max_chunksize=4)
    else:
        compression = "lz4" if kind == "lz4" else "uncompressed"
        pa.feather.write_feather(data, str(path), compression=compression, chunksize=4)
    return str(path)


KINDS = ["parquet", "stream", "feather", "lz4"]


@pytest.mark.parametrize("kind", KINDS)
def test_parts(tmp_path, kind):
    path = write(tmp_path / "a", kind, table())
    file = open_parts(Files([path]), 0, path)
    assert file.schema.names == ["image", "text", "n"]
    assert [num_rows for num_rows, _ in file.sizes()] == [4, 4, 2]
    assert all(num_bytes > 0 for _, num_bytes in file.sizes())
    assert pa.concat_tables(file.read(part) for part in range(3)).equals(table())
    texts = open_parts(Files([path]), 0, path, ["text"])
    assert [num_rows for num_rows, _ in texts.sizes()] == [4, 4, 2]
    assert texts.read(2).select(["text"]).equals(table().select(["text"])[8:])
    assert ("image" in texts.read(2).column_names) == (kind in ("stream", "feather"))  # mapped


@pytest.mark.parametrize("kind", ["stream", "feather"])
def test_uncompressed_arrow_files_are_not_copied(tmp_path, kind):
    data = pa.table({"image": [bytes(100_000)] * 8, "text": ["x"] * 8})
    path = write(tmp_path / "a", kind, data)
    file = open_parts(Files([path]), 0, path, ["image", "text"])
    before = pa.total_allocated_bytes()
    parts = [file.read(part) for part in range(2)]
    assert pa.total_allocated_bytes() - before < 50_000
    assert pa.concat_tables(parts).equals(data)


def test_compressed_streams(tmp_path):
    path = str(tmp_path / "a")
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(path, table(100).schema, options=options) as writer:
        writer.write_table(table(100))
    with pytest.raises(ValueError, match="a compressed Arrow stream"):
        open_parts(Files([path]), 0, path)


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_remote(tmp_path, kind):
    content = Path(write(tmp_path / "x", kind, table())).read_bytes()
    fsspec.filesystem("memory").pipe(f"/{kind}", content)
    file = open_parts(Files([f"memory://{kind}"]), 0, f"memory://{kind}")
    assert pa.concat_tables(file.read(part) for part in range(3)).equals(table())


def test_remote_file_vanishes(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/gone", Path(write(tmp_path / "x", "parquet", table())).read_bytes())
    file = open_parts(Files(["memory://gone"]), 0, "memory://gone")
    store.rm("/gone")
    with pytest.raises(BadSampleError) as caught:
        file.read(0)
    assert caught.value.reason == "read"


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_told(tmp_path, kind, data):
    content = bytearray(Path(write(tmp_path / "whole", kind, table())).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = open_parts(Files([str(path)]), 0, str(path), ["image", "text"])
        for part in range(len(file.sizes())):
            for column in file.read(part).columns:
                column.to_pylist()
    except (OSError, ValueError, LookupError, NotImplementedError):
        pass


@pytest.mark.parametrize("kind", ["stream", "feather"])
def test_values_that_lie_outside_of_the_file(tmp_path, kind):
    data = pa.table({"text": ["x" * 1000, "y" * 1001, "z" * 1002]})
    path = write(tmp_path / "a", kind, data)
    content = (tmp_path / "a").read_bytes()
    offsets = np.array([0, 1000, 2001, 3003], "<i4")
    assert content.count(offsets.tobytes()) == 1
    offsets[2:] = 2**30  # pyarrow would follow them, and the process end
    content = content.replace(np.array([0, 1000, 2001, 3003], "<i4").tobytes(), offsets.tobytes())
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="offset"):
        open_parts(Files([path]), 0, path).read(0)


def test_cache():
    reads = []
    big = pa.table({"x": pa.array([b"x" * 1000])})

    def reader(key):
        def read():
            reads.append(key)
            return big

        return read

    cache = PartCache(int(2.5 * big.nbytes))
    for key in [1, 2, 1, 3, 1, 2]:
        assert cache.get((key, True), reader(key)) is big
    assert reads == [1, 2, 3, 2]  # 3 pushed out 2, which was used longest ago
    alone = PartCache(10)  # less than a part
    for _ in range(2):
        alone.get((7, True), reader(7))
    assert reads[4:] == [7]

    def fails():
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011
            cache.get((9, True), fails)
    assert len(cache._entries) == 2
    assert cache._num_bytes == 2 * big.nbytes


def test_threads_wait_for_one_read():
    started, go, reads = threading.Event(), threading.Event(), []

    def read():
        reads.append(1)
        started.set()
        go.wait(5)
        return table()

    cache = PartCache(10**6)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.get((0, True), read))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    started.wait(5)
    go.set()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len(found) == 4
