"""What the loop reads: batches, where the run stands in them, and what was bad on the way."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.checkpoint import BadSamplesFile, Workdir
from clip_jax.config import ExperimentConfig, UserError
from clip_jax.data.configured_text import configured_text
from clip_jax.data.order import Positions
from clip_jax.data.pipeline import BatchIterator, training_batches
from clip_jax.data.record import Source
from clip_jax.data.sources import open_source
from clip_jax.data.stream_batches import StreamBatches, local_streams, stream_batches
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.parallel import on_all_processes, values_of_processes

_COUNTS = ("data/bad_", "data/cut_")  # are summed over processes; the other figures are averaged


def open_sources(config: ExperimentConfig, cache: Path) -> dict[str, Source]:
    """The training sources, opened; none where the run streams.

    Raises as `open_source` does, on all processes where one of them cannot open them.
    """
    data = config.data
    if data.streams:
        return {}

    def open_all() -> dict[str, Source]:
        return {
            name: open_source(
                source, cache, retries=data.read_retries, on_bad_sample=data.on_bad_sample
            )
            for name, source in data.sources.items()
        }

    return on_all_processes(open_all)


def describe_sources(config: ExperimentConfig, sources: Mapping[str, Source]) -> str:
    """How much there is to read, in words."""
    if config.data.streams:
        count = len(config.data.sources)
        plural = "s" if count > 1 else ""
        return f"{count} source{plural} in {config.data.stream.num_streams} streams"
    return f"{sum(map(len, sources.values())):,} samples"


class TrainingInput:
    """This process's training batches, endlessly, from a position on; close it to end its threads.

    saved: what `position` returned at the checkpoint that the run goes on from; {}: it begins.
    quarantine: ranges of the order that are passed over beside those of the config.
    workdir: JSON lines of the samples that were bad are appended to a file of it.

    Raises UserError where the sources hold other samples than when the run was saved or than on
    other processes, and as `training_batches` and `stream_batches` do: on all processes, which make
    it together.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        sources: Mapping[str, Source],
        tokenizer: Tokenizer,
        *,
        first_sample: int,
        saved: Mapping[str, Any],
        quarantine: tuple[tuple[int, int], ...] = (),
        workdir: Workdir,
        allow_config_change: bool = False,
    ) -> None:
        ranges = (*config.data.skipped_ranges, *quarantine)
        if config.data.streams:  # each stream passes over as many: batches stay rows of all
            num = config.data.stream.num_streams
            ranges = tuple((first // num * num, -(-end // num) * num) for first, end in ranges)
        data = dataclasses.replace(config.data, skipped_ranges=ranges)
        config = dataclasses.replace(config, data=data)
        self._num_samples = {name: len(source) for name, source in sources.items()}
        self._batch_size = config.global_batch_size
        self._places = Positions(ranges)
        # By its place: ranges that came in since then may lie before it.
        self._consumed = first_sample
        if "place" in saved:
            self._consumed = self._places.consumed_before(saved["place"])
        self._first = self._consumed

        def open_batches() -> BatchIterator | StreamBatches:
            if not allow_config_change:
                _check_same(self._num_samples, saved.get("num_samples", {}))
            text = configured_text(config, sources, tokenizer)
            return _batches(config, sources, text, start=self._consumed, saved=saved)

        self._batches = on_all_processes(open_batches)
        self._bad_samples = BadSamplesFile(
            workdir.bad_samples(jax.process_index()), self.place, config.logging.upload_seconds
        )
        _check_same_everywhere(self._batches, self._num_samples)

    @property
    def place(self) -> int:
        """Where the next sample stands in the order."""
        return int(self._places(np.array([self._consumed]))[0])

    def places(self, first: int, end: int) -> tuple[int, int]:
        """A range of the samples that this object gave, counted from its first, in the order."""
        start, last = self._places(self._first + np.array([first, end - 1])).tolist()
        return start, last + 1

    def __next__(self) -> dict[str, np.ndarray]:
        """This process's share of the next batch. What was bad in it is written down."""
        try:
            batch = next(self._batches)
        finally:  # what ends a run has to be found there too
            self._bad_samples.write(self._batches.drain_bad_samples())
        self._consumed += self._batch_size
        return batch

    def position(self) -> dict[str, Any]:
        """What a checkpoint has to keep, beside the samples seen, for a run to go on from here.

        A collective where sources stream: all processes call it after the same batch.
        """
        position: dict[str, Any] = {"place": self.place}
        if not isinstance(self._batches, StreamBatches):
            return position | {"num_samples": self._num_samples}
        states = self._batches.states()
        if jax.process_count() > 1:
            # As pairs of 32 bits: JAX would cut off the upper half of an int64.
            halves = multihost_utils.process_allgather(states.view(np.int32))
            states = np.ascontiguousarray(halves.reshape(-1, halves.shape[-1])).view(np.int64)
        return position | {"streams": states.tolist()}

    def figures(self) -> dict[str, float]:
        """Times and counts since the last call, over all processes: a collective."""
        figures = self._batches.stats()
        if jax.process_count() == 1:
            return figures
        values = np.array(list(figures.values()), np.float32)
        values_PN = multihost_utils.process_allgather(values)
        sums = dict(zip(figures, values_PN.sum(axis=0).tolist(), strict=True))
        return {
            name: value if name.startswith(_COUNTS) else value / jax.process_count()
            for name, value in sums.items()
        }

    def flush(self) -> None:
        """Uploads what a bucket has not got yet of the list of bad samples."""
        self._bad_samples.flush()

    def close(self) -> None:
        self._batches.close()
        self._bad_samples.close()


def _batches(
    config: ExperimentConfig,
    sources: Mapping[str, Source],
    text: PaddedText | PackedText,
    *,
    start: int,
    saved: Mapping[str, Any],
) -> BatchIterator | StreamBatches:
    """This process's batches after `start` samples of the run."""
    run: dict[str, Any] = {
        "image": config.model.image,
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "start_sample": start,
    }
    if not config.data.streams:
        num_samples = config.num_steps * config.global_batch_size
        return training_batches(config.data, sources, text, num_samples=num_samples, **run)
    states = saved.get("streams")
    if states is not None:
        mine = local_streams(len(states), jax.process_index(), jax.process_count())
        states = np.array(states, np.int64)[mine.start : mine.stop]
    return stream_batches(config.data, text, states=states, **run)


def _check_same_everywhere(
    batches: BatchIterator | StreamBatches, num_samples: Mapping[str, int]
) -> None:
    """Raises UserError, on all processes, where they would not draw from the same samples."""
    if isinstance(batches, StreamBatches):
        what, here = "lists of tars", batches.fingerprint
    else:
        spelled = json.dumps(sorted(num_samples.items()))
        what, here = f"numbers of samples (here {spelled})", zlib.crc32(spelled.encode())
    values = values_of_processes(here)
    for process, value in enumerate(values):
        if value != values[0]:
            batches.close()
            raise UserError(
                f"processes 0 and {process} see different data: their sources have other {what}; "
                "give all hosts the same files"
            )


def _check_same(now: Mapping[str, int], saved: Mapping[str, int]) -> None:
    """Raises UserError where a source has grown or shrunk: its samples would stand elsewhere."""
    for name in now.keys() & saved.keys():
        if now[name] != saved[name]:
            raise UserError(
                f"data source '{name}' has {now[name]:,} samples and had {saved[name]:,} when this "
                "run was saved: another order, in which samples come twice or never; give it the "
                "files of then, or go on all the same with --allow_config_change"
            )
