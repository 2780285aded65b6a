"""One host's batches as sequences: item j is a pure function of the config and j.

Whoever reads them, in whatever order, in however many threads and processes, gets the same arrays.
"""

import bisect
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, ImageTowerConfig, SourceConfig
from clip_jax.data.order import Place, Positions, SampleOrder
from clip_jax.data.preprocess import Inputs, blank_inputs, evaluation_inputs, training_inputs
from clip_jax.data.record import Record, Source
from clip_jax.data.report import (
    MAX_REPLACEMENTS,
    BadSample,
    BatchReport,
    bad_sample_error,
    too_many_bad_error,
    why_bad,
)
from clip_jax.data.sample_random import SampleRandom
from clip_jax.data.slot_threads import SlotThreads
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.transforms import Framing, decode_image

Batch = dict[str, NDArray[Any]]
TextInputs = Callable[[Sequence[str]], Batch]  # captions to the text part of a batch

# Both, of reads in a row: where each waits for an answer, the store is dead.
_MIN_FAILED_READS, _MAX_READING_SECONDS = 3, 30.0


def sample_order(config: DataConfig, sources: Mapping[str, Source], seed: int) -> SampleOrder:
    """The order in which a config goes through its sources."""
    lengths = {name: len(source) for name, source in sources.items()}
    return SampleOrder(lengths, {name: config.sources[name].weight for name in lengths}, seed)


