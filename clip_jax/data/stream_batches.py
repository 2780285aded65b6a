"""Training batches out of tars that are read in sequence: for buckets, exactly resumable.

A run has S streams, however many hosts and workers there are: `data.stream.num_streams`. Each
gives the same number of rows to every global batch, in the order of the streams, and carries a
state of a few numbers. A host makes the rows of S / H neighbouring streams, so that the hosts'
batches one after another are the global batch: the same one for any number of hosts. (With every
H-th stream to a host, rows would change places with the number of hosts, and so would packed groups
of captions and each row's random numbers in the step.)
"""

import itertools
import json
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError, nearest_multiples
from clip_jax.config.schema import DataConfig, ImageTowerConfig
from clip_jax.data.host_batches import Batch, TextInputs
from clip_jax.data.pipeline import BatchIterator
from clip_jax.data.sources.tar_paths import expand_tars
from clip_jax.data.stream_pieces import (
    STATES,
    Piece,
    PieceMaker,
    StreamingRun,
    mixed_state,
    open_streams,
)
from clip_jax.data.streams import StreamedSource, check_tars

logger = logging.getLogger(__name__)

_FEW_TARS = 10  # of a stream: one more makes its samples come 10% less often


def local_streams(num_streams: int, process_index: int, process_count: int) -> range:
    """The streams that a process reads: neighbours, as many as any other process.

    Raises UserError if they do not divide over the processes.
    """
    if num_streams % process_count:
        raise UserError(
            f"data.stream.num_streams {num_streams} is not divisible by {process_count} processes; "
            f"nearest: {nearest_multiples(num_streams, process_count)}"
        )
    count = num_streams // process_count
    return range(process_index * count, (process_index + 1) * count)


def stream_batches(
    config: DataConfig,
    text: TextInputs,
    *,
    image: ImageTowerConfig,
    seed: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
    states: NDArray[np.int64] | None,
    start_sample: int,
) -> "StreamBatches":
    """Return this host's endless training batches from streams.

    states: int64 [S / H, width], the rows of `local_streams` out of those of all streams as
    `StreamBatches.states` gave them at the checkpoint; None: from the beginning, start_sample 0.

    Yields what `training_batches` yields. The batches depend on the seed, the sources, the global
    batch size and `data.stream`, not on the number of workers, threads or hosts, nor on where the
    run was interrupted. Every sample comes once before one of the same stream and source comes
    again. Held in memory, at most: `streams.WINDOW_BYTES` (64 MiB) of encoded samples for each
    stream of the host, two ranges for each of its `interleave` open tars per source (see
    `open_sequential`), and `prefetch_batches` batches.

    Raises UserError where the streams do not divide over the hosts or the batch over the streams, a
    source has fewer tars than there are streams, or `states` are of another run; from `next`, for
    bad samples as `config.on_bad_sample` says, and where nothing usable comes.
    """
    num_streams = config.stream.num_streams
    streams = local_streams(num_streams, process_index, process_count)
    if global_batch_size % num_streams:
        raise UserError(
            f"global_batch_size {global_batch_size} is not divisible by data.stream.num_streams "
            f"{num_streams}; nearest: {nearest_multiples(global_batch_size, num_streams)}"
        )
    run = StreamingRun(
        config=config,
        sources=_open_sources(config, resumes=states is not None),
        text=text,
        image=image,
        seed=seed,
        rows=global_batch_size // num_streams,
    )
    if states is None and start_sample:
        raise UserError(
            f"the checkpoint at {start_sample:,} samples has no states of streams: its data was "
            "read otherwise; a run keeps to config.data.sources.*.access"
        )
    if states is not None and states.shape != (len(streams), run.width):
        raise UserError(
            f"the states of streams in the checkpoint have shape {states.shape}, not "
            f"{(len(streams), run.width)}: another number of streams, sources or tars at a time; "
            "a run keeps to its config.data.stream and sources"
        )
    return StreamBatches(run, streams, _checked(run, streams, states))


