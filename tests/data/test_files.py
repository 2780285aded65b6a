import os
import pickle
import threading
import time

import pytest
from data.stores import Bucket, web_server

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import files as files_module
from clip_jax.data.sources.files import Files, open_sequential, remote_filesystem

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["local", "bucket"])
def paths(request, tmp_path):
    Bucket.empty()
    if request.param == "bucket":
        Bucket.objects |= {f"b/{number}": CONTENT[number:] for number in range(5)}
        return [f"bucket://b/{number}" for number in range(5)]
    for number in range(5):
        (tmp_path / str(number)).write_bytes(CONTENT[number:])
    return [str(tmp_path / str(number)) for number in range(5)]


@pytest.fixture
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr(files_module.time, "sleep", waits.append)
    return waits


def test_byte_ranges(paths):
    files = Files(paths)
    assert files.read(2, 10, 20) == CONTENT[12:32]
    assert files.read(0, len(CONTENT) - 3, 20) == CONTENT[-3:]  # short at the end alone
    assert files.read(0, 5, 0) == b""
    assert [files.size(number) for number in range(5)] == [len(CONTENT) - n for n in range(5)]
    assert pickle.loads(pickle.dumps(files)).read(1, 0, 4) == CONTENT[1:5]


def test_versions_tell_a_changed_file(paths):
    files = Files(paths)
    before = [files.info(number) for number in range(5)]
    assert before == [files.info(number) for number in range(5)]
    if paths[0].startswith("bucket"):
        Bucket.objects["b/3"] = bytes(len(CONTENT) - 3)
    else:
        os.utime(paths[3], (1, 1))
    after = [files.info(number) for number in range(5)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True] * 3 + [
        False,
        True,
    ]


def test_a_missing_file_is_not_tried_again(paths, no_waiting):
    files = Files([*paths, paths[0] + "-gone"])
    with pytest.raises(BadSampleError, match="0-gone: FileNotFoundError") as caught:
        files.read(5, 0, 1)
    assert caught.value.reason == "read"
    with pytest.raises(BadSampleError):
        files.size(5)
    assert not no_waiting
    assert files.read(0, 0, 1) == CONTENT[:1]


@pytest.mark.parametrize("retries", [0, 3])
def test_errors_that_pass_are_tried_again(no_waiting, retries):
    Bucket.empty()
    Bucket.objects["b/a"] = CONTENT
    files = Files(["bucket://b/a"], retries)
    Bucket.errors += [ConnectionResetError("peer"), TimeoutError("late"), OSError(5, "I/O error")]
    if retries:
        assert files.read(0, 1, 3) == CONTENT[1:4]
        assert no_waiting == pytest.approx([0.1, 0.4, 1.6])
    else:
        with pytest.raises(BadSampleError, match="ConnectionResetError: peer"):
            files.read(0, 1, 3)


@pytest.mark.parametrize("status", [400, 403, 408, 429, 500, 503])
def test_client_errors_stay(no_waiting, status):
    class StoreError(Exception):  # as gcsfs and aiohttp have them: no OSError
        code = status

    Bucket.empty()
    Bucket.objects["b/a"] = CONTENT
    Bucket.errors += [StoreError("no")]
    files = Files(["bucket://b/a"])
    if status in (400, 403):
        with pytest.raises(BadSampleError, match=r"StoreError: no$"):
            files.read(0, 1, 3)
    else:
        assert files.read(0, 1, 3) == CONTENT[1:4]


def test_a_dead_store_shows_in_seconds(no_waiting):
    Bucket.empty()
    Bucket.objects |= {"b/0": CONTENT, "b/1": CONTENT}
    Bucket.down = ConnectionRefusedError("down")
    files = Files(["bucket://b/0", "bucket://b/1"])
    for number in range(100):
        with pytest.raises(BadSampleError, match="down"):
            files.read(number % 2, 0, 1)
    assert sum(no_waiting) == pytest.approx(3 * 2.1)
    Bucket.down = None
    assert files.read(0, 0, 1) == CONTENT[:1]
    Bucket.errors += [TimeoutError()] * 3  # alive again: retries are back
    assert files.read(1, 0, 1) == CONTENT[:1]


