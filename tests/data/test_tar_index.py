import os
import time

import numpy as np
import pytest
from data.stores import Bucket, web_server
from data.tars import pairs, write_tar

from clip_jax.config.errors import UserError
from clip_jax.data.sources import tar_index
from clip_jax.data.sources.tar_index import build_indexes, index_tars
from clip_jax.data.sources.tar_scan import NUM_FIELDS, scan


@pytest.fixture
def no_scan(monkeypatch):
    def forbid():
        monkeypatch.setattr(tar_index, "scan", lambda *_: pytest.fail("scanned again"))

    return forbid


@pytest.fixture
def tars(tmp_path):
    return [str(write_tar(tmp_path / f"{i}.tar", pairs(0, 2 + i))) for i in range(3)]


@pytest.fixture
def bucket(tars):
    Bucket.empty()
    urls = []
    for tar in tars:
        with open(tar, "rb") as file:
            Bucket.objects[f"b/{os.path.basename(tar)}"] = file.read()
        urls.append(f"bucket://b/{os.path.basename(tar)}")
    return urls


def rows_of(index):
    return np.load(index.rows_file, mmap_mode="r").reshape(-1, NUM_FIELDS)


def test_joined_rows_are_those_of_the_tars(tars, tmp_path):
    index = build_indexes(tars, tmp_path / "index")
    assert (rows_of(index) == np.concatenate([scan(tar).rows for tar in tars])).all()
    assert index.counts.tolist() == [2, 3, 4]
    assert index.num_scanned == 3
    assert index.rows_file.stat().st_size <= 9 * 40 + 128


def test_index_is_reused(tars, tmp_path, no_scan):
    build_indexes(tars, tmp_path / "index")
    no_scan()
    index = build_indexes(tars, tmp_path / "index")
    assert (index.counts.tolist(), index.num_scanned) == ([2, 3, 4], 0)
    # A tar's own index serves another list of tars too.
    assert build_indexes([tars[1], tars[1]], tmp_path / "index").counts.tolist() == [3, 3]


def test_index_of_a_changed_tar_is_built_again(tars, tmp_path):
    old = build_indexes(tars, tmp_path / "index")
    size = os.path.getsize(tars[0])
    time.sleep(0.01)
    write_tar(tmp_path / "0.tar", pairs(10, 2))
    assert os.path.getsize(tars[0]) == size  # only the modification time tells
    os.utime(tars[0])
    new = build_indexes(tars, tmp_path / "index")
    assert new.num_scanned == 1
    assert new.rows_file != old.rows_file  # a run that has the old one open goes on with it
    assert old.rows_file.exists()
    assert rows_of(new)[0, 7] != rows_of(old)[0, 7]


def test_no_temporary_files_are_left(tmp_path):
    tars = [str(write_tar(tmp_path / f"{i}.tar", pairs(0, 2))) for i in range(12)]
    build_indexes(tars, tmp_path / "index")
    names = [file.name for file in (tmp_path / "index").iterdir()]
    assert len(names) == 12 + 2  # one each, and the rows and heads of the list
    assert all(name.endswith(".npy") and not name.startswith(".") for name in names)


def test_a_build_that_was_stopped_goes_on(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "_LOCAL_THREADS", 1)

    def stop(done, total):
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_indexes(tars, tmp_path / "index", progress=stop)
    calls = []
    index = build_indexes(tars, tmp_path / "index", progress=lambda *call: calls.append(call))
    assert index.num_scanned == len(calls) <= 1
    assert index.counts.tolist() == [2, 3, 4]


def test_processes_scan_as_threads_do(tmp_path, monkeypatch):
    tars = [str(write_tar(tmp_path / f"{i}.tar", pairs(i, 1))) for i in range(6)]
    monkeypatch.setattr(tar_index, "_TARS_PER_PROCESS", 2)
    monkeypatch.setattr(tar_index, "ThreadPoolExecutor", lambda *_: pytest.fail("threads"))
    processes = build_indexes(tars, tmp_path / "a", num_processes=16)
    monkeypatch.undo()
    assert (rows_of(processes) == rows_of(build_indexes(tars, tmp_path / "b"))).all()


def test_damaged_tars_are_the_same_at_the_second_start(tars, tmp_path, no_scan):
    whole = scan(tars[2]).rows
    with open(tars[2], "r+b") as file:
        file.truncate(int(whole[2, 0]) * 512 + 3)
    first = build_indexes(tars, tmp_path / "index")
    assert first.counts.tolist() == [2, 3, 2]
    ((path, reason),) = first.damaged
    assert path == tars[2]
    assert reason.endswith("after 2 whole samples")
    no_scan()
    second = build_indexes(tars, tmp_path / "index")
    assert second.damaged == first.damaged
    assert second.rows_file == first.rows_file