def _checked(
    run: StreamingRun, streams: range, states: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """The states to begin with. Raises UserError where they are of another run."""
    rows = []
    for number, stream in enumerate(streams):
        state = None if states is None else states[number]
        parts = [part.state() for part in open_streams(run, stream, state)]
        rows.append(mixed_state(0 if state is None else int(state[0]), parts))
    return np.stack(rows)


def _open_sources(config: DataConfig, resumes: bool) -> tuple[StreamedSource, ...]:
    sources = []
    for name in sorted(config.sources):
        source = config.sources[name]
        if source.access != "stream":
            raise UserError(
                f"config.data.sources.{name}.access is '{source.access}' and others stream: a run "
                "reads all its sources in one way"
            )
        # A tar that went during the run is a bad sample, not a reason not to go on.
        tars = expand_tars(source.path, known=lambda file: resumes)
        opened = StreamedSource(
            name=name,
            tars=tuple(tars),
            caption_keys=source.caption_keys,
            caption_weights=source.caption_weights,
        )
        check_tars(opened, config.stream)
        fewest = len(tars) // config.stream.num_streams
        if len(tars) % config.stream.num_streams and fewest < _FEW_TARS:
            logger.warning(
                "data source '%s' has %d tars for %d streams, %d or %d each: those of the smaller "
                "streams come round more often; better a data.stream.num_streams that divides them",
                name,
                len(tars),
                config.stream.num_streams,
                fewest,
                fewest + 1,
            )
        sources.append(opened)
    return tuple(sources)


def _split(streams: range, rows: int, group_size: int, num_workers: int) -> list[range]:
    """The streams of each worker: neighbours, whose rows are whole groups of packed captions."""
    step = group_size // math.gcd(group_size, rows)
    num_steps = len(streams) // step
    num_parts = min(max(num_workers, 1), num_steps)
    ends = [number * num_steps // num_parts * step for number in range(num_parts + 1)]
    return [streams[start:end] for start, end in itertools.pairwise(ends)]


class StreamPieces:
    """The pieces of a host's batches as a sequence: item i is part i % P of batch i // P.

    Each part is made by one process, in order: it asks for every P-th item, from one on.
    """

    def __init__(
        self, run: StreamingRun, parts: Sequence[range], states: Sequence[NDArray[np.int64]]
    ) -> None:
        self._run = run
        self._parts = parts
        self._states = states
        self._maker: PieceMaker | None = None
        self._next = 0

    def __len__(self) -> int:
        return 2**62  # Grain takes no infinite sequence

    def __getitem__(self, index: int) -> Piece:
        if self._maker is None:
            self.start(index)
        assert self._maker is not None
        assert index == self._next, f"piece {index} out of turn, next is {self._next}"
        self._next += len(self._parts)
        return next(self._maker)

    def start(self, number: int) -> None:
        """Begin to make the pieces of one part, in this process."""
        ahead = self._run.config.prefetch_batches
        streams, states = self._parts[number], self._states[number]
        self._maker = PieceMaker(self._run, streams, states, ahead)
        self._next = number

    def describe(self, index: int) -> str:
        """What a piece consists of, for messages."""
        batch, number = divmod(index, len(self._parts))
        streams = self._parts[number]
        words = f"streams {streams.start} to {streams.stop - 1}, batch {batch} since the start"
        tars = self._maker.in_hand() if self._maker is not None else set()
        return f"{words}; in hand: {', '.join(sorted(tars))}" if tars else words

    def close(self) -> None:
        if self._maker is not None:
            self._maker.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maker": None, "_next": 0}


class StreamBatches(Iterator[Batch]):
    """What `stream_batches` returns. Close it to end its threads and workers.

    Usable in a `with` statement.
    """

    def __init__(self, run: StreamingRun, streams: range, states: NDArray[np.int64]) -> None:
        config = run.config
        parts = _split(streams, run.rows, config.packing.group_size or 1, config.num_workers)
        ends = np.cumsum([len(part) for part in parts])
        self._states = states
        self._sources = run.sources
        self._streams, self._parts = streams, parts
        self._copiers = ThreadPoolExecutor(len(parts), "copy") if len(parts) > 1 else None
        self._pieces = StreamPieces(run, parts, np.split(states, ends[:-1]))
        num_workers = len(parts) if config.num_workers else 0
        if not num_workers:
            self._pieces.start(0)  # before the first batch is wanted
        # Grain's threads would ask for pieces out of turn; each part has its own.
        self._iterator = BatchIterator(
            self._pieces, num_workers, num_threads=0, ahead=config.prefetch_batches
        )

    def __next__(self) -> Batch:
        batch = next(self._iterator) if self._copiers is None else self._joined(self._copiers)
        self._states = np.array(batch.pop(STATES))
        return batch

    def _joined(self, copiers: ThreadPoolExecutor) -> Batch:
        """A batch of the next piece of each part: one is copied while others are waited for."""
        batch: Batch = {}
        copies = []
        for part in self._parts:
            for name, rows in next(self._iterator).items():
                if name not in batch:
                    length = len(rows) * len(self._streams) // len(part)
                    batch[name] = np.empty((length, *rows.shape[1:]), rows.dtype)
                first = len(rows) * (part.start - self._streams.start) // len(part)
                place = batch[name][first : first + len(rows)]
                copies.append(copiers.submit(np.copyto, place, rows))
        for copy in copies:
            copy.result()
        return batch

    def states(self) -> NDArray[np.int64]:
        """int64 [S / H, width]: where this host's streams stand after the last batch."""
        return self._states

    @property
    def fingerprint(self) -> int:
        """32 bits that tell other lists of tars apart, wherever they lie."""
        names = [
            [source.name, *(PurePosixPath(tar).name for tar in source.tars)]
            for source in self._sources
        ]
        return zlib.crc32(json.dumps(names).encode())

    def stats(self) -> dict[str, float]:
        """Times and counts since the last call; see `BatchIterator.stats`."""
        return self._iterator.stats()

    def drain_bad_samples(self) -> list[dict[str, Any]]:
        """The bad samples since the last call; see `BatchIterator.drain_bad_samples`."""
        return self._iterator.drain_bad_samples()

    def close(self) -> None:
        """End the threads and workers. Calling it again is nothing."""
        self._iterator.close()
        self._pieces.close()
        if self._copiers is not None:
            self._copiers.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