def test_each_store_is_dead_by_itself(no_waiting, tmp_path):
    """Three dead hosts do not take the retries from one that is alive, nor the local disk its."""
    Bucket.empty()
    Bucket.objects["alive/a"] = CONTENT
    (tmp_path / "a").write_bytes(CONTENT)
    names = [f"bucket://dead{number}/a" for number in range(3)] + ["bucket://alive/a"]
    files = Files([*names, str(tmp_path / "a")])
    Bucket.down = ConnectionRefusedError("down")
    for number in (0, 1, 2, 0, 1, 2, 0, 1, 2):
        with pytest.raises(BadSampleError, match="down"):
            files.read(number, 0, 1)
    assert len(no_waiting) == 9 * 3
    with pytest.raises(BadSampleError, match=r"down$"):  # its fourth read has one attempt
        files.read(0, 0, 1)
    Bucket.down = None
    Bucket.errors += [TimeoutError()] * 3
    assert files.read(3, 0, 1) == files.read(4, 0, 1) == CONTENT[:1]
    Bucket.errors += [TimeoutError()]
    with pytest.raises(BadSampleError, match="TimeoutError"):  # dead still: others were read
        files.read(0, 0, 1)


def test_few_stores_are_remembered(no_waiting, monkeypatch):
    monkeypatch.setattr(files_module, "_MOST_FILESYSTEMS", 3)
    monkeypatch.setattr(files_module, "_MOST_FAILING", 4)
    made = []
    make = files_module.remote_filesystem
    monkeypatch.setattr(
        files_module, "remote_filesystem", lambda url: made.append(url) or make(url)
    )
    Bucket.empty()
    Bucket.objects |= {f"{number}/a": CONTENT for number in range(10)}
    files = Files([f"bucket://{number}/a" for number in range(10)], retries=0)
    for number in (0, 0, 1, 2, 0, 3, 0, 1):  # 1 is the one used longest ago when 3 comes
        assert files.read(number, 0, 1) == CONTENT[:1]
    assert made == [f"bucket://{number}/a" for number in (0, 1, 2, 3, 1)]
    Bucket.down = ConnectionRefusedError("down")
    for number in range(10):
        with pytest.raises(BadSampleError, match="down"):
            files.read(number, 0, 1)
    assert len(files._filesystems._values) == 3
    assert len(files._failed) == 4
    assert pickle.loads(pickle.dumps(files))._retries == 0


def test_local_io_errors_open_the_file_again(tmp_path, no_waiting, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    files = Files([str(path)])
    assert files.read(0, 0, 2) == CONTENT[:2]
    pread, failures = os.pread, [OSError(116, "stale"), OSError(5, "I/O error")]

    def failing(*args):
        if failures:
            raise failures.pop()
        return pread(*args)

    monkeypatch.setattr(os, "pread", failing)
    opened = []
    monkeypatch.setattr(os, "open", lambda *args, f=os.open: opened.append(args) or f(*args))
    assert files.read(0, 0, 2) == CONTENT[:2]
    assert len(opened) == 2


def test_short_answers_are_completed(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, start: pread(fd, min(count, 7), start))
    assert Files([str(path)]).read(0, 3, 100) == CONTENT[3:103]


def test_few_local_files_stay_open_and_threads_share_them(tmp_path):
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    files = Files([str(tmp_path / str(number)) for number in range(6)], max_open=2)
    copies = [files]
    before = len(os.listdir("/proc/self/fd"))
    wrong = []

    def read(offset):
        for step in range(400):
            number = (offset + step * 5) % 6
            if copies[0].read(number, step, 3) != bytes([number]) * 3:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) - before == 2
    copies.clear()
    del files
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("offset", [0, 1, 1000, len(CONTENT) - 1, len(CONTENT)])
def test_sequential_reading(paths, monkeypatch, no_waiting, offset):
    monkeypatch.setattr(files_module, "_BLOCK", 1000)
    if paths[0].startswith("bucket"):
        Bucket.errors += [None, TimeoutError(), None, None, ConnectionResetError()]
    with open_sequential(paths[0], offset) as file:
        assert file.size == len(CONTENT)
        parts = [file.read(300)]
        while parts[-1]:
            assert file.tell() == offset + sum(map(len, parts))
            parts.append(file.read(300))
    assert b"".join(parts) == CONTENT[offset:]
    assert all(len(part) == 300 for part in parts[:-2])


def test_a_large_sequential_read_spans_blocks(paths, monkeypatch):
    monkeypatch.setattr(files_module, "_BLOCK", 1000)
    with open_sequential(paths[0], 5) as file:
        assert file.read(3456) == CONTENT[5:3461]


def test_sequential_reading_goes_on_after_a_failed_read(no_waiting, monkeypatch):
    monkeypatch.setattr(files_module, "_BLOCK", 1000)
    Bucket.empty()
    Bucket.objects["b/a"] = CONTENT
    with open_sequential("bucket://b/a", retries=0) as file:
        assert file.read(1000) == CONTENT[:1000]
        Bucket.down = TimeoutError("down")
        with pytest.raises(BadSampleError, match="down"):
            file.read(3000)  # one block of it may be there
        at = file.tell()
        Bucket.down = None
        assert file.read(1500) == CONTENT[at : at + 1500]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/a.tar", r"pip install 'clip-jax-training\[gcs\]'"),
        ("s3://bucket/a.tar", r"pip install 'clip-jax-training\[s3\]'"),
        ("nosuch://bucket/a.tar", "Protocol not known: nosuch; is the URL right"),
    ],
)
def test_missing_packages_are_named(url, message):
    package = {"gs": "gcsfs", "s3": "s3fs"}.get(url.partition(":")[0])
    if package:
        try:
            __import__(package)
        except ImportError:
            pass
        else:
            pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=message) as caught:
        Files([url]).read(0, 0, 1)
    assert "\n" not in str(caught.value)