@pytest.mark.parametrize("remote", [False, True])
def test_a_tar_that_has_gone_keeps_its_rows(tars, bucket, tmp_path, remote):
    paths = bucket if remote else tars
    first = build_indexes(paths, tmp_path / "index")
    if remote:
        del Bucket.objects["b/1.tar"]
    else:
        os.remove(tars[1])
    second = build_indexes(paths, tmp_path / "index")
    assert second.gone == [paths[1]]
    assert second.rows_file == first.rows_file
    # Another list of tars too, which is joined from the tars' own indexes.
    assert build_indexes(paths[:2], tmp_path / "index").counts.tolist() == [2, 3]
    with pytest.raises(UserError, match=r"1 of 3 tar files do not exist, the first: .*1\.tar"):
        build_indexes(paths, tmp_path / "other")


def test_indexes_beside_the_tars(tars, tmp_path, no_scan):
    first = build_indexes(tars, tmp_path / "a", beside=True)
    assert all(os.path.exists(f"{tar}.index.npy") for tar in tars)
    written = os.stat(f"{tars[0]}.index.npy").st_mtime_ns
    no_scan()
    other = build_indexes(tars, tmp_path / "b", beside=True)
    assert other.num_scanned == 0
    assert (rows_of(other) == rows_of(first)).all()
    assert os.stat(f"{tars[0]}.index.npy").st_mtime_ns == written


def test_an_index_beside_a_changed_tar_is_not_taken(tars, tmp_path):
    build_indexes(tars, tmp_path / "a", beside=True)
    os.utime(tars[0], (1, 1))
    (tmp_path / "1.tar.index.npy").write_bytes(b"PK\x03\x04 garbage")
    assert build_indexes(tars, tmp_path / "b").num_scanned == 2


def test_indexes_in_a_bucket(tars, bucket, tmp_path, no_scan):
    index = build_indexes(bucket, tmp_path / "a", beside=True)
    assert (rows_of(index) == rows_of(build_indexes(tars, tmp_path / "local"))).all()
    assert len(Bucket.objects) == 6
    assert build_indexes(bucket, tmp_path / "a").num_scanned == 0
    no_scan()
    assert build_indexes(bucket, tmp_path / "b").num_scanned == 0


def test_local_indexes_that_were_uploaded_with_their_tars(tars, bucket, tmp_path, no_scan):
    build_indexes(tars, tmp_path / "a", beside=True)
    for tar in tars:
        with open(f"{tar}.index.npy", "rb") as file:
            Bucket.objects[f"b/{os.path.basename(tar)}.index.npy"] = file.read()
    no_scan()
    assert build_indexes(bucket, tmp_path / "b").counts.tolist() == [2, 3, 4]


def test_an_object_that_changed_is_scanned_again(bucket, tmp_path):
    build_indexes(bucket, tmp_path / "a")
    content = bytearray(Bucket.objects["b/0.tar"])
    content[600] ^= 1
    Bucket.objects["b/0.tar"] = bytes(content)  # of the same size
    assert build_indexes(bucket, tmp_path / "a").num_scanned == 1


def test_a_dead_store_is_a_user_error(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    Bucket.down = ConnectionRefusedError("down")
    with pytest.raises(
        UserError, match=r"bucket://b/0.tar cannot be read: ConnectionRefusedError: down"
    ):
        build_indexes(bucket, tmp_path / "a")


def test_a_place_that_cannot_be_written(tars, tmp_path):
    pytest.importorskip("aiohttp")
    with open(tars[0], "rb") as file, web_server({"/0.tar": file.read()}) as root:
        assert build_indexes([f"{root}/0.tar"], tmp_path / "a").counts.tolist() == [2]
        with pytest.raises(UserError, match=r"0.tar.index.npy cannot be written: .* cache folder"):
            build_indexes([f"{root}/0.tar"], tmp_path / "a", beside=True)


def test_summary(tars, tmp_path):
    write_tar(tmp_path / "3.tar", [*pairs(0, 1), ("z.txt", b"no image")])
    (tmp_path / "4.tar").write_bytes(b"no tar" * 100)
    summary = index_tars(str(tmp_path / "{0..4}.tar"), tmp_path / "cache", beside=True)
    assert summary[:4] == (5, 5, 10, 1)
    ((path, reason),) = summary.damaged
    assert path == str(tmp_path / "4.tar")
    assert "not a tar header" in reason
    assert index_tars(str(tmp_path / "{0..4}.tar"), tmp_path / "cache").num_scanned == 0
    # A source reads the same files.
    assert build_indexes(tars, tmp_path / "cache" / "index").num_scanned == 0
