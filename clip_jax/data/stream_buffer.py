"""Reads a stream ahead of its use, in a thread, holding about a block's worth of samples."""

import collections
import threading

import numpy as np
from numpy.typing import NDArray

from clip_jax.data.report import BadSample
from clip_jax.data.streams import Block, SampleStream, StreamedSample, used


class StreamBuffer:
    """The samples of a stream one by one. Close it to end its thread.

    max_samples, max_bytes: a block is shuffled when it has been read whole; then the next one is
    read into the room that its samples leave, so that no more than these are held, beside the one
    sample that was read last. One thread may take samples.
    """

    def __init__(self, stream: SampleStream, max_samples: int, max_bytes: int) -> None:
        self._stream = stream
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._change = threading.Condition()
        self._blocks: collections.deque[Block] = collections.deque()  # read, not begun
        # Samples and bytes of the blocks that are read and of the one that is being read.
        self._ready, self._ready_bytes = 0, 0
        self._coming, self._coming_bytes = 0, 0
        self._closed = False
        self._error: BaseException | None = None
        self._block: Block | None = None  # in use
        self._used = 0  # samples of it
        self._state = stream.state()
        self._bad: list[BadSample] = []
        # A daemon: a read that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)
        self._thread.start()

    def take(self) -> StreamedSample:
        """The next sample. Raises UserError where the stream cannot go on; see `SampleStream`."""
        while self._block is None or not self._block.samples:
            with self._change:
                self._change.wait_for(lambda: self._blocks or self._error or self._closed)
                if not self._blocks:
                    raise self._error or ValueError("the stream is closed")
                self._block = self._blocks.popleft()
            self._used = self._block.used
            self._bad += self._block.bad
            self._state = self._block.end
        sample = self._block.samples.popleft()
        self._used += 1
        with self._change:
            self._ready -= 1
            self._ready_bytes -= sample.num_bytes
            self._change.notify_all()
        return sample

    def state(self) -> NDArray[np.int64]:
        """Where to go on after the samples that were taken: for `SampleStream`."""
        if self._block is not None and self._block.samples:
            return used(self._block.start, self._used)
        return self._state

    def drain_bad(self) -> list[BadSample]:
        """The bad samples that were met before the samples taken, each once; position -1."""
        bad, self._bad = self._bad, []
        return bad

    def in_hand(self) -> str:
        """The tar that is being read at the moment, or ""."""
        return self._stream.in_hand

    def close(self) -> None:
        """End the thread, at the latest when the read that it waits for is over."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _read(self) -> None:
        try:
            while not self._closed:
                block = self._stream.read_block(self._admit)
                with self._change:
                    self._blocks.append(block)
                    self._ready += len(block.samples)
                    self._ready_bytes += sum(sample.num_bytes for sample in block.samples)
                    self._coming = self._coming_bytes = 0
                    self._change.notify_all()
        except _ClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - `take` raises it where it is waited for
            with self._change:
                self._error = error
                self._change.notify_all()
        finally:
            self._stream.close()

    def _admit(self, num_bytes: int) -> None:
        with self._change:
            self._coming += 1
            self._coming_bytes += num_bytes
            # What is coming alone is never waited with: a block has to be whole to be used.
            self._change.wait_for(
                lambda: (
                    self._closed
                    or not self._ready
                    or (
                        self._ready + self._coming <= self._max_samples
                        and self._ready_bytes + self._coming_bytes <= self._max_bytes
                    )
                )
            )
            if self._closed:
                raise _ClosedError


class _ClosedError(Exception):
    """The buffer was closed while its thread was reading."""
