import pickle
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from clip_jax.data.slot_threads import SlotThreads


def new_threads(before) -> set[threading.Thread]:
    return set(threading.enumerate()) - before


def wait_until(holds) -> bool:
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])
@pytest.mark.parametrize("num_slots", [0, 1, 3, 40, 333])
def test_every_slot_once_and_in_order(num_threads, num_slots):
    threads = pickle.loads(pickle.dumps(SlotThreads(num_threads)))
    parts = threads.fill(0, num_slots, list)
    assert [slot for part in parts for slot in part] == list(range(num_slots))
    threads.close()


def test_threads_share_a_batch():
    threads = SlotThreads(3)
    together = threading.Barrier(3, timeout=5)

    def make(slots):
        for slot in slots:
            if slot < 3:  # with 3 slots a chunk is one
                together.wait()
                yield slot

    parts = threads.fill(0, 3, lambda slots: list(make(slots)))
    assert parts == [[0], [1], [2]]  # each waited for the others: three threads at a time
    threads.close()


@pytest.mark.parametrize("num_threads", [0, 2, 4])
@pytest.mark.parametrize(
    "seconds",
    [{5: 0.1}, {0: 0.2, 5: 0.05, 6: 0.1}],  # those behind it fail before; or while 0 is made
)
def test_the_foremost_error_counts(num_threads, seconds):
    threads = SlotThreads(num_threads)
    made = []

    def make(slots):
        for slot in slots:
            time.sleep(seconds.get(slot, 0))
            if slot >= 5:
                raise KeyError(slot)
            made.append(slot)

    for _ in range(2):
        made.clear()
        with pytest.raises(KeyError) as caught:
            threads.fill(0, 64, make)
        assert caught.value.args == (5,)
        assert sorted(made) == [0, 1, 2, 3, 4]
    threads.close()


def test_an_error_ends_the_batch_at_once():
    threads, in_hand = SlotThreads(2), threading.Event()
    made = []

    def make(slots):
        for slot in slots:
            if slot == 0:
                assert in_hand.wait(5)
                raise RecursionError
            made.append(slot)
            in_hand.set()
            time.sleep(0.01)

    with pytest.raises(RecursionError):
        threads.fill(0, 1000, make)
    time.sleep(0.2)
    assert len(made) < 8  # of the 16 that the other thread had in hand
    threads.close()


def test_the_first_batch_goes_first():
    threads, order = SlotThreads(2), []
    busy, release = threading.Barrier(3, timeout=5), threading.Event()

    def hold(slots):
        for _ in slots:
            busy.wait()
            release.wait(5)

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(threads.fill, 0, 2, hold)]
        busy.wait()
        for count, index in enumerate((9, 3), start=2):  # wanted in this order
            make = lambda slots, index=index: order.extend(index for _ in slots)  # noqa: E731
            jobs.append(pool.submit(threads.fill, index, 32, make))
            assert wait_until(lambda count=count: len(threads._work) == count)
        release.set()
        for job in jobs:
            job.result(5)
    # The last one of batch 3 may be in hand while batch 9 begins.
    assert set(order[:28]) == {3}
    assert len(order) == 64
    threads.close()


def test_closing_ends_a_batch_in_the_making():
    before = set(threading.enumerate())
    threads = SlotThreads(2)
    started = threading.Event()

    def make(slots):
        for _ in slots:
            started.set()
            time.sleep(0.02)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(threads.fill, index, 10_000, make) for index in range(2)]
        assert started.wait(5)
        threads.close()
        threads.close()
        for job in jobs:
            with pytest.raises(CancelledError):
                job.result(5)
    assert wait_until(lambda: not new_threads(before))
    with pytest.raises(CancelledError):
        threads.fill(2, 8, list)


def test_threads_end_with_their_object():
    before = set(threading.enumerate())
    threads = SlotThreads(2)
    threads.fill(0, 8, list)
    assert new_threads(before)
    del threads
    assert wait_until(lambda: not new_threads(before))