def test_web_servers():
    pytest.importorskip("aiohttp")
    with web_server({"/a": CONTENT}) as root:
        files = Files([f"{root}/a", f"{root}/b"])
        assert files.read(0, 10, 20) == CONTENT[10:30]
        assert files.read(0, len(CONTENT) - 5, 20) == CONTENT[-5:]
        assert files.size(0) == len(CONTENT)
        with pytest.raises(BadSampleError, match="FileNotFoundError") as caught:
            files.read(1, 0, 3)
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        with open_sequential(f"{root}/a", 7) as file:
            assert file.read(10**6) == CONTENT[7:]
    with (
        web_server({"/a": CONTENT}, ranges=False) as root,
        pytest.raises(BadSampleError, match="ignores byte ranges"),
    ):
        Files([f"{root}/a"]).read(0, 10, 20)


# fsspec looks a web address up by HEAD and then GET, and calls every failure "not found".
@pytest.mark.parametrize("failure", [0, 503])
def test_web_failures_to_look_up_that_pass(no_waiting, failure):
    pytest.importorskip("aiohttp")
    # A client tries a dropped HEAD or GET again by itself, once.
    with web_server({"/a": CONTENT}, failures=[failure] * 8) as root:
        assert Files([f"{root}/a"], retries=5).size(0) == len(CONTENT)
    assert sum(map(bool, no_waiting)) >= 2


@pytest.mark.parametrize(("status", "gone"), [(404, True), (410, True), (403, False), (500, False)])
def test_which_web_failures_mean_gone(no_waiting, status, gone):
    pytest.importorskip("aiohttp")
    with (
        web_server({"/a": CONTENT}, failures=[status] * 99) as root,
        pytest.raises(BadSampleError) as caught,
    ):
        Files([f"{root}/a"], retries=1).size(0)
    assert isinstance(caught.value.__cause__, FileNotFoundError) == gone
    assert sum(map(bool, no_waiting)) == (status == 500)  # the server sleeps for 0 seconds


def test_a_dead_file_does_not_stall_its_store(no_waiting):
    """Its reads have one attempt after three that failed, though others succeed in between."""
    Bucket.empty()
    Bucket.objects |= {"b/0": CONTENT, "b/1": CONTENT}
    files = Files(["bucket://b/0", "bucket://b/1"])
    for _ in range(10):
        Bucket.errors[:] = [OSError("503")] * 4
        with pytest.raises(BadSampleError, match="503"):
            files.read(0, 0, 1)
        Bucket.errors.clear()
        assert files.read(1, 0, 1) == CONTENT[:1]
    assert len(no_waiting) == 3 * 3
    assert files.read(0, 0, 1) == CONTENT[:1]
    Bucket.errors[:] = [TimeoutError()] * 3  # alive again: retries are back
    assert files.read(0, 0, 1) == CONTENT[:1]


def test_a_stream_from_a_server_without_ranges(monkeypatch):
    pytest.importorskip("aiohttp")
    with web_server({"/a": CONTENT}, ranges=False) as root:
        with (
            open_sequential(f"{root}/a", 5) as file,
            pytest.raises(UserError, match="ignores byte ranges, which both"),
        ):
            file.read(10)
        monkeypatch.setattr(files_module, "_BLOCK", 1000)
        with (
            open_sequential(f"{root}/a") as file,
            pytest.raises(UserError, match="ignores byte ranges, which both"),
        ):
            file.read(10)


def test_a_server_that_does_not_answer_costs_its_time_limit(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(files_module, "_TIMEOUT", 0.1)
    with web_server({"/a": CONTENT}, delay=1.0) as root:
        started = time.monotonic()
        with pytest.raises(BadSampleError, match="Timeout"):
            Files([f"{root}/a"], retries=1).read(0, 10, 20)
        assert time.monotonic() - started < 0.9


def test_memory_store():
    remote_filesystem("memory://x").pipe_file("memory://files-test/a", CONTENT)
    assert Files(["memory://files-test/a"]).read(0, 100, 9) == CONTENT[100:109]
    with open_sequential("memory://files-test/a") as file:
        assert file.read(len(CONTENT)) == CONTENT
