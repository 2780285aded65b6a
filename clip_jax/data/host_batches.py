"""One host's batches as sequences: item j is a pure function of the config and j.

Whoever reads them, in whatever order, in however many threads and processes, gets the same arrays.
"""

import logging
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, ImageTowerConfig, SourceConfig
from clip_jax.data.order import Place, SampleOrder
from clip_jax.data.preprocess import Inputs, blank_inputs, evaluation_inputs, training_inputs
from clip_jax.data.record import Record
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.transforms import Framing, decode_image

logger = logging.getLogger(__name__)

Batch = dict[str, NDArray[np.generic]]

_MAX_REPLACEMENTS = 100  # in a row: where as many fail, the set is broken, not a sample
_FIRST_WARNINGS = 5


class Source(Protocol):
    """Random access to records; picklable and cheap to open in a worker."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def locate(self, index: int) -> str:
        """Name a sample for messages, also where reading it fails."""
        ...


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
        tokenizer: Tokenizer,
        *,
        image: ImageTowerConfig,
        context_length: int,
        seed: int,
        global_batch_size: int,
        process_index: int,
        process_count: int,
        start_sample: int,
    ) -> None:
        self._config = config
        self._sources = sources
        self._tokenizer = tokenizer
        self._image = image
        self._context_length = context_length
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._batch_size = global_batch_size // process_count
        self._first = start_sample + process_index * self._batch_size
        self._order = sample_order(config, sources, seed)
        self._num_bad = 0

    def __len__(self) -> int:
        return 2**62 // self._global_batch_size  # Grain takes no infinite sequence

    def __getitem__(self, index: int) -> Batch:
        """Return {'image': uint8 [b, S, S, 3], 'tokens': int32 [b, L]}.

        For NaFlex, 'patches', 'patch_mask' and 'spatial_shapes' instead of 'image': see
        `preprocess`. Raises UserError for a bad sample if the config says so, or if too many are
        bad.
        """
        first = self._first + index * self._global_batch_size
        positions = range(first, first + self._batch_size)
        batch: Batch = blank_inputs(self._image, self._batch_size)
        captions = []
        for slot, place in enumerate(self._order.places(positions)):
            inputs, caption = self._sample(place, positions[slot])
            _put(batch, slot, inputs)
            captions.append(caption)
        return batch | {"tokens": self._tokenizer(captions, self._context_length)}

    def _sample(self, place: Place, position: int) -> tuple[Inputs, str]:
        source = self._sources[place.source]
        row = place.row
        for attempt in range(_MAX_REPLACEMENTS + 1):
            # A stream for each position: a sample's crop depends on nothing else in the run.
            rng = np.random.default_rng([self._seed, position, attempt])
            if attempt:
                row = int(rng.integers(len(source)))
            try:
                return self._load(source[row], place.source, rng)
            except (ValueError, OSError) as error:
                if self._config.on_bad_sample == "fail":
                    raise UserError(
                        f"bad sample in data source '{place.source}': {source.locate(row)}: "
                        f"{error}; mend it, or set data.on_bad_sample to 'skip'"
                    ) from None
                last_error = error
                self._warn(place.source, source.locate(row), error)
        raise UserError(
            f"{_MAX_REPLACEMENTS + 1} samples in a row of data source '{place.source}' are bad, "
            f"the last: {source.locate(row)}: {last_error}; check the tars"
        )

    def _load(
        self, record: Record, source_name: str, rng: np.random.Generator
    ) -> tuple[Inputs, str]:
        config = self._config
        caption = record.captions[_caption(config.sources[source_name], len(record.captions), rng)]
        inputs = training_inputs(record.image, self._image, config.framing, config.augment, rng)
        return inputs, caption

    def _warn(self, source_name: str, sample: str, error: Exception) -> None:
        self._num_bad += 1
        if self._num_bad <= _FIRST_WARNINGS:
            logger.warning("bad sample replaced in '%s': %s: %s", source_name, sample, error)
        elif self._num_bad % 1000 == 0 or self._num_bad in (10, 100):
            logger.warning("%d bad samples replaced so far, the last: %s", self._num_bad, sample)


def _put(batch: Batch, slot: int, inputs: Inputs) -> None:
    for name, value in inputs.items():
        batch[name][slot] = value


def _caption(source: SourceConfig, count: int, rng: np.random.Generator) -> int:
    """Which of a sample's captions to take."""
    if source.captions == "first" or count == 1:
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

    def __getitem__(self, index: int) -> Batch:
        """Return {'image': uint8 [b, S, S, 3], 'mask': bool [b], 'index': int32 [b]}.

        For NaFlex, 'patches', 'patch_mask' and 'spatial_shapes' instead of 'image'. With a
        tokenizer also 'tokens': int32 [b, L]. Padding: mask False, index -1, images 0, empty
        captions. Raises UserError for a bad sample: scores without it would not compare.
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
        return batch
