"""How fast a recipe's input pipeline is: each stage alone, and all of it as a run uses it."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.config.errors import UserError
from clip_jax.config.schema import ExperimentConfig
from clip_jax.data.host_batches import TextInputs, sample_order
from clip_jax.data.order import Positions
from clip_jax.data.pipeline import BatchIterator, training_batches
from clip_jax.data.preprocess import blank_inputs, training_inputs
from clip_jax.data.record import Source
from clip_jax.data.report import STAGES
from clip_jax.data.sample_random import SampleRandom
from clip_jax.data.stream_batches import StreamBatches, stream_batches

_CHUNK = 64  # samples that go through a stage together, where it is timed alone
_BATCH = 256  # samples of a batch end to end: a batch is made by one thread, whatever its size
_WAITING = 1.5  # wall time / processor time of reading, above which storage is waited for
_HELD_UP = 0.7  # of the rate that the stages alone promise: below it threads hold each other up


@dataclass
class StageTime:
    """Seconds of one thread for all samples."""

    wall: float = 0.0
    processor: float = 0.0


@dataclass(frozen=True)
class StagesAlone:
    """What each stage takes where one thread does one after the other."""

    num_samples: int
    num_bad: int  # were left out
    stages: dict[str, StageTime]

    @property
    def processor_ms(self) -> float:
        """Milliseconds of a core per sample."""
        total = sum(stage.processor for stage in self.stages.values())
        return 1000 * total / self.num_samples

    @property
    def wall_ms(self) -> float:
        """Milliseconds of a thread per sample, waiting for storage included."""
        return 1000 * sum(stage.wall for stage in self.stages.values()) / self.num_samples


@dataclass(frozen=True)
class EndToEnd:
    """What a run would get, as fast as it can take it."""

    num_samples: int
    seconds: float
    batch_size: int
    figures: dict[str, float]  # `BatchIterator.stats`: milliseconds of a thread, counts

    @property
    def samples_per_second(self) -> float:
        return self.num_samples / self.seconds


def time_stages(
    config: ExperimentConfig,
    sources: Mapping[str, Source],
    text: TextInputs,
    *,
    seconds: float,
) -> StagesAlone:
    """Take the first samples of the run through one stage after the other, in this thread.

    Raises UserError where all samples are bad.
    """
    data, image = config.data, config.model.image
    group = data.packing.group_size or 1
    size = -(-_CHUNK // group) * group
    order, places_of = sample_order(data, sources, config.seed), Positions(data.skipped_ranges)
    random = SampleRandom(config.seed)
    stages = {stage: StageTime() for stage in STAGES}
    num_samples = num_bad = 0
    started = time.perf_counter()
    for first in itertools.count(0, size):
        with _timed(stages["batch"]):
            positions = places_of(np.arange(first, first + size))
            places = order.places(positions)
            batch = blank_inputs(image, size)
        records = []
        with _timed(stages["read"]):
            for place in places:
                try:
                    records.append(sources[place.source][place.row])
                except UserError:
                    raise
                except (ValueError, OSError):
                    num_bad += 1
        captions = []
        for slot, record in enumerate(records):
            with _timed(stages["batch"]):
                rng = random.at(first + slot)
            try:
                with _timed(stages["decode"]):
                    inputs = training_inputs(
                        record.image, image, data.framing, data.augment, rng, decode=data.decode
                    )
            except (ValueError, OSError):
                num_bad += 1
                continue
            with _timed(stages["batch"]):
                for name, value in inputs.items():
                    batch[name][slot] = value
            captions.append(record.captions[slot % len(record.captions)])
        whole_groups = captions[: len(captions) // group * group]
        with _timed(stages["tokenize"]):
            if whole_groups:
                text(whole_groups)
        num_samples += len(captions)
        if time.perf_counter() - started > seconds:
            break
    if not num_samples:
        raise UserError(
            f"the first {num_bad} samples of the run are all bad; see clip-jax data check"
        )
    return StagesAlone(num_samples, num_bad, stages)


def time_end_to_end(
    config: ExperimentConfig,
    sources: Mapping[str, Source],
    text: TextInputs,
    *,
    seconds: float,
    num_batches: int | None = None,
    progress: Callable[[float], None] = lambda rate: None,
) -> EndToEnd:
    """Take batches with the threads and workers of the config, nothing done with them.

    The batches of the start and those that were made ahead meanwhile are not counted. seconds: of
    the rest, unless `num_batches` are said. progress: called with the samples/s so far.

    Raises UserError as `training_batches` does.
    """
    data = config.data
    run: dict[str, Any] = {
        "image": config.model.image,
        "seed": config.seed,
        "start_sample": 0,
        "process_index": 0,
        "process_count": 1,
    }
    batches: BatchIterator | StreamBatches
    if data.streams:
        size = config.global_batch_size
        batches = stream_batches(data, text, states=None, global_batch_size=size, **run)
    else:
        group = data.packing.group_size or 1
        size = min(config.global_batch_size, -(-_BATCH // group) * group)
        batches = training_batches(data, sources, text, global_batch_size=size, **run)
    parallel = max(1, data.num_workers)
    with batches:
        for _ in range(parallel * (1 + data.prefetch_batches)):
            next(batches)
        batches.stats()
        started, taken = time.perf_counter(), 0
        while True:
            next(batches)
            taken += 1
            elapsed = time.perf_counter() - started
            progress(taken * size / elapsed)
            if taken == num_batches or (num_batches is None and elapsed >= seconds):
                break
        figures = batches.stats()
    return EndToEnd(taken * size, elapsed, size, figures)


def table(
    config: ExperimentConfig, alone: StagesAlone | None, whole: EndToEnd, target: float | None
) -> str:
    """The figures and what follows from them. alone: None where sources stream."""
    data = config.data
    lines = []
    if alone is not None:
        lines += [
            f"one thread, {alone.num_samples:,} samples, {alone.num_bad:,} bad",
            *_stage_lines(alone, target),
            "",
        ]
    workers = f"{data.num_workers} worker processes with " if data.num_workers else ""
    lines.append(
        f"end to end, {workers}{data.num_threads} threads{' each' * bool(workers)}, "
        f"{_num_cores()} cores: {whole.samples_per_second:,.0f} samples/s "
        f"({whole.num_samples:,} samples in batches of {whole.batch_size:,})"
    )
    times = ", ".join(f"{stage} {whole.figures[f'data/{stage}_ms']:.3f}" for stage in STAGES)
    lines.append(f"  ms of a thread per sample: {times}")
    counts = [
        f"{name.removeprefix('data/').replace('_', ' ')} {value:,.0f}"
        for name, value in whole.figures.items()
        if value and not name.endswith("_ms")
    ]
    lines += [f"  {', '.join(counts) or 'no bad samples'}", ""]
    if alone is not None:
        lines += [f"- {line}" for line in advice(config, alone, whole, target)]
    return "\n".join(lines).rstrip() + "\n"


def _stage_lines(alone: StagesAlone, target: float | None) -> list[str]:
    seconds = {
        name: (stage.wall / alone.num_samples, stage.processor / alone.num_samples)
        for name, stage in alone.stages.items()
    }
    seconds["all"] = (alone.wall_ms / 1000, alone.processor_ms / 1000)
    last = "share" if target is None else f"cores at {target:,.0f}/s"
    rows = [("stage", "ms/sample", "core ms/sample", "samples/s/core", last)]
    for name, (wall, core) in seconds.items():
        share = 1000 * core / alone.processor_ms
        last = f"{share:.1%}" if target is None else f"{target * core:,.2f}"
        rate = f"{1 / core:,.0f}" if core else "-"
        rows.append((name, f"{1000 * wall:.3f}", f"{1000 * core:.3f}", rate, last))
    return [f"{a:10} {b:>10} {c:>16} {d:>16} {e:>20}" for a, b, c, d, e in rows]


def advice(
    config: ExperimentConfig, alone: StagesAlone, whole: EndToEnd, target: float | None
) -> list[str]:
    """Which stage limits the rate, and what it takes to reach `target` samples/s."""
    data, cores = config.data, _num_cores()
    slowest, longest = max(alone.stages.items(), key=lambda item: item[1].wall)
    read = alone.stages["read"]
    waits = slowest == "read" and read.wall > _WAITING * read.processor
    share = 1000 * longest.wall / alone.num_samples / alone.wall_ms
    what = "waiting for storage" if waits else slowest
    lines = [f"{what} limits: {share:.0%} of the time that a thread takes for a sample"]
    threads = data.num_threads * max(1, data.num_workers)
    promised = min(1000 * threads / alone.wall_ms, 1000 * cores / alone.processor_ms)
    if whole.samples_per_second < _HELD_UP * promised:
        remedy = "" if data.num_workers else "; if not, try data.num_workers"
        lines.append(
            f"{threads} threads on {cores} cores promise {promised:,.0f} samples/s: is the machine "
            f"busy otherwise?{remedy}"
        )
    elif waits:
        lines.append("more data.num_threads wait for more samples at a time")
    elif threads < cores:
        lines.append(f"{threads} threads leave cores idle; there are {cores}")
    if target is not None:
        needed_cores = math.ceil(target * alone.processor_ms / 1000)
        needed_threads = math.ceil(target * alone.wall_ms / 1000)
        lines.append(
            f"{target:,.0f} samples/s take {needed_cores:,} cores and {needed_threads:,} threads, "
            "on all hosts together"
        )
    return lines


def _num_cores() -> int:
    return os.cpu_count() or 1


@contextmanager
def _timed(stage: StageTime) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        stage.wall += time.perf_counter() - wall
        stage.processor += time.process_time() - processor
