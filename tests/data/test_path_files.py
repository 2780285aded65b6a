import os
import pickle
import threading

import fsspec
import pytest

from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import path_files
from clip_jax.data.sources.path_files import PathFiles, folder_of, resolve


def test_local_and_remote(tmp_path):
    (tmp_path / "größe.jpg").write_bytes(b"local")
    fsspec.filesystem("memory").pipe("/folder/a.jpg", b"remote")
    files = pickle.loads(pickle.dumps(PathFiles()))
    assert files.read(str(tmp_path / "größe.jpg")) == b"local"
    assert files.read("memory://folder/a.jpg") == b"remote"


def test_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(b"x" * 9001)
    (tmp_path / "empty").write_bytes(b"")
    monkeypatch.setattr(path_files, "_MAX_BYTES", 9000)
    files = PathFiles()
    assert files.read(str(tmp_path / "empty")) == b""
    for name, reason in (("large", "image"), ("none", "read"), ("", "read"), ("a\0b", "read")):
        with pytest.raises(BadSampleError) as caught:
            files.read(str(tmp_path / name))
        assert caught.value.reason == reason


def test_threads_and_descriptors(tmp_path):
    for number in range(20):
        (tmp_path / str(number)).write_bytes(str(number).encode())
    files = PathFiles()
    before = len(os.listdir("/proc/self/fd"))
    wrong = []

    def read(first):
        for step in range(300):
            number = (first + 7 * step) % 20
            if files.read(str(tmp_path / str(number))) != str(number).encode():
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(files._paths) == 0  # a path for each read would fill the memory
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(folder_of("table.csv"), "a/b.jpg") == str(tmp_path / "a/b.jpg")
    assert resolve(folder_of("/x/table.csv"), "/y/b.jpg") == "/y/b.jpg"
    assert resolve(folder_of("gs://bucket/x/t.csv"), "b.jpg") == "gs://bucket/x/b.jpg"
    assert resolve("/x", "https://host/b.jpg") == "https://host/b.jpg"
