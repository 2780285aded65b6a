"""Samples of tars read in sequence, in an order that a few numbers describe: a stream.

The tars of a source are dealt out to the streams of a run once and for all. A stream goes through
its tars in an order of each epoch, several at a time by turns, and shuffles blocks of consecutive
samples. All of it is a function of the seed, so where a stream stands is the byte offsets of its
open tars at the beginning of a block and the position in that block: going on from there reads at
most one block again.
"""

import collections
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.config.schema import StreamConfig
from clip_jax.data.order import permute
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.report import BadSample
from clip_jax.data.sources.files import SequentialFile, open_sequential
from clip_jax.data.sources.tar_stream import END, TarSample, tar_samples

# A block ends here where its samples are large: what a stream holds in memory is bounded.
WINDOW_BYTES = 64 * 2**20
# Of one stream in a row: where as many fail, the set or its store is broken.
_MAX_BAD_TARS = 10
_MAX_SLOW_TARS, _MAX_BAD_SECONDS = 3, 30.0  # both: where each waits for an answer
_MAX_BAD_SAMPLES = 1000  # without image or caption; they cost no decoding
# What a permutation is for, apart from each other by their seeds.
_DEAL, _EPOCH, _BLOCK = 1, 2, 3

_VERSION = 1  # of the order and the state
# A state: fingerprint, epoch, block in it, samples used of the block, next tar of the epoch, slot
# whose turn it is; then of each slot the tar's place in the epoch and the byte offset in the tar.
_HEAD, _USED = 6, 3
_NO_TAR = -1


@dataclass(frozen=True, kw_only=True)
class StreamedSource:
    """One source of a run that streams; picklable."""

    name: str
    tars: tuple[str, ...]  # as `expand_path` gives them
    caption_keys: tuple[str, ...] = ()
    caption_weights: tuple[float, ...] = ()


class StreamedSample(NamedTuple):
    record: Record
    tar: str

    @property
    def num_bytes(self) -> int:
        return len(self.record.image)

    @property
    def where(self) -> str:
        """Names the sample for messages."""
        return f"{self.tar}, key {self.record.key}"


class Block(NamedTuple):
    """Consecutive samples of a stream, shuffled among each other."""

    samples: collections.deque[StreamedSample]  # that are still to be used
    used: int  # before the run was interrupted
    bad: list[BadSample]  # met while the block was read; position -1
    start: NDArray[np.int64]  # state at its beginning
    end: NDArray[np.int64]  # and after it


@dataclass(slots=True)
class _Slot:
    """One of the tars that are open at a time."""

    ordinal: int = _NO_TAR  # in the order of the epoch
    offset: int = 0  # bytes, of the next sample
    has_usable: bool = False  # it has given a sample
    file: SequentialFile | None = None
    samples: Iterator[TarSample] | None = field(default=None, repr=False)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.ordinal, self.offset, self.has_usable = _NO_TAR, 0, False
        self.file = self.samples = None


def check_tars(source: StreamedSource, config: StreamConfig) -> None:
    """Raises UserError where there are not enough tars for every stream to have one."""
    if len(source.tars) < config.num_streams:
        raise UserError(
            f"data source '{source.name}' has {len(source.tars)} tars for "
            f"{config.num_streams} streams, which take at least one each; set "
            f"data.stream.num_streams to {len(source.tars)} or fewer"
        )


def state_width(config: StreamConfig) -> int:
    """Numbers in the state of one stream of one source."""
    return _HEAD + 2 * config.interleave


