"""Threads that make the samples of a batch together.

A batch is made by all threads rather than one by each: a large one is ready sooner, and there are
as many of them in memory as are made ahead, not as many as there are threads.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from multiprocessing import parent_process, util
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MOST_SLOTS = 16  # of a chunk: a thread without work waits for the others for no longer
_CHUNKS_PER_THREAD = 8  # of a batch, at least: the last ones are ready at about the same time


class SlotThreads:
    """The threads of a process that fill the slots of batches; pickled without them.

    num_threads: with fewer than two, whoever wants a batch makes it.

    They start with the first batch, and end with `close`, with this object or with the worker
    process that they run in.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._change = threading.Condition()  # of what follows
        self._work: list[_Work[Any]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def fill(self, index: int, num_slots: int, make: Callable[[Iterator[int]], T]) -> list[T]:
        """Let `make` have the slots in chunks, several at a time; its results by their order.

        index: of the batch. Where several are wanted at the same time the first one goes first.

        Raises what `make` raised for the foremost chunk, whichever thread was faster: chunks before
        it are made, those behind it given up. Raises CancelledError once closed.
        """
        threads = max(1, self._num_threads)
        size = min(max(1, num_slots // (threads * _CHUNKS_PER_THREAD)), _MOST_SLOTS)
        starts = range(0, num_slots, size)
        work = _Work(index, [range(start, min(start + size, num_slots)) for start in starts], make)
        if threads == 1:
            while work.has_more():
                self._make(work, work.take())
            return work.results()
        with self._change:
            pool = self._running()
            self._work.append(work)
            try:
                for _ in range(min(threads, len(starts))):
                    pool.submit(self._help)
                self._change.wait_for(lambda: self._closed or work.is_done())
            finally:
                self._work.remove(work)
            if not work.is_done():
                raise CancelledError
        return work.results()

    def close(self) -> None:
        """Give up what is being made, after the sample in hand. Waits for nothing."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _running(self) -> ThreadPoolExecutor:
        if self._closed:
            raise CancelledError
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, "samples")
            if parent_process() is not None:
                # A process waits for its threads at its end, and they would end their batches.
                util.Finalize(self, SlotThreads.close, args=(self,), exitpriority=1)
        return self._pool

    def _help(self) -> None:
        """Make chunks until there are none: every thread has one such task after a new batch."""
        while True:
            with self._change:
                waiting = [work for work in self._work if work.has_more()]
                if not waiting or self._closed:
                    return
                work = min(waiting, key=lambda work: work.index)
                number = work.take()
            self._make(work, number)

    def _make(self, work: "_Work[T]", number: int) -> None:
        try:
            made = work.make(self._slots(work, number))
        except BaseException as error:  # noqa: BLE001 - `results` raises it
            with self._change:
                work.fail(number, error)
                self._change.notify_all()
        else:
            with self._change:
                work.made[number] = made
                if work.is_done():
                    self._change.notify_all()

    def _slots(self, work: "_Work[T]", number: int) -> Iterator[int]:
        for slot in work.chunks[number]:
            if self._closed or number > work.end:
                raise CancelledError
            yield slot

    def __getstate__(self) -> dict[str, Any]:
        return {"num_threads": self._num_threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Work(Generic[T]):
    """The chunks of a batch, handed out in their order."""

    def __init__(self, index: int, chunks: list[range], make: Callable[[Iterator[int]], T]) -> None:
        self.index = index
        self.chunks = chunks
        self.make = make
        self.made: dict[int, T] = {}
        self.end = len(chunks)  # or the foremost chunk that failed
        self._next = 0
        self._error: BaseException | None = None

    def has_more(self) -> bool:
        return self._next < self.end

    def take(self) -> int:
        """The number of the next chunk."""
        self._next += 1
        return self._next - 1

    def fail(self, number: int, error: BaseException) -> None:
        if number < self.end:
            self.end, self._error = number, error

    def is_done(self) -> bool:
        """Whether all chunks are made, or those before the one that failed."""
        if self._error is None:
            return len(self.made) == len(self.chunks)
        return all(number in self.made for number in range(self.end))

    def results(self) -> list[T]:
        """Those of all chunks, once they are done; raises the foremost error."""
        if self._error is not None:
            raise self._error
        return [self.made[number] for number in range(len(self.chunks))]
