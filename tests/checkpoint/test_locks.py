import errno
import json
import os
import subprocess

import pytest
from checkpoint.buckets import Bucket, lock_as_elsewhere

from clip_jax.checkpoint import Workdir, locks
from clip_jax.checkpoint.locks import BucketLock
from clip_jax.config import UserError


def _stop(lock):
    """What `kill -9` does to the owner of a lock: nobody writes it again."""
    lock._background.stop()


def _no_wait(_):
    raise AssertionError("nothing was to wait for")


def test_one_process_at_a_time(workdir):
    with workdir.lock() as lock:
        with pytest.raises(UserError, match=r"another process .*--workdir$"):
            workdir.lock()
        lock.check()
    workdir.lock().close()


def test_a_lock_leaves_nothing_in_the_bucket(bucket):
    lock = BucketLock(bucket.path, wait=_no_wait)
    assert list(Bucket.objects()) == ["000001.json"]
    lock.close()
    lock.close()
    assert Bucket.objects() == {}


def test_a_process_of_this_machine_is_known_to_be_alive_or_dead(bucket, caplog):
    with subprocess.Popen(["sleep", "600"]) as other:
        owner = locks._this_process() | {"pid": other.pid, "started": locks._started(other.pid)}
        (bucket.path / "lock" / "000004.json").write_text(json.dumps(owner))
        with pytest.raises(UserError, match=rf"another process \(process {other.pid} on .* trains"):
            BucketLock(bucket.path, wait=_no_wait)
        other.kill()
    lock = BucketLock(bucket.path, wait=_no_wait)
    assert list(Bucket.objects()) == ["000005.json"]
    assert f"taking over from process {other.pid} on" in caplog.text
    lock.close()


def test_another_process_of_the_same_number_is_not_the_owner(bucket):
    # As in a container that was started again: each is process 1.
    owner = locks._this_process() | {"started": "0", "token": "x"}
    (bucket.path / "lock" / "000001.json").write_text(json.dumps(owner))
    lock = BucketLock(bucket.path, wait=_no_wait)
    assert list(Bucket.objects()) == ["000002.json"]
    lock.close()


def test_an_old_lock_of_another_machine_is_taken_over_at_once(bucket, monkeypatch, caplog):
    killed = lock_as_elsewhere(bucket.path, monkeypatch)
    _stop(killed)
    Bucket.age(61)
    lock = BucketLock(bucket.path, wait=_no_wait)
    assert f"taking over from process {os.getpid()} on" in caplog.messages[0]
    assert list(Bucket.objects()) == ["000002.json"]
    killed.refresh()  # it was not dead after all
    with pytest.raises(
        UserError, match=r"another process .* has taken over teststore://bucket/run"
    ):
        killed.check()
    killed.close()
    lock.refresh()
    lock.check()
    assert list(Bucket.objects()) == ["000002.json"]
    lock.close()
    assert Bucket.objects() == {}


def test_a_young_lock_of_another_machine_is_watched_until_it_is_old(bucket, monkeypatch, caplog):
    killed = lock_as_elsewhere(bucket.path, monkeypatch)
    _stop(killed)
    Bucket.age(40)
    waits = []
    BucketLock(bucket.path, wait=waits.append).close()
    assert 19 < sum(waits) <= 20
    assert "waiting 20 s to see whether that still runs" in caplog.messages[0]
    assert "taking over from" in caplog.messages[1]


def test_a_lock_that_is_refreshed_is_not_taken_over(bucket, monkeypatch):
    owner = lock_as_elsewhere(bucket.path, monkeypatch)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            owner.refresh()

    with pytest.raises(UserError, match=r"another process \(process \d+ on .*\) trains there: tes"):
        BucketLock(bucket.path, wait=wait)
    assert len(waits) == 3
    owner.check()
    owner.close()
    assert Bucket.objects() == {}


def test_a_lock_that_is_given_back_is_free(bucket, monkeypatch):
    owner = lock_as_elsewhere(bucket.path, monkeypatch)
    lock = BucketLock(bucket.path, wait=lambda _: owner.close())
    assert list(Bucket.objects()) == ["000001.json"]
    owner.close()  # not the other's
    assert list(Bucket.objects()) == ["000001.json"]
    lock.close()


def test_one_given_up_for_dead_leaves_later_locks_alone(bucket, monkeypatch):
    killed = lock_as_elsewhere(bucket.path, monkeypatch)
    _stop(killed)
    Bucket.age(61)
    BucketLock(bucket.path, wait=_no_wait).close()
    later = BucketLock(bucket.path, wait=_no_wait)
    assert list(Bucket.objects()) == ["000001.json"]  # as the dead one's was called
    killed.close()
    assert list(Bucket.objects()) == ["000001.json"]
    later.close()


def test_of_two_that_start_together_one_goes_on(bucket, monkeypatch):
    seen = BucketLock._locks
    first = []

    def late(self):
        """Another one locks between the look at the bucket and the writing of the lock."""
        held = seen(self)
        if not first:
            first.append(None)
            first[0] = BucketLock(bucket.path)
        return held

    monkeypatch.setattr(BucketLock, "_locks", late)
    with pytest.raises(UserError, match="has started there at the same moment"):
        BucketLock(bucket.path)
    first[0].check()
    first[0].close()
    assert Bucket.objects() == {}


def test_a_lock_of_another_kind_is_waited_for(bucket):
    (bucket.path / "lock" / "000001.json").write_text("{broken")
    waits = []
    BucketLock(bucket.path, wait=waits.append).close()
    assert 59 < sum(waits) <= 60
    assert Bucket.objects() == {}


def test_a_refresh_that_fails_keeps_the_lock(bucket, caplog):
    lock = BucketLock(bucket.path)
    with Bucket.failing(ConnectionError("reset")):
        assert not lock._background.flush()
    lock.check()
    assert lock._background.flush()
    assert json.loads(Bucket.objects()["000001.json"])["refreshes"] == 1
    assert "refreshing the lock" in caplog.messages[0]
    lock.close()


def test_a_disk_keeps_its_lock_file(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.lock().close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.lock(tmp_path) as held:
        held.check()
    assert f"the file system of {tmp_path} has no locks" in caplog.text
