import threading

import pytest
from checkpoint.buckets import Bucket

from clip_jax.checkpoint import UploadedFolder, uploads
from clip_jax.checkpoint.uploads import Background

HOUR = 3600.0


def test_work_is_done_by_and_by_and_when_asked():
    calls, twice = [], threading.Event()

    def work():
        calls.append(threading.current_thread())
        if len(calls) == 2:
            twice.set()

    background = Background(work, 0.01, what="working")
    assert twice.wait(60)
    background.stop()
    assert threading.current_thread() not in calls
    calls.clear()
    background = Background(work, HOUR, what="working")
    assert background.flush()
    assert background.flush()
    assert background.close()
    assert background.close()
    assert len(calls) == 3


def test_an_error_is_said_once_and_the_work_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(uploads, "_LAST_WAITS", (0.0, 0.0))
    answers = [OSError("one"), OSError("two"), None, KeyError("three"), OSError("four"), None]

    def work():
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    background = Background(work, HOUR, what="working")
    assert [background.flush() for _ in range(3)] == [False, False, True]
    assert background.close()
    assert not answers
    assert caplog.messages == [
        *("working: one; it is tried again", "working: it works again"),
        *("working: 'three'; it is tried again", "working: it works again"),
    ]


def test_a_store_without_an_answer_does_not_hold_up_the_run(monkeypatch):
    monkeypatch.setattr(uploads, "_FLUSH_SECONDS", 0.05)
    answer = threading.Event()
    background = Background(answer.wait, HOUR, what="working")
    assert not background.flush()
    answer.set()
    assert background._thread.is_alive()
    monkeypatch.setattr(uploads, "_FLUSH_SECONDS", 60)
    assert background.close()


def test_a_folder_on_a_disk_is_written_itself(tmp_path):
    folder = UploadedFolder(tmp_path / "tensorboard", HOUR)
    assert folder.path == tmp_path / "tensorboard"
    folder.close()


def test_files_of_a_folder_are_copied_as_they_change(bucket, monkeypatch):
    folder = UploadedFolder(bucket.tensorboard, HOUR)
    (folder.path / "plugins").mkdir()
    (folder.path / "events").write_text("a")
    (folder.path / "plugins" / "trace").write_text("t")
    assert folder._background.flush()
    assert Bucket.objects() == {"events": "a", "trace": "t"}
    assert (bucket.tensorboard / "plugins" / "trace").exists()
    (folder.path / "events").write_text("ab")
    # A large one has just been copied: not again before its time, but in the end.
    monkeypatch.setattr(uploads, "_BYTES_PER_SECOND", 1e-6)
    (folder.path / "plugins" / "trace").write_text("t, longer")
    folder._due.clear()
    assert folder._background.flush()
    (folder.path / "events").write_text("abc")
    assert folder._background.flush()
    assert Bucket.objects() == {"events": "ab", "trace": "t, longer"}
    folder.close()
    assert Bucket.objects() == {"events": "abc", "trace": "t, longer"}
    assert not folder.path.exists()


def test_what_could_not_be_copied_stays_on_the_disk(bucket, monkeypatch, caplog):
    monkeypatch.setattr(uploads, "_LAST_WAITS", ())
    folder = UploadedFolder(bucket.tensorboard, HOUR)
    (folder.path / "events").write_text("a")
    with Bucket.failing(ConnectionError("reset")):
        folder.close()
    assert (folder.path / "events").read_text() == "a"
    assert caplog.messages[1].endswith(f"is not complete; the rest of it is in {folder.path}")


@pytest.fixture(autouse=True)
def temporary_folders(tmp_path, monkeypatch):
    """Below pytest's own folder, which it removes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