class TrainingBatches:
    """The training batches of one host.

    The host's share of global batch j is rows [p * b, (p + 1) * b) of it, so that the hosts'
    batches, one after another, are the same global batch for any number of hosts. Close them to end
    the `config.num_threads` threads that make them; these do not outlive them either.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Mapping[str, Source],
        text: TextInputs,
        *,
        image: ImageTowerConfig,
        seed: int,
        global_batch_size: int,
        process_index: int,
        process_count: int,
        start_sample: int,
    ) -> None:
        self._config = config
        self._sources = sources
        self._text = text
        self._image = image
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._batch_size = global_batch_size // process_count
        self._first = start_sample + process_index * self._batch_size
        self._order = sample_order(config, sources, seed)
        self._positions = Positions(config.skipped_ranges)
        self._threads = SlotThreads(config.num_threads)
        self._in_hand: dict[int, tuple[str, int]] = {}  # by thread: source and row

    def __len__(self) -> int:
        return 2**62 // self._global_batch_size  # Grain takes no infinite sequence

    def __getitem__(self, index: int) -> tuple[Batch, BatchReport]:
        """Return the batch and how it was made.

        The batch is {'image': uint8 [b, S, S, 3]} and what `text` gives, 'num_cut_captions' apart.
        For NaFlex, 'patches', 'patch_mask' and 'spatial_shapes' instead of 'image': see
        `preprocess`. Raises UserError for a bad sample if the config says so, or if too many are
        bad.
        """
        start = perf_counter()
        first = self._first + index * self._global_batch_size
        positions = self._positions(np.arange(first, first + self._batch_size))
        places = self._order.places(positions)
        batch: Batch = blank_inputs(self._image, self._batch_size)
        make = functools.partial(self._fill, batch, places, positions.tolist())
        report = BatchReport(0, batch=perf_counter() - start)
        captions: list[str] = []
        for part, its_report in self._threads.fill(index, self._batch_size, make):
            captions += part
            report.add(its_report)
        before_text = perf_counter()
        batch |= self._text(captions)
        report.tokenize = perf_counter() - before_text
        report.num_cut_captions = int(batch.pop("num_cut_captions", 0))
        return batch, report

    def describe(self, index: int) -> str:
        """What a batch consists of and what this process is reading, for messages."""
        first = self._first + index * self._global_batch_size
        words = f"samples {first} to {first + self._batch_size - 1} of the run"
        shards = {self._sources[name].shard(row) for name, row in self._in_hand.copy().values()}
        return f"{words}; in hand: {', '.join(sorted(shards))}" if shards else words

    def close(self) -> None:
        """Give up what is being made, and end the threads."""
        self._threads.close()

    def _fill(
        self, batch: Batch, places: list[Place], positions: list[int], slots: Iterator[int]
    ) -> tuple[list[str], BatchReport]:
        """Put samples into some slots of a batch. Returns their captions."""
        start = perf_counter()
        random = SampleRandom(self._seed)
        captions, report = [], BatchReport(0)
        try:
            for slot in slots:
                inputs, caption = self._sample(places[slot], positions[slot], random, report)
                _put(batch, slot, inputs)
                captions.append(caption)
        finally:
            self._in_hand.pop(threading.get_ident(), None)
        report.num_samples = len(captions)
        report.batch = perf_counter() - start - report.read - report.decode
        return captions, report

    def _sample(
        self, place: Place, position: int, random: SampleRandom, report: BatchReport
    ) -> tuple[Inputs, str]:
        config, row = self._config, place.row
        source, source_config = self._sources[place.source], config.sources[place.source]
        bad: list[BadSample] = []
        num_failed_reads, reading_seconds = 0, 0.0  # in a row
        for attempt in range(MAX_REPLACEMENTS + 1):
            # A stream for each position: a sample's crop depends on nothing else in the run.
            rng = random.at(position, attempt)
            if attempt:
                row = int(rng.integers(len(source)))
            self._in_hand[threading.get_ident()] = (place.source, row)
            record = None
            start = perf_counter()
            try:
                record = source[row]
                middle = perf_counter()
                inputs, caption = training_sample(record, source_config, config, self._image, rng)
            except UserError:  # nothing that another sample would mend
                raise
            except (ValueError, OSError) as error:
                reason = why_bad(error, otherwise="archive" if record is None else "image")
                # To name a sample its file is read, which may take long where that has failed.
                shard = source.shard(row)
                sample = f"{shard}, sample {row}" if reason == "read" else source.locate(row)
                bad.append(BadSample(position, place.source, shard, sample, reason, str(error)))
                if config.on_bad_sample == "fail":
                    raise bad_sample_error(bad[-1]) from None
                seconds = perf_counter() - start
                report.read += seconds
                if reason != "read":
                    num_failed_reads, reading_seconds = 0, 0.0
                    continue
                num_failed_reads += 1
                reading_seconds += seconds
                if num_failed_reads >= _MIN_FAILED_READS and reading_seconds > _MAX_READING_SECONDS:
                    break
                continue
            report.read += middle - start
            report.decode += perf_counter() - middle
            report.bad_samples.extend(bad)
            return inputs, caption
        raise too_many_bad_error(bad)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_in_hand": {}}


def _put(batch: Batch, slot: int, inputs: Inputs) -> None:
    for name, value in inputs.items():
        batch[name][slot] = value


def training_sample(
    record: Record,
    source: SourceConfig,
    config: DataConfig,
    image: ImageTowerConfig,
    rng: np.random.Generator,
) -> tuple[Inputs, str]:
    """A random view of a record, and one of its captions. Raises as `training_inputs` does."""
    caption = record.captions[choose_caption(source, record, rng)]
    inputs = training_inputs(
        record.image, image, config.framing, config.augment, rng, decode=config.decode
    )
    return inputs, caption


def choose_caption(source: SourceConfig, record: Record, rng: np.random.Generator) -> int:
    """Which of a sample's captions to take, as the source's config says."""
    count = len(record.captions)
    if count == 1:
        return 0
    if record.weights:
        ends = list(itertools.accumulate(record.weights))
        return bisect.bisect_right(ends, rng.random() * ends[-1], hi=count - 1)
    if source.captions == "first":
        return 0
    if source.first_caption is None:
        return int(rng.integers(count))
    return 0 if rng.random() < source.first_caption else int(rng.integers(1, count))


class EvaluationBatches:
    """The batches of one host over a source in order; the last one is padded.

    The host's share of global batch j is rows [p * b, (p + 1) * b) of it. Close them to end their
    threads.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None,
        *,
        image: ImageTowerConfig,
        framing: Framing,
        context_length: int,
        batch_size: int,
        process_index: int,
        process_count: int,
        num_threads: int,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._framing = framing
        self._image = image
        self._context_length = context_length
        self._global_batch_size = batch_size
        self._batch_size = batch_size // process_count
        self._first = process_index * self._batch_size
        self._threads = SlotThreads(num_threads)

    def __len__(self) -> int:
        return (len(self._source) + self._global_batch_size - 1) // self._global_batch_size

    def __getitem__(self, index: int) -> tuple[Batch, BatchReport]:
        """Return {'image': uint8 [b, S, S, 3], 'mask': bool [b], 'index': int32 [b]} and a report.

        The report has no times. For NaFlex, 'patches', 'patch_mask' and 'spatial_shapes' instead of
        'image'. With a tokenizer also 'tokens': int32 [b, L]. Padding: mask False, index -1, images
        0, empty captions. Raises UserError for a bad sample: scores without it would not compare.
        """
        rows = np.arange(self._batch_size) + self._first + index * self._global_batch_size
        mask = rows < len(self._source)
        batch: Batch = blank_inputs(self._image, self._batch_size)
        parts = self._threads.fill(
            index, int(mask.sum()), functools.partial(self._fill, batch, rows.tolist())
        )
        batch["mask"] = mask
        batch["index"] = np.where(mask, rows, -1).astype(np.int32)
        if self._tokenizer is not None:
            captions = list(itertools.chain.from_iterable(parts))
            captions += [""] * (self._batch_size - len(captions))
            batch["tokens"] = self._tokenizer(captions, self._context_length)
        return batch, BatchReport(int(mask.sum()))

    def describe(self, index: int) -> str:
        """What a batch consists of, for messages."""
        first = self._first + index * self._global_batch_size
        last = min(first + self._batch_size, len(self._source)) - 1
        return f"samples {first} to {last} of an evaluation set"

    def close(self) -> None:
        """Give up what is being made, and end the threads."""
        self._threads.close()

    def _fill(self, batch: Batch, rows: list[int], slots: Iterator[int]) -> list[str]:
        """Put samples into some slots of a batch. Returns their captions."""
        captions = []
        for slot in slots:
            row = rows[slot]
            try:
                record = self._source[row]
                picture = decode_image(record.image)
                _put(batch, slot, evaluation_inputs(picture, self._image, self._framing))
            except UserError:
                raise
            except (ValueError, OSError) as error:
                raise UserError(
                    f"bad sample in an evaluation set: {self._source.locate(row)}: {error}; "
                    "mend it or take it out of the set"
                ) from None
            captions.append(record.captions[0])
        return captions
