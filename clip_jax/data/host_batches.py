"""One host's batches as sequences: item j is a pure function of the config and j.

Whoever reads them, in whatever order, in however many threads and processes, gets the same arrays.
"""

import bisect
import collections
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, ImageTowerConfig, SourceConfig
from clip_jax.data.order import Place, Positions, SampleOrder
from clip_jax.data.preprocess import Inputs, blank_inputs, evaluation_inputs, training_inputs
from clip_jax.data.record import Record, Source
from clip_jax.data.report import BadSample, BatchReport, why_bad
from clip_jax.data.sample_random import SampleRandom
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.transforms import Framing, decode_image

Batch = dict[str, NDArray[Any]]
TextInputs = Callable[[Sequence[str]], Batch]  # captions to the text part of a batch

_MAX_REPLACEMENTS = 100  # in a row: where as many fail, the set is broken, not a sample


def sample_order(config: DataConfig, sources: Mapping[str, Source], seed: int) -> SampleOrder:
    """The order in which a config goes through its sources."""
    lengths = {name: len(source) for name, source in sources.items()}
    return SampleOrder(lengths, {name: config.sources[name].weight for name in lengths}, seed)


class TrainingBatches:
    """The training batches of one host.

    The host's share of global batch j is rows [p * b, (p + 1) * b) of it, so that the hosts'
    batches, one after another, are the same global batch for any number of hosts.
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
        report = BatchReport(self._batch_size)
        random = SampleRandom(self._seed)
        captions = []
        for slot, (place, position) in enumerate(zip(places, positions.tolist(), strict=True)):
            inputs, caption = self._sample(place, position, random, report)
            _put(batch, slot, inputs)
            captions.append(caption)
        self._in_hand.pop(threading.get_ident(), None)
        before_text = perf_counter()
        batch |= self._text(captions)
        end = perf_counter()
        report.num_cut_captions = int(batch.pop("num_cut_captions", 0))
        report.tokenize = end - before_text
        report.batch = end - start - report.read - report.decode - report.tokenize
        return batch, report

    def describe(self, index: int) -> str:
        """What a batch consists of and what this process is reading, for messages."""
        first = self._first + index * self._global_batch_size
        words = f"samples {first} to {first + self._batch_size - 1} of the run"
        shards = {self._sources[name].shard(row) for name, row in self._in_hand.copy().values()}
        return f"{words}; in hand: {', '.join(sorted(shards))}" if shards else words

    def _sample(
        self, place: Place, position: int, random: SampleRandom, report: BatchReport
    ) -> tuple[Inputs, str]:
        config, row = self._config, place.row
        source, source_config = self._sources[place.source], config.sources[place.source]
        bad: list[BadSample] = []
        for attempt in range(_MAX_REPLACEMENTS + 1):
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
                caption = record.captions[choose_caption(source_config, record, rng)]
                inputs = training_inputs(
                    record.image,
                    self._image,
                    config.framing,
                    config.augment,
                    rng,
                    decode=config.decode,
                )
            except UserError:  # nothing that another sample would mend
                raise
            except (ValueError, OSError) as error:
                reason = why_bad(error, otherwise="archive" if record is None else "image")
                # To name a sample its file is read, which may take long where that has failed.
                shard = source.shard(row)
                sample = f"{shard}, sample {row}" if reason == "read" else source.locate(row)
                if config.on_bad_sample == "fail":
                    raise UserError(
                        f"bad sample in data source '{place.source}': {sample}: {error}; "
                        "mend it, or set data.on_bad_sample to 'skip'"
                    ) from None
                bad.append(BadSample(position, place.source, shard, sample, reason, str(error)))
                report.read += perf_counter() - start
                continue
            report.read += middle - start
            report.decode += perf_counter() - middle
            report.bad_samples.extend(bad)
            return inputs, caption
        reasons = collections.Counter(sample.reason for sample in bad)
        raise UserError(
            f"{len(bad)} samples in a row of data source '{place.source}' are bad ("
            + ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            + f"), the last: {sample}: {bad[-1].message}; check the files"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_in_hand": {}}


def _put(batch: Batch, slot: int, inputs: Inputs) -> None:
    for name, value in inputs.items():
        batch[name][slot] = value


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

    The host's share of global batch j is rows [p * b, (p + 1) * b) of it.
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
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._framing = framing
        self._image = image
        self._context_length = context_length
        self._global_batch_size = batch_size
        self._batch_size = batch_size // process_count
        self._first = process_index * self._batch_size

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
        captions = [""] * self._batch_size
        for slot, row in enumerate(rows[mask].tolist()):
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
            captions[slot] = record.captions[0]
        batch["mask"] = mask
        batch["index"] = np.where(mask, rows, -1).astype(np.int32)
        if self._tokenizer is not None:
            batch["tokens"] = self._tokenizer(captions, self._context_length)
        return batch, BatchReport(int(mask.sum()))

    def describe(self, index: int) -> str:
        """What a batch consists of, for messages."""
        first = self._first + index * self._global_batch_size
        last = min(first + self._batch_size, len(self._source)) - 1
        return f"samples {first} to {last} of an evaluation set"
