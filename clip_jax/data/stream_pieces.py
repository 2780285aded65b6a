"""A part of a host's streaming batches, made in one process: read ahead, decoded by threads."""

import contextlib
import math
import queue
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, ImageTowerConfig
from clip_jax.data.host_batches import Batch, TextInputs, training_sample
from clip_jax.data.order import Positions, SampleOrder
from clip_jax.data.preprocess import blank_inputs
from clip_jax.data.report import (
    MAX_REPLACEMENTS,
    BadSample,
    BatchReport,
    bad_sample_error,
    too_many_bad_error,
    why_bad,
)
from clip_jax.data.sample_random import SampleRandom
from clip_jax.data.stream_buffer import StreamBuffer
from clip_jax.data.streams import (
    WINDOW_BYTES,
    SampleStream,
    StreamedSample,
    StreamedSource,
    state_width,
)

Piece = tuple[Batch, BatchReport]
STATES = "stream_states"  # rides in a piece: int64 [streams, width], after the piece


@dataclass(frozen=True, kw_only=True)
class StreamingRun:
    """What the processes of a run have in common; picklable."""

    config: DataConfig
    sources: tuple[StreamedSource, ...]
    text: TextInputs
    image: ImageTowerConfig
    seed: int
    rows: int  # of a stream in a batch

    @property
    def width(self) -> int:
        """Numbers in the state of a stream."""
        return 1 + len(self.sources) * state_width(self.config.stream)

    @property
    def window_bytes(self) -> int:
        """Of one stream of one source."""
        return WINDOW_BYTES // len(self.sources)


def open_streams(
    run: StreamingRun, stream: int, state: NDArray[np.int64] | None
) -> list[SampleStream]:
    """Stream `stream` of each source, where the state left it; nothing is read yet.

    state: int64 [width]; None: from the beginning. Raises UserError as `SampleStream` does.
    """
    count = len(run.sources)
    parts = [None] * count if state is None else np.split(state[1:], count)
    total = sum(run.config.sources[source.name].weight for source in run.sources)
    return [
        SampleStream(
            source,
            stream,
            config=run.config.stream,
            seed=run.seed,
            retries=run.config.read_retries,
            state=part,
            window_bytes=run.window_bytes,
            # The least that its exact share of a batch may come to.
            rows=math.floor(run.rows * run.config.sources[source.name].weight / total),
        )
        for source, part in zip(run.sources, parts, strict=True)
    ]


