import io
import os
import sys
from pathlib import Path

import pytest
from checkpoint.buckets import Bucket
from fsspec.registry import _registry

from clip_jax.checkpoint import BucketPath, any_path, write_atomically
from clip_jax.config import TemporaryError, UserError


def test_paths_read_as_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    assert any_path("runs/one") == tmp_path / "runs" / "one"
    assert any_path("~/one") == Path("/home/user/one")
    assert any_path("file:///data/one") == Path("/data/one")
    path = any_path("gs://bucket/run/")
    assert isinstance(path, BucketPath)
    assert str(path) == f"{path}" == "gs://bucket/run"
    assert (path.name, str(path.parent)) == ("run", "gs://bucket")
    assert str(path / "checkpoints" / "100") == "gs://bucket/run/checkpoints/100"
    assert any_path(path) is path
    assert {path / "a", BucketPath("gs://bucket/run/a")} == {path / "a"}


def test_a_url_is_no_name_of_a_local_file():
    with pytest.raises(TypeError):
        os.fspath(BucketPath("gs://bucket/run"))
    with pytest.raises(TypeError):
        Path(BucketPath("gs://bucket/run"))


def test_objects_are_written_read_listed_and_deleted(bucket):
    folder = bucket.path
    assert not folder.exists()
    assert list(folder.iterdir()) == []
    write_atomically(folder / "b.json", "old")
    write_atomically(folder / "b.json", "new \u00e9")
    (folder / "a" / "c.txt").write_bytes(b"\xff")
    assert (folder / "b.json").read_text() == "new \u00e9"
    assert (folder / "a" / "c.txt").read_text(errors="replace") == "\ufffd"
    assert (folder / "b.json").open().read() == "new \u00e9"
    assert (folder / "a" / "c.txt").open("rb").read() == b"\xff"
    assert [path.name for path in folder.iterdir()] == ["a", "b.json"]
    assert [path.name for path in folder.glob("*.json")] == ["b.json"]
    assert (folder / "a").is_dir()
    assert not (folder / "a").is_file()
    assert (folder / "b.json").is_file()
    assert (folder / "b.json").modified() is not None
    (folder / "b.json").unlink()
    assert not (folder / "b.json").exists()
    (folder / "b.json").unlink(missing_ok=True)
    for ask in (BucketPath.unlink, BucketPath.read_text):
        with pytest.raises(FileNotFoundError):
            ask(folder / "b.json")
    with pytest.raises(io.UnsupportedOperation, match="written whole"):
        (folder / "b.json").open("a")


def test_an_object_is_made_only_where_there_is_none(bucket):
    (bucket.path / "one").write_bytes(b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        (bucket.path / "one").write_bytes(b"second", exclusive=True)
    assert Bucket.objects() == {"one": "first"}


@pytest.mark.parametrize(
    "ask", ["exists", "is_dir", "iterdir", "read_text", "write_text", "unlink"]
)
def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(bucket, ask):
    bucket.config.write_text("{}")
    arguments = ["text"] if ask == "write_text" else []
    with (
        Bucket.failing(ConnectionError("no route\nto host")),
        pytest.raises(UserError, match=r"run.* cannot be \w+: ConnectionError: no route to host;"),
    ):
        list(getattr(bucket.config, ask)(*arguments) or [])
    assert Bucket.objects() == {"config.json": "{}"}


def test_a_bucket_that_is_not_there_cannot_be_written(bucket):
    with (
        Bucket.failing(FileNotFoundError("no such bucket")),
        pytest.raises(
            UserError, match="cannot be written: FileNotFoundError: no such bucket; chec"
        ),
    ):
        bucket.config.write_text("{}")


@pytest.mark.parametrize(
    ("scheme", "package", "remedy"),
    [
        ("gs", "gcsfs", r"pip install 'clip-jax-training\[gcs\]'"),
        ("s3", "s3fs", r"pip install 'clip-jax-training\[s3\]'"),
        ("unheard", "", "is the URL right?"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, scheme, package, remedy):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(UserError, match=rf"^{scheme}://bucket/run cannot be reached: .*{remedy}"):
        any_path(f"{scheme}://bucket/run").exists()


def test_what_is_written_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    """A shared workdir: mkstemp's files are for nobody else."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "config.json", "{}")
        assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("503 Service Unavailable", TemporaryError), ("403 Forbidden", UserError)],
)
def test_what_may_pass_is_told_from_what_may_not(monkeypatch, answer, kind):
    monkeypatch.setattr(Bucket, "down", OSError(answer))
    with pytest.raises(UserError, match=answer) as raised:
        any_path("teststore://run/config.json").read_text()
    assert type(raised.value) is kind
    assert raised.value.exit_code == (75 if kind is TemporaryError else 2)
