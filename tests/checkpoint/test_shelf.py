"""On a disk and in a bucket, with files that stand for Orbax's."""

import json

import pytest
from checkpoint.buckets import Bucket

from clip_jax.checkpoint.checksums import ShardChecksums
from clip_jax.checkpoint.folders import below, file_sizes
from clip_jax.checkpoint.paths import BucketPath
from clip_jax.checkpoint.record import DamagedError, read_record
from clip_jax.checkpoint.shelf import Shelf
from clip_jax.config import UserError

FILES = {
    "_CHECKPOINT_METADATA": '{"custom_metadata": {}}',
    "commit_success.txt": "",
    "state/manifest.ocdbt": "index",
    "state/ocdbt.process_0/d/0123": "data",
    "checksums/process_0.json": "{}",
}


def put(folder, files=FILES) -> None:
    for name, text in files.items():
        file = below(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def shelf(workdir) -> Shelf:
    """With two complete checkpoints."""
    workdir.checkpoints.mkdir(parents=True)
    shelf = Shelf(workdir.checkpoints)
    for step in (3, 20):
        put(shelf.being_saved(step))
        shelf.complete(step, num_processes=1, groups=("params",))
    return shelf


def test_what_is_complete_is_listed(shelf):
    assert shelf.steps() == [3, 20]
    assert shelf.newest_whole() == 20
    record = read_record(shelf.path(20))
    assert (record.step, record.num_processes, record.groups) == (20, 1, ("params",))
    assert record.num_bytes == sum(len(text) for text in FILES.values())
    assert set(file_sizes(shelf.path(20))) == {*FILES, "checksums.json"}


def test_what_is_being_saved_does_not_count_and_goes_when_it_is_left(shelf):
    files = {name: text for name, text in FILES.items() if name != "commit_success.txt"}
    put(shelf.being_saved(30), files)
    assert shelf.steps() == [3, 20]
    shelf.clean()
    assert shelf.numbered() == [3, 20]
    assert file_sizes(shelf.being_saved(30)) == {}


def test_deleting_is_never_half_done(shelf, monkeypatch):
    def killed(path):  # when the first file is gone
        if names := sorted(file_sizes(path)):
            below(path, names[0]).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clip_jax.checkpoint.shelf.remove", killed)
        with pytest.raises(KeyboardInterrupt):
            shelf.delete(20)
    assert shelf.steps() == [3]
    shelf.clean()
    assert shelf.numbered() == [3]
    shelf.delete(3)
    shelf.delete(3)  # gone already
    assert 3 not in shelf.numbered()


def test_damage_is_moved_aside_each_to_a_place_of_its_own(shelf):
    for name in ("20.damaged", "20.damaged-2"):
        assert shelf.set_aside(20).name == name
        assert shelf.steps() == [3]
        put(shelf.being_saved(20))
        shelf.complete(20, num_processes=1, groups=())
    assert shelf.damaged() == ["20.damaged", "20.damaged-2"]
    assert shelf.steps() == [3, 20]
    shelf.clean()
    assert len(shelf.damaged()) == 2
    shelf.delete_damaged()
    assert shelf.damaged() == []


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_a_file_that_is_missing_cut_or_changed_is_named(shelf, name):
    file = below(shelf.path(20), name)
    text = file.read_text()
    for changed, problem in (
        (text[:-1], "bytes"),
        (text[:-1] + chr(ord(text[-1:] or " ") ^ 1), "changed"),
        (None, "is missing"),
    ):
        if changed is None:
            file.unlink()
        else:
            file.write_text(changed)
        if changed != text:
            assert name in str(shelf.quick_problem(20))
            if name != "checksums.json":
                assert problem in str(shelf.quick_problem(20)) or not text
            assert shelf.verify(20)[0].startswith(name)
            assert shelf.newest_whole() == 3
    assert shelf.quick_problem(3) is None


def test_a_newer_format_is_no_damage_but_an_old_program(shelf):
    file = shelf.path(20) / "checksums.json"
    from clip_jax.checkpoint.record import _checksum

    content = json.loads(file.read_text())["content"] | {"format": 2}
    file.write_text(json.dumps({"checksum": _checksum(content), "content": content}))
    with pytest.raises(UserError, match="format 2 of a newer clip-jax, not 1; update it"):
        read_record(shelf.path(20))


def test_a_bucket_is_written_in_place(workdir):
    shelf = Shelf(workdir.checkpoints)
    in_place = isinstance(workdir.checkpoints, BucketPath)
    assert (shelf.being_saved(7) == shelf.path(7)) == in_place


def test_an_array_without_all_its_checksums_is_never_completed(workdir):
    shelf = Shelf(workdir.checkpoints)
    arrays = {
        "x": {
            "shape": [4],
            "dtype": "float32",
            "parts": [{"box": [[0, 3]], "rows": 9, "checksums": [1]}],
        }
    }
    put(shelf.being_saved(7), FILES | {"checksums/process_0.json": json.dumps(arrays)})
    with pytest.raises(AssertionError, match="without its checksums"):
        shelf.complete(7, num_processes=1, groups=())
    assert ShardChecksums({}).arrays == {}


def test_a_bucket_that_does_not_answer_is_no_damage(bucket):
    shelf = Shelf(bucket.checkpoints)
    put(shelf.being_saved(3))
    shelf.complete(3, num_processes=1, groups=())
    with Bucket.failing(OSError("timed out")), pytest.raises(UserError, match="timed out") as error:
        read_record(shelf.path(3))
    assert not isinstance(error.value, DamagedError)
