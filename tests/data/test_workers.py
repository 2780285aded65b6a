import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from data.batches import CONFIG, IMAGE, ONE, host_batches, padded_text, small_tokenizer
from data.tars import png

from clip_jax.config.errors import UserError
from clip_jax.data.host_batches import TrainingBatches
from clip_jax.data.pipeline import BatchIterator
from clip_jax.data.record import Record
from clip_jax.data.workers import SlowWait, WorkerEnvironment


@pytest.mark.parametrize("before", [None, "tpu"])
def test_the_last_one_out_restores(monkeypatch, before):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if before is not None:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    first = WorkerEnvironment()
    second = WorkerEnvironment()
    first.restore()
    first.restore()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    second.restore()
    assert os.environ.get("JAX_PLATFORMS") == before


@pytest.fixture(scope="module")
def text(tar_sources):
    return padded_text(small_tokenizer(tar_sources))


def has_ended(process: int) -> bool:
    """Whether a process is gone, or only waits to be reaped by whoever adopts orphans."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def test_workers_leave_the_accelerator_alone_and_end(tar_sources, text, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    config = dataclasses.replace(CONFIG, num_workers=2)
    batches = host_batches(tar_sources, text, config=config)
    next(batches)
    assert os.environ["JAX_PLATFORMS"] == "cpu"  # the second worker may still be starting
    next(batches)
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        with open(f"/proc/{child.pid}/environ", "rb") as environment:
            assert b"JAX_PLATFORMS=cpu" in environment.read().split(b"\0")
    os.kill(children[0].pid, signal.SIGKILL)  # as the system does where memory runs out
    start = time.monotonic()
    with pytest.raises(UserError, match=r"killed .*exit code -9.*lower data.num_workers \(2\)"):
        list(itertools.islice(batches, 100))
    assert time.monotonic() - start < 20
    batches.close()
    batches.close()
    assert not multiprocessing.active_children()


def test_closing_before_the_first_batch(tar_sources, text, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with host_batches(tar_sources, text, config=dataclasses.replace(CONFIG, num_workers=1)):
        pass
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    assert not multiprocessing.active_children()


_ORPHAN = """
import multiprocessing, os, signal, time
from clip_jax.data.workers import prepare_worker

def work(ready):
    prepare_worker(0, 1)
    ready.put((os.getpid(), os.environ["TOKENIZERS_PARALLELISM"]))
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    context.Process(target=work, args=(ready,), daemon=True).start()
    print(*ready.get(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_was_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(_ORPHAN)
    path = {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, stdout=subprocess.PIPE, env=path, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL
    worker, parallel = result.stdout.split()
    assert parallel == b"false"
    worker = int(worker)
    for _ in range(100):
        if has_ended(worker):
            break
        time.sleep(0.05)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker outlived its parent")


def test_a_slow_wait_is_told_at_growing_intervals(caplog):
    wait = SlowWait(0.05, lambda: "for the test")
    with wait:
        time.sleep(0.02)
    assert not caplog.records
    with wait:
        time.sleep(0.5)
    wait.close()
    # After 0.05 s, and each time at twice as long or little more.
    assert 2 <= len(caplog.records) <= 4
    assert all(record.message.startswith("waiting 0 s for the test") for record in caplog.records)


def test_a_slow_source_is_named(text, caplog):
    batches = TrainingBatches(
        ONE,
        {"s": Stuck()},
        text,
        image=IMAGE,
        seed=0,
        global_batch_size=4,
        process_index=0,
        process_count=1,
        start_sample=8,
    )
    with BatchIterator(batches, 0, 1, 1, slow_wait_seconds=0.1) as iterator:
        next(iterator)
    assert "(samples 8 to 11 of the run; in hand: far/away.tar); before, in ms per" in caplog.text


@pytest.mark.parametrize("threads", [1, 2])
def test_closing_while_a_batch_is_made_leaves_no_thread(text, threads):
    before = set(threading.enumerate())
    config = dataclasses.replace(ONE, num_threads=threads)
    batches = host_batches({"s": Stuck(400)}, text, config=config, batch=4)
    next(batches)
    long = host_batches({"s": Stuck(400)}, text, config=config, batch=400)
    long._iterator.start_prefetch()
    time.sleep(0.15)
    start = time.monotonic()
    long.close()
    batches.close()
    assert time.monotonic() - start < 1
    while set(threading.enumerate()) - before and time.monotonic() - start < 5:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before


class Stuck:
    """A source that takes its time."""

    def __init__(self, count=4):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        time.sleep(0.1)
        return Record(png(index), ("caption",), "key")

    def shard(self, index):
        return "far/away.tar"
