import threading
import time

import pytest

from clip_jax.data.sources import in_threads as module
from clip_jax.data.sources.in_threads import in_threads


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("slow", [-1.0, 1.0])  # every disk is, none is
def test_results_are_in_order(monkeypatch, count, slow):
    monkeypatch.setattr(module, "_SLOW", slow)
    used = set()

    def call(item):
        used.add(threading.get_ident())
        return item * 2

    assert in_threads(call, range(count)) == [2 * item for item in range(count)]
    assert used <= {threading.get_ident()} or (slow < 0 and count > 64)


def test_a_slow_disk_is_asked_for_many_files_at_a_time():
    started = time.perf_counter()
    assert len(in_threads(lambda item: time.sleep(0.001), range(64 * 33))) == 64 * 33
    assert time.perf_counter() - started < 0.7  # 2.1 s one after another


def test_errors_end_it():
    calls = []

    def call(item):
        calls.append(item)
        time.sleep(0.0001)
        if item == 100:
            raise KeyError(item)

    with pytest.raises(KeyError, match="100"):
        in_threads(call, range(100_000))
    assert len(calls) < 50_000