def mixed_state(place: int, parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """int64 [width]: the next place of a stream, and the states of its sources."""
    return np.concatenate([np.array([place], np.int64), *parts])


class _Row(NamedTuple):
    """A sample, where it stands in the order and from which source it is."""

    position: int
    source: str
    sample: StreamedSample


class MixedStream:
    """One stream of a run: the streams of its sources, mixed by their weights.

    Place p of the run's order is place p // S of stream p % S, of the S streams there are.
    """

    def __init__(self, run: StreamingRun, stream: int, state: NDArray[np.int64]) -> None:
        config = run.config
        self._stream, self._num_streams = stream, config.stream.num_streams
        self._on_bad_sample = config.on_bad_sample
        self._place = int(state[0])  # the next one of this stream
        self._positions = Positions(
            [
                (-(-(first - stream) // self._num_streams), -(-(end - stream) // self._num_streams))
                for first, end in config.skipped_ranges
            ]
        )
        weights = {source.name: config.sources[source.name].weight for source in run.sources}
        self._order = SampleOrder(dict.fromkeys(weights, 1), weights, run.seed)
        self._buffers = {
            source.name: StreamBuffer(reader, config.stream.window, run.window_bytes)
            for source, reader in zip(run.sources, open_streams(run, stream, state), strict=True)
        }

    def take(self, count: int, bad: list[BadSample]) -> list[_Row]:
        """The next samples; adds to `bad` those that were met on the way.

        Raises UserError for a bad one if the config says so, and as `SampleStream` does.
        """
        consumed = self._positions.consumed_before(self._place)
        rows = []
        for place in self._positions(consumed + np.arange(count)).tolist():
            for passed_over in range(self._place, place):
                self._take(passed_over, bad)
            rows.append(self._take(place, bad))
            self._place = place + 1
        return rows

    def replacement(self, row: _Row, bad: list[BadSample]) -> _Row:
        """What takes the place of a sample that does not decode: the next one of its source."""
        return self._row(row.position, row.source, bad)

    def state(self) -> NDArray[np.int64]:
        """int64 [width]: where to go on after the samples that were taken."""
        return mixed_state(self._place, (buffer.state() for buffer in self._buffers.values()))

    def in_hand(self) -> set[str]:
        """The tars that are being read at the moment."""
        return {tar for buffer in self._buffers.values() if (tar := buffer.in_hand())}

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()

    def _take(self, place: int, bad: list[BadSample]) -> _Row:
        before, after = self._order.drawn_before(place), self._order.drawn_before(place + 1)
        source = next(name for name in after if after[name] > before[name])
        return self._row(place * self._num_streams + self._stream, source, bad)

    def _row(self, position: int, source: str, bad: list[BadSample]) -> _Row:
        sample = self._buffers[source].take()
        met = [one._replace(position=position) for one in self._buffers[source].drain_bad()]
        if met and self._on_bad_sample == "fail":
            raise bad_sample_error(met[0])
        bad += met
        return _Row(position, source, sample)


@dataclass(slots=True)
class _Draft:
    """A piece in the making."""

    batch: Batch
    report: BatchReport
    seconds: list[float]  # of decoding, of each row


class PieceMaker:
    """Makes the rows of some streams, a batch after the other; close it to end its threads.

    states: int64 [streams, width], as `STATES` of an earlier piece.
    ahead: pieces that are made before they are asked for.

    The rows of a stream do not depend on the other streams that are made along with them.
    """

    def __init__(
        self,
        run: StreamingRun,
        streams: Sequence[int],
        states: NDArray[np.int64],
        ahead: int,
    ) -> None:
        self._run = run
        self._thread_local = threading.local()
        self._pieces: queue.Queue[Future[Piece]] = queue.Queue(max(1, ahead))
        self._closed = False
        self._mixed: list[MixedStream] = []
        for stream, state in zip(streams, states, strict=True):
            self._mixed.append(MixedStream(run, stream, state))
        self._pool = ThreadPoolExecutor(max(1, run.config.num_threads), "decode")
        self._thread = threading.Thread(target=self._work, name="pieces", daemon=True)
        self._thread.start()

    def __next__(self) -> Piece:
        """The next piece: arrays as those of a batch, and `STATES`. Raises UserError."""
        return self._pieces.get().result()

    def in_hand(self) -> set[str]:
        """The tars that are being read at the moment."""
        return set().union(*(mixed.in_hand() for mixed in self._mixed))

    def close(self) -> None:
        self._closed = True
        for mixed in self._mixed:
            mixed.close()
        while self._thread.is_alive():  # it may wait for room in the queue
            with contextlib.suppress(queue.Empty):
                self._pieces.get(timeout=0.05)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        failed: Future[Piece] | None = None
        while not self._closed:
            try:
                piece = failed or self._piece()
            except BaseException as error:  # noqa: BLE001 - `__next__` raises it, every time
                piece = failed = Future()
                failed.set_exception(error)
            self._pieces.put(piece)

    def _piece(self) -> Future[Piece]:
        start = perf_counter()
        count = self._run.rows * len(self._mixed)
        draft = _Draft(blank_inputs(self._run.image, count), BatchReport(count), [0.0] * count)
        report = draft.report
        rows: list[tuple[MixedStream, _Row, Future[str | BadSample]]] = []
        for mixed in self._mixed:
            before = perf_counter()
            taken = mixed.take(self._run.rows, report.bad_samples)
            report.read += perf_counter() - before
            # While other streams are waited for, what has come is decoded.
            for row in taken:
                rows.append((mixed, row, self._pool.submit(self._load, draft, len(rows), row)))
        captions = []
        waited = 0.0
        for slot, (mixed, row, job) in enumerate(rows):
            before = perf_counter()
            caption = job.result()
            if isinstance(caption, BadSample):
                caption = self._replace(draft, slot, mixed, row, caption)
            waited += perf_counter() - before
            captions.append(caption)
        draft.batch[STATES] = np.stack([mixed.state() for mixed in self._mixed])
        report.decode = sum(draft.seconds)
        report.batch = perf_counter() - start - report.read - waited
        # The next piece is decoded meanwhile.
        return self._pool.submit(self._finish, draft.batch, captions, report)

    def _load(self, draft: _Draft, slot: int, row: _Row, attempt: int = 0) -> str | BadSample:
        """Put a sample into the batch. Returns its caption, or why it cannot be used."""
        start = perf_counter()
        config, sample = self._run.config, row.sample
        if not hasattr(self._thread_local, "random"):
            self._thread_local.random = SampleRandom(self._run.seed)
        rng = self._thread_local.random.at(row.position, attempt)
        try:
            source = config.sources[row.source]
            inputs, caption = training_sample(sample.record, source, config, self._run.image, rng)
        except UserError:  # nothing that another sample would mend
            raise
        except (ValueError, OSError) as error:
            where = (row.position, row.source, sample.tar, sample.where)
            return BadSample(*where, why_bad(error, otherwise="image"), str(error))
        for name, value in inputs.items():
            draft.batch[name][slot] = value
        draft.seconds[slot] = perf_counter() - start
        return caption

    def _replace(
        self, draft: _Draft, slot: int, mixed: MixedStream, row: _Row, bad: BadSample
    ) -> str:
        """Put a sample into the batch in place of one that does not decode."""
        met = [bad]
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            if self._run.config.on_bad_sample == "fail":
                raise bad_sample_error(bad)
            draft.report.bad_samples.append(bad)
            row = mixed.replacement(row, draft.report.bad_samples)
            loaded = self._load(draft, slot, row, attempt)
            if isinstance(loaded, str):
                return loaded
            bad = loaded
            met.append(bad)
        raise too_many_bad_error(met)

    def _finish(self, batch: Batch, captions: Sequence[str], report: BatchReport) -> Piece:
        start = perf_counter()
        batch |= self._run.text(captions)
        report.num_cut_captions = int(batch.pop("num_cut_captions", 0))
        report.tokenize = perf_counter() - start
        return batch, report