class SampleStream:
    """Stream `stream` of the `config.num_streams` of a source: its blocks, endlessly.

    state: where to go on, `start` or `end` of a block, or `start` as `used` gives it; None: from
    the beginning. window_bytes: a block ends with the sample that reaches them. rows: samples that
    a batch takes of it, at least.

    Every sample of the stream's tars comes once before one comes again. A tar that is damaged, gone
    or cannot be read after `retries` counts as one bad sample; its whole samples before that count
    as any others, and the next tar takes its place.

    Raises UserError if there are fewer tars than streams, or the state is of other tars or another
    config; from `read_block`, if ten tars or 1,000 samples in a row, or all of a pass, are bad, or
    a pass has fewer samples than a batch takes.
    """

    def __init__(
        self,
        source: StreamedSource,
        stream: int,
        *,
        config: StreamConfig,
        seed: int,
        retries: int = 3,
        state: NDArray[np.int64] | None = None,
        window_bytes: int = WINDOW_BYTES,
        rows: int = 0,
    ) -> None:
        check_tars(source, config)
        self._source = source
        self._config = config
        self._window_bytes = window_bytes
        self._rows = rows
        self._retries = retries
        self._seed = (seed, zlib.crc32(source.name.encode()))
        self._stream = stream
        dealt = self._permutation(len(source.tars), _DEAL)
        self._tars = [source.tars[number] for number in dealt[stream :: config.num_streams]]
        self._fingerprint = self._make_fingerprint()
        self.in_hand = ""  # the tar that is being read at the moment, for messages
        self._slots = [_Slot() for _ in range(config.interleave)]
        self._epoch = self._block = self._used = self._next = self._turn = 0
        if state is not None:
            self._restore(state)
        self._order = self._permutation(len(self._tars), _EPOCH, stream, self._epoch)
        # Samples of the pass so far; None: it was begun before an interruption, and is not counted.
        self._given = None if self._block else 0
        self._bad: list[BadSample] = []
        # In a row, without a usable sample in between.
        self._bad_tars = self._bad_samples = 0
        self._bad_seconds = 0.0

    def read_block(self, admit: Callable[[int], None] = lambda num_bytes: None) -> Block:
        """Read the next block; at the end of an epoch it may be short, or empty.

        admit: is called after each sample with its bytes, and may wait before the next is read.
        """
        start, used, self._used = self.state(), self._used, 0
        samples: list[StreamedSample] = []
        num_bytes = 0
        ended = False
        while len(samples) < self._config.window and num_bytes < self._window_bytes:
            sample = self._read_sample()
            if sample is None:
                ended = True
                break
            samples.append(sample)
            num_bytes += sample.num_bytes
            admit(sample.num_bytes)
        if self._given is not None:
            self._given += len(samples)
        if samples:
            place = (self._stream, self._epoch, self._block)
            samples = [samples[n] for n in self._permutation(len(samples), _BLOCK, *place)]
        self._block += 1
        if ended:
            if self._given is not None and self._given < self._rows:
                raise self._too_few(self._given)
            self._given = 0
            self._epoch += 1
            self._block = self._next = self._turn = 0
            self._order = self._permutation(len(self._tars), _EPOCH, self._stream, self._epoch)
        # Those of a block that was in use at the interruption were counted then.
        bad, self._bad = [] if used else self._bad, []
        left = collections.deque(samples[used:])
        return Block(left, len(samples) - len(left), bad, start, self.state())

    def state(self) -> NDArray[np.int64]:
        """int64 [state_width]: where the next block begins, and how much of it was used."""
        slots = [number for slot in self._slots for number in (slot.ordinal, slot.offset)]
        head = [self._fingerprint, self._epoch, self._block, self._used, self._next, self._turn]
        return np.array([*head, *slots], np.int64)

    @property
    def epoch(self) -> int:
        """Passes over the stream's tars that are complete."""
        return self._epoch

    def close(self) -> None:
        for slot in self._slots:
            slot.close()

    def _read_sample(self) -> StreamedSample | None:
        """The next usable sample by turns, or None at the end of the epoch."""
        while True:
            slot = self._slots[self._turn]
            if slot.ordinal == _NO_TAR:
                if self._next < len(self._tars):
                    slot.ordinal = self._next
                    self._next += 1
                elif all(other.ordinal == _NO_TAR for other in self._slots):
                    return None
                else:
                    self._turn = (self._turn + 1) % len(self._slots)
                    continue
            tar = self._tars[self._order[slot.ordinal]]
            sample, ended = self._advance(slot, tar)
            record = None if sample is None else self._record(sample, tar)
            slot.has_usable |= record is not None
            if ended:
                if not slot.has_usable:
                    self._count_bad_tar()
                slot.close()
            if sample is not None:
                self._turn = (self._turn + 1) % len(self._slots)
            if record is not None:
                return StreamedSample(record, tar)

    def _advance(self, slot: _Slot, tar: str) -> tuple[TarSample | None, bool]:
        """The next sample of an open tar, if there is one, and whether the tar ends with it."""
        start = time.monotonic()
        sample = None
        self.in_hand = tar
        try:
            if slot.samples is None:
                retries = 0 if self._bad_tars else self._retries  # a dead store shows in seconds
                slot.file = open_sequential(tar, slot.offset, retries)
                slot.samples = tar_samples(slot.file)
            sample = next(slot.samples, None)
            if sample is not None:
                slot.offset = sample.after
                if sample.after != END:
                    return sample, False
                next(slot.samples, None)  # raises what ended the tar before its time
        except BadSampleError as error:
            self._note(tar, tar, error)
            self._bad_seconds += time.monotonic() - start
        finally:
            self.in_hand = ""
        return sample, True

    def _record(self, sample: TarSample, tar: str) -> Record | None:
        try:
            record = sample.record(self._source.caption_keys, self._source.caption_weights)
        except BadSampleError as error:
            self._note(tar, f"{tar}, key {sample.key}", error)
            self._bad_samples += 1
            if self._bad_samples == _MAX_BAD_SAMPLES:
                raise self._hopeless(f"{self._bad_samples:,} samples") from None
            return None
        self._bad_tars = self._bad_samples = 0
        self._bad_seconds = 0.0
        return record

    def _note(self, tar: str, sample: str, error: BadSampleError) -> None:
        message = str(error).removeprefix(f"{tar}: ")
        bad = BadSample(-1, self._source.name, tar, sample, error.reason, message)
        self._bad.append(bad)

    def _count_bad_tar(self) -> None:
        self._bad_tars += 1
        slow = self._bad_tars >= _MAX_SLOW_TARS and self._bad_seconds > _MAX_BAD_SECONDS
        if slow or self._bad_tars >= min(_MAX_BAD_TARS, len(self._tars)):
            raise self._hopeless(f"{self._bad_tars} of the stream's {len(self._tars)} tars")

    def _too_few(self, count: int) -> UserError:
        return UserError(
            f"data source '{self._source.name}' gives {count} samples of {len(self._tars)} tars in "
            f"stream {self._stream} of {self._config.num_streams}, fewer than the {self._rows} "
            "that a batch takes of it: a batch would hold a pair twice; lower global_batch_size to "
            f"{count / self._rows:.0%} of it or less, or the source's weight, or add samples"
        )

    def _hopeless(self, what: str) -> UserError:
        last = f", the last: {self._bad[-1].sample}: {self._bad[-1].message}" if self._bad else ""
        return UserError(
            f"{what} in a row of data source '{self._source.name}' hold no usable sample{last}; "
            "check the tars and the access to them"
        )

    def _permutation(self, length: int, *purpose: int) -> list[int]:
        numbers = np.arange(length, dtype=np.uint64)
        shuffled: list[int] = permute(numbers, length, [*self._seed, *purpose]).tolist()
        return shuffled

    def _restore(self, state: NDArray[np.int64]) -> None:
        numbers = state.tolist()
        if len(numbers) != state_width(self._config) or numbers[0] != self._fingerprint:
            raise UserError(
                f"data source '{self._source.name}' ({len(self._source.tars)} tars) is not the one "
                "that the checkpoint was reading: other tars, seed or data.stream settings; give "
                "it those of then, with the tars named by braces, {00..99}, not by a glob: so one "
                "that has gone keeps its place"
            )
        self._epoch, self._block, self._used, self._next, self._turn = numbers[1:_HEAD]
        for slot, ordinal, offset in zip(
            self._slots, numbers[_HEAD::2], numbers[_HEAD + 1 :: 2], strict=True
        ):
            slot.ordinal, slot.offset = ordinal, offset
            slot.has_usable = offset > 0

    def _make_fingerprint(self) -> int:
        """Tells orders apart. The folder or bucket that the tars lie in may change."""
        config = self._config
        numbers = [_VERSION, *self._seed, config.num_streams, config.interleave, config.window]
        numbers.append(self._window_bytes)
        names = [PurePosixPath(tar).name for tar in self._source.tars]
        whole = "/".join([*map(str, numbers), *names])
        return zlib.crc32(whole.encode(errors="surrogateescape"))


def used(state: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The state in a block of which so many samples were handed out: `start` of it, marked."""
    marked = state.copy()
    marked[_USED] = count
    return marked
